"""Warnings that are given once a process, at the line of the user's code that called this package."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from fused_contrastive.core import compiler

_told: set[str] = set()
# Frames in these folders are skipped: torch is among them, because it calls a module's forward.
_OURS = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent.parent, Path(torch.__file__).parent))


@compiler.constant
def once(kind: str, text: str, category: type[Warning] = UserWarning) -> None:
    """Gives each kind of warning once; under torch.compile, while it traces."""
    if kind in _told:
        return
    at_caller(text, category)
    _told.add(kind)


def at_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that is neither this package's nor torch's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
