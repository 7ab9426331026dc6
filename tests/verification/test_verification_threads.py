"""A verification observes its own thread or task, and does not change what others compute meanwhile."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.backends import cpp
from fused_contrastive.core import observing
from fused_contrastive.ops import dispatch

X, Y = (F.normalize(torch.randn(16, 8), dim=1) for _ in range(2))


def loss(scale: float = 1.0) -> Tensor:
    return fc.clip_loss(X, Y, scale)


def in_a_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    yield
    assert len(observing._observers) == 0
    assert not observing._observers.anywhere


@pytest.fixture
def switching() -> Iterator[None]:
    """Makes Python switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_blocks_beside_threads_that_compute_losses(switching: None) -> None:
    ended, failed = threading.Event(), []

    def compute() -> None:
        while not ended.is_set():
            try:
                loss()
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with fc.verify_against_reference(every=1000) as check:
                loss()
            assert check.calls == 1
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_another_thread_is_not_observed() -> None:
    with fc.verify_against_reference() as check:
        in_a_thread(loss)
        assert check.calls == 0
        loss()
    assert check.calls == 1


def in_two_threads(x: Tensor, y: Tensor) -> Tensor:
    return fc.clip_loss(x, y, 1.0) + in_a_thread(lambda: fc.clip_loss(x, y, 2.0))


def in_threads_alone(x: Tensor, y: Tensor) -> Tensor:
    return in_a_thread(lambda: fc.clip_loss(x, y, 2.0))


def in_a_copy(x: Tensor, y: Tensor) -> Tensor:
    context = contextvars.copy_context()
    return fc.clip_loss(x, y, 1.0) + in_a_thread(lambda: context.run(fc.clip_loss, x, y, 2.0))


def in_asyncio(x: Tensor, y: Tensor) -> Tensor:
    return fc.clip_loss(x, y, 1.0) + asyncio.run(asyncio.to_thread(fc.clip_loss, x, y, 2.0))


@pytest.mark.parametrize("loss_fn", [in_two_threads, in_threads_alone])
def test_a_loss_in_a_thread_of_its_own_is_not_taken_for_verified(loss_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"loss_fn: another thread called a loss while .*, or in others by contextv"):
        fc.verify(loss_fn, X, Y)
    assert fc.verify(lambda x, y: fc.clip_loss(x, y, 1.0), X, Y).held


@pytest.mark.parametrize("loss_fn", [in_a_copy, in_asyncio])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_loss_in_a_thread_with_a_copy_of_the_context_is_verified(
    loss_fn: Callable[..., Tensor], wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, main = cpp.BACKEND.row_loss, threading.get_ident()

    def row_loss(*args: Any) -> tuple[Tensor, None]:
        loss, _ = right(*args)
        return 1.5 * loss if wrong and threading.get_ident() != main else loss, None

    monkeypatch.setattr(cpp.BACKEND, "row_loss", row_loss)
    assert fc.verify(loss_fn, X, Y).held != wrong


def test_blocks_of_two_threads_are_apart() -> None:
    """Each counts its own calls, whichever of the blocks ends first."""
    both, left = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)
    counted = {}

    def watch(calls: int) -> None:
        with fc.verify_against_reference(every=1000) as check:
            both.wait()
            for _ in range(calls):
                loss()
            if calls == 3:
                left.wait()
                loss()
        if calls != 3:
            left.wait()
        counted[calls] = check.calls

    threads = [threading.Thread(target=watch, args=(calls,)) for calls in (3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == {3: 4, 5: 5}


def test_blocks_that_end_in_the_order_of_their_beginnings() -> None:
    """Neither decides the backend of what is compiled afterwards."""
    first, second = dispatch.using("reference"), dispatch.using("reference")
    entries = [first.__enter__(), second.__enter__()]
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    torch.compile(loss, backend="eager")()
    assert [entry.calls for entry in entries] == [0, 0]


def test_one_check_of_many_threads_counts_them_all(switching: None) -> None:
    check = fc.verify_against_reference(every=20)
    inside = threading.Barrier(4, timeout=60)

    def work(_: int) -> None:
        with check:
            inside.wait()
            for _ in range(25):
                loss()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (check.calls, check.checked, check.breaches) == (100, 5, 0)
    loss()
    assert check.calls == 100


def test_a_block_that_is_left_elsewhere_has_ended() -> None:
    """Also if it is left in another thread, and for contexts that were copied inside it."""
    check = fc.verify_against_reference(every=1000)
    in_a_thread(check.__enter__)
    check.__exit__(None, None, None)
    loss()
    check.__enter__()
    copied = contextvars.copy_context()
    copied.run(loss)
    assert check.calls == 1
    check.__exit__(None, None, None)
    copied.run(loss)
    loss()
    assert check.calls == 1


def test_a_block_is_left_once() -> None:
    check = fc.verify_against_reference()
    with check, check:
        loss()
    assert check.calls == 1
    with pytest.raises(RuntimeError, match="verify_against_reference: got an exit from a block that has been left"):
        check.__exit__(None, None, None)
    with check:
        loss()
    assert check.calls == 2


def test_tasks() -> None:
    """A task that begins in the block is observed until the block ends; a task beside it never is."""

    async def several(count: int, begun: asyncio.Event, resume: asyncio.Event) -> None:
        for _ in range(count):
            loss()
        begun.set()
        await resume.wait()
        loss()

    async def main() -> int:
        events = [asyncio.Event() for _ in range(3)]
        beside = asyncio.create_task(several(7, events[0], events[2]))
        await asyncio.sleep(0)
        with fc.verify_against_reference(every=1000) as check:
            within = asyncio.create_task(several(5, events[1], events[2]))
            await events[0].wait()
            await events[1].wait()
        events[2].set()
        await asyncio.gather(beside, within)
        return check.calls

    assert asyncio.run(main()) == 5


def test_the_reference_is_forced_on_one_thread_alone() -> None:
    with dispatch.using("reference") as forced:
        cpu = (torch.device("cpu"), torch.float32)
        assert in_a_thread(dispatch.forced) is None
        assert (forced.calls, forced.missed) == (0, True)
        assert dispatch.resolve("auto", *cpu) == "reference"
        assert forced.calls == 1
    assert dispatch.forced() is None


def test_checked_losses_beside_threads_that_compute_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training is checked even if other threads compute losses, because a loss itself starts no threads."""
    evaluate = fc.verification.compare._evaluate

    def evaluate_beside_another(*args: Any) -> object:
        in_a_thread(loss)
        return evaluate(*args)

    monkeypatch.setattr(fc.verification.compare, "_evaluate", evaluate_beside_another)
    with fc.verify_against_reference(on_breach="raise") as check:
        loss()
    assert check.checked == 1


def test_a_checked_loss_leaves_the_generator_to_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers that another thread draws during a check are not drawn a second time."""
    drawn: list[Tensor] = []
    state = torch.get_rng_state()
    expected = torch.rand(3)
    torch.set_rng_state(state)
    evaluate = fc.verification.compare._evaluate

    def evaluate_and_draw(*args: object) -> object:
        drawn.append(torch.rand(1))
        return evaluate(*args)

    monkeypatch.setattr(fc.verification.compare, "_evaluate", evaluate_and_draw)
    with fc.verify_against_reference() as check:
        loss()
    assert check.checked == 1
    assert torch.equal(torch.cat(drawn), expected)


def test_a_compiled_loss_beside_a_verification() -> None:
    """It is traced again inside a verification and uses its own backend outside; with fullgraph=True it raises."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: fc.clip_loss(x, y, 1.0), backend="aot_eager")
    expected = loss()
    assert torch.allclose(compiled(X, Y), expected)
    with fc.verify_against_reference() as check:
        assert torch.allclose(compiled(X, Y), expected)
        assert check.calls == 1
        assert torch.allclose(in_a_thread(lambda: compiled(X, Y)), expected)
        assert check.calls == 1
    assert fc.verify(compiled, X, Y).held
    whole = torch.compile(lambda x, y: fc.clip_loss(x, y, 1.0), fullgraph=True, backend="aot_eager")
    assert torch.allclose(whole(X, Y), expected)
    with (
        fc.verify_against_reference(),
        pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"),
    ):
        whole(X, Y)
    assert torch.allclose(whole(X, Y), expected)
