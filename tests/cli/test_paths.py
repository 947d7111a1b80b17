"""Paths that cannot be used: a file instead of a folder, a folder without permission, the home of an unknown user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lutetia.models.data.ingest.synthetic import make_clips
from lutetia.protocol.schema.identity import Identity
from tests.cli.command_runner import each, failure, lutetia, ticket

NOT_MINE = "-dac_override,-dac_read_search"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file, to be given instead of a folder."""
    path = tmp_path / "AFILE"
    path.write_text("not a folder\n")
    return path


@pytest.fixture
def barred(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user may not enter."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to drop root's capabilities")
    folder = tmp_path / "barred"
    folder.mkdir(mode=0)
    yield folder
    folder.chmod(0o700)


def check_sentences(runs: Sequence[subprocess.CompletedProcess[str]], codes: set[int]) -> None:
    wrong = []
    for run in runs:
        message = failure(run)["message"] if "--json" in run.args else run.stderr
        if run.returncode not in codes or "bug" in message or message.strip().count("\n"):
            wrong.append((run.args, run.returncode, message))
    assert not wrong


def test_file_instead_of_folder_gives_one_sentence(file: Path, tmp_path: Path) -> None:
    Identity.derived("node").save(key := tmp_path / "node.key")
    make_clips(clips := tmp_path / "clips", 3, 0, 4, 16)
    below = file / "x"
    runs = each(
        [
            ("data", "build", clips, below, "--json"),
            ("join", ticket(), "--state-folder", file),
            ("identity", "import", key, "--state-folder", file),
            ("identity", "export", "/proc/key", "--state-folder", tmp_path),
            ("identity", "export", below, "--state-folder", tmp_path),
            ("demo", "--out", below),
            ("evaluate", "nowhere", clips, "--out", file),
            ("generate", "a star", "--mixture", "nowhere", "--out", below / "clip.mp4"),
            ("generate", "a star", "--mixture", "nowhere", "--out", tmp_path / "clip.txt"),
            ("run", "rotate", tmp_path / "NOPE"),
            ("run", "upgrade", tmp_path / "NOPE", "--set", "valid_days=3"),
            ("coordinator", "pardon", tmp_path / "NOPE", "0123456789"),
            ("coordinator", "rollback", tmp_path / "NOPE", "0", "1"),
            ("coordinator", "serve", file),
            ("coordinator", "backup", file, tmp_path / "backup"),
            ("coordinator", "restore", file, tmp_path / "run"),
        ],
        LUTETIA_CACHE=str(below),
    )
    check_sentences(runs, {2, 10, 11, 12, 21})
    codes = {" ".join(run.args[:1]): run.returncode for run in runs}
    assert (codes["join"], codes["demo"], codes["evaluate"]) == (21, 21, 21), "reported before the long work begins"
    assert [run.returncode for run in runs if run.args[0] == "generate"] == [21, 2]
    assert next(run.returncode for run in runs if "rotate" in run.args) == 10
    assert file.read_text() == "not a folder\n"


def test_folder_without_permission_gives_one_sentence(barred: Path, tmp_path: Path) -> None:
    state, at = ("--state-folder", barred / "x"), barred / "x"
    runs = each(
        [
            ("identity", "show", *state),
            ("identity", "export", tmp_path / "key", *state),
            ("run", "show", at),
            ("data", "build", tmp_path, at),
            ("data", "inspect", at),
            ("run", "create", tmp_path, at),
            ("coordinator", "backup", at, tmp_path / "backup"),
            ("swarm", "fetch", ticket(), "--out", at),
            ("demo", "--out", at),
            ("evaluate", at, tmp_path),
        ],
        without=NOT_MINE,
    )
    check_sentences(runs, {10, 11, 12, 21})


def test_unexpanded_tilde_means_home(tmp_path: Path) -> None:
    """As in systemd's EnvironmentFile."""
    Identity.derived("node").save(key := tmp_path / "node.key")
    (home := tmp_path / "home").mkdir()
    (here := tmp_path / "here").mkdir()
    run = lutetia("identity", "import", key, cwd=here, HOME=str(home), LUTETIA_STATE_FOLDER="~/node")
    assert run.returncode == 0, run.stderr
    assert Identity.load(home / "node" / "identity.key") == Identity.load(key)
    assert not list(here.iterdir())
    assert not lutetia("identity", "show", cwd=here, HOME=str(home), LUTETIA_HOME="~/node").returncode


def test_unknown_home_gives_one_sentence() -> None:
    for variable, commands in (
        ("LUTETIA_STATE_FOLDER", [("identity", "show"), ("doctor",), ("status", "--json")]),
        ("LUTETIA_HOME", [("identity", "show"), ("doctor",), ("join", ticket())]),
    ):
        runs = each(commands, **{variable: "~nobodyhere/node"})
        check_sentences(runs, {10})
        assert all("~nobodyhere/node begins with a home folder that does not exist" in run.stderr + run.stdout for run in runs)


def test_doctor_reports_unusable_state_folder(file: Path, barred: Path) -> None:
    for place, codes in ((file, {21}), (file / "x" / "y", {21}), (barred / "x", {21})):
        run = each([("doctor", "--json", "--state-folder", place)], without=NOT_MINE)[0]
        findings = json.loads(run.stdout)["findings"]
        failed = {finding["check"]: finding["seen"] for finding in findings if finding["verdict"] == "fail"}
        assert {run.returncode} == codes, run
        assert str(place.parent if place.parent == barred else file) in failed["disk"]
        assert ("identity" in failed) == (place.parent == barred)


def test_status_of_another_users_daemon_names_the_user(barred: Path) -> None:
    run = each([("status", "--state-folder", barred)], without=NOT_MINE)[0]
    assert run.returncode == 31
    assert run.stderr == f"lutetia: {barred} belongs to another user; run this command as that user\n"
