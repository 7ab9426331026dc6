"""A hook of mkdocs that copies MathJax from an installed package to the site, so that formulas need no network."""

from __future__ import annotations

from importlib import resources
from typing import Any

from mkdocs.structure.files import File, Files

SCRIPT = "tex-svg.js"  # includes its fonts; docs/mkdocs/mathjax.js loads it


def on_files(files: Files, config: Any) -> Files:
    source = resources.files("mathjax") / "static/mathjax/es5" / SCRIPT
    files.append(File.generated(config, f"mkdocs/{SCRIPT}", abs_src_path=str(source)))
    return files
