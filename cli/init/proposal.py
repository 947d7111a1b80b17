"""What `lutetia init` proposes for some clips and a machine, each choice with its reason. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from lutetia.models.data.decode.cut import ClipLook
from lutetia.system.errors import DataError

FEWEST_CLIPS = 8
FRAMES = 8
_HOURS = 8  # of an expert on this machine, at most, where that allows some epochs
_EPOCH_SECONDS = 900


@dataclass(frozen=True)
class ClipFacts:
    """The clips of a folder.

    Attributes:
        training: clips to train on and to hold out.
        looks: of those that were looked at.
        all_seen: whether every clip was looked at.
    """

    training: int
    looks: Sequence[ClipLook]
    all_seen: bool


@dataclass(frozen=True)
class DataChoice:
    """Settings of `lutetia data build`, the batch that fits its smallest shard, and reasons by setting."""

    experts: int
    frames: int
    fps: float
    side: int
    short: str
    smallest: int
    batch: int
    why: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """An expert on this machine: parameters, bytes that a training step of the batch keeps, and seconds a sample."""

    parameters: int
    activation_bytes: int
    seconds_per_sample: float
    device: str


@dataclass(frozen=True)
class BudgetChoice:
    """The budget of an expert and what it costs.

    Attributes:
        samples: budget of each expert.
        checkpoint: samples of an epoch.
        memory_gb: memory of a card that trains it with the whole batch.
        upload_gb: what a node uploads after each epoch.
        hours: of one expert on this machine.
    """

    samples: int
    checkpoint: int
    memory_gb: float
    upload_gb: float
    hours: float


def choose_data(facts: ClipFacts, has_accelerator: bool) -> DataChoice:
    """Choose shapes and sizes. Raises DataError if the clips are too few."""
    count = facts.training
    if count < FEWEST_CLIPS or not facts.looks:
        raise DataError(f"{count} clips for training are too few for a run; bring at least {FEWEST_CLIPS}, better some hundreds")
    experts = 1 if count < 16 else 2 if count < 36 else 3
    share = 2 * count // (3 * experts)
    smallest = max(2, min(32, share))
    batch = max(size for size in (1, 2, 4, 8, 16) if size <= max(1, 3 * smallest // 5))
    fps, short, why_fps, why_short = _rate(facts)
    side = 128 if has_accelerator else 64
    why = {
        "experts": f"{count} clips for training: about {count // experts} for each expert",
        "fps": why_fps,
        "height": "the machine has an accelerator" if has_accelerator else "small, for a machine without an accelerator",
        "short": why_short,
        "smallest": "two thirds of an equal share" if smallest < 32 else "enough for the batch below",
        "batch": f"the smallest shard has {smallest} clips, of which some are held out",
    }
    return DataChoice(experts, FRAMES, fps, side, short, smallest, batch, why)


def _rate(facts: ClipFacts) -> tuple[float, str, str, str]:
    """Frames per second and what to do with short clips, each with its reason."""
    seconds = sorted(look.seconds for look in facts.looks)
    usual = quantiles(seconds, n=10)[0] if len(seconds) > 1 else seconds[0]
    fps = 8.0 if usual >= FRAMES / 8 or usual <= 0 else float(min(30, math.ceil(FRAMES / usual)))
    window = FRAMES / fps
    short = sum(each < window for each in seconds)
    why_fps = f"{FRAMES} frames are {window:.2f} s; the clips last {seconds[0]:.1f} to {seconds[-1]:.1f} s"
    if short:
        return fps, "loop", why_fps, f"{short} of {len(seconds)} clips are shorter and are repeated from their beginning"
    if not facts.all_seen:
        return fps, "loop", why_fps, f"only {len(seconds)} clips were looked at; shorter ones are repeated from their beginning"
    return fps, "refuse", why_fps, "no clip is shorter"


def choose_budget(measured: Measured, batch: int) -> BudgetChoice:
    """Choose budget and epoch, so that an expert takes hours rather than days on this machine."""
    pace = max(measured.seconds_per_sample, 1e-6)
    checkpoint = 3200
    while checkpoint > 200 and checkpoint * pace > _EPOCH_SECONDS:
        checkpoint //= 2
    checkpoint -= checkpoint % batch
    epochs = max(4, min(20, int(_HOURS * 3600 / (checkpoint * pace))))
    states = measured.parameters * (4 + 4 + 4 + 8)  # parameters, gradients, their average, two moments
    return BudgetChoice(
        samples=epochs * checkpoint,
        checkpoint=checkpoint,
        memory_gb=(states + measured.activation_bytes) / 1e9,
        upload_gb=measured.parameters * (4 + 4 + 8) / 1e9,  # the average, and parameters and moments to resume from
        hours=epochs * checkpoint * pace / 3600,
    )
