"""Verification in a training loop: now and then, a step's loss is computed again by the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from fused_contrastive.core import checks, observing, warn
from fused_contrastive.verification.compare import Verification, compare

ON_BREACH = ("warn", "raise")


class verify_against_reference(observing.Observing):  # noqa: N801
    """In this block, every so many calls of this package's losses are checked on their live tensors.

    Calls are those of the block's own thread, and of asyncio's tasks that begin in it, until it ends. Other threads'
    losses are not checked; each thread may enter the same object, which then counts the calls of all of them.
    While a block is active in any thread, the graph of a function of ``torch.compile`` breaks at each loss, which
    raises if it was compiled with ``fullgraph=True``.

    ::

        with fused_contrastive.verify_against_reference(every=100) as check:
            train()
        print(check)

    A checked call computes the loss and its gradients of detached copies three more times: with the same backend, with
    the reference, and with the reference in float64. The training's own graph and random state are left alone.

    Args:
        every: the first call is checked, and each ``every``-th after it.
        on_breach: "warn" or "raise" where an error is larger than allowed.
        save: a folder in which a failing call's tensors are kept, with a script that repeats it.

    Attributes:
        calls: how many calls there were.
        checked: how many of them were checked.
        breaches: how many of those were off by more than allowed.
        worst: the ``Verification`` that used the largest share of what is allowed, or None.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
        RuntimeError: at a breach, with ``on_breach="raise"``.
    """

    def __init__(self, every: int = 100, on_breach: Literal["warn", "raise"] = "warn", save: str | None = None) -> None:
        super().__init__()
        checks.at_least_1("every", every)
        checks.one_of("on_breach", on_breach, ON_BREACH)
        self.every, self.on_breach, self.save = every, on_breach, save
        self.calls = self.checked = self.breaches = 0
        self.worst: Verification | None = None

    def __str__(self) -> str:
        if self.worst is None:
            return f"{self.calls} calls, none checked"
        share = self.worst.worst.share
        return (
            f"{self.calls} calls, {self.checked} checked, {self.breaches} breaches; at worst {share:.2f} of what is "
            f"allowed, by the {self.worst.worst.quantity}"
        )

    def _observe(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        result = observing.call(function, args, options)
        with self._lock:
            self.calls += 1
            call = self.calls
        if (call - 1) % self.every == 0:
            self._check(call, function, args, options)
        return result

    def _check(self, call: int, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found = compare(function, args, options, draws=False, any_threads=True)
        with self._lock:
            self.checked += 1
            self.breaches += not found.held
            if self.worst is None or found.worst.share > self.worst.worst.share:
                self.worst = found
        if found.held:
            return
        message = f"{function.__name__}, call {call}, is not what the reference computes:\n{found}"
        if self.save is not None:
            message += f"\nto repeat: python {self._saved(call, function, args, options)}"
        if self.on_breach == "raise":
            raise RuntimeError(message)
        warn.at_caller(message)

    def _saved(self, call: int, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Path:
        folder = Path(str(self.save))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = folder / f"call_{call}.pt"
        kept = {name: value for name, value in options.items() if name != "group"}
        torch.save((args, kept), tensors)
        script = folder / f"call_{call}.py"
        script.write_text(
            f"import torch\nimport fused_contrastive\n\n"
            f"args, options = torch.load({str(tensors.resolve())!r}, weights_only=False)\n"
            f"print(fused_contrastive.verify(fused_contrastive.{function.__name__}, *args, **options))\n",
            encoding="utf-8",
        )
        return script
