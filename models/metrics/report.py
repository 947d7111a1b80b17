"""`lutetia evaluate MIXTURE DATA`: sample the held-out prompts, measure the clips, and report each figure with its meaning."""

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

from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.data.ingest.listing import METADATA_NAMES, read_listing
from lutetia.models.metrics.clips import ClipSet, read_clips
from lutetia.models.metrics.evaluator import Evaluator, MetricEntry
from lutetia.models.metrics.generated_clips import MixtureSampler, generate
from lutetia.models.metrics.routing import Routing, loss_table, routing_figures
from lutetia.models.metrics.settings import MIN_CLIPS, EvaluateSettings
from lutetia.models.metrics.timestep_loss import TimedLoss, flow_losses
from lutetia.models.mixing.description import FILE as MIXTURE
from lutetia.models.mixing.options import SamplingOptions
from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import DataError

Progress = Callable[[str, int, int], None]
"""(stage, done, total)."""


class MetricsReport(Frozen):
    """The result of `lutetia evaluate`."""

    evaluated: str = Field(description="name of the folder of the mixture or of the clips")
    data: str = Field(description="name of the folder of real clips")
    clips: int = Field(description="evaluated clips")
    reference_clips: int = Field(description="real held-out clips that they were compared with")
    spare_clips: int = Field(description="more real held-out clips, for the floors")
    fit_clips: int = Field(description="real training clips that probe and classifier were fitted on")
    shape: str = Field(description="frames, size in pixels and frames per second of the clips, in words")
    seed: int = Field(description="seed of the choice of clips and of the sampling noise")
    prompts: str = Field(description="natural or stratified")
    sampling: SamplingOptions | None = Field(description="how the mixture was sampled; none for a folder of clips")
    entries: tuple[MetricEntry, ...] = Field(description="one line per figure")
    routing: Routing | None = Field(description="decisions of the router; none for a folder of clips")
    losses: dict[str, TimedLoss] = Field(default={}, description="candidate (mixture, expert 0, …) to its held-out loss")
    left_out: dict[str, str] = Field(description="metric to the reason why it was not measured")
    hardware: str = Field(description="the machine, in words")
    seconds: float = Field(description="duration of the evaluation, seconds")

    def markdown(self) -> str:
        """The report as a table; compare it with another report of the same data and settings only."""
        scope = f"{self.clips} clips of {self.shape} against {self.reference_clips} held-out real ones ({self.prompts} prompts)"
        lines = [
            f"# {self.evaluated} on {self.data}",
            "",
            f"{scope}, seed {self.seed}; {self.hardware}; {self.seconds:.0f} s.",
            "",
        ]
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
    """Evaluate a mixture on held-out real clips.

    Args:
        mixture: folder of the mixture, or a folder of videos with captions, which are measured as they are.
        data: folder of real clips with captions and splits. Prompts, reference and candidates come from the split `test`; the
            probes are fitted on the split `train`.
        settings: how many clips, and which metrics.
        on_progress: called with stage, done and total.

    Raises DataError if there are too few clips or, with `settings.complete`, if a metric cannot be measured.
    """
    started = time.monotonic()
    step = on_progress or (lambda stage, done, total: None)
    stratified = settings.prompts == "stratified"
    if _holds_clips(mixture):
        if settings.shape is None:
            raise DataError(f"{mixture} is a folder of videos; set the frames, fps and size that they are cut to")
        shape, sampling, sampler = settings.shape, None, None
    else:
        sampling, device = settings.sampling, settings.evaluator.device
        sampler = MixtureSampler(mixture, sampling, device, hub=settings.hub)
        shape = _agreed(settings.shape, sampler.shape)

    def read(split: Literal["train", "test"], first: int, limit: int, stage: str) -> ClipSet:
        return read_clips(
            data, shape, split=split, first=first, limit=limit, seed=settings.seed, stratified=stratified and split == "test",
            on_progress=lambda done, total: step(stage, done, total),
        )  # fmt: skip

    reference = read("test", 0, settings.clips, "reading real clips")
    if len(reference) < MIN_CLIPS:
        raise DataError(f"{data} has {len(reference)} clips of split test, fewer than {MIN_CLIPS}; hold more clips out")
    remaining = sum(clip.split == "test" for clip in read_listing(data).clips) - settings.clips
    has_spare = min(remaining, settings.spare) >= 2  # else floors come from two halves of the reference
    spare = read("test", settings.clips, settings.spare, "reading more real clips") if has_spare else None
    fit = read("train", 0, settings.fit_clips, "reading clips to fit the probes on")
    evaluator = Evaluator(fit, reference, spare, settings.evaluator, on_progress)
    if settings.complete and evaluator.left_out:
        name, reason = next(iter(evaluator.left_out.items()))
        raise DataError(f"the metric {name} cannot be measured: {reason}; or remove it from the list of metrics")
    routing, losses = None, {}
    if sampler is None:
        clips = _known(mixture, shape, settings.clips, reference)
    else:
        clips, weights = generate(sampler, reference, settings.sampling, settings.seed, settings.evaluator.cache, step)
        routing = routing_figures(weights)
        if settings.loss_clips:
            losses = flow_losses(
                sampler.pipeline, reference.take(range(min(settings.loss_clips, len(reference)))), seed=settings.seed,
                on_progress=lambda done, total: step("loss by timestep", done, total),
            )  # fmt: skip
    return MetricsReport(
        evaluated=mixture.name,
        data=data.name,
        clips=len(clips),
        reference_clips=len(reference),
        spare_clips=len(spare) if spare else 0,
        fit_clips=len(fit),
        shape=f"{shape.frames} x {shape.height} x {shape.width} px at {shape.fps:g} fps",
        seed=settings.seed,
        prompts=settings.prompts,
        sampling=sampling,
        entries=tuple(evaluator.evaluate(clips, (settings.seed,))),
        routing=routing,
        losses=losses,
        left_out=evaluator.left_out,
        hardware=hardware(),
        seconds=time.monotonic() - started,
    )


def hardware() -> str:
    """The processor or GPU in words, to be printed beside every figure."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores of {_processor()} ({platform.machine()})"


def _processor() -> str:
    """The name of the processor from /proc/cpuinfo, or "a CPU" where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "a CPU"


def _agreed(asked: ClipShape | None, made: ClipShape) -> ClipShape:
    """The shape that the user asked for. Raises DataError unless it has the frames and size of the mixture."""
    if asked is None:
        return made
    for name in ("frames", "height", "width"):
        if getattr(asked, name) != getattr(made, name):
            raise DataError(
                f"the mixture makes clips of {name} {getattr(made, name)}, not {getattr(asked, name)}; use its own size"
            )
    return asked


def _holds_clips(folder: Path) -> bool:
    """Whether the folder holds clips rather than a mixture: it has metadata, or archives or videos with captions."""
    if any((folder / name).is_file() for name in METADATA_NAMES):
        return True
    try:
        return not (folder / MIXTURE).is_file() and bool(read_listing(folder).clips)
    except DataError:
        return False


def _known(folder: Path, shape: ClipShape, limit: int, reference: ClipSet) -> ClipSet:
    """The clips of the folder whose captions are prompts of the reference. Raises DataError if there are too few."""
    prompts = frozenset(reference.captions)
    matching = sum(clip.caption in prompts for clip in read_listing(folder).clips)
    if matching < MIN_CLIPS:
        raise DataError(
            f"{matching} clips of {folder} have captions of held-out clips, fewer than {MIN_CLIPS}; sample more of those prompts"
        )
    return read_clips(folder, shape, captions=prompts, limit=limit)
