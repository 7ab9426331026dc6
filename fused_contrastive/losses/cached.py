"""The loss of a batch whose encoders do not fit in memory: they run on a chunk of its rows at a time (GradCache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_contrastive.core import checks, compiler, forks
from fused_contrastive.core.modes import refuse_transforms
from fused_contrastive.core.replay import Autocast, Buffers, RandomState

R = TypeVar("R")
Encoder = Callable[..., Tensor | Sequence[Tensor]]
Input = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@compiler.outside("cached runs its encoders again in the backward; compile the encoders and the loss instead")
def cached(
    encoders: Encoder | Sequence[Encoder], inputs: Sequence[Input], loss: Callable[..., R],
    chunk_size: int | Sequence[int],
) -> R:  # fmt: skip
    """The loss of a large batch, with the encoders' activations of one chunk at a time (GradCache).

    The encoders run without a graph on one chunk of rows after another, and ``loss`` is called once with the features
    of all rows. Its backward gives the gradients of the features; then each chunk is encoded again, with a graph, and
    backpropagated. The gradients are those of one pass over the whole batch if a row's features do not depend on the
    other rows. The price is a second forward of the encoders.

    The result is what ``loss`` returns, as a part of the graph: ``loss.backward()``, a ``GradScaler``, a division for
    gradient accumulation and a sum with other losses work as usual. This backward runs the chunks and adds to the
    ``grad`` of the encoders' parameters; a learned temperature gets its gradient by the ordinary graph. Under
    ``torch.no_grad()`` there is no second run.

    The second run of a chunk repeats the first: it has the same autocast and draws the same numbers from torch's
    generators, on every device, so that dropout has the same masks. If an encoder is a module or a module's method, its
    buffers, such as running statistics, change in the first run only. If it is a ``DistributedDataParallel`` or
    contains one, gradients are reduced after its last chunk only.

    Args:
        encoders: a callable for each of ``inputs``, where the same one may occur twice, or one callable for all of
            them. It returns a tensor (N, ...) with a row for each row of its input, or a tuple of such tensors.
        inputs: for each encoder a tensor (N, ...), its argument; a tuple or list of such tensors, its positional
            arguments; or a dict of them, its keyword arguments. N may differ between encoders.
        loss: a function of the encoders' outputs for all rows, in their order.
        chunk_size: how many rows are encoded at a time, or a sequence with one number for each of ``inputs``.

    Source: Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache),
    arXiv:2101.06983.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: inside a transform of torch.func; in the backward, for ``create_graph=True`` and for
            ``torch.autograd.grad`` or ``backward(inputs=...)``, which could not reach the encoders' parameters.
    """
    forks.guard()
    refuse_transforms("cached")
    towers = _towers(encoders, inputs, chunk_size)
    if not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a function of the encoders' outputs")
    start = torch.empty(0, device="cpu", requires_grad=True)  # makes the features a part of the graph
    tensors = [tensor for tower in towers for tensor in tower.tensors]
    features = _Encode.apply(towers, start, *tensors)  # type: ignore[no-untyped-call]
    parts = zip(towers, _parts(features, [tower.outputs for tower in towers]), strict=True)
    return loss(*(part[0] if tower.single else tuple(part) for tower, part in parts))


def _towers(encoders: Any, inputs: Any, chunk_size: Any) -> list[_Tower]:
    if not isinstance(inputs, (tuple, list)):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a tuple or list with the input of each encoder")
    if not inputs:
        raise ValueError("inputs: got none, expected the input of each encoder")
    several = isinstance(encoders, (tuple, list, nn.ModuleList))
    each_encoder = list(encoders) if several else [encoders] * len(inputs)
    if len(each_encoder) != len(inputs):
        raise ValueError(f"inputs: got {len(inputs)} for {len(each_encoder)} encoders, expected one for each encoder")
    for k, encoder in enumerate(each_encoder):
        if not callable(encoder):
            name = f"encoders[{k}]" if several else "encoders"
            raise TypeError(f"{name}: got {type(encoder).__name__}, expected a module or another callable")
    if isinstance(chunk_size, Sequence):
        checks.counts("chunk_size", chunk_size)
        if len(chunk_size) != len(inputs):
            raise ValueError(f"chunk_size: got {len(chunk_size)} for {len(inputs)} inputs, expected one for each input")
    else:
        checks.at_least_1("chunk_size", chunk_size)
        chunk_size = [chunk_size] * len(inputs)
    parts = zip(each_encoder, inputs, chunk_size, strict=True)
    return [_Tower(place, *part) for place, part in enumerate(parts)]


class _Tower:
    """An encoder, its input, and what the first run over its chunks leaves for the second."""

    def __init__(self, place: int, encoder: Encoder, given: Input, chunk_size: int) -> None:
        self.name, self.encoder, self.chunk_size = f"encoders[{place}]", encoder, chunk_size
        self.keys = list(given) if isinstance(given, Mapping) else None
        self.tensors = _tensors(f"inputs[{place}]", given)
        owner = getattr(encoder, "__self__", encoder)  # of a method
        modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
        self.replicas = [module for module in modules if isinstance(module, DistributedDataParallel)]
        self.buffers = list(owner.buffers()) if isinstance(owner, nn.Module) else []

    def chunks(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(tensor.split(self.chunk_size) for tensor in rows), strict=True)

    def encode(self, chunk: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self.keys is None:
            output: Any = self.encoder(*chunk)
        else:
            output = self.encoder(**dict(zip(self.keys, chunk, strict=True)))
        self.single = isinstance(output, Tensor)
        outputs = (output,) if self.single else output
        if not isinstance(outputs, (tuple, list)) or not outputs or not all(isinstance(t, Tensor) for t in outputs):
            raise TypeError(f"{self.name}: got {type(output).__name__}, expected it to return a tensor or several")
        for each in outputs:
            if each.dim() == 0 or len(each) != len(chunk[0]):
                raise ValueError(
                    f"{self.name}: got an output of shape {tuple(each.shape)} for {len(chunk[0])} rows of input, "
                    "expected as many rows"
                )
        return tuple(outputs)

    def first_run(self) -> list[Tensor]:
        """The outputs for all rows."""
        self.buffers_before, self.random_states = Buffers(self.buffers), []
        parts: list[tuple[Tensor, ...]] = []
        for chunk in self.chunks(self.tensors):
            self.random_states.append(RandomState())
            parts.append(self.encode(chunk))
            first, last = ([(tuple(t.shape[1:]), t.dtype) for t in part] for part in (parts[0], parts[-1]))
            if first != last:
                raise ValueError(
                    f"{self.name}: got outputs with {last} after outputs with {first}, expected the same shape of a "
                    "row and the same dtype for every chunk"
                )
        self.outputs = len(parts[0])
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def second_run(
        self, rows: list[Tensor], asked: list[bool], upstream: list[Tensor | None], autocast: Autocast,
        reduced: list[DistributedDataParallel],
    ) -> list[Tensor | None]:  # fmt: skip
        """Backpropagates the gradients of the outputs, ``upstream``, and returns those of the inputs that are asked.

        ``reduced``: the replicas that have their last chunk here, after which their gradients are reduced.
        """
        places = [k for k, gradient in enumerate(upstream) if gradient is not None]
        if not places:
            return [None] * len(rows)
        self.buffers_before.restore()
        chunks = zip(self.chunks(rows), self.chunks([g for g in upstream if g is not None]), strict=True)
        found: list[list[Tensor]] = []
        for k, (chunk, gradients) in enumerate(chunks):
            leaves = [t.detach().requires_grad_(needed) for t, needed in zip(chunk, asked, strict=True)]
            last = k == len(self.random_states) - 1
            with ExitStack() as stack:
                for replica in self.replicas:
                    # A static graph is recorded in the first backward of all, which must be reduced.
                    starts = replica.static_graph and not replica._static_graph_delay_allreduce_enqueued
                    if not (starts or (last and replica in reduced)):
                        stack.enter_context(replica.no_sync())
                self.random_states[k].restore()
                with torch.enable_grad(), autocast.again():
                    outputs = self.encode(leaves)
                pairs = zip((outputs[place] for place in places), gradients, strict=True)
                learned = [(output, gradient) for output, gradient in pairs if output.requires_grad]
                if learned:
                    torch.autograd.backward([t for t, _ in learned], [gradient for _, gradient in learned])
            found.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t.requires_grad])
        of_asked = iter([torch.cat(each) for each in zip(*found, strict=True)])
        return [next(of_asked) if needed else None for needed in asked]


def _parts(values: Sequence[Any], sizes: list[int]) -> list[list[Any]]:
    rest = iter(values)
    return [list(islice(rest, size)) for size in sizes]


def _tensors(name: str, given: Any) -> list[Tensor]:
    """The tensors of an input, which have equally many rows."""
    if isinstance(given, Tensor):
        named = {name: given}
    elif isinstance(given, (tuple, list, Mapping)):
        items = given.items() if isinstance(given, Mapping) else enumerate(given)
        named = {f"{name}[{key!r}]": value for key, value in items}
    else:
        raise TypeError(f"{name}: got {type(given).__name__}, expected a tensor, or a tuple, list or dict of tensors")
    if not named:
        raise ValueError(f"{name}: got none, expected at least one tensor")
    (first_name, first), *_ = named.items()
    for each, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{each}: got {type(value).__name__}, expected a tensor; bind other arguments by a lambda")
        if value.dim() == 0:
            raise ValueError(f"{each}: got shape (), expected at least one dimension, the first of which is of rows")
        checks.same_rows(first_name, first, each, value)
    return list(named.values())


class _Encode(torch.autograd.Function):
    """The features of all towers. In the backward, each chunk is encoded again and backpropagated."""

    @staticmethod
    def forward(ctx: Any, towers: list[_Tower], _: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.towers, ctx.autocast = towers, Autocast()
        features = [each for tower in towers for each in tower.first_run()]
        torch.clear_autocast_cache()  # weights that were cast without a graph would get no gradient
        return tuple(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("cached: got a backward with create_graph=True, expected one without")
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "cached: got torch.autograd.grad() or backward(inputs=...), expected backward() without inputs, which "
                "adds to the grad of the encoders' parameters"
            )
        towers: list[_Tower] = ctx.towers
        counts = [len(tower.tensors) for tower in towers]
        rows, asked = _parts(ctx.saved_tensors, counts), _parts(ctx.needs_input_grad[2:], counts)
        upstream = _parts(gradients, [tower.outputs for tower in towers])
        learning = [tower for tower, own in zip(towers, upstream, strict=True) if any(g is not None for g in own)]
        last = {replica: tower for tower in learning for replica in tower.replicas}
        random_state, buffers = RandomState(), Buffers([b for tower in towers for b in tower.buffers])
        of_inputs: list[Tensor | None] = []
        try:
            for tower, its_rows, its_asked, its_upstream in zip(towers, rows, asked, upstream, strict=True):
                reduced = [replica for replica in tower.replicas if last.get(replica) is tower]
                of_inputs += tower.second_run(its_rows, its_asked, its_upstream, ctx.autocast, reduced)
        finally:
            random_state.restore()
            buffers.restore()
        return (None, None, *of_inputs)
