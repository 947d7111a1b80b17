"""Losses and clips of a training, exported step by step to a file, to TensorBoard and to trackio's interface."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.settings import load_settings
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.export import TrainingExport
from lutetia.node.trainer.loss_log import open_log
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import ConfigError
from tests.models.mixing.tiny_mixture import PIXELS, WAN_PIXELS
from tests.models.tiny_experts import tiny_data, tiny_manifest

STEPS = 6  # of an epoch


def run_with_prompts(text_encoder: str = "builtin:words") -> Manifest:
    latent = PIXELS.model_copy(update={"text_encoder": text_encoder})
    return tiny_manifest(
        1, expert=WAN_PIXELS, latent=latent, sampling={"steps": 2, "guidance": 2.0, "prompts": ("a ball", "a cube")}
    )


def exported(manifest: Manifest, steps: int = STEPS, **fields: Any) -> ExpertTrainer:
    """A trainer that has exported so many steps as `fields` of its assignment say."""
    trainer = ExpertTrainer(manifest, 0, tiny_data(latent=manifest.latent))
    none = Path("unused")
    assignment = Assignment(manifest=none, shard=0, data=none, folder=none, epoch=0, parent=None, until=2, **fields)
    export = TrainingExport.of(trainer, assignment)
    for _ in range(steps):
        export.step(trainer.step(), 2.5)
    export.close()
    return trainer


def test_json_lines_hold_every_step_and_clips_of_the_prompts(tmp_path: Path) -> None:
    manifest = run_with_prompts()
    trainer = exported(manifest, losses=str(tmp_path / "new" / "losses.jsonl"), clips_every=1)
    lines = [json.loads(line) for line in (tmp_path / "new" / "losses.jsonl").read_text().splitlines()]
    steps, clips = lines[:STEPS], lines[STEPS:]
    assert [line["loss"] for line in steps] == trainer.trace
    assert [line["step"] for line in steps] == list(range(STEPS))
    assert all((line["run"], line["shard"]) == (manifest.run_id, 0) for line in lines)
    assert steps[0]["learning_rate"] < steps[2]["learning_rate"]
    assert [clip["prompt"] for clip in clips[0]["clips"]] == ["a ball", "a cube"]
    assert all(Path(clip["file"]).read_bytes().startswith(b"GIF8") for clip in clips[0]["clips"])
    exported(manifest, 1, losses=str(tmp_path / "new" / "losses.jsonl"))
    assert len((tmp_path / "new" / "losses.jsonl").read_text().splitlines()) == STEPS + 2, "a restart appends"


def test_exports_do_not_change_the_training(tmp_path: Path) -> None:
    manifest = run_with_prompts()
    watched = exported(manifest, 2 * STEPS, losses=str(tmp_path / "losses.jsonl"), clips_every=1)
    assert exported(manifest, 2 * STEPS).trace == watched.trace


def test_tensorboard_reads_losses_and_clips(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    manifest = run_with_prompts()
    trainer = exported(manifest, losses=f"tensorboard:{tmp_path}", clips_every=1)
    events = accumulator.EventAccumulator(str(tmp_path / f"{manifest.run_id[:12]}-shard-0"), {"images": 0, "scalars": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(trainer.trace)
    assert [event.step for event in events.Scalars("loss")] == list(range(STEPS))
    assert sorted(events.Tags()["images"]) == ["clips/a ball", "clips/a cube"]


def test_trackio_gets_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module stands in here: it cannot be installed beside the pinned pillow. The calls are those of its version 0.43."""
    seen: list[Any] = []
    run = SimpleNamespace(log=lambda metrics, step=None: seen.append((step, metrics["loss"])), finish=lambda: seen.append("end"))
    module = ModuleType("trackio")
    vars(module)["init"] = lambda **options: seen.append(options) or run
    monkeypatch.setitem(sys.modules, "trackio", module)
    manifest = tiny_manifest(1)
    trainer = exported(manifest, 2, losses="trackio:video")
    assert seen[0] == {"project": "video", "name": f"{manifest.run_id[:12]}-shard-0", "resume": "allow", "embed": False}
    assert seen[1:] == [(0, trainer.trace[0]), (1, trainer.trace[1]), "end"]


def test_failing_export_is_logged_once_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        exported(tiny_manifest(1), 2, losses=str(tmp_path / "file" / "losses.jsonl"))
        exported(run_with_prompts("somebody/encoder"), 1, losses=str(tmp_path / "losses.jsonl"), clips_every=1)
    texts = [record.getMessage() for record in caplog.records if record.name == "lutetia.node.trainer.export"]
    assert texts[0].startswith("losses: cannot write to")
    assert "cannot load text encoder 'somebody/encoder'" in texts[1]
    assert len(texts) == 2
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 1


def test_places_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("losses.txt", "tensorboard:", "wandb:video", ""):
        with pytest.raises(ConfigError, match="is no place for losses; give a file that ends in .jsonl, tensorboard:FOLDER"):
            load_settings({"ticket": "t", "losses": place})
    assert load_settings({"ticket": "t", "losses": "tensorboard:runs"})[0].losses == "tensorboard:runs"
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"trackio is not installed here; run: pip install 'lutetia\[trackio\]'"):
        open_log("trackio:video", "0" * 64, 0)
