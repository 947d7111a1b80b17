"""`lutetia study` with the miniature study: plan, interruption, resumption, tables and pictures; every stage is real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lutetia.cli.commands.study import load_study
from lutetia.cli.study.autoencoder import own_latents
from lutetia.cli.study.state import StudyState
from lutetia.cli.study.training import create
from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.data.ingest.synthetic import make_clips
from lutetia.models.metrics.clips import read_clips
from lutetia.models.study.config import StudyConfig
from lutetia.models.study.results import StudyResults
from lutetia.system.errors import ConfigError
from lutetia.system.files import write_atomic
from tests.child_environment import clean_environment
from tests.cli.command_runner import failure, lutetia

CONFIG = Path(__file__).parents[3] / "docs" / "studies" / "miniature.toml"


def test_study_plan_is_printed_and_nothing_runs(tmp_path: Path) -> None:
    run = lutetia("study", CONFIG, "--folder", tmp_path / "study", "--plan", "--json")
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    arms = [training["arm"] for training in document["plan"]["trainings"]]
    assert arms == ["frames", "monolith", "mixture", "small-batch", "balanced", "warm-start"]
    hours = document["core_hours"]
    assert 0 < hours["autoencoder"] < hours["all"]
    assert not (tmp_path / "study").exists()


def test_study_plan_refuses_impossible_autoencoder_size(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(CONFIG.read_text().replace("height = 16\nwidth = 16", "height = 20\nwidth = 20"))
    run = lutetia("study", wrong, "--plan", "--json")
    assert failure(run)["code"] == 10
    assert "20 pixels" in failure(run)["message"]


def test_load_study_refuses_missing_and_unknown_keys(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(CONFIG.read_text().replace("text_tokens = 12\n", ""))
    with pytest.raises(ConfigError, match=r"data.text_tokens must be set"):
        load_study(wrong)
    wrong.write_text("colour = 3\n" + CONFIG.read_text())
    with pytest.raises(ConfigError, match=r"colour.*known keys"):
        load_study(wrong)
    assert load_study(CONFIG, device="cuda", tune=True).evaluation.on == "tune"


def test_forget_deletes_figures_of_a_removed_run(tmp_path: Path) -> None:
    """The run was removed, as a study asks for when its budget has changed."""
    state = StudyState.prepare(load_study(CONFIG), tmp_path, tmp_path / "out", tmp_path / "cache", lambda *_: None)
    first, second = state.plan.of("headline", "monolith")[0], state.plan.of("headline", "mixture")[0]
    removed, others = (state.plan.readings_of(training)[0].name for training in (first, second))
    compared = ["headline-natural-0", f"against-{others}", "spare-rebuilt-natural"]
    for name in (removed, others, *compared):
        write_atomic(state.figure(name), b"{}")
    state.forget(first)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == [state.figure(others).name]
    for name in compared:
        write_atomic(state.figure(name), b"{}")
    state.forget(first)  # trained for the first time: the figures of the others stay
    assert len(list((tmp_path / "figures").iterdir())) == 4


def test_create_uses_learning_rate_of_the_arm(tmp_path: Path) -> None:
    values = tomllib.loads(CONFIG.read_text())
    config = StudyConfig(**{**values, "controls": {"share": 1.0, "learning_rates": [5e-4], "clips": 20}})
    state = StudyState.prepare(config, tmp_path, tmp_path / "out", tmp_path / "cache", lambda *_: None)
    rates = {}
    for training in (each for each in state.plan.trainings if each.tier != "base"):
        create(training, state.data(training), run := state.folder(training) / "run", config)
        rates[training.name] = RunFolder(run).read_manifest(now=0.0).manifest.optimisation.learning_rate
    assert rates == {
        "headline-monolith-s0": 1e-3,
        "headline-mixture-s0": 1e-3,
        "control-monolith-rate-0.0005-s0": 5e-4,
        "control-mixture-rate-0.0005-s0": 5e-4,
    }


def test_own_latents_are_trained_again_for_other_clips(tmp_path: Path) -> None:
    values = tomllib.loads(CONFIG.read_text())
    values["autoencoder"]["steps"] = 1
    folders = []
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "clips", ignore_errors=True)
        make_clips(tmp_path / "clips", 120, seed, 8, 32)
        config = StudyConfig(**{**values, "clips": {"kind": "folder", "folder": str(tmp_path / "clips")}})
        folders.append(own_latents(config, tmp_path / "clips", tmp_path / "cache", lambda *_: None)[0])
    assert folders[0] != folders[1]
    assert own_latents(config, tmp_path / "clips", tmp_path / "cache", lambda *_: None)[0] == folders[1]


@pytest.mark.timeout(1200)  # two minutes on two idle cores
def test_interrupted_study_resumes_and_writes_tables(tmp_path: Path) -> None:
    home, out = tmp_path / "study", tmp_path / "out"
    arguments = [sys.executable, "-m", "lutetia.cli", "study", str(CONFIG), "--folder", str(home), "--out", str(out)]
    environment = {**clean_environment(), "OMP_NUM_THREADS": "1", "LUTETIA_PARENT": str(os.getpid())}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as first:
        assert first.stderr is not None
        lines = []
        for line in first.stderr:
            lines.append(line)
            if "headline-mixture-s0" in line:  # its swarm is up
                break
        first.send_signal(signal.SIGTERM)
        lines.append(first.communicate()[1])
    assert first.returncode == 143, "".join(lines)
    weights = home / "runs" / "headline-monolith-s0" / "run" / "mixture" / "mixture.json"
    before = weights.read_bytes()
    assert not (home / "runs" / "headline-mixture-s0" / "run" / "mixture").exists()

    run = lutetia("study", CONFIG, "--folder", home, "--out", out, "--json", timeout=1100)
    assert run.returncode == 0, run.stderr
    assert "headline-monolith-s0 " not in run.stderr  # it was finished
    assert weights.read_bytes() == before
    results = StudyResults.model_validate_json((out / "results.json").read_bytes())
    StudyConfig.model_validate(results.config)
    trainings = {training.arm: training for training in results.plan.trainings}
    assert trainings["mixture"].flops <= trainings["monolith"].flops
    manifests = [RunFolder(home / "runs" / name / "run").read_manifest(now=0.0).manifest for name in results.trainings]
    bases = {manifest.name.removeprefix("headline-"): manifest.expert.init for manifest in manifests}
    assert bases["base-frames-s0"] is None
    assert bases["monolith-s0"] == bases["mixture-s0"] == bases["small-batch-s0"] is not None, "all start from the image model"
    assert bases["control-warm-start-s0"] not in (None, bases["mixture-s0"]), "that one starts from the monolith, which did"
    assert manifests[0].latent.frames == 1
    (ratio,) = [row.ratio for row in results.headline["natural"] if row.ratio]
    assert (ratio.n, ratio.seeds) == (22, (0,))
    assert ratio.low <= ratio.value <= ratio.high  # after two steps of the autoencoder both sides look alike
    rebuilt = {entry.name: entry.figure for entry in results.rebuilt["natural"]}
    assert rebuilt["motion distance"].n == 20  # of the spare clips
    assert [row.first.n for row in results.beyond["natural"]] == [22, 22]
    controls = [reading for _, reading in results.plan.controls(StudyConfig.model_validate(results.config))]
    assert len(controls) == 10  # the pair, small-batch, balanced, warm-start; of the mixture: oracle, text-blind, three experts
    against = {reading.name for reading in controls if not (reading.plain and reading.training == "headline-mixture-s0")}
    assert results.against.keys() == against
    for reading in controls:
        if reading.name in against:
            whole, part = results.against[reading.name], results.evaluated[reading.name].entries[0]
            mixture = results.evaluated["headline-mixture-s0-e2-router-own-natural-20"].entries[0]
            assert (part.name, whole.n) == ("motion distance", 20)
            assert whole.value == pytest.approx(part.figure.value / mixture.figure.value, rel=1e-6)
    routes = {evaluated.reading.route for evaluated in results.evaluated.values()}
    assert routes == {"router", "oracle", "text-blind"}
    losses = next(evaluated.losses for evaluated in results.evaluated.values() if "right expert" in evaluated.losses)
    assert set(losses) == {"mixture", "right expert", "expert 0", "expert 1", "expert 2"}
    assert set(results.autoencoder_psnr) <= {"camera", "digit", "shape"}
    page = (out / "README.md").read_text()
    assert str(tmp_path) not in page + (out / "results.json").read_text()  # results are published
    assert "561.04" in page
    assert "**All arms start from one image model**, trained on 24 single frames" in page
    assert "## What the mixture is worth in compute" in page
    assert "encoded and decoded again by the autoencoder, have motion distance" in page
    assert page.count("(clusters/00") == 3
    assert "mixture, oracle routing" in page
    assert "motion distance ÷ the mixture's" in page
    assert "| balanced | 0 |" in page
    assert "| small-batch | 0 |" in page
    assert "### small-batch against mixture, natural prompts, N = 22, seeds 0" in page
    assert results.rivals["small-batch"]["natural"][0].second == results.headline["natural"][0].second, "the same mixture"
    assert "| warm-start | 0 |" in page
    for picture in ("curves.png", "samples.png", *(f"clusters/{path.name}" for path in (out / "clusters").iterdir())):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    evaluated_on = set(read_clips(home / "clips" / "test", StudyConfig.model_validate(results.config).data.clip_shape).captions)
    trained_on = {json.loads(line)["caption"] for line in (home / "clips" / "train" / "metadata.jsonl").read_text().splitlines()}
    assert not evaluated_on & trained_on

    again = tmp_path / "again"
    assert lutetia("study", CONFIG, "--folder", home, "--out", again, "--json", timeout=300).returncode == 0
    assert (again / "README.md").read_text() == page  # all figures are read before the first report is written

    other = tmp_path / "other.toml"
    other.write_text(CONFIG.read_text().replace("samples = 144", "samples = 192"))
    assert "holds a study of another config" in failure(lutetia("study", other, "--folder", home, "--json"))["message"]
    other.write_text(CONFIG.read_text().replace("share = 1.0", "share = 0.9"))
    refused = lutetia("study", other, "--folder", home, "--json")
    assert "name another --folder" in failure(refused)["message"]


def test_tables_are_made_again_from_results_alone(tmp_path: Path) -> None:
    union = Path(__file__).parents[3] / "docs" / "results" / "union"
    shutil.copy(union / "results.json", tmp_path)
    run = lutetia("study", CONFIG, "--tables", "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "compute multiplier" in (tmp_path / "README.md").read_text()
    (tmp_path / "results.json").write_text("{}")
    refused = lutetia("study", CONFIG, "--tables", "--out", tmp_path, "--json")
    assert failure(refused)["code"] == 10
    assert "is not the results of a study" in failure(refused)["message"]
