"""An extension of griffe that turns docstrings into Markdown. Names of the API become links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

LITERAL_BLOCK = re.compile(r"(?m)(\S?)( ?)::$")  # Markdown also takes the indented block that follows for code
NAME = re.compile(r"``(\w+)``")


def _colon(match: re.Match[str]) -> str:
    return f"{match[1]}:" if match[1] else ""


class Markdown(Extension):
    def on_package(self, *, pkg: Any, **_: Any) -> None:
        self._rewrite(pkg, set(pkg.exports or ()))

    def _rewrite(self, obj: Object, public: set[str]) -> None:
        def linked(match: re.Match[str]) -> str:
            name = match[1]
            return f"[`{name}`][fused_contrastive.{name}]" if name in public else f"`{name}`"

        if obj.docstring is not None:
            obj.docstring.value = NAME.sub(linked, LITERAL_BLOCK.sub(_colon, obj.docstring.value))
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, public)
