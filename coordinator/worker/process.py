"""The coordinator's heavy work, in a child process: `python -m lutetia.coordinator.worker MANIFEST NAME DEVICE`.

The coordinator imports torch only here. It takes one job at a time (`messages.py`); files are named by path. An unexpected error
ends the process, and the coordinator starts a new one.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from lutetia.coordinator.worker.messages import (
    AnyAnswer,
    AnyJob,
    CostMeasured,
    EpochMerged,
    EpochReplayed,
    FilesInspected,
    GallerySampled,
    InspectFiles,
    JobDone,
    JobProgress,
    JobRefused,
    JobRequest,
    LibraryLoaded,
    LossMeasured,
    MeasureCost,
    MeasureLoss,
    MeasureSizes,
    MergeLanes,
    MixtureReady,
    PartsPrepared,
    PrepareParts,
    ReadTrace,
    ReplayEpoch,
    RouterReady,
    SampleGallery,
    SignatureReply,
    SignatureRequest,
    SizesMeasured,
    StitchMixture,
    TraceRead,
    TrainRouter,
    encode,
    read_to_worker,
)
from lutetia.models.experts.adapters.base_sources import BASE_FILE, read_paths
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.system.errors import ConfigError, LutetiaError
from lutetia.system.process import ParentChannel, give_way

if TYPE_CHECKING:
    from lutetia.models.data.shards import ClipReader
    from lutetia.models.mixing.description import MixtureRouting

_MOST_HOLDOUTS = 16
LEAN = ("checking", "auditing", "proving", "proving-parents", "merging")
"""Worker processes with these names never load a text encoder, and start in half the time."""


class WorkerProcess:
    """Does the jobs of one run, one method each.

    Args:
        manifest: the run.
        channel: to the coordinator.
        device: where to compute: auto, cpu, mps, cuda, cuda:N, xpu or xpu:N.
        clock: seconds, by which the rows of a loss are limited.
        base: the files of the base that the run's experts adapt, if they do.
    """

    def __init__(
        self, manifest: Manifest, channel: ParentChannel, device: str = "cpu", clock: Callable[[], float] = time.monotonic,
        base: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        self.manifest, self._clock, self._base = manifest, clock, base
        self._wanted_device, self._job = device, 0
        self._reported = float("-inf")
        self._channel = channel
        self._lines = channel.messages()
        self._holdouts: dict[Path, ClipReader] = {}

    def run(self) -> None:
        """Take jobs until the parent closes the channel. Raises ValueError for a line that is no job."""
        for line in self._lines:
            request = read_to_worker(line)
            if not isinstance(request, JobRequest):
                raise ValueError(f"a {request.kind} message outside of a job")
            self._channel.send(encode(self.answer(request)))

    def answer(self, request: JobRequest) -> JobDone | JobRefused:
        """Do the job; a file that is wrong is a refusal."""
        self._job = request.id
        try:
            return JobDone(id=request.id, answer=self.do(request.job))
        except LutetiaError as error:
            from lutetia.models.checking.result import failed_check

            return JobRefused(id=request.id, text=str(error), check=failed_check(error))

    def do(self, job: AnyJob) -> AnyAnswer:
        """Raises LutetiaError when the job's files are wrong."""
        match job:
            case MeasureSizes():
                return self.sizes()
            case MeasureCost():
                return self.cost()
            case InspectFiles():
                return self.inspect(job)
            case MeasureLoss():
                return self.loss(job)
            case ReadTrace():
                return self.trace(job)
            case ReplayEpoch():
                return self.replay(job)
            case MergeLanes():
                return self.merge(job)
            case TrainRouter():
                return self.router(job)
            case StitchMixture():
                return self.stitch(job)
            case PrepareParts():
                return self.parts(job)
            case SampleGallery():
                return self.gallery(job)
            case _:
                assert_never(job)

    @cached_property
    def device(self) -> str:
        """Raises ConfigError when torch does not see the device."""
        return resolved_device(self._wanted_device)

    def _progress(self, done: int = 0, total: int = 0) -> None:
        """Tell the coordinator that the job goes on, at most once a second."""
        if self._clock() - self._reported >= 1.0:
            self._reported = self._clock()
            self._channel.send(encode(JobProgress(id=self._job)))

    def sizes(self) -> SizesMeasured:
        """The coordinator asks for this first, so a device that is not there is found at the start."""
        assert self.device
        from lutetia.models.training.checkpoint_checks import published_schema, state_schema

        def form(schema: Any) -> tuple[int, int]:
            sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in schema.values() if -1 not in shape]
            return sum(sizes), len(schema)

        weights, state, known = {}, {}, {}
        for shard in self.manifest.shards:
            spec = self.manifest.expert_of(shard.index)
            name = spec.model_dump_json()
            if name not in known:
                required, optional = state_schema(spec, self.manifest.optimisation, self.manifest.checkpoints)
                known[name] = form(published_schema(spec, self.manifest.checkpoints)), form({**required, **optional})
            weights[shard.index], state[shard.index] = known[name]
        return SizesMeasured(weights=weights, state=state)

    def cost(self) -> CostMeasured:
        from lutetia.models.study.flops import training_flops

        return CostMeasured(flops=training_flops(self.manifest))

    def inspect(self, job: InspectFiles) -> FilesInspected:
        from lutetia.models.checking.result import ResultFiles, inspect_result

        files = ResultFiles(job.shard, job.epoch, job.weights, job.state, job.trace, job.lanes)
        inspect_result(self.manifest, files, self._progress)
        return FilesInspected()

    def loss(self, job: MeasureLoss) -> LossMeasured:
        """Rows that are scored are reported at once: the next attempt goes on from them if this process is ended."""
        from lutetia.models.training.holdout_loss import RowLimits, holdout_loss

        def report(drawn: bool, losses: Sequence[float]) -> None:
            self._channel.send(encode(JobProgress(id=self._job, drawn=drawn, rows=tuple(losses))))

        seconds = math.inf if job.seconds is None else job.seconds
        result = holdout_loss(
            self.manifest, job.shard, job.weights, self._holdout(job.holdout), draw=job.draw, raw=job.raw, averages=job.averages,
            device=self.device,
            limits=RowLimits(seconds, job.fewest, job.count, job.drawn, job.known), on_rows=report, clock=self._clock,
            base=self._base,
        )  # fmt: skip
        return LossMeasured(loss=result.loss, by_time=result.by_time, rows=result.rows, drawn=result.drawn)

    def trace(self, job: ReadTrace) -> TraceRead:
        from lutetia.models.training.replay import read_trace

        return TraceRead(losses=tuple(read_trace(job.path)))

    def replay(self, job: ReplayEpoch) -> EpochReplayed:
        from lutetia.models.data.parts.reader import open_shard
        from lutetia.models.training.memory.options import MemoryOptions
        from lutetia.models.training.replay import ReplayDoubt, ReplayEnd, ReplayParent, read_trace, replay, under_budget

        published = read_trace(job.trace)
        result = replay(
            under_budget(self.manifest, job.epochs), job.shard, open_shard(job.data, self.manifest.latent),
            ReplayParent(job.epoch, job.weights, job.state), job.steps, end=ReplayEnd(*job.end) if job.end else None,
            precision=job.precision, memory=MemoryOptions(moments=job.moments, weights=job.kept_weights),
            doubt=ReplayDoubt(job.doubt.near, job.doubt.far, job.doubt.coarse) if job.doubt else None,
            device=self.device, progress=self._progress, base=self._base, lane=job.lane,
        )  # fmt: skip
        losses = tuple(loss if math.isfinite(loss) else None for loss in result.losses)
        return EpochReplayed(
            published=tuple(published[: len(losses)]),
            losses=losses,
            drift=result.drift,
            noise=result.noise,
            made=result.made,
            farthest=result.farthest,
        )

    def merge(self, job: MergeLanes) -> EpochMerged:
        from lutetia.models.training.lanes.merge import LaneFiles, merge_lanes

        lanes = [LaneFiles(part.lane, part.samples, part.weights, part.state, part.trace) for part in job.sources]
        merged = merge_lanes(
            self.manifest, job.shard, job.epoch, lanes, job.folder, parent=job.parent, progress=self._progress
        )  # fmt: skip
        return EpochMerged(weights=merged.weights, state=merged.state, trace=merged.trace, loss=merged.loss)

    def router(self, job: TrainRouter) -> RouterReady:
        from lutetia.models.data.parts.reader import open_shard
        from lutetia.models.mixing.router import write_router
        from lutetia.models.mixing.router_training import train_router

        shards, holdouts = ([open_shard(path, self.manifest.latent) for path in paths] for paths in (job.train, job.holdout))
        router, report = train_router(
            self.manifest, shards, seed=0, holdouts=holdouts, device=self.device,
            on_progress=lambda done, steps, loss: self._progress(done, steps),
        )  # fmt: skip
        write_router(router, job.out)
        return RouterReady(
            accuracy=report.accuracy, accuracy_by_time=tuple(report.accuracy_by_time), calibration_error=report.ece
        )

    def stitch(self, job: StitchMixture) -> MixtureReady:
        """The parent signs the mixture's description, because no key enters this process."""
        from lutetia.models.mixing.router import read_router
        from lutetia.models.mixing.stitch import stitch

        router = read_router(self.manifest, job.router) if job.router else None
        measured = self._measured(job, router) if job.measure else None
        digest = stitch(
            job.folder, self.manifest, list(job.weights), router, list(job.accepted), self._signed_by_parent,
            measured and measured[0],
        )  # fmt: skip
        return MixtureReady(digest=digest, losses=measured[1] if measured else (), routing=measured[0].text if measured else "")

    def _measured(self, job: StitchMixture, router: Any) -> tuple[MixtureRouting, tuple[float, ...]]:
        """How the mixture routes, and its held-out losses."""
        from lutetia.models.mixing.description import MixtureRouting
        from lutetia.models.mixing.routing.choice import choose_routing
        from lutetia.models.mixing.routing.evidence import gather_evidence

        assert job.measure
        evidence = gather_evidence(
            self.manifest, {given.shard: path for given, path in zip(job.accepted, job.weights, strict=True)}, router,
            [self._holdout(path) for path in job.measure.holdout], draw=job.measure.draw, seconds=job.measure.seconds,
            device=self.device, base=self._base, on_progress=self._progress, clock=self._clock,
        )  # fmt: skip
        choice = choose_routing(evidence, self.manifest.sampling.mode, job.measure.choose)
        loss = sum(choice.losses) / len(choice.losses)
        return MixtureRouting(
            mode=choice.mode, temperature=choice.temperature, loss=loss, rows=len(choice.losses), text=choice.text
        ), choice.losses

    def parts(self, job: PrepareParts) -> PartsPrepared:
        from lutetia.models.mixing.router import build_router
        from lutetia.models.mixing.stitch import write_parts

        job.folder.mkdir()
        shards = [shard.index for shard in self.manifest.shards]
        write_parts(job.folder, self.manifest, shards, build_router(self.manifest) if len(shards) > 1 else None)
        return PartsPrepared()

    def _signed_by_parent(self, message: bytes) -> str:
        self._channel.send(encode(SignatureRequest(message=message.decode())))
        reply = read_to_worker(next(self._lines))
        if not isinstance(reply, SignatureReply):
            raise ValueError(f"a {reply.kind} message in place of a signature")
        return reply.signature

    def gallery(self, job: SampleGallery) -> GallerySampled:
        """Each prompt is sampled from its own fixed noise."""
        from lutetia.coordinator.worker.gallery import sample_gallery

        return sample_gallery(job, self.manifest, self.device, self._base)

    def _holdout(self, path: Path) -> ClipReader:
        from lutetia.models.data.parts.reader import open_shard

        if path not in self._holdouts:
            if len(self._holdouts) > _MOST_HOLDOUTS:
                self._holdouts.clear()
            self._holdouts[path] = open_shard(path, self.manifest.latent)
        return self._holdouts[path]


def resolved_device(wanted: str) -> str:
    """The device for `auto`, or `wanted`. Raises ConfigError when torch does not see it."""
    import torch

    kinds = {"cuda": torch.cuda, "xpu": torch.xpu}
    counts = {name: kind.device_count() if kind.is_available() else 0 for name, kind in kinds.items()}
    if wanted == "auto":
        apple = ("mps",) if torch.backends.mps.is_available() else ()
        return next(iter((*(f"{name}:0" for name, count in counts.items() if count), *apple, "cpu")))
    kind, _, number = wanted.partition(":")
    if kind in counts and int(number or 0) >= counts[kind]:
        raise ConfigError(
            f"device {wanted} is set, but torch sees {counts[kind]} {kind.upper()} devices; check the driver, or serve with cpu"
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps is set, but torch sees no Apple GPU; serve with cpu")
    return wanted


def load_libraries(name: str) -> Iterator[None]:
    """Import what the jobs of the process `name` need, and yield after each large part."""
    if name in LEAN:
        from lutetia.models.fast_import import import_experts

        import_experts()
    else:
        import torch  # noqa: F401

        yield
        import diffusers.models.transformers  # noqa: F401
    yield


def main() -> None:
    """Take jobs until the parent closes the channel."""
    channel = ParentChannel()
    give_way(int(os.environ.get("LUTETIA_WORKER_NICE", "0")))
    manifest_file, name, device = sys.argv[1:4]
    for _ in load_libraries(name):
        channel.send(encode(LibraryLoaded()))
    import torch

    torch.set_flush_denormal(True)  # before any thread of torch starts: a processor takes several times as long for such numbers
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    manifest = SignedManifest.model_validate_json(Path(manifest_file).read_bytes()).manifest
    base = read_paths(Path(manifest_file).with_name(BASE_FILE)) if manifest.adapter else None
    WorkerProcess(manifest, channel, device, base=base).run()
