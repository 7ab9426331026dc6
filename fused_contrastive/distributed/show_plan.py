"""``python -m fused_contrastive plan``: the model's figures as a table, and which of our strategies is the fastest."""

from __future__ import annotations

from collections.abc import Sequence

from fused_contrastive.core.terminal import Terminal
from fused_contrastive.distributed.plan import Cost, Machine, choose, costs

COLUMNS = ("batch", "GPUs", "strategy", "PFLOP", "sent, GB", "memory, GB", "ms", "")


def run(
    batches: Sequence[int], worlds: Sequence[int], dim: int, itemsize: int, machine: Machine, markdown: bool,
    terminal: Terminal,
) -> int:  # fmt: skip
    """Prints a row per strategy, for every batch on every number of GPUs.

    Returns the exit status: 1 if for one of them neither "gather" nor "ring" fits, else 0.
    """
    head = (
        f"per GPU, forward + backward, D = {dim}, {itemsize} bytes a feature; assumed: "
        f"{machine.flops / 1e12:g} TFLOP/s, {machine.bandwidth / 1e9:g} GB/s sent, {machine.memory / 1e9:g} GB free"
    )
    rows, short = [], False
    for batch in batches:
        for world in worlds:
            found = costs(batch, dim, world, itemsize, machine)
            best = choose(found)
            short |= best is None
            for cost in found:
                remark = "" if cost.fits else "does not fit"
                rows.append(
                    (f"{batch:,}", f"{world:,}", *_figures(cost), "fastest of ours" if cost is best else remark)
                )
    if markdown:
        terminal.say(head + "\n")
        for row in (COLUMNS, ("---:", "---:", "---", *("---:",) * 4, "---"), *rows):
            terminal.say("| " + " | ".join(row) + " |")
        return int(short)
    terminal.table(head, COLUMNS, rows, right=(0, 1, 3, 4, 5, 6))
    if short:
        terminal.say("some batch fits with neither gather nor ring: use more GPUs", style="red")
    return int(short)


def _figures(cost: Cost) -> tuple[str, ...]:
    return (
        cost.strategy, f"{cost.flops / 1e15:.3g}", f"{cost.sent / 1e9:.3g}", f"{cost.memory / 1e9:.3g}",
        f"{1e3 * cost.seconds:.3g}",
    )  # fmt: skip
