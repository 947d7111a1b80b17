"""Texts of others in every view: they are shown as they are, and control neither markup nor terminal nor log nor picture."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lutetia.cli.commands.data import render_data
from lutetia.cli.commands.run import render_manifest
from lutetia.cli.commands.volunteer import render_local
from lutetia.cli.demo.curves import LossCurve, draw_losses
from lutetia.cli.demo.live_view import LiveTable, shard_rows
from lutetia.cli.doctor.checks import DoctorFinding, render_findings
from lutetia.cli.local.gallery import GalleryRow, compose
from lutetia.cli.output import as_json_text, console, emit, say, show
from lutetia.cli.status_table import render_status
from lutetia.coordinator.web.page import render_page
from lutetia.models.data.cluster.contact_sheets import write_sheet
from lutetia.models.data.description import DataDescription, DataFile, DataShard
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.log_format import PlainFormatter
from tests.cli.sample_documents import NOW, PEERS, manifest, status
from tests.test_walls import FILES, name_of, tree_of

HOSTILE = "[/x][red]\x1b[2J\x1b]0;t\x07\x9b31m\u202egnp\r\nforged $x_{$ <b>:smile:"
SHOWN = "[/x][red]\\x1b[2J"
MANY = [HOSTILE, "[/]", "[link=http://h]", "\x1b]52;c;eA==\x07", "\u2028\u2066", "\ud800", "$\\frac{$", "\0"]


def safe(text: str) -> bool:
    """Whether nothing in `text` moves a cursor, changes a colour or turns a direction."""
    return all(letter == "\n" or unicodedata.category(letter)[0] != "C" for letter in text) and "\u2028" not in text


def hostile_status(words: str) -> SwarmStatus:
    """A status as a hostile peer and owner would fill it, whatever the schema lets through today."""
    sample = status()
    shards = tuple(shard.model_copy(update={"name": words}) for shard in sample.shards)
    nodes = tuple(node.model_copy(update={"device": words, "state": words, "peer_id": words}) for node in sample.nodes)
    return sample.model_copy(update={"name": words, "run": words, "software": words, "shards": shards, "nodes": nodes})


def local_document(words: str) -> dict[str, Any]:
    return {
        "peer_id": words, "owner": words, "device": words, "state": words, "since": NOW, "reason": words, "name": words,
        "run": words, "online": True, "shard": 0, "shard_name": words, "epoch": 1, "epochs": 2, "step": 1, "steps": 2,
        "samples_per_second": 1.0, "loss": 1.0, "accepted": 1, "accepted_today": 1, "refused": 0, "last_accepted": None,
        "pending": 0, "due": None, "paused_until": None, "slowed": words, "left_out": words, "copies": 1,
        "problem": words,
    }  # fmt: skip


def data_description(words: str) -> DataDescription:
    file = DataFile.model_construct(clips=3, bytes=9, blob=manifest().shards[0].train)
    shard = DataShard.model_construct(index=0, name=words, prior=1.0, keywords=(words,), test=None, train=file, holdout=file)
    return DataDescription.model_construct(latent=manifest().latent, shards=(shard,))


def hostile_manifest(words: str) -> Manifest:
    sample = manifest()
    shards = tuple(shard.model_copy(update={"name": words}) for shard in sample.shards)
    return sample.model_copy(update={"name": words, "run": "b4" * 32, "shards": shards})


def demo_table(words: str) -> Any:
    view = LiveTable(console())
    view.phase, view.rows = words, shard_rows(hostile_status(words), {})
    view.timeline.append((1.0, words))
    return view.table()


RENDERERS: dict[str, Callable[[str], Any]] = {
    "render_status": lambda words: render_status(hostile_status(words), NOW),
    "render_local": lambda words: render_local(local_document(words), NOW),
    "render_data": lambda words: render_data(data_description(words)),
    "render_manifest": lambda words: render_manifest(hostile_manifest(words)),
    "render_findings": lambda words: render_findings([DoctorFinding(words, "ok", words, words)]),
    "table": demo_table,
    "text": str,
}
FIGURES = {"shard_table", "node_table", "_table", "_rows_table", "_catalogue_table", "render_plan", "render"}
"""Parts of those above, and tables of our own words and figures."""


def printed(action: Callable[[], object], terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `action` writes to stdout and stderr, without the bold and dim of our own tables."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    written = io.StringIO()
    written.isatty = lambda: terminal  # type: ignore[method-assign]
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        action()
    return re.sub(r"\x1b\[[012]m", "", written.getvalue())


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("name", RENDERERS)
def test_every_view_shows_hostile_words_and_obeys_none(name: str, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in [HOSTILE, *MANY]:
        text = printed(lambda words=words: emit({}, False, lambda: RENDERERS[name](words)), terminal, monkeypatch)
        assert safe(text)
        assert words != HOSTILE or SHOWN in text
        assert name == "text" or not any(line.startswith("forged") for line in text.splitlines())


def test_lines_and_documents_are_inert(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in MANY:
        text = as_json_text({"words": words})
        assert json.loads(text) == {"words": words}
        assert safe(text)
        assert safe(printed(lambda words=words: show(words), True, monkeypatch))
        assert safe(printed(lambda words=words: say(words), True, monkeypatch))


def test_a_log_line_stays_one_line_and_a_traceback_is_printable() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("lutetia", logging.INFO, "", 0, "%s", (HOSTILE,), sys.exc_info())
    text = PlainFormatter().format(record)
    assert safe(text)
    assert text.index("Traceback") == text.index("\n") + 1


def test_the_page_shows_no_markup_of_others() -> None:
    for words in [HOSTILE, *MANY]:
        page = render_page(hostile_status(words))
        assert "<b>" not in page
        assert safe(page.replace("\n", ""))


def test_pictures_take_every_caption(tmp_path: Path) -> None:
    clip = np.zeros((2, 16, 16, 3), np.uint8)
    for words in [HOSTILE, *MANY]:
        compose([GalleryRow(words, (clip,))], [words])
        write_sheet(tmp_path / "sheet.png", words, [clip], [words])
        draw_losses([LossCurve(0, words, (1,), (0.5,), (1.0,), (PEERS[0].public_key,))], tmp_path / "losses.png")


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).rpartition(".")[2], node


ONLY_IN = {
    "print": "cli/output.py", "Console": "cli/output.py", "StreamHandler": "system/log_format.py",
    "Formatter": "system/log_format.py", "from_markup": None, "from_ansi": None, "echo": None, "secho": None,
}  # fmt: skip
"""Every other way to a terminal or a log would read texts of others as markup, or let their control letters pass."""


def test_only_the_inert_ways_out_are_used() -> None:
    wrong = []
    for path in FILES:
        source = path.read_text()
        tree = tree_of(path) if "markup=" in source or any(f"{word}(" in source for word in ONLY_IN) else ast.Module([], [])
        for name, node in calls(tree):
            console_print = isinstance(node.func, ast.Attribute) and name == "print"
            marked = any(word.arg == "markup" and ast.unparse(word.value) != "False" for word in node.keywords)
            if marked or (not console_print and ONLY_IN.get(name, name_of(path)) != name_of(path)):
                wrong.append(f"{name_of(path)}:{node.lineno} {name}")
    assert not wrong


def test_every_view_is_tried_with_hostile_words() -> None:
    views = {
        node.name for path in FILES if name_of(path).startswith("cli/") for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) in ("RenderableType", "Table")
    }  # fmt: skip
    assert views - FIGURES <= RENDERERS.keys()
