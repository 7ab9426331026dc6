"""Prints what the commands say: in colour by rich, if the extra "cli" has installed it, otherwise as plain text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


class Styled(NamedTuple):
    """A table's cell in one of rich's styles, such as "bold red"."""

    text: str
    style: str

    def __str__(self) -> str:
        return self.text


class Terminal:
    """Prints to stdout. A closed pipe raises BrokenPipeError, with rich too."""

    def __init__(self) -> None:
        self.rich = _rich_console()

    def say(self, text: str, style: str | None = None) -> None:
        """Lines of text, never wrapped."""
        if self.rich is None:
            print(text, flush=True)
        else:
            self.rich.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Styled]], right: Collection[int] = ()
    ) -> None:
        """``right``: the numbers of the columns that are aligned to the right. Without ``columns`` there is no head."""
        if self.rich is None:
            self.say("\n".join([title, *_aligned([*([columns] if columns else []), *rows], right)]))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, show_header=bool(columns))
        for k, column in enumerate(columns):
            table.add_column(column, justify="right" if k in right else "left")
        for row in rows:
            table.add_row(*(Text(str(cell), getattr(cell, "style", "")) for cell in row))
        self.rich.print(table)

    def progress(self, items: Sequence[T], what: str) -> Iterable[T]:
        """The items, with a bar that shows how many of them are done; without rich there is no bar."""
        if self.rich is None:
            return items
        from rich.progress import track

        return track(items, description=what, console=self.rich, transient=True)


def _rich_console() -> Console | None:
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            """rich would exit with status 1, which means something else here."""
            raise BrokenPipeError

    return Piped()


def _aligned(lines: Sequence[Sequence[object]], right: Collection[int]) -> list[str]:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            str(cell).rjust(w) if k in right else str(cell).ljust(w) for k, (cell, w) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
