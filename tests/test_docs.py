"""The documentation names what exists: settings, exit codes, files, drawings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.build_settings import BuildSettings
from lutetia.node.settings import NodeSettings
from lutetia.system import errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FOLDERS = "benchmarks|cli|coordinator|docker|docs|examples|models|node|protocol|simulation|system|tests|typings"
MADE_BY_RUNS = {"demo/mixture"}


def rows(text: str) -> set[str]:
    """The names in the first column of the tables in `text`."""
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def section(page: str, heading: str) -> str:
    return (DOCS / page).read_text().partition(f"## {heading}")[2].partition("\n## ")[0]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (NodeSettings, (DOCS / "guide" / "volunteer.md").read_text()),
        (BuildSettings, section("guide/runs.md", "2. Shards")),
    ],
)
def test_every_setting_has_its_row(settings: type[BaseModel], text: str) -> None:
    assert rows(text) == set(settings.model_fields)


def test_every_run_setting_is_named() -> None:
    named = set(re.findall(r"[`\[\"]([a-z_]+)", section("guide/runs.md", "3. A run")))
    assert set(RunSettings.model_fields) - {"experts", "warm_start"} <= named


def test_every_exit_code_is_listed() -> None:
    cells = re.findall(r"^\| ([\d, ]+) \|", section("guide/runs.md", "Exit codes"), re.MULTILINE)
    listed = {int(code) for cell in cells for code in cell.split(",")}
    raised = {each.code for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.LutetiaError)}
    assert raised | {0, 60, 129, 130, 143} == listed


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_paths_exist(page: Path) -> None:
    """Every `folder/file` in backquotes that begins with a folder of the source tree."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", page.read_text())
    assert not [path for path in named if not (ROOT / path).exists() and path not in MADE_BY_RUNS]


def test_pages_that_the_code_names_exist() -> None:
    missing = set[tuple[str, str]]()
    for folder in FOLDERS.split("|"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".sh", ".yaml") and "__pycache__" not in path.parts:
                named = re.findall(r"\bdocs/(?:[\w-]+/)*[\w-]+\.(?:md|json|toml|sh)\b", path.read_text())
                missing |= {(page_name(path), page) for page in named if not (ROOT / page).exists()}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_tests_exist(page: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M), f"{path} has no {name}"


def test_no_reader_is_told_to_run_code_of_a_mixture() -> None:
    """Warnings name the option without a value to paste; the reference quotes them from the code."""
    made = [ROOT / "models" / "mixing" / "stitch.py", ROOT / "cli" / "demo" / "report.py"]  # they write pages of their own
    pages = [*PAGES, *made, *(ROOT / "examples").iterdir()]
    assert not [page_name(page) for page in pages if "trust_remote_code=True)" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    """GitHub's rendering and the site follow the same links; mkdocs sees only those inside docs/."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text())
    generated = DOCS / "reference"
    targets = [(page.parent / link).resolve() for link in links if "://" not in link]
    assert not [target for target in targets if not target.exists() and not target.is_relative_to(generated)]


_CITATION = re.compile(
    r"`tests/[\w/]+\.py`|\.\./results/[\w-]+\.md|\baudits\.md#|\bnot measured\b|^nothing, in the tests beside it$"
)


def attack_rows() -> list[list[str]]:
    """The cells of each row of the threat model's tables: attack, defence, test, left over."""
    text = (DOCS / "explanation" / "threat-model.md").read_text()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in rows if cells[0] != "attack"]


def test_what_the_threat_model_leaves_over_cites_a_measurement_or_says_that_there_is_none() -> None:
    rows = attack_rows()
    assert len(rows) > 80
    assert not [cells[0] for cells in rows if len(cells) != 4 or not _CITATION.search(cells[3])]


def test_links_of_the_threat_model_lead_to_headings() -> None:
    text = (DOCS / "explanation" / "threat-model.md").read_text()
    links = re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", text)
    assert len(links) > 10
    for name, anchor in links:
        page = DOCS / "explanation" / (name or "threat-model.md")
        heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\s-]", "", head.lower()).strip().replace(" ", "-") for head in heads}, (name, anchor)


def test_each_architecture_question_names_at_most_three_files() -> None:
    rows = re.findall(r"^\| ([^|]+\?) \| (.+) \|$", section("architecture.md", "Thirteen questions"), re.MULTILINE)
    assert len(rows) == 13
    for question, answer in rows:
        assert 1 <= len(set(re.findall(r"`(\w+/[\w/.]*)`", answer))) <= 3, question


def test_glossary_words_are_sorted_and_unique() -> None:
    words = re.findall(r"^\| ([a-z][^|]*) \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)[1:]
    assert words == sorted(set(words), key=str.casefold)


REPLACED = r"\b(box|boxes|rungs?|ladder|workshops?|crier|herald|lookout|thin client|seeders?|chores?|roll-backs?)\b"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_prose_uses_words_of_the_glossary(page: Path) -> None:
    """Printed output and code keep the words that were printed."""
    prose = re.sub(r"```.*?```|^    .*$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(REPLACED, prose, re.IGNORECASE)


def test_glossary_symbols_exist() -> None:
    for line in (DOCS / "glossary.md").read_text().splitlines():
        for symbol, path in re.findall(r"`(\w+)` in `([\w/]+\.py)`", line):
            assert re.search(rf"\b{symbol}\b", (ROOT / path).read_text()), f"{path} has no {symbol}"


@pytest.mark.parametrize("source", sorted(DOCS.rglob("*.dot")), ids=lambda path: path.stem)
def test_drawing_is_up_to_date(source: Path) -> None:
    """Each drawing has its SVG, with the nodes and edges of its source: `make pictures` after a change."""
    text, drawn = source.read_text(), source.with_suffix(".svg").read_text()
    nodes = set(re.findall(r"^\s*(\w+)(?= \[)", text, re.MULTILINE)) - {"graph", "node", "edge"}
    chains = re.findall(r"^\s*(\w+(?: -> \w+)+)", text, re.MULTILINE)
    edges = {pair for chain in chains for pair in zip(chain.split(" -> "), chain.split(" -> ")[1:], strict=False)}
    titles = set(re.findall(r"<title>([^<]+)</title>", drawn))
    assert nodes | {f"{a}&#45;&gt;{b}" for a, b in edges} <= titles
