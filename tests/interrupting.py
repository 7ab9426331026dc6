"""Ctrl-C during a long call, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

# A shell's background jobs ignore SIGINT, and so do their children unless told otherwise. The clock is the system's,
# the same in both processes: what the interpreter takes to end does not count.
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
    program = PROGRAM.format(code=textwrap.indent(code, "    "))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    time.sleep(0.5)
    assert process.poll() is None, "the call was too short to interrupt"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    raised, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors, errors
    return float(raised) - start
