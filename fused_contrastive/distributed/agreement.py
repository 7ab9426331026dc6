"""Before anything is exchanged, the processes agree on sizes and options; or all raise the same error.

This takes one all-gather of a few integers. A process whose own input is bad takes part in it and says so, so that no
other waits for it in vain. Later it could not say so, because the others are in other collectives: a function must
refuse what it can before it agrees. If it fails later all the same, out of memory or interrupted, its process refuses
to use the group again, because the data of two calls would be mixed up.
"""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_contrastive.core import forks
from fused_contrastive.core.memory import total_memory
from fused_contrastive.core.modes import is_plain, outside_everything, refuse_fake, refuse_transforms
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.distributed.collectives import all_gather_single
from fused_contrastive.distributed.shape import GlobalShape, LocalShape, Shape

P = ParamSpec("P")
R = TypeVar("R")

# Groups in which this process has left a call that the others still wait in, with the reason.
_left: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()

GATHER_SHARE = 8  # "auto" gathers while columns and their gradient take at most memory divided by this


class Alone:
    """A call without a group. ``Call`` has the same functions."""

    spread = False  # whether rows and columns are spread over processes, so that one of them may have none

    def agree(
        self, name: str, x: Tensor, y: Tensor, options: dict[str, Any], *inputs: object,
        targets: Tensor | None = None, keys: int | None = None, paired: bool = True,
    ) -> Shape:  # fmt: skip
        return LocalShape(x.shape[0], y.shape[0])


class Call:
    """One call of a loss over a group, in this process: it agrees with the others, or tells them of a failure."""

    spread = True

    def __init__(self, batch: GlobalBatch) -> None:
        if (reason := _left.get(_actual(batch.group))) is not None:
            raise RuntimeError(
                "group: got one in which this process has left an earlier call, for which the others may still wait "
                f"({reason}), expected a new one: destroy_process_group and init_process_group, or new_group"
            )
        self.batch = batch
        self._agreed = self._closed = False

    def agree(
        self, name: str, x: Tensor, y: Tensor, options: dict[str, Any], *inputs: object,
        targets: Tensor | None = None, keys: int | None = None, paired: bool = True,
    ) -> Shape:  # fmt: skip
        """The shape that the processes agree on. Nothing may be refused after it, because the others would wait.

        ``x`` (m, D) and ``y`` (n, D) are this process's rows and columns, or items (m, P, D) and (n, T, D) of tokens;
        ``options`` must be the same everywhere; ``inputs`` are what else may require a gradient or be saved for one.
        ``targets`` count the first ``keys`` columns of each process; without ``paired``, rows have none.
        """
        is_plain(x, y, *inputs)  # raises under torch.jit.trace and for forward-mode tangents
        refuse_fake("group", x, y, *inputs)
        _refuse_inference(name, x, y, *inputs)
        needs = [torch.is_grad_enabled() and isinstance(t, Tensor) and t.requires_grad for t in (x, y, *inputs)]
        described = {
            "D": x.shape[-1],
            "dtype": str(x.dtype),
            "device": x.device.type,
            "requires_grad": needs,
            "exchange": self.batch.exchange,
            "gradients": self.batch.gradients,
            "targets": "given" if targets is not None else None,
            **{key: _plain(value) for key, value in options.items()},
        }
        memory = total_memory(x.device.type, x.device.index)
        keys = len(y) if keys is None else keys
        lowest, highest = 0, -1  # passes the check below: on a GPU, the host would have to wait for the values
        if targets is not None and len(targets) and targets.device.type == "cpu":
            lowest, highest = (int(t) for t in targets.aminmax())
        options_hash = zlib.crc32(repr((name, described)).encode())
        tokens = y.shape[1] if y.dim() == 3 else 0
        headers = self._exchange(0, len(x), len(y), memory, options_hash, keys, lowest, highest, tokens)
        if len({row[4] for row in headers}) > 1:
            self._raise_difference(name, described)
        rank, _ = _place(self.batch.group)
        rows, cols = tuple(row[1] for row in headers), tuple(row[2] for row in headers)
        held = 2 * sum(cols) * x.shape[-1] * x.element_size()
        ring = self.batch.exchange == "ring" or (
            self.batch.exchange == "auto" and held > min(row[3] for row in headers) // GATHER_SHARE
        )
        for what, sizes in (("row", rows), ("column", cols)):
            if not sum(sizes):
                raise ValueError(f"{name}: got no {what} in any of {len(rows)} processes, expected at least one")
        every_key = tuple(row[5] for row in headers)
        columns = sum(every_key)
        if paired and targets is None and sum(rows) > columns:
            raise ValueError(
                f"targets: got None for {sum(rows)} rows and {columns} columns of all processes, expected targets"
            )
        for r, row in enumerate(headers):
            if row[6] < 0 or row[7] >= columns:
                raise ValueError(f"targets: rank {r} has values from {row[6]} to {row[7]}, expected 0 to {columns - 1}")
        longest = max(row[8] for row in headers)
        self._agreed = len(rows) > 1
        return GlobalShape(self.batch, rank, rows, cols, every_key, longest, any(needs), ring)

    def fail(self, error: BaseException) -> None:
        """Tells the others if they wait to agree. If they have agreed, this process must not use the group again."""
        message = f"{type(error).__name__}: {error}"
        if self._agreed:
            _left[_actual(self.batch.group)] = message
        elif not self._closed and isinstance(error, Exception):  # after Ctrl-C, nobody wants to wait for the others
            try:
                with outside_everything():
                    self._exchange(1, 0, 0, 0, 0, 0, 0, -1, 0, message=message)
            except Exception as untold:  # ``error`` is still the one that is raised
                _left[_actual(self.batch.group)] = f"{message}; telling them: {untold}"

    def _exchange(self, failed: int, *values: int, message: str = "") -> list[list[int]]:
        self._closed = True
        group = self.batch.group
        _, world = _place(group)
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
        ours = torch.tensor([failed, *values], dtype=torch.int64, device=device)
        everyone = ours.new_empty(world * len(ours))
        all_gather_single(everyone, ours, group=group)
        headers: list[list[int]] = everyone.view(world, -1).tolist()
        if any(row[0] for row in headers):
            messages: list[Any] = [None] * world
            dist.all_gather_object(messages, message, group=group)
            if not failed:
                refused = "; ".join(f"rank {r}: {text}" for r, text in enumerate(messages) if text)
                raise RuntimeError(f"group: another process's input was refused: {refused}")
        return headers

    def _raise_difference(self, name: str, described: dict[str, Any]) -> None:
        _, world = _place(self.batch.group)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, (name, {k: repr(v) for k, v in described.items()}), group=self.batch.group)
        names = [each for each, _ in everyone]
        if len(set(names)) > 1:
            raise ValueError(f"group: the processes call different losses: {_by_rank(names)}")
        keys = [k for k in everyone[0][1] if len({options.get(k) for _, options in everyone}) > 1]
        text = "; ".join(f"{key}: {_by_rank([options.get(key) for _, options in everyone])}" for key in keys)
        raise ValueError(f"group: the processes of {name} disagree on {text}; expected the same in all")


Group = dist.ProcessGroup | GlobalBatch | None
_ALONE = Alone()


def _actual(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group itself, or the default group for None."""
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return group


def _plain(value: Any) -> Any:
    """One value for equal options such as 0, 0.0 and NumPy's 0, because options are compared as they are printed."""
    if isinstance(value, (tuple, list)):
        return tuple(_plain(each) for each in value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return int(value) if value == value // 1 else float(value)


def _by_rank(values: list[Any]) -> str:
    return ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in the group, and the group's size."""
    return dist.get_rank(group), dist.get_world_size(group)


def _refuse_inference(name: str, *values: object) -> None:
    """Raises if a gradient is needed and a tensor was made in ``torch.inference_mode()``: autograd cannot save it."""
    tensors = [t for t in values if isinstance(t, Tensor)]
    if torch.compiler.is_dynamo_compiling() or not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return
    for k, t in enumerate(tensors):
        if t.is_inference():
            which = ("the features of the rows", "the features of the columns")[k] if k < 2 else "another input"
            raise RuntimeError(
                f"{name}: got {which}, of shape {tuple(t.shape)}, from torch.inference_mode() while a gradient is "
                "asked, expected a tensor from torch.no_grad(), or its clone()"
            )


def collective(function: Callable[P, R]) -> Callable[P, R]:
    """Makes the ``group`` argument of a public function a ``Call``, which the function gets by ``call_of``.

    An error in the function is told to the other processes, so that none waits for this one. The guard against threads
    lost in a fork is here too, because all losses and statistics begin here.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        forks.guard()
        group = options.get("group")
        if group is None:
            return function(*args, **options)
        call = Call(GlobalBatch.of(group))
        options["group"] = call
        try:
            refuse_transforms("group")
            refuse_fake("group")
            return function(*args, **options)
        except BaseException as error:
            call.fail(error)
            raise

    return wrapper


def call_of(group: object) -> Call | Alone:
    """In a ``collective`` function: the call that its ``group`` has become."""
    return group if isinstance(group, Call) else _ALONE
