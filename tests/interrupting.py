"""Ctrl-C during a long call, in a process of its own."""

from __future__ import annotations

import textwrap
import time

from processes import Process

SOON = 5  # seconds, for a busy machine; without Ctrl-C the calls take many times that
# Both processes read the system's clock, so that the time in which the interpreter exits does not count.
PROGRAM = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
{code}
except KeyboardInterrupt:
    print(time.monotonic(), flush=True)
    raise
"""


def seconds_to_end(code: str) -> float:
    """From the signal until the call has raised KeyboardInterrupt. ``code`` prints "ready" before its long call."""
    process = Process(PROGRAM.format(code=textwrap.indent(code, "    ")))
    while "ready" not in process.stdout and process.running:
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.running, f"the call was too short to interrupt: {process.wait()}"
    start = time.monotonic()
    process.interrupt()
    ended = process.wait()
    assert "KeyboardInterrupt" in ended.stderr, ended.stderr
    return float(ended.stdout.split()[-1]) - start
