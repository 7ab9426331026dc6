"""``monitor``: measures a training's own calls of the losses now and then, and warns of what keeps it from learning."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_contrastive.core import checks, hints, observing, warn
from fused_contrastive.core.modes import is_plain
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.evaluation.live import HARDEST, Call, described, measured

COLLAPSED = 1e-3  # mean of 1 - cosine over all pairs of rows
STUCK = 0.02  # how near the loss is to that of equal logits, relatively
LARGEST_SCALE, LARGEST_SIGMOID_SCALE = 100, 200  # CLIP's limit; SigLIP learns up to 120
ROUNDING = 1.01  # of a scale in bfloat16
# In how many checks in a row a cause must be found. Encoders may begin with features that are nearly alike.
PATIENCE = {"nan": 1, "zero": 1, "collapse": 2, "stuck": 10, "duplicates": 1, "scale": 1}
LOGGED = (
    "loss", "temperature", "top1", "hardest_share", "alignment", "uniformity", "duplicates", "duplicates_floor",
    "nan_rows", "zero_rows", "spread",
)  # fmt: skip


class monitor(observing.Observing):  # noqa: N801
    """Measures one in ``every`` calls of each loss in this block, and warns of faults of the training.

    ::

        with fused_contrastive.monitor(every=100, log=wandb.log) as m:
            train()
        print(m)

    A call is measured on its own tensors, which stay as they are, like the training's random state. Each fault is
    warned of once for each loss, with what it means and what to try; without a fault nothing is printed:

    - rows with NaN or infinite numbers, rows of zeros;
    - collapse: all rows are nearly alike, in two checks in a row;
    - a loss within 2% of log N, the loss of equal logits, in ten checks in a row;
    - duplicates: negatives that equal the positive, so that the loss cannot fall below a floor;
    - a logit scale that is not above 0, or with features of norm 1 below 1 or above 100 (200 for SigLIP).

    NaN, zeros and collapse are looked for in all rows. All other measures are of a block of at most 128 rows, and of at
    most 2^20 pairs, against all columns; the next check takes the next block. Over a group, each process measures its
    own rows against its own columns, and nothing is exchanged. Margins and guides that leave out negatives are not
    applied, and ``filip_loss`` and other losses of tokens are counted, but not measured.

    Calls are those of the block's own thread, as in ``verify_against_reference``; both blocks may be open at once.

    Args:
        every: the first call of each loss is measured, and each ``every``-th after it. If a step calls the same loss
            several times, an ``every`` without a common divisor with that number measures each of them in turn.
        log: called at each check with a dict of floats, such as ``wandb.log``. Its keys are the loss's name, "/" and
            one of: "loss"; "temperature" (1 / scale); "top1", the share of rows whose positive has a larger logit than
            every negative; "hardest_share", the weight of the 10 hardest negatives in a row's gradient, as in
            ``diagnose``; "alignment" and "uniformity" (Wang & Isola 2020, arXiv:2005.10242) of normalised features;
            "duplicates", the share of rows with a negative that equals the positive, and "duplicates_floor", below
            which the loss cannot fall; "nan_rows" and "zero_rows", counts; "spread", the mean of 1 - cosine over all
            pairs of rows of one argument, the smallest.
        compiled: observe losses inside of functions of ``torch.compile``, too. Their graphs break there, which raises
            with ``fullgraph=True``. By default such losses run as if there were no monitor.

    Attributes:
        calls: how many calls there were.
        checked: how many of them were measured.
        measures: by loss, the last dict of floats that ``log`` gets.
        warnings: by loss and cause, the warnings given.

    Warns:
        UserWarning: once for each loss and cause; and at the end of a block that saw no call.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self, every: int = 100, log: Callable[[dict[str, float]], object] | None = None, *, compiled: bool = False
    ) -> None:
        super().__init__()
        checks.at_least_1("every", every)
        if log is not None and not callable(log):
            raise TypeError(f"log: got {log!r}, expected a function of a dict of floats, or None")
        checks.boolean("compiled", compiled)
        self.every, self.log, self.compiled = every, log, compiled
        self.checked = 0
        self.measures: dict[str, dict[str, float]] = {}
        self.warnings: dict[tuple[str, str], str] = {}
        self._calls: Counter[str] = Counter()  # by loss
        self._in_a_row: Counter[tuple[str, str]] = Counter()  # checks in a row that found this, by loss and cause

    @property
    def calls(self) -> int:
        return self._calls.total()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if not self.calls and error is None:
            warn.at_caller(
                "monitor: saw no call of a loss in this block. Losses in other threads are not observed, nor those in "
                "functions of torch.compile unless compiled=True."
            )

    def __str__(self) -> str:
        lines = [f"{self.calls} calls, {self.checked} measured, {len(self.warnings)} warnings"]
        for name, found in self.measures.items():
            shown = (f"{key} {found[f'{name}/{key}']:.4g}" for key in LOGGED)
            lines.append(f"{name}: {', '.join(shown)}")
        return "\n".join([*lines, *self.warnings.values()])

    def _observe(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        result = observing.call(function, args, options)
        name = function.__name__
        with self._lock:
            self._calls[name] += 1
            number = self._calls[name]
        if (number - 1) % self.every == 0:
            # Between the graphs of a compiled function, torch.compile would trace what is called here.
            check = torch.compiler.disable(self._check) if self.compiled else self._check
            check(number, function, args, options, result)
        return result

    def _check(
        self, number: int, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], result: Any
    ) -> None:
        bound = inspect.signature(function).bind(*args, **options)
        bound.apply_defaults()
        given, name = bound.arguments, function.__name__
        if not _readable(*given.values(), *given.get("views", ())):
            return
        group = given["group"]
        processes = 1 if group is None else dist.get_world_size(GlobalBatch.of(group).group)
        with torch.no_grad():
            call = described(name, given, processes)
            if call is None:
                return
            loss = result[0] if isinstance(result, tuple) else result  # a tuple has further results
            loss = loss / (processes * len(call.directions[0].rows)) if given.get("reduction") == "sum" else loss
            found = measured(call, loss, (number - 1) // self.every)
        causes = dict(_causes(name, call, found, given))
        told = []
        with self._lock:
            self.checked += 1
            for cause, patience in PATIENCE.items():
                self._in_a_row[name, cause] = self._in_a_row[name, cause] + 1 if cause in causes else 0
                if self._in_a_row[name, cause] >= patience and (name, cause) not in self.warnings:
                    self.warnings[name, cause] = f"{name}, call {number}: {causes[cause]}"
                    told.append(self.warnings[name, cause])
            self.measures[name] = measures = _measures(name, found)
        if self.log is not None:
            self.log(dict(measures))
        for text in told:
            warn.at_caller(text)


def _readable(*values: Any) -> bool:
    """Whether a call is plain, and its tensors can be read: not while a CUDA graph is captured."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    capturing = any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()
    return is_plain(*tensors) and not capturing


def _measures(name: str, found: dict[str, dict[str, float]]) -> dict[str, float]:
    rows = [of for argument, of in found.items() if argument]
    at = {
        **found[""],
        "temperature": 1 / found[""]["scale"] if found[""]["scale"] else math.inf,
        "nan_rows": sum(of["nan_rows"] for of in rows),
        "zero_rows": sum(of["zero_rows"] for of in rows),
        "spread": min(of["spread"] for of in rows),
    }
    return {f"{name}/{key}": at[key] for key in LOGGED}


def _causes(
    name: str, call: Call, found: dict[str, dict[str, float]], given: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """What is wrong, as (cause, text); no cause that follows from another one."""
    at = found[""]
    known = f"{'the loss of equal logits' if call.sigmoid else 'log N'} = {at['equal_logits']:.4g}"
    sizes = {argument: len(features) for argument, features in call.features.items()}

    def rows(key: str) -> str:
        return ", ".join(f"{a}: {found[a][key]:.0f} of {n} rows" for a, n in sizes.items() if found[a][key])

    if where := rows("nan_rows"):
        text = (
            f"{where} have NaN or infinite numbers, so that the loss and all gradients become NaN. Find the operation "
            "by torch.autograd.set_detect_anomaly(True); try a lower learning rate, clipped gradients, and bfloat16 in "
            "place of float16."
        )
        yield "nan", text
        return
    if where := rows("zero_rows"):
        text = (
            f"{where} are zeros, whose similarity to every row is 0, and to which normalisation passes no gradient. "
            "Look for dead units, empty inputs and padding in the batch."
        )
        yield "zero", text
    if alike := [argument for argument, n in sizes.items() if n > 1 and found[argument]["spread"] < COLLAPSED]:
        text = (
            f"{', '.join(alike)}: all rows are alike (the mean cosine of two is above {1 - COLLAPSED}), so that the "
            f"loss cannot fall below {known}. Look for an encoder that ignores its input; try a lower learning rate or "
            "a longer warm-up, normalisation before the projection, and a smaller temperature, which spreads the rows."
        )
        yield "collapse", text
        return
    if text := _of_scale(call, at["scale"], given, not rows("off_norm")):
        yield "scale", text
    elif call.usual and abs(at["loss"] / at["equal_logits"] - 1) < STUCK:
        text = (
            f"loss stuck at {known}, in {PATIENCE['stuck']} checks in a row: negatives score like the positives, and "
            "nothing is learned. Check that row i of one input belongs to row i of the other (is only one of them "
            "shuffled?), that gradients reach the encoders, and that learning rate and scale are not too small."
        )
        yield "stuck", text
    if at["duplicates_floor"] > 0:
        text = (
            f"{at['duplicates']:.1%} of the rows have a negative that equals their positive: the loss cannot fall "
            f"below {at['duplicates_floor']:.4g} on such batches, and equal items are pushed apart. Give equal items "
            "equal ids (row_ids, col_ids, or labels), or draw batches without repeated items."
        )
        yield "duplicates", text


def _of_scale(call: Call, scale: float, given: dict[str, Any], of_norm_1: bool) -> str:
    """What is wrong with the scale, or nothing."""
    name = "logit_scale" if given["logit_scale"] is not None else "1 / temperature"
    most = LARGEST_SIGMOID_SCALE if call.sigmoid else LARGEST_SCALE
    if not 0 < scale < math.inf:
        return (
            f"{name}: got {scale:.4g}, expected a finite number above 0: with this one, positives are pushed apart, or "
            "the loss is no number. Learn its logarithm, as CLIP does, and pass log_scale.exp()."
        )
    if not (of_norm_1 or call.normalize):
        return ""
    if scale > ROUNDING * most:
        return (
            f"{name}: got {scale:.4g}, expected at most {most} with features of norm 1: nearly all of the gradient is "
            f"of the {HARDEST} hardest negatives or fewer, wrong pairs and duplicates among them. Clamp a learned "
            "scale as CLIP does, log_scale.data.clamp_(max=math.log(100)), and learn it without weight decay."
        )
    hint = hints.hint({}, name, scale)
    return "" if hint is None else hint.text
