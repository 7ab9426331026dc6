"""The Python of a Markdown page, run as a reader would: block after block, in one session."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run_page(name: str, given: dict[str, Any] | None = None) -> int:
    """Runs the page's blocks in ``given`` and returns how many there were. An error shows the page and the line."""
    path = ROOT / name
    text = path.read_text()
    session = {} if given is None else given
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(path), "exec"), session)
    return len(blocks)
