"""The demo's results in one folder: the mixture, samples beside real clips, the status and the report."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.cli.demo.curves import LossCurve, loss_curves
from lutetia.cli.demo.report import DemoReport, write_report
from lutetia.cli.local.gallery import MP4_SECONDS, GalleryRow, compose
from lutetia.models.video_files import write_gif, write_mp4
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import LutetiaError
from lutetia.system.files import write_atomic

if TYPE_CHECKING:
    from lutetia.cli.demo.setup import MadeRun
    from lutetia.cli.demo.swarm_run import DemoClock, DemoSwarm
    from lutetia.cli.local.gallery import Frames
    from lutetia.coordinator.run_folder import RunFolder
    from lutetia.models.data.ingest.listing import ClipSource

SEED = 1


def write_results(work: Path, made: MadeRun, swarm: DemoSwarm, timer: DemoClock, keep_run: bool) -> Path:
    """Make the complete result inside `work`; returns its folder, for the caller to move to its place."""
    from lutetia.coordinator.run_folder import RunFolder

    status, run, folder = swarm.status, RunFolder(made.folder), work / "finished"
    if status is None:
        raise LutetiaError("the coordinator left no status; this is a bug")
    manifest = run.read_manifest(now=0.0).manifest
    folder.mkdir()
    shutil.copytree(run.mixture, folder / "mixture")
    with timer.phase(f"generate clips for {len(manifest.sampling.prompts)} prompts"):
        samples = sample(folder / "mixture", made.clips, manifest)
        write_gallery(samples, folder)
    write_atomic(folder / "status.json", canonical(status) + b"\n")
    report = DemoReport(
        manifest=manifest, status=status, curves=curves_of(run, manifest), phases=timer.phases, timeline=timer.view.timeline,
        workers=swarm.poller.names, speeds={limit.name: limit.description for limit in swarm.preset.workers},
        takeover=swarm.takeover, prompts=manifest.sampling.prompts, single=samples.single, preset=swarm.preset.name,
    )  # fmt: skip
    write_report(report, folder)
    if keep_run:
        for part in ("clips", "data", "run", "logs"):
            shutil.move(work / part, folder / "run" / part)
    return folder


def curves_of(run: RunFolder, manifest: Manifest) -> list[LossCurve]:
    """Held-out losses of the run, read from its ledger."""
    from lutetia.coordinator.ledger.describe import read_events

    return loss_curves(read_events(run.root), [shard.name for shard in manifest.shards])


@dataclass(frozen=True)
class Samples:
    """The gallery's rows, the name of the expert in its third column, and frames per second."""

    rows: list[GalleryRow]
    single: str
    fps: float


def sample(mixture: Path, clips: Path, manifest: Manifest) -> Samples:
    """One row per fixed prompt: a real clip, the mixture's clip, and that of the largest cluster's expert from the same noise."""
    from lutetia.cli.local.sampler import MixtureLoader

    sampler = MixtureLoader(mixture)
    prompts = list(manifest.sampling.prompts)
    largest = max(manifest.shards, key=lambda shard: shard.prior)
    mixed = sampler.sample(prompts, seed=SEED)
    alone = sampler.sample(prompts, seed=SEED, expert=largest.index)
    real = real_clips(clips, prompts, manifest)
    rows = [GalleryRow(*row) for row in zip(prompts, zip(real, mixed.clips, alone.clips, strict=True), strict=True)]
    return Samples(rows, f"expert {largest.index} ({largest.name})", sampler.fps)


def real_clips(folder: Path, prompts: Sequence[str], manifest: Manifest) -> list[Frames]:
    """For every prompt the clip with the most similar caption; among equals a held-out one."""
    from lutetia.models.data.decode.clip import decode_clip
    from lutetia.models.data.decode.shape import ClipShape
    from lutetia.models.data.ingest.listing import read_listing

    latent = manifest.latent
    shape = ClipShape(frames=latent.pixel_frames, fps=latent.fps, height=latent.pixel_height, width=latent.pixel_width)
    clips = read_listing(folder).clips
    return [decode_clip(nearest(prompt, clips).path, shape) for prompt in prompts]


def nearest(prompt: str, clips: Sequence[ClipSource]) -> ClipSource:
    """The clip with the most similar caption, by Jaccard similarity of words."""
    wanted = set(prompt.lower().split())

    def rank(clip: ClipSource) -> tuple[float, bool, str]:
        words = set(clip.caption.lower().split())
        return -len(wanted & words) / len(wanted | words), clip.split != "test", clip.name

    return min(clips, key=rank)


def write_gallery(samples: Samples, folder: Path) -> None:
    """Write `samples.gif` and `samples.mp4` into `folder`."""
    pictures = compose(samples.rows, ("real clip", "mixture", samples.single.split(" (")[0] + " alone"))
    write_gif(pictures, folder / "samples.gif", samples.fps)
    write_mp4(pictures, folder / "samples.mp4", samples.fps, seconds=MP4_SECONDS)
