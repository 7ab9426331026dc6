"""What a batch over many GPUs costs each of them, by a model: bytes on the wire, products, memory, time.

With W processes of n = N / W rows each, features of D numbers of b bytes, and a block of n x N products (2 n N D flops)
per process:

    strategy                    blocks fwd + bwd   bytes a process sends                        holds at its peak
    gather                      1 + 3              2 (W - 1) n D b + vectors                    3 N D b
    ring                        1 + 3              (W - 1) n D 2 b + W n D 4 + vectors          2 n D (b + 4)
    open_clip                   2 + 4              4 (W - 1) n D b                              4 N D b + n N (2 b + 12)
    inf-cl's ring               2 x (1 + 4)        2 x ((W - 1) + 2 W) n D 4                    4 n D 4

open_clip is ``local_loss`` with ``gather_with_grad``: both matrices gathered, logits of both directions, their
log-softmax in float32 and one gradient of them. inf-cl is counted from its source (1.2.1): one direction at a time, two
for a symmetric loss, float32 features, tf32 products at half the half-precision rate. A ring sends while products are
computed; a gather does not.
"""

from __future__ import annotations

from typing import NamedTuple

VECTORS = 8  # bytes of a statistic, and of its gradient; an all-reduce sends 4 for each


class Machine(NamedTuple):
    """What the model assumes about one GPU."""

    flops: float  # FLOP/s of half-precision products, as measured
    bandwidth: float  # bytes a second that one process sends, all links together
    memory: float  # bytes that are left for the loss


class Cost(NamedTuple):
    """What forward and backward cost one process."""

    strategy: str
    flops: float
    sent: float  # bytes
    memory: float  # bytes at the peak, besides its own features and their gradients
    seconds: float
    fits: bool


def costs(batch: int, dim: int, world: int, itemsize: int, machine: Machine) -> list[Cost]:
    """Each strategy's cost for a batch of N = ``batch`` rows in all processes together."""
    n = batch / world
    block = 2.0 * n * batch * dim
    own = n * dim  # numbers in a process's features
    others = world - 1
    vectors = gather_vectors(batch, world)

    def cost(strategy: str, blocks: float, sent: float, memory: float, overlaps: bool, rate: float = 1.0) -> Cost:
        products, wire = blocks * block / (rate * machine.flops), sent / machine.bandwidth
        seconds = max(products, wire) if overlaps else products + wire
        return Cost(strategy, blocks * block, sent, memory, seconds, memory <= machine.memory)

    return [
        cost("gather", 4, 2 * others * own * itemsize + vectors, 3 * batch * dim * itemsize, False),
        cost(
            "ring", 4, 2 * others * own * itemsize + world * own * 4 + ring_vectors(batch, world),
            2 * own * (itemsize + 4), True,
        ),
        cost(
            "open_clip", 6, 4 * others * own * itemsize,
            4 * batch * dim * itemsize + n * batch * (2 * itemsize + 12), False,
        ),
        cost("inf-cl, ring", 10, 2 * (others + 2 * world) * own * 4, 16 * own, True, rate=0.5),
    ]  # fmt: skip


def gather_vectors(batch: int, world: int) -> float:
    """Bytes of statistics: two all-reduces of 4 N bytes, and the columns' gradients gathered."""
    share = (world - 1) / world
    return 2 * (2 * 4 * batch * share) + VECTORS * batch * share


def ring_vectors(batch: int, world: int) -> float:
    """Bytes of vectors that travel with the blocks: sums and bias forward; bias, sums and both gradients backward."""
    n = batch / world
    return n * (VECTORS * world + 4 * (world - 1) + (4 + 2 * VECTORS) * (world - 1) + 4 * world)


def choose(found: list[Cost]) -> Cost | None:
    """The faster of "gather" and "ring", among those that fit; None if neither does."""
    ours = [cost for cost in found if cost.strategy in ("gather", "ring") and cost.fits]
    return min(ours, key=lambda cost: cost.seconds, default=None)
