"""`lutetia init`: what it proposes for some clips, and that build, create and serve run from the file at the first try."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from lutetia.cli.arguments import read_config, same_config, settings_of
from lutetia.cli.commands.run import created_text
from lutetia.cli.init.proposal import ClipFacts, DataChoice, Measured, choose_budget, choose_data
from lutetia.cli.init.run import write_settings
from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.settings import RunSettings, ServeSettings
from lutetia.models.data.build import build_data
from lutetia.models.data.build_settings import BuildSettings, ClusterSettings
from lutetia.models.data.cluster.kmeans import smallest_cluster
from lutetia.models.data.decode.cut import ClipLook
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.system.errors import ConfigError, DataError
from tests.cli.command_runner import failure, lutetia
from tests.models.data.clip_files import WORDS, look, write_video


def chosen(training: int, *seconds: float, all_seen: bool = True, has_accelerator: bool = False) -> DataChoice:
    looks = [ClipLook(240, 320, each, round(24 * each)) for each in seconds or (4.0,)]
    return choose_data(ClipFacts(training, looks, all_seen), has_accelerator)


@pytest.mark.parametrize("training", [8, 15, 16, 20, 30, 35, 36, 45, 60, 200, 5000])
def test_proposed_sizes_fit_the_number_of_clips(training: int) -> None:
    choice = chosen(training)
    settings = ClusterSettings(experts=choice.experts, smallest=choice.smallest)
    assert smallest_cluster(settings, training) == choice.smallest
    assert choice.batch <= choice.smallest - choice.smallest // 4, "a quarter of a small shard is held out"
    assert 3200 % choice.batch == 0


def test_too_few_clips_are_one_sentence() -> None:
    with pytest.raises(DataError, match="7 clips for training are too few for a run; bring at least 8"):
        chosen(7)


@pytest.mark.parametrize(
    ("seconds", "all_seen", "fps", "short"),
    [
        ([4.0] * 20, True, 8.0, "refuse"),
        ([4.0] * 19 + [0.5], True, 8.0, "loop"),
        ([0.5] * 20, True, 16.0, "refuse"),
        ([0.1] * 20, True, 30.0, "loop"),
        ([4.0] * 20, False, 8.0, "loop"),
    ],
)
def test_rate_follows_how_long_the_clips_last(seconds: list[float], all_seen: bool, fps: float, short: str) -> None:
    choice = chosen(30, *seconds, all_seen=all_seen)
    assert (choice.fps, choice.short) == (fps, short)


@pytest.mark.parametrize("pace", [1e-4, 0.01, 0.3, 3.0])
def test_budget_takes_hours_and_divides(pace: float) -> None:
    budget = choose_budget(Measured(4_000_000, 50_000_000, pace, "cpu"), 8)
    assert budget.samples % budget.checkpoint == budget.checkpoint % 8 == 0
    assert budget.hours <= 8 or budget.samples == 4 * budget.checkpoint
    assert budget.memory_gb == pytest.approx(0.13)
    assert budget.upload_gb == pytest.approx(0.064)


@pytest.mark.parametrize("count", [20, 60])
def test_first_try_works_on_few_clips(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTETIA_CACHE", str(tmp_path / "cache"))
    for number in range(count):
        kind = ("ball", "bars", "noise")[number % 3]
        path = write_video(tmp_path / f"clips/{number:02}.mp4", look(kind, number, 12))
        path.with_suffix(".txt").write_text(WORDS[kind])
    (tmp_path / "clips/broken.mp4").write_bytes(b"broken")
    (tmp_path / "clips/broken.txt").write_text("broken")
    file = tmp_path / "run.toml"
    report = write_settings(tmp_path / "clips", file, lambda *_: None)
    assert [reason.split(" cannot")[0] for reason in report.bad] == ["broken.mp4"]
    built = build_data(tmp_path / "clips", tmp_path / "data", settings_of(BuildSettings, "", read_config(file, "data")))
    assert len(built.description.shards) == report.data.experts
    created = create_run(tmp_path / "data", tmp_path / "run", settings_of(RunSettings, "", read_config(file, "run")))
    assert created.manifest.optimisation.batch == report.data.batch
    assert settings_of(ServeSettings, "", read_config(file, "serve")) == ServeSettings()
    assert tomllib.loads(file.read_text())["run"]["samples_per_shard"] == report.budget.samples
    with pytest.raises(ConfigError, match="run.toml exists already and is not overwritten; name another file with --out"):
        write_settings(tmp_path / "clips", file, lambda *_: None)
    plain_run = create_run(tmp_path / "data", tmp_path / "plain", RunSettings())
    smallest = min(shard.clips for shard in plain_run.manifest.shards)
    assert plain_run.manifest.optimisation.batch == min(16, next(n for n in range(smallest, 0, -1) if 3200 % n == 0))
    with pytest.raises(ConfigError, match="fewer than a batch of 512"):
        create_run(tmp_path / "data", tmp_path / "big", RunSettings(optimisation=Optimisation(batch=512), checkpoint_samples=512))


def test_file_of_several_commands_gives_each_its_table(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data]\nexperts = 2\n[run]\nname = "a"\n')
    assert read_config(file, "data") == {"experts": 2}
    assert read_config(file, "serve") == {}
    file.write_text("experts = 2\n")
    assert read_config(file, "data") == {"experts": 2}, "a file for one command has no tables of commands"
    file.write_text('experts = 2\n[run]\nname = "a"\n')
    with pytest.raises(ConfigError, match=r"tables of several commands and experts outside of them; move it into \[data\]"):
        read_config(file, "data")


def test_next_command_takes_the_same_file_where_it_has_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "my run.toml"
    file.write_text('[data]\nexperts = 2\n[run]\nname = "a"\n')
    assert same_config(file, "run") == f" --config '{file}'"
    assert same_config(file, "serve") == same_config(None, "run") == ""
    file.write_text("experts = 2\n")
    assert same_config(file, "run") == "", "a file for one command is refused by the next"
    assert (
        created_text({"run": "0" * 64, "folder": "run", "ticket": "t"}, " --config x")
        .splitlines()[1]
        .endswith("serve run --config x")
    )


def test_command_names_what_is_missing(tmp_path: Path) -> None:
    refused = failure(lutetia("init", "nowhere", "--json", cwd=tmp_path))
    assert (refused["code"], refused["message"].split(" is not")[0]) == (12, "nowhere")


def test_too_few_clips_name_what_was_not_used(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "notes.doc").write_text("no clip")
    with pytest.raises(DataError, match=r"0 clips for training are too few .*Not used: .*pipe\.mp4"):
        write_settings(tmp_path, tmp_path.parent / "settings.toml", lambda *_: None)
