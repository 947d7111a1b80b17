"""`lutetia data build|inspect` and `lutetia run create|show`, and how each refuses bad input."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from lutetia.coordinator.ledger.events import CoordinatorStarted
from lutetia.coordinator.ledger.log import Ledger
from lutetia.models.data.ingest.synthetic import make_clips
from tests.cli.command_runner import failure, lutetia

SETTINGS = 'frames = 8\nheight = 16\nwidth = 16\nlatents = "pixels"\nsmallest = 4\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips/ (real mp4 files), data.toml, and data/ that `lutetia data build` made of them."""
    folder = tmp_path_factory.mktemp("made")
    make_clips(folder / "clips", 72, 0, 8, 16)
    (folder / "data.toml").write_text(f'{SETTINGS}cache = "{folder / "cache"}"\n')
    run = lutetia("data", "build", "clips", "data", "--config", "data.toml", "--experts", "3", cwd=folder, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "lutetia run create data RUN" in run.stdout
    return folder


def test_built_data_is_inspected(made: Path) -> None:
    shards = json.loads(lutetia("data", "inspect", made / "data", "--json").stdout)["shards"]
    assert len(shards) == 3
    text = lutetia("data", "inspect", made / "data").stdout
    assert all(shard["name"] in text for shard in shards)


def test_run_is_created_and_shown(made: Path, tmp_path: Path) -> None:
    made_run = lutetia("run", "create", made / "data", tmp_path / "run", "--preset", "tiny", "--name", "trial", "--json")
    created = json.loads(made_run.stdout)
    assert (tmp_path / "run" / "ticket.txt").read_text().strip() == created["ticket"]
    shown = json.loads(lutetia("run", "show", tmp_path / "run", "--json").stdout)
    assert (shown["name"], len(shown["shards"])) == ("trial", 3)
    text = lutetia("run", "show", tmp_path / "run").stdout
    assert created["run"] in text
    again = failure(lutetia("run", "create", made / "data", tmp_path / "run", "--preset", "tiny", "--json"))
    assert again["code"] == 10
    assert "never overwritten" in again["message"]
    replay = json.loads(lutetia("coordinator", "replay", tmp_path / "run", "--json").stdout)
    assert [event["kind"] for event in replay["events"]] == ["run-created", "manifest-published"]
    early = failure(lutetia("coordinator", "replay", tmp_path / "run", "--at", "20261121", "--json"))
    assert early["code"] == 2
    assert "the run began at 20" in early["message"]
    port = lutetia("coordinator", "serve", tmp_path / "run", "--http", "127.0.0.1:99999")
    assert (port.returncode, "no port between" in port.stderr) == (10, True)


def test_replay_prints_one_line_for_each_event(made: Path, tmp_path: Path) -> None:
    name = "0.9 of [/somebody] who [b]writes\x1b[2J much " * 5
    lutetia("run", "create", made / "data", tmp_path / "run", "--preset", "tiny")
    ledger = Ledger.open(tmp_path / "run" / "ledger.sqlite")
    ledger.append([CoordinatorStarted(time=time.time(), software=name)])
    ledger.close()
    lines = lutetia("coordinator", "replay", tmp_path / "run").stdout.splitlines()
    assert lines[2].endswith(f"coordinator started ({name})".replace("\x1b", "\\x1b"))
    assert lines[3].startswith("3 events: ")
    assert lines[-1].startswith("state ")


def test_ticket_is_printed_without_line_breaks(made: Path, tmp_path: Path) -> None:
    printed = lutetia("run", "create", made / "data", tmp_path / "run", "--preset", "tiny", COLUMNS="80").stdout
    assert (tmp_path / "run" / "ticket.txt").read_text().strip() in printed


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        ("frobnicate = 3\n", (), "frobnicate"),
        ("[optimisation]\nbatch = 2\nmomentum = 1.0\n", (), "optimisation.momentum"),
        ("samples_per_shard = 'many'\n", (), "samples_per_shard"),
        ("this is not TOML", (), "not TOML"),
        ("", ("--experts", "5"), "more than the data have clusters"),
        ("[optimisation]\nbatch = 4096\n", (), "batch"),
        ("", ("--address", "nowhere"), "addresses"),
        ("", ("--preset", "huge"), "preset"),
    ],
)
def test_run_create_refuses_bad_settings(made: Path, tmp_path: Path, config: str, flags: tuple[str, ...], words: str) -> None:
    (tmp_path / "run.toml").write_text(config)
    error = failure(
        lutetia("run", "create", made / "data", tmp_path / "run", "--config", tmp_path / "run.toml", *flags, "--json")
    )
    assert error["code"] == 10
    assert words in error["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize("damage", ["caption", "undecodable", "empty", "short", "experts", "key", "absent"])
def test_data_build_refuses_bad_input(made: Path, tmp_path: Path, damage: str) -> None:
    clips, config = tmp_path / "clips", tmp_path / "data.toml"
    clips.mkdir()
    for path in sorted((made / "clips").glob("*.mp4"))[:8]:
        shutil.copy(path, clips / path.name)
        (clips / path.name).with_suffix(".txt").write_text("a red handwritten three moves up\n")
    config.write_text(f'{SETTINGS}cache = "{tmp_path / "cache"}"\n')
    first, flags, code = sorted(clips.glob("*.mp4"))[0], ["--experts", "2"], 12
    match damage:
        case "caption":
            first.with_suffix(".txt").unlink()
        case "undecodable":
            first.write_bytes(b"this is no video" * 64)
        case "empty":
            first.write_bytes(b"")
        case "short":
            config.write_text(config.read_text().replace("frames = 8", "frames = 9"))
        case "experts":
            flags = ["--experts", "40"]
        case "key":
            config.write_text("frobnicate = 1\n")
            code = 10
        case "absent":
            shutil.rmtree(clips)
    error = failure(lutetia("data", "build", clips, tmp_path / "data", "--config", config, *flags, "--json"))
    assert error["code"] == code, error
    assert "\n" not in error["message"]
    if damage in ("caption", "undecodable", "empty", "short"):
        assert first.name in error["message"]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("command", [("run", "create"), ("data", "inspect")])
def test_folder_without_data_is_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    more = [tmp_path / "run"] if command[0] == "run" else []
    error = failure(lutetia(*command, tmp_path, *more, "--json"))
    assert (error["code"], "data build" in error["message"]) == (12, True)


def test_changed_manifest_is_refused(made: Path, tmp_path: Path) -> None:
    lutetia("run", "create", made / "data", tmp_path / "run", "--preset", "tiny")
    path = tmp_path / "run" / "manifest.json"
    path.write_text(path.read_text().replace('"samples_per_shard":24', '"samples_per_shard":48'))
    assert failure(lutetia("run", "show", tmp_path / "run", "--json"))["code"] == 40
    path.write_text("{}")
    assert failure(lutetia("run", "show", tmp_path / "run", "--json"))["code"] == 10
    assert failure(lutetia("run", "show", tmp_path / "nowhere", "--json"))["code"] == 10
    assert lutetia("coordinator", "serve", tmp_path / "nowhere").returncode == 10


@pytest.mark.parametrize(("guidance", "says"), [("inf", "inf is not a finite number"), ("nan", "--guidance")])
def test_generate_refuses_guidance_that_is_not_finite(tmp_path: Path, guidance: str, says: str) -> None:
    command = ("generate", "a star", "--mixture", tmp_path / "none", "--out", tmp_path / "clip.mp4", "--guidance", guidance)
    error = failure(lutetia(*command, "--json"))
    assert (error["code"], says in error["message"]) == (2, True)
    assert not list(tmp_path.iterdir())


def test_generate_refuses_folder_without_mixture(tmp_path: Path) -> None:
    error = failure(lutetia("generate", "a star", "--mixture", tmp_path, "--out", tmp_path / "clip.mp4", "--json"))
    assert error["code"] == 10
    assert not list(tmp_path.iterdir())
