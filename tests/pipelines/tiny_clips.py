"""A folder of a few captioned clips for the tiny pipelines, and data and run that are made of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.build import BuildReport, build_data
from lutetia.models.data.build_settings import BuildSettings
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.training_spec import Optimisation, SamplingSpec
from tests.cli.command_runner import lutetia
from tests.models.data.clip_files import write_video
from tests.pipelines.tiny_pipelines import FRAMES, PROMPTS, SIZES, pipeline_folder

CLIPS = 6
FPS = 8.0
STEPS = 4


def write_clips(folder: Path, count: int = CLIPS) -> Path:
    """Clips of noise, captioned in the words that the tiny tokenizers know."""
    draw, lines = np.random.default_rng(0), []
    for number in range(count):
        write_video(folder / f"{number}.mp4", draw.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8), fps=FPS)
        lines.append(json.dumps({"file_name": f"{number}.mp4", "caption": PROMPTS[number % len(PROMPTS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def build_settings(name: str, cache: Path, **changes: Any) -> BuildSettings:
    frames, side = SIZES.get(name, (FRAMES, 32))
    values = {
        "pipeline": str(pipeline_folder(name)), "experts": 1, "smallest": 1, "frames": frames, "height": side, "width": side,
        "fps": FPS, "features": "builtin", "holdout": 0.34, "workers": 1, "cache": cache,
    }  # fmt: skip
    return BuildSettings(**{**values, **changes})


def build(name: str, clips: Path, folder: Path) -> BuildReport:
    """Data made with the pipeline's own autoencoder and text encoder."""
    return build_data(clips, folder / "data", build_settings(name, folder / "cache"))


def run_settings(name: str, **changes: Any) -> RunSettings:
    values = {
        "pipeline": str(pipeline_folder(name)), "sampling": SamplingSpec(steps=STEPS, guidance=3.0),
        "optimisation": Optimisation(batch=2, learning_rate=1e-3, warmup_steps=1, text_dropout=0.5, ema_decay=0.5),
        "samples_per_shard": 4, "checkpoint_samples": 4, "part": "high" if "a14b" in name else None,
    }  # fmt: skip
    return RunSettings(**{**values, **changes})


def create_by_command(name: str, data: Path, run: Path, *options: str, more: str = "") -> Manifest:
    """A run by `lutetia run create --from`, with further `options`, and `more` in its settings file."""
    settings = run.with_suffix(".toml")
    settings.write_text(_RUN + more)
    made = lutetia("run", "create", data, run, "--config", settings, "--from", pipeline_folder(name), *options)
    assert made.returncode == 0, made.stderr
    return RunFolder(run).read_manifest(time.time()).manifest


_RUN = f"""
[run]
samples_per_shard = 4
checkpoint_samples = 4
sampling = {{ steps = {STEPS}, guidance = 3.0 }}
optimisation = {{ batch = 2, learning_rate = 1e-3, warmup_steps = 1, text_dropout = 0.5, ema_decay = 0.5 }}
"""


def create(name: str, folder: Path) -> CreatedRun:
    """A run on `folder / data` whose expert starts from the pipeline's transformer."""
    return create_run(folder / "data", folder / "run", run_settings(name))
