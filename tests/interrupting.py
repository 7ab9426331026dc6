"""Ctrl-C during a long call, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

# A shell's background jobs ignore SIGINT, and so do their children unless told otherwise.
HEAD = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


def seconds_to_end(code: str) -> float:
    """From the signal to the end. ``code`` prints "ready" before its long call."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    time.sleep(0.5)
    assert process.poll() is None, "the call was too short to interrupt"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors, errors
    return time.monotonic() - start
