"""The documentation site builds strictly and needs no other server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESOURCE = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=[\"']?(?:https?:)?//|<link\b[^>]*?\shref=[\"']?(?:https?:)?//", re.IGNORECASE
)
"""Whatever a browser fetches by itself; links that a reader follows may lead elsewhere."""


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of the source tree in `root`."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--config-file", str(root / "mkdocs.yml"), "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_site_has_a_page_for_every_markdown_file(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    named = {path.with_name("index.html") if path.name == "README.md" else path.with_suffix(".html") for path in pages}
    assert not {path for path in named if not (site / path).exists() and path.parts[0] != "generate"}


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert not [str(page) for page in pages if RESOURCE.search(page.read_text())]
    assert not [str(page) for page in pages if 'class="mermaid"' in page.read_text()], "the theme would fetch mermaid"
    assert not [str(sheet) for sheet in site.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text())]


def test_broken_link_fails_the_build(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\n[nowhere](no-such-page.md)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "no-such-page.md" in done.stderr
