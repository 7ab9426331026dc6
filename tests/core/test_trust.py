"""Calls in several threads at once, after a fork, thousands of times, and interrupted by Ctrl-C."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import processes
import pytest
import torch
from every_loss import LOSSES, problem, same, step
from interrupting import SOON, seconds_to_end

import fused_contrastive as fc

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and forks")


def run(code: str, *arguments: str) -> str:
    """What the code prints in a separate process."""
    result = processes.run(code, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_threads_at_once_give_the_bits_of_each_alone() -> None:
    """A Python thread for each loss, all at once, forward and backward; two sizes, one of several blocks of tiles."""
    problems = [problem(n, d) for n, d in ((24, 8), (600, 33))]
    alone = {name: [step(name, inputs) for inputs in problems] for name in LOSSES}
    start = threading.Barrier(len(LOSSES))

    def repeat(name: str) -> bool:
        start.wait()
        return all(
            same(step(name, inputs), expected)
            for _ in range(5)
            for inputs, expected in zip(problems, alone[name], strict=True)
        )

    with ThreadPoolExecutor(len(LOSSES)) as threads:
        assert dict(zip(LOSSES, threads.map(repeat, LOSSES), strict=True)) == dict.fromkeys(LOSSES, True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_call_gives_the_same_bits(loss: str) -> None:
    """The problem has several C++ blocks. A GEMM and torch's sums may round differently on other numbers of threads."""
    inputs = problem(2500, 24)
    torch.set_num_threads(1)
    first = step(loss, inputs)
    for count in (2, 3, 1):
        torch.set_num_threads(count)
        found = step(loss, inputs)
        assert same(found, step(loss, inputs))
        for a, b in zip(found, first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    assert same(found, first)


# The parent used two threads, which do not exist in a forked child: there torch's own operators would wait for ever.
# The children below call these operators through a loss, which goes on with one thread.
FORK = """
import os, sys, warnings
import torch
from every_loss import LOSSES, problem, same, step
inputs = problem(1000, 64)
for count in (2, 1):
    torch.set_num_threads(count)
    before = {name: step(name, inputs) for name in LOSSES}
torch.set_num_threads(2)

def child(_):
    return [name for name in LOSSES if not same(step(name, inputs), before[name])]
"""

CHILDREN = {
    "os.fork": """
pid = os.fork()
if pid == 0:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        differ = child(0)
    print(differ, torch.get_num_threads(), [str(w.message)[:55] for w in said], flush=True)
    os._exit(0)
os.waitpid(pid, 0)
""",
    "DataLoader": """
loader = torch.utils.data.DataLoader(range(4), num_workers=2, collate_fn=child, multiprocessing_context="fork")
print(sum(loader, []), 1, [])
""",
    "multiprocessing": """
import multiprocessing
warnings.simplefilter("ignore")
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(sum(pool.map(child, range(4)), []), 1, [])
""",
}
SAID = {"os.fork": ["fused_contrastive: this process was forked from one tha"]}


@POSIX
@pytest.mark.parametrize("way", CHILDREN)
def test_a_forked_child_computes_the_same_bits(way: str) -> None:
    assert run(FORK + CHILDREN[way]).strip() == f"[] 1 {SAID.get(way, [])}"


@POSIX
def test_a_child_of_a_process_in_which_torch_alone_used_threads_does_not_hang() -> None:
    code = """
import os, warnings
import torch
from every_loss import LOSSES, problem, step
torch.set_num_threads(2)
torch.randn(2_000_000).exp_()
inputs = problem(1000, 64)  # here: an operator of torch's own would hang in the child
if os.fork() == 0:
    warnings.simplefilter("ignore")
    for name in LOSSES:
        step(name, inputs)
    print(torch.get_num_threads(), flush=True)
    torch.set_num_threads(1)
    os._exit(0)
os.wait()
"""
    assert run(code).strip() == "1"


# In each function the first parallel operator is torch's own or ours; core/forks.py has to come before either.
FORK_EACH = """
import itertools, os, sys, time, warnings
import torch
import fused_contrastive as fc
from test_trust import PUBLIC
torch.set_num_threads(2)
n = 1500
x, y, labels = torch.randn(n, 64), torch.randn(n, 64), torch.arange(n) % 50
half, mask = x.half(), labels.view(-1, 4) > 3  # made here, because torch's own operators hang in a child
calls = {name: eval(call) for name, call in PUBLIC.items()}
for call in calls.values():
    call()
sys.stdout.flush()
children = {}
for name, action in itertools.product(calls, ("ignore", "error")):
    call = calls[name]
    if (pid := os.fork()) == 0:
        warnings.simplefilter(action, RuntimeWarning)
        try:
            call()
        except RuntimeWarning:  # an error that is caught: the next call goes on with one thread all the same
            call()
        os._exit(0 if torch.get_num_threads() == 1 else 3)
    children[pid] = f"{name}, warnings: {action}"
end = time.time() + 200
while children and time.time() < end:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        name = children.pop(pid)
        if status:
            print(name, status)
    time.sleep(0.01)
for pid, name in children.items():
    print(name, "hangs")
    os.kill(pid, 9)
print("ended")
"""
PUBLIC = {
    "cached": "lambda: fc.cached([lambda t: t], [x[:9]], torch.sum, 4)",
    "clip_loss": "lambda: fc.clip_loss(x, y, 0.1)",
    "contrastive_stats": "lambda: fc.contrastive_stats(half, half)",
    "distillation_loss": "lambda: fc.distillation_loss(x, y, 0.1, y, x, 1.0)",
    "diagnose": "lambda: fc.diagnose(x, y, 0.1)",
    "filip_loss": "lambda: fc.filip_loss(x.view(-1, 4, 64), y.view(-1, 4, 64), 1.0, image_mask=mask)",
    "info_nce_loss": "lambda: fc.info_nce_loss(x, y, negatives=y)",
    "max_sim": "lambda: fc.max_sim(x.view(-1, 4, 64), y.view(-1, 4, 64), mask)",
    "median_rank": "lambda: fc.median_rank(x, y)",
    "nt_xent_loss": "lambda: fc.nt_xent_loss(x, y, normalize=False)",
    "rank": "lambda: fc.rank(x, y, 5)",
    "recall_at_k": "lambda: fc.recall_at_k(x, y)",
    "sample_negatives": "lambda: fc.sample_negatives(x, y, 0.1)",
    "self_stats": "lambda: fc.self_stats(x, 0.1)",
    "siglip_loss": "lambda: fc.siglip_loss(x, y, 0.1)",
    "sigmoid_stats": "lambda: fc.sigmoid_stats(x, y, 0.1)",
    "supcon_loss": "lambda: fc.supcon_loss(x, labels)",
    "target_ranks": "lambda: fc.target_ranks(x, y)",
    "verify": "lambda: fc.verify(fc.clip_loss, x[:500], y[:500], 0.1)",
    "x_clip_loss": "lambda: fc.x_clip_loss(x, y, 0.1)",
    "zero_shot": "lambda: fc.zero_shot(x, y[:50])",
}


@POSIX
def test_what_a_forked_child_calls_first_in_a_thread_or_compiled() -> None:
    """Only the thread that forked has lost its threads, whichever thread calls first."""
    code = """
import os, sys, threading, warnings
import torch
import fused_contrastive as fc
warnings.simplefilter("ignore")
torch.set_num_threads(2)
x, y = torch.randn(600, 64), torch.randn(600, 64)
compiled = torch.compile(fc.clip_loss, fullgraph=True, backend="eager")
right = fc.clip_loss(x, y, 0.1)
for way in ("thread", "compiled"):
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        if way == "thread":
            thread = threading.Thread(target=fc.clip_loss, args=(x, y, 0.1))
            thread.start()
            thread.join()
        else:
            compiled(x, y, 0.1)
        print(way, torch.allclose(fc.clip_loss(x, y, 0.1), right), torch.get_num_threads(), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
    assert run(code).split() == ["thread", "True", "1", "compiled", "True", "1"]


def test_every_public_function_is_tried_after_a_fork() -> None:
    functions = {name for name in fc.__all__ if inspect.isfunction(getattr(fc, name))}
    assert functions == set(PUBLIC)


@POSIX
def test_no_public_function_hangs_in_a_forked_child() -> None:
    assert run(FORK_EACH).split() == ["ended"]


@POSIX
def test_a_signal_handler_that_sets_the_number_of_threads() -> None:
    """The handler runs between blocks of a call, whose scratch memory is sized for the threads at its start."""
    code = """
import signal, torch
import fused_contrastive as fc
torch.manual_seed(0)
x, y = (torch.randn(6000, 64, requires_grad=True) for _ in range(2))
calls = {
    "clip": lambda: fc.clip_loss(x, y, 0.1, memory_budget=0),
    "siglip": lambda: fc.siglip_loss(x, y, 0.1, -1.0),
    "max_sim": lambda: fc.max_sim(x.view(-1, 8, 64), y.view(-1, 8, 64)).mean(),
    "rank": lambda: fc.rank(x, y, 5).scores.sum() + 0 * x.sum(),
}
signal.signal(signal.SIGALRM, lambda *_: torch.set_num_threads(8))
for name, call in calls.items():
    found = []
    for delay in (0, 0.06):
        torch.set_num_threads(1)
        signal.setitimer(signal.ITIMER_REAL, delay)
        loss = call()
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, y), allow_unused=True)))
    equal = all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found) if a is not b)
    print(name, equal, torch.get_num_threads(), end="; ")
"""
    assert run(code).strip() == "clip True 8; siglip True 8; max_sim True 8; rank True 8;"


MEMORY = """
import itertools, sys, torch
from every_loss import LOSSES, problem, step
inputs = problem(int(sys.argv[1]), 8)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4 // 1024
def forward(name):
    LOSSES[name](*inputs)
names, call = itertools.cycle({names}), {call}
for _ in range(1_000):
    call(next(names))
before = resident()
for _ in range(int(sys.argv[2])):
    call(next(names))
print(resident() - before)
"""
# Code, rows and calls. Products that are not freed show after fewer calls if there are more rows.
CALLS = {
    "clip": (["clip"], "lambda name: step(name, inputs)", 12, 9_000),
    "clip forward": (["clip"], "forward", 12, 9_000),
    "every loss": (list(LOSSES), "lambda name: step(name, inputs)", 48, 4_000),
    "every loss forward": (list(LOSSES), "forward", 48, 4_000),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux's /proc")
@pytest.mark.parametrize("calls", CALLS)
def test_thousands_of_calls_leave_nothing(calls: str) -> None:
    """Resident memory grows by less than 2 MB between call 1,000 and the last one."""
    names, call, rows, count = CALLS[calls]
    assert int(run(MEMORY.format(names=names, call=call), str(rows), str(count))) < 2


HEAD = """
import torch
import fused_contrastive as fc
from fused_contrastive.core.spec import Forward
from fused_contrastive.ops import schema

def at_once(x, y, *problem):
    '''What the forward pass would take long to find: only the backward is to be cut short.'''
    return Forward(*(torch.zeros(len(x)).double() for _ in range(3)), x.new_empty(0, len(y)))
x, y = (torch.randn(60_000, 256, requires_grad=True) for _ in range(2))
"""
LONG_CALLS = {
    "clip": "fc.clip_loss(x, y, 0.1)",
    "nt_xent": "fc.nt_xent_loss(x, y, normalize=True)",
    "siglip": "fc.siglip_loss(x, y, 0.1)",
    "clip backward": "fc.clip_loss(x, y, 0.1, memory_budget=0).backward()",
    "nt_xent backward": "fc.nt_xent_loss(x[:40_000], y[:40_000], normalize=True, memory_budget=0).backward()",
    "siglip backward": "fc.siglip_loss(x, y, 0.1, memory_budget=0).backward()",
    "rank": "fc.rank(x, y, 10)",
    "target_ranks": "fc.target_ranks(x, y)",
}


@POSIX
@pytest.mark.parametrize("call", LONG_CALLS)
def test_ctrl_c_ends_a_call(call: str) -> None:
    only_backward = "schema.stats_forward = at_once\n" if "backward" in call else ""
    assert seconds_to_end(f"{HEAD}{only_backward}print('ready', flush=True)\n{LONG_CALLS[call]}") < SOON
