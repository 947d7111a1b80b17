"""`lutetia evaluate`: figures, metrics left out, files, errors, missing packages and progress lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lutetia.cli.progress import ProgressLines
from lutetia.models.data.ingest.synthetic import make_clips
from tests.cli.command_runner import each, failure, lutetia

MINIATURE = Path(__file__).parents[3] / "docs" / "studies" / "miniature.toml"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn clips; every second one is held out."""
    folder = tmp_path_factory.mktemp("evaluate") / "clips"
    make_clips(folder, 96, 0, 8, 32)
    metadata = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 2 else "train"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_evaluate_measures_what_it_has_weights_for(clips: Path, tmp_path: Path) -> None:
    out, nothing = tmp_path / "report", tmp_path / "no assets"
    sizes = ("--clips", "24", "--spare", "24", "--fit-clips", "24", "--frames", "8", "--fps", "8", "--size", "32")
    run = lutetia(
        "evaluate", clips, clips, *sizes, "--out", out, "--json", LUTETIA_ASSETS=str(nothing), LUTETIA_CACHE=str(tmp_path / "c")
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    distance = next(entry for entry in report["entries"] if entry["name"] == "motion distance")
    assert distance["figure"]["n"] == distance["real"]["n"] == 24
    assert distance["figure"]["low"] <= distance["figure"]["value"] <= distance["figure"]["high"]
    assert report["left_out"]["fvd"].endswith("set LUTETIA_ASSETS to the folder that holds it, or give its path")
    assert json.loads((out / "report.json").read_text()) == report
    assert "| motion distance ↓ |" in (out / "report.md").read_text()
    assert "evaluation: reading real clips 24/24" in run.stderr
    assert "/s" in run.stderr
    refused = lutetia("evaluate", clips, clips, *sizes, "--metric", "fvd", "--json", LUTETIA_ASSETS=str(nothing))
    assert "the metric fvd cannot be measured" in failure(refused)["message"]


def test_evaluate_refuses_folder_without_mixture(clips: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("empty").mkdir()
    run = lutetia("evaluate", tmp_path / "empty", clips, "--json")
    assert failure(run)["code"] == 10
    assert "holds no mixture" in failure(run)["message"]
    unknown = lutetia("evaluate", clips, clips, "--metric", "beauty", "--json")
    assert "evaluator.metrics.0" in failure(unknown)["message"]


@pytest.mark.parametrize("package", ["cv2", "matplotlib", "skimage"])
def test_command_without_its_package_names_the_extra(package: str, clips: Path, tmp_path: Path) -> None:
    evaluate = ["evaluate", clips, clips, "--frames", "8", "--fps", "8", "--size", "32", "--json"]
    study = ["study", MINIATURE, "--folder", tmp_path / "study", "--json"]
    train = ["data", "train-autoencoder", tmp_path / "autoencoder", "--json"]
    commands = {"cv2": [evaluate, study], "matplotlib": [study], "skimage": [[*study, "--prepare"], train]}
    for run in each(commands[package], missing=package):
        assert failure(run)["code"] == 10
        extra = "demo" if "train-autoencoder" in run.args else "study"
        assert f"is not installed; run: pip install 'lutetia[{extra}]'" in failure(run)["message"]
    assert not list(tmp_path.iterdir())


def test_progress_lines_show_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = ProgressLines("work", lambda: now[0])
    for done in range(101):
        now[0] = done / 4
        lines("read", done, 100)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "work: read 0/100"
    assert printed[5] == "work: read 50/100 (4/s, 12 s left)"
    assert printed[-1] == "work: read 100/100 (4/s)"
    assert len(printed) == 11


def test_progress_lines_of_a_slow_stage_come_every_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = ProgressLines("work", lambda: now[0])
    for done in range(1000):
        now[0] = done * 2.0
        lines("train", done, 100_000)
    printed = capsys.readouterr().err.splitlines()
    assert printed[:2] == ["work: train 0/100000", "work: train 30/100000 (0.5/s, 199940 s left)"]
    assert len(printed) == 1000 // 30 + 1
