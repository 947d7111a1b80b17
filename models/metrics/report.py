"""`lutetia evaluate MIXTURE DATA`: sample the held-out prompts, judge the clips, write down each figure and what it means."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from lutetia.models.data.ingest.listing import METADATA_NAMES, read_listing
from lutetia.models.data.ingest.video import ClipShape
from lutetia.models.metrics.clips import ClipSet, read_clips
from lutetia.models.metrics.evaluator import Evaluator, EvaluatorSettings, MetricEntry
from lutetia.models.metrics.generated_clips import MixtureSampler, SamplingOptions, generate
from lutetia.models.metrics.routing import Routing, loss_table, routing_figures
from lutetia.models.metrics.timestep_loss import TimedLoss, flow_losses
from lutetia.models.mixing.description import FILE as MIXTURE
from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import DataError

Progress = Callable[[str, int, int], None]
MIN_CLIPS = 20


class EvaluateSettings(Frozen):
    """How much to judge and by what. `clips` prompts and as many real clips; `spare` more real clips make the floors at equal N.

    `shape` says how real clips are cut in time and space, as when the run's data were built; by default the middle of each. It is
    required where the clips to judge are a folder of video files. `loss_clips`: held-out clips for the loss by timestep.
    `complete`: refuse to judge at all where one of the metrics asked for cannot be had, instead of naming it as left out.
    """

    clips: int = Field(default=256, ge=MIN_CLIPS)
    spare: int = Field(default=256, ge=0)
    fit_clips: int = Field(default=1000, ge=MIN_CLIPS)
    seed: int = 0
    prompts: Literal["natural", "stratified"] = "natural"
    loss_clips: int = Field(default=256, ge=0)
    complete: bool = False
    shape: ClipShape | None = None
    sampling: SamplingOptions = SamplingOptions()
    judges: EvaluatorSettings = EvaluatorSettings()


class MetricsReport(Frozen):
    """What `evaluate` found. `left_out`: metric to the reason why it is missing."""

    judged: str
    data: str
    clips: int
    reference_clips: int
    spare_clips: int
    fit_clips: int
    shape: str
    seed: int
    prompts: str
    sampling: SamplingOptions | None
    entries: tuple[MetricEntry, ...]
    routing: Routing | None
    losses: dict[str, TimedLoss] = {}
    left_out: dict[str, str]
    hardware: str
    seconds: float

    def markdown(self) -> str:
        """The report as a table, best read beside another one of the same data and settings."""
        what = f"{self.clips} clips of {self.shape} against {self.reference_clips} held-out real ones ({self.prompts} prompts)"
        lines = [f"# {self.judged} on {self.data}", "", f"{what}, seed {self.seed}; {self.hardware}; {self.seconds:.0f} s.", ""]
        lines += ["| metric | figure (95 % interval) | real clips | note |", "|---|---|---|---|"]
        arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
        for entry in self.entries:
            real = f"{entry.real} (N = {entry.real.n})" if entry.real else "–"
            lines.append(f"| {entry.name}{arrows[entry.better]} | {entry.figure} | {real} | {entry.note} |")
        if self.routing:
            load = ", ".join(f"{share:.1%}" for share in self.routing.load)
            lines += ["", f"Routing: load {load}; balance {self.routing.balance:.2f} (1 is even); entropy of a decision "]
            lines[-1] += f"{self.routing.entropy:.3f} nats; {self.routing.switches:.1f} changes of expert per clip."
        if self.losses:
            lines += ["", loss_table(self.losses).rstrip()]
        lines += [f"\nLeft out: {name}: {reason}." for name, reason in self.left_out.items()]
        return "\n".join(lines) + "\n"


def evaluate(mixture: Path, data: Path, settings: EvaluateSettings, on_progress: Progress | None = None) -> MetricsReport:
    """Judge the mixture in the folder `mixture` by the clips of the folder `data` (videos, captions and splits).

    Prompts, reference and candidates come from the split `test`, the probes are fitted on the split `train`. `mixture` may also
    be a folder of videos with captions: these are then judged as they are. Raises DataError where there are too few clips.
    """
    begun = time.monotonic()
    step = on_progress or (lambda what, done, total: None)
    stratified = settings.prompts == "stratified"
    if _holds_clips(mixture):
        if settings.shape is None:
            raise DataError(f"{mixture} is a folder of videos; say into which shape (frames, fps, size) to bring them")
        shape, sampling, sampler = settings.shape, None, None
    else:
        sampling, sampler = settings.sampling, MixtureSampler(mixture, settings.sampling, settings.judges.device)
        shape = _agreed(settings.shape, sampler.shape)

    def read(split: Literal["train", "test"], first: int, limit: int, what: str) -> ClipSet:
        return read_clips(
            data, shape, split=split, first=first, limit=limit, seed=settings.seed, stratified=stratified and split == "test",
            on_progress=lambda done, total: step(what, done, total),
        )  # fmt: skip

    reference = read("test", 0, settings.clips, "reading real clips")
    if len(reference) < MIN_CLIPS:
        raise DataError(f"{data} has {len(reference)} clips of split test, fewer than {MIN_CLIPS}; hold more clips out")
    left = sum(clip.split == "test" for clip in read_listing(data).clips) - settings.clips
    wants_spare = min(left, settings.spare) >= 2  # a small test split leaves none, and floors then come from halves
    spare = read("test", settings.clips, settings.spare, "reading further real clips") if wants_spare else None
    fit = read("train", 0, settings.fit_clips, "reading clips to fit the probes on")
    judges = Evaluator(fit, reference, spare, settings.judges, on_progress)
    if settings.complete and judges.left_out:
        name, reason = next(iter(judges.left_out.items()))
        raise DataError(f"the metric {name} cannot be measured: {reason}; or leave it out of the metrics asked for")
    routing, losses = None, {}
    if sampler is None:
        judged = _known(mixture, shape, settings.clips, reference)
    else:
        judged, weights = generate(sampler, reference, settings.sampling, settings.seed, settings.judges.cache, step)
        routing = routing_figures(weights)
        if settings.loss_clips:
            losses = flow_losses(
                sampler.pipeline, reference.take(range(min(settings.loss_clips, len(reference)))), seed=settings.seed,
                on_progress=lambda done, total: step("loss by timestep", done, total),
            )  # fmt: skip
    return MetricsReport(
        judged=mixture.name,
        data=data.name,
        clips=len(judged),
        reference_clips=len(reference),
        spare_clips=len(spare) if spare else 0,
        fit_clips=len(fit),
        shape=f"{shape.frames} x {shape.height} x {shape.width} px at {shape.fps:g} fps",
        seed=settings.seed,
        prompts=settings.prompts,
        sampling=sampling,
        entries=tuple(judges.judge(judged, (settings.seed,))),
        routing=routing,
        losses=losses,
        left_out=judges.left_out,
        hardware=hardware(),
        seconds=time.monotonic() - begun,
    )


def hardware() -> str:
    """The device in words, as it stands beside every figure."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores of {_processor()} ({platform.machine()})"


def _processor() -> str:
    """The processor's name as Linux tells it, or else "a CPU"."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "a CPU"


def _agreed(asked: ClipShape | None, made: ClipShape) -> ClipShape:
    """The user's way of cutting real clips, if it gives clips of the mixture's size."""
    if asked is None:
        return made
    for name in ("frames", "height", "width"):
        if getattr(asked, name) != getattr(made, name):
            raise DataError(
                f"the mixture makes clips of {name} {getattr(made, name)}, not {getattr(asked, name)}; judge at its own size"
            )
    return asked


def _holds_clips(folder: Path) -> bool:
    """Whether a folder is to be judged as clips: by their metadata, or as archives or files with captions beside them."""
    if any((folder / name).is_file() for name in METADATA_NAMES):
        return True
    try:
        return not (folder / MIXTURE).is_file() and bool(read_listing(folder).clips)
    except DataError:
        return False


def _known(folder: Path, shape: ClipShape, limit: int, reference: ClipSet) -> ClipSet:
    """The folder's clips whose captions are prompts of the reference. Raises DataError when there are too few to judge."""
    prompts = frozenset(reference.captions)
    found = sum(clip.caption in prompts for clip in read_listing(folder).clips)
    if found < MIN_CLIPS:
        raise DataError(
            f"{found} clips of {folder} have captions of the held-out clips, fewer than {MIN_CLIPS}; sample those prompts"
        )
    return read_clips(folder, shape, captions=prompts, limit=limit)
