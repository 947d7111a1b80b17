"""The demo before its swarm starts: draw clips, build shards, create the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lutetia.cli.demo.presets import Preset


@dataclass(frozen=True)
class MadeRun:
    """A run that is ready to be served: its folder, the clips and shards it was made from, and its ticket."""

    folder: Path
    clips: Path
    data: Path
    ticket: str


def make_run(work: Path, preset: Preset, address: str, phase: Callable[[str], AbstractContextManager[None]]) -> MadeRun:
    """Draw clips, build shards of them and create the run.

    Args:
        work: folder for everything that is made.
        preset: what to draw and how to train.
        address: host:port where the coordinator will listen.
        phase: context manager that times a phase, given its name.
    """
    with phase("start"):  # torch takes some seconds to import
        from lutetia.cli.arguments import settings_of
        from lutetia.coordinator.admin.create import create_run
        from lutetia.coordinator.settings import RunSettings
        from lutetia.models.data.build import build_data
        from lutetia.models.data.build_settings import BuildSettings
        from lutetia.models.data.ingest.synthetic import make_clips
    clips, data, folder = work / "clips", work / "data", work / "run"
    with phase(f"draw {preset.clips} captioned clips as mp4 files"):
        make_clips(clips, preset.clips, preset.seed, preset.frames, preset.size)
    with phase("build shards: decode, encode, cluster"):
        build_data(clips, data, settings_of(BuildSettings, "demo preset", {**preset.build, "cache": work / "cache"}))
    with phase("create the run: manifest, keys, ticket"):
        settings = settings_of(RunSettings, "demo preset", {**preset.run, "addresses": (address,)})
        created = create_run(data, folder, settings)
    return MadeRun(folder, clips, data, created.ticket)
