"""The error that a command raises for arguments and files that it cannot work with."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input of a command: its message goes to stderr, and the exit status is 2, as argparse's own is."""
