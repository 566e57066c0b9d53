"""The docs site: it builds without a warning, every page is reachable, and a reader without a network sees all of it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import deeplabzoo

ROOT = Path(__file__).resolve().parents[2]


def test_every_page_stands_in_the_navigation() -> None:
    """A page that nobody can reach is no documentation; a wish for a page that is not there fails at once."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/]+\.md)$", text, flags=re.MULTILINE))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == there


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; building needs the extra `docs`, which .ci/run installs for this test."""
    pytest.importorskip("mkdocs", reason="the site is built with pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loaded(HTMLParser):
    """Collects what a browser would fetch to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note scripts, pictures, frames and linked files; links to click on are none."""
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.addresses.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "dns-prefetch"):
            self.addresses.append(values.get("href") or "")


def loaded_by(page: Path) -> Iterator[str]:
    """Yield the addresses that a page loads by itself."""
    parser = Loaded()
    parser.feed(page.read_text(encoding="utf-8"))
    yield from filter(None, parser.addresses)


@pytest.mark.slow
def test_the_site_builds_and_needs_no_network(site: Path) -> None:
    """Strict: no broken link, no missing picture; no font, script or picture from another host, in pages or style sheets."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    away = {(page.name, address) for page in pages for address in loaded_by(page) if re.match(r"(https?:)?//", address)}
    assert away == set()
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_reference_is_written_from_docstrings(site: Path) -> None:
    """What `create` refuses stands in the reference, every public name has its place there, and examples are code."""
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    missing = [name for name in deeplabzoo.__all__ if name != "__version__" and f".{name}" not in text]
    assert missing == []
    assert "UnsupportedStrideError" in text
    assert "<blockquote>" not in text  # what Markdown makes of >>> by itself; docs/doctests.py fences it
    assert 'class="gp"' in text  # a prompt that was coloured as one
