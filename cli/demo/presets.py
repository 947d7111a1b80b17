"""What the demo draws and trains: the real demo, or a tiny one for tests that trains for seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WorkerLimit:
    """The name of a node, its CPU threads, and the share of time that it may train."""

    name: str
    threads: int
    duty: float

    @property
    def description(self) -> str:
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads}, all of the time" if self.duty >= 1 else f"{threads}, {100 * self.duty:.0f} % of the time"


@dataclass(frozen=True)
class Preset:
    """Clips to draw, settings to build the data (BuildSettings) and to create the run (RunSettings), and the nodes that train."""

    name: str
    clips: int
    frames: int
    size: int
    seed: int
    build: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    workers: tuple[WorkerLimit, ...] = (
        WorkerLimit("worker-1", 1, 1.0),
        WorkerLimit("worker-2", 1, 0.85),
        WorkerLimit("worker-3", 1, 0.55),
    )

    @property
    def slowest_first(self) -> list[str]:
        """The nodes' names, slowest first."""
        return [limit.name for limit in sorted(self.workers, key=lambda limit: limit.threads * limit.duty)]

    start_timeout: float = 120.0
    """Seconds that the coordinator may take to start."""
    run_timeout: float = 1800.0
    """Seconds that the swarm may take to finish."""


_TINY = Preset(
    name="tiny",
    clips=72,
    frames=8,
    size=32,
    seed=0,
    build={"experts": 3, "frames": 8, "height": 16, "width": 16, "latents": "pixels", "smallest": 4, "seed": 0},
    run={
        "preset": "tiny",
        "name": "tiny demo",
        "samples_per_shard": 480,
        "checkpoint_samples": 80,
        "sampling": {
            "steps": 2,
            "guidance": 1.0,
            "prompts": ("a red handwritten three moves to the left", "a purple star spins", "the camera zooms in on a cat"),
        },
    },
)


def preset_of(name: str) -> Preset:
    """The preset called `demo` or `tiny`."""
    if name == "tiny":
        return _TINY
    from lutetia.models.data import recipe

    run = {"preset": "demo", "name": "demo", "timing": {"heartbeat": 2.0, "tenure": 120.0}}
    drawn = recipe.CLIPS
    return Preset("demo", drawn["clips"], drawn["frames"], drawn["size"], drawn["seed"], build=recipe.DATA, run=run)
