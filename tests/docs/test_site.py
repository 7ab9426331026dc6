"""The site in headless Chromium at two widths: nothing is cut off, no word is broken, no TeX is left.

`make screenshots` installs all that this needs except Chromium, runs it, and keeps the pictures in screenshots/.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from snippets import ROOT

for package in ("mkdocs", "material", "mkdocstrings", "mathjax"):
    pytest.importorskip(package, reason=f"the site is built with {package}: pip install .[docs]")

PAGES = ("", "calls/", "api/losses/", "benchmark/", "mathematics/", "cost/", "triton-configurations/")
WIDTHS = (1400, 420)
HEIGHT = 900
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Chromium is driven by playwright: pip install it")
    if (path := next(filter(None, map(shutil.which, CHROMIUM)), None)) is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is on PATH")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root in a container needs it


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = os.environ.get("FUSED_CONTRASTIVE_SCREENSHOTS")
    made = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    made.mkdir(parents=True, exist_ok=True)
    return made


@pytest.fixture(
    scope="module",
    params=[(name, width) for width in WIDTHS for name in PAGES],
    ids=lambda shown: f"{shown[0] or 'home'}-{shown[1]}",
)
def page(request: pytest.FixtureRequest, browser: Any, address: str, screenshots: Path) -> Iterator[Any]:
    """A page of the site, laid out, with its formulas drawn. Its requests to other hosts are refused and listed."""
    name, width = request.param
    shown = browser.new_page(viewport={"width": width, "height": HEIGHT})
    shown.refused = []

    def refuse(route: Any) -> None:
        shown.refused.append(route.request.url)
        route.abort()

    shown.route(lambda url: not url.startswith((address, "data:")), refuse)
    shown.goto(address + name, wait_until="networkidle")
    shown.evaluate("window.MathJax?.startup?.promise?.then(() => null)")
    shown.evaluate("document.fonts.ready.then(() => null)")
    shown.screenshot(path=screenshots / f"{name.strip('/').replace('/', '-') or 'home'}-{width}.png", full_page=True)
    yield shown
    shown.close()


# Words that are broken over two lines. A line may end after a hyphen or a full stop, not inside a name or number.
BROKEN_WORDS = r"""() => {
  const broken = [];
  const walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest("pre, mjx-container")) continue;
    for (const word of node.data.matchAll(/[\p{L}\p{N}_]+/gu)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) broken.push(word[0]);
    }
  }
  return broken;
}"""

# Elements that reach over the edge of the window and are in no frame inside the window that scrolls.
CUT_OFF = """() => [...document.querySelectorAll("article table, article img, article pre, article mjx-container")]
  .filter(seen => {
    for (let box = seen; box && box.tagName != "ARTICLE"; box = box.parentElement) {
      const {left, right} = box.getBoundingClientRect();
      if (left >= 0 && right <= innerWidth && (box == seen || /auto|scroll/.test(getComputedStyle(box).overflowX)))
        return false;
    }
    return true;
  }).map(seen => seen.textContent.slice(0, 80))"""

# The text without code and formulas.
PROSE = """() => {
  const article = document.querySelector("article").cloneNode(true);
  article.querySelectorAll("pre, code, mjx-container").forEach(each => each.remove());
  return article.textContent;
}"""

# Each formula, and whether it is drawn.
FORMULAS = """() => [...document.querySelectorAll(".arithmatex")].map(formula => {
  const drawn = formula.querySelector("mjx-container svg")?.getBoundingClientRect();
  const seen = drawn?.width > 4 && drawn?.height > 4;
  return [formula.textContent, Boolean(seen) && !formula.querySelector("[data-mjx-error]")];
})"""


def test_network(page: Any) -> None:
    assert page.refused == []


def test_layout(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(BROKEN_WORDS) == []


def test_formulas(page: Any) -> None:
    formulas = page.evaluate(FORMULAS)
    assert len(formulas) >= (40 if "mathematics" in page.url else 0)
    assert [text for text, drawn in formulas if not drawn] == []
    assert re.findall(r"\\[A-Za-z]+|\\[()\[\]]|\$", page.evaluate(PROSE)) == []


@pytest.mark.parametrize("page", [("", 1400)], indirect=True)
def test_home(page: Any) -> None:
    """The first code, with the change to make, is in the upper half of the screen; the page fits on two screens."""
    swap = page.locator("article pre").first
    box = swap.bounding_box()
    assert box["y"] + box["height"] <= HEIGHT / 2
    assert "clip_loss(images, texts, scale)" in swap.text_content()
    assert page.evaluate("document.documentElement.scrollHeight") <= 2 * HEIGHT


def test_nothing_is_fetched(site: Path) -> None:
    """No page names a script, style sheet or picture of another host."""
    for html in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", html.read_text()):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag) or "canonical" in tag, f"{html}: {tag}"
