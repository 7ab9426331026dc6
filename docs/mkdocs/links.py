"""A hook of mkdocs that makes pages of the site from the Markdown files at the root of the repository.

A link means the same in the repository and on the site: it is resolved from the file it is written in, and leads to
the target's page. A target that is not a page, such as a script, is served unchanged. Some sections of README become a
separate page.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/cpu.md": "benchmark.md",
    "benchmarks/results/cpu-zen4.md": "benchmark-zen4.md",
    "benchmarks/results/cpu-zen5.md": "benchmark-zen5.md",
}
CALLS = "calls.md"
MOVED = ("Which call is my training", "The losses")  # README's sections that are on CALLS and not on the home page
# Wide tables use the room of the table of contents; the home page fits on two screens.
HIDDEN = {"index.md": ["toc", "footer"], "triton-configurations.md": ["toc"]}
LOG = logging.getLogger("mkdocs.hooks.links")  # with --strict, a warning fails the build
ROW = re.compile(r"^\|.*", re.MULTILINE)
SIZE = re.compile(r"(?<=\d) x (?=\d)")  # a table's cell must not wrap within "128 x 64"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, CALLS, abs_src_path=str(ROOT / "README.md")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = Path(page.file.abs_src_path).parent
    if page.file.src_uri in ("index.md", CALLS):
        markdown = _part_of_readme(markdown, moved=page.file.src_uri == CALLS)
    page.meta.setdefault("hide", HIDDEN.get(page.file.src_uri, []))
    markdown = ROW.sub(lambda row: SIZE.sub("\u00a0x\u00a0", row[0]), markdown)

    def resolved(match: re.Match[str]) -> str:
        link = match[2]
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        target = Path(os.path.normpath(here / link))
        if not target.is_file():  # mkdocs reports it
            return match[0]
        place = _place(target, Path(config.docs_dir))
        if target.suffix == ".md" and files.get_file_from_path(place) is None:
            LOG.warning("%s: links to %s, which is no page: PAGES in docs/mkdocs/links.py", page.file.src_uri, link)
            return match[0]
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(target)))
        return match[1] + os.path.relpath(place, Path(page.file.src_uri).parent) + match[3]

    return LINK.sub(resolved, markdown)


def _part_of_readme(markdown: str, moved: bool) -> str:
    sections = re.split(r"^(?=## )", markdown, flags=re.MULTILINE)
    kept = [section for section in sections if section.startswith(tuple(f"## {title}\n" for title in MOVED)) == moved]
    for title in MOVED:  # links to a moved section lead to CALLS
        anchor = "#" + title.lower().replace(" ", "-")
        kept = [section.replace(f"]({anchor})", f"]({CALLS}{anchor})") for section in kept]
    return "".join(kept)


def _place(target: Path, docs: Path) -> str:
    """The path of a file within the sources of the site."""
    if target.is_relative_to(docs):
        return target.relative_to(docs).as_posix()
    inside = target.relative_to(ROOT).as_posix()
    return PAGES.get(inside, f"source/{inside}")
