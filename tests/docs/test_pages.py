"""What the pages say of the code is so: commands, options, targets, scenarios, streams, folders, symbols and quoted messages."""

from __future__ import annotations

import errno
import os
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, STUDIES
from docs.generate.cli import commands, root
from lutetia.simulation.scenarios.catalogue import SCENARIOS
from tests.test_docs import DOCS, PAGES, ROOT, page_name, section
from tests.test_walls import FILES, MAY_IMPORT

COMMANDS = dict(commands(root(), "lutetia"))
MADE = ROOT / "docs" / "reference"
WRITTEN = [page for page in PAGES if page.parent != MADE]
PLACEHOLDER = "\0"


def code_spans(page: Path) -> list[str]:
    """What stands in backquotes or in an indented or fenced block, a line each."""
    text = page.read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"^    (.+)$", text, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [*inline, *(line for block in blocks for line in block.splitlines())]


@pytest.mark.parametrize("page", WRITTEN, ids=page_name)
def test_named_commands_and_options_exist(page: Path) -> None:
    wrong = []
    for span in code_spans(page):
        for words in re.findall(r"(?:^|\$ |/bin/)lutetia((?: [a-z][a-z-]*)+)((?: .*)?)$", span):
            path = "lutetia"
            for word in words[0].split():
                if f"{path} {word}" not in COMMANDS:
                    break
                path += f" {word}"
            known = {name for option in COMMANDS[path].params for name in (*option.opts, *option.secondary_opts)}
            named = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", words[1].partition("|")[0]))
            if path == "lutetia" or not named <= known | {"--help"}:
                wrong.append(span)
    assert not wrong


@pytest.mark.parametrize("page", WRITTEN, ids=page_name)
def test_named_make_targets_and_benchmarks_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(code_spans(page))
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"python -m benchmarks ([a-z][a-z_-]*)", text)) <= {*NAMES, *STUDIES}


@pytest.mark.parametrize("page", WRITTEN, ids=page_name)
def test_named_scenarios_exist(page: Path) -> None:
    assert set(re.findall(r"lutetia simulate ([a-z][a-z-]*)", "\n".join(code_spans(page)))) <= set(SCENARIOS)


def fault_rows() -> list[list[str]]:
    """The cells of the table of faults, without its head."""
    lines = (DOCS / "explanation" / "faults.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        for line in lines
        if line.startswith("| ")
    ]
    return [row for row in rows if row[0].isdigit()]


def test_faults_are_simulated_by_scenarios_that_exist() -> None:
    assert len(fault_rows()) > 50
    assert {name for row in fault_rows() for name in re.findall(r"`([\w-]+)`", row[2])} <= set(SCENARIOS)


@cache
def said() -> str:
    """The code, with texts that stand one after the other as one, and a mark where a value is put in."""
    code = "\n".join(path.read_text() for path in FILES)
    return re.sub(r"\{[^{}\n]*\}|%[-+.\d]*[sdfr]", PLACEHOLDER, re.sub(r"\"\s*\n\s*f?\"", "", code))


OF_THE_SYSTEM = {os.strerror(errno.ENOSPC).lower(), os.strerror(errno.EROFS).lower(), "database or disk is full"}


def is_said(message: str) -> bool:
    """Whether each piece of the message between numbers and omissions is in the code, its first and last word aside.

    Those may be values: `inconclusive` and `transfer` in "inconclusive at check transfer".
    """
    pieces = [piece.strip(" ,.:") for piece in re.split(r"…|;|\d[\d.]*(?:\s?s\b)?|\(|\)|: ", message)]
    return all(_in_code(piece) for piece in pieces if len(piece) > 12 and piece not in OF_THE_SYSTEM)


def _in_code(piece: str) -> bool:
    words = piece.split()
    kept = {piece, " ".join(words[1:]), " ".join(words[:-1]), " ".join(words[1:-1])}
    return any(each in said() for each in kept if len(each) >= 8)


def test_messages_that_faults_quote_are_said_by_the_code() -> None:
    quoted = [message for row in fault_rows() for message in re.findall(r"`([^`]{15,})`", row[4]) if " " in message]
    assert len(quoted) > 30
    assert not [message for message in quoted if not is_said(message)]


def test_architecture_names_every_stream() -> None:
    table = section("architecture.md", "Processes and streams")
    named = set(re.findall(r"`(/lutetia/[a-z]+/\d)`", table))
    spoken = set(re.findall(r"\"(/lutetia/[a-z]+/\d)\"", said()))
    assert {name.rpartition("/")[0] for name in named} == {name.rpartition("/")[0] for name in spoken}
    assert named <= spoken | {name.replace("/2", "/1") for name in spoken}


def test_architecture_has_a_line_for_every_folder() -> None:
    text = (DOCS / "architecture.md").read_text()
    folders = {path.parent.relative_to(ROOT).as_posix() for room in MAY_IMPORT for path in (ROOT / room).rglob("__init__.py")}
    assert not [folder for folder in sorted(folders) if not re.search(rf"^(?:- |### |- .*)`{folder}/`", text, re.MULTILINE)]


def test_architecture_names_symbols_where_they_are() -> None:
    text = (DOCS / "architecture.md").read_text()
    missing = []
    for answer in re.findall(r"^\| [^|]+\? \| (.+) \|$", text, re.MULTILINE):
        files = [ROOT / name for name in re.findall(r"`(\w+/[\w/.]+\.py)`", answer)]
        for symbol in re.findall(r"`(\w+)`", answer):
            if not any(re.search(rf"\b{symbol}\b", path.read_text()) for path in files):
                missing.append(symbol)
    assert not missing


@pytest.mark.parametrize("page", WRITTEN, ids=page_name)
def test_named_modules_and_their_symbols_exist(page: Path) -> None:
    """`node.machine.machine.advance` and the like, with or without `lutetia.` before it."""
    rooms = "|".join(MAY_IMPORT)
    missing = []
    for name in re.findall(rf"`(?:lutetia\.)?((?:{rooms})(?:\.\w+)+)(?<!\.key)`", page.read_text()):
        path, parts = ROOT, name.split(".")
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        if parts and (path / f"{parts[0]}.py").is_file():
            path /= f"{parts.pop(0)}.py"
        if parts and not (path.is_file() and all(re.search(rf"\b{part}\b", path.read_text()) for part in parts)):
            missing.append(name)
    assert not missing
