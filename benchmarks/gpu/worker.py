"""A node's trainer process on the device, and the coordinator's worker process on the CPU that replays what it made.

Both are the real processes, with the messages and files that a node and a coordinator use. Only the network between them is
left out, so neither hivemind nor PyAV is needed.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.runs import AUDITED, OWNER, TINY, clips_of, manifest_of
from benchmarks.gpu.site import Site
from lutetia.coordinator.acceptance.audit_comparison import compare
from lutetia.coordinator.worker.client import WorkerClient
from lutetia.coordinator.worker.messages import ReplayEpoch
from lutetia.models.data.parts.writer import write_shard
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.checkpoint_folder import CheckpointFolder
from lutetia.node.trainer.messages import ProbeFinished, RunProbe, StartTraining, parse_report
from lutetia.node.trainer.probe import ProbeQuestion
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.records import TrainedWith
from lutetia.system.process import Child


def audited_worker(site: Site) -> None:
    """Probe, train two epochs on the device, audit each whole on the CPU: verdicts and how far apart the ends are."""
    asyncio.run(_audited(site))


async def _audited(site: Site) -> None:
    manifest = manifest_of(AUDITED, steps=2 if site.small else 32, epochs=2)
    run, data, work = (
        site.folder / "manifest.json",
        site.folder / "clips.train.safetensors",
        CheckpointFolder(site.folder, manifest.run_id, 0),
    )
    run.write_bytes(SignedManifest.sign(manifest, OWNER).to_bytes())
    write_shard(data, clips_of(count=64), TINY)
    began = time.perf_counter()
    made = await _train(site, run, data, work, manifest)
    detail = f"{made.precision}, micro-batch {made.micro_batch}; process start and probe included"
    site.put("two epochs by the trainer process", round(time.perf_counter() - began, 1), "s", detail)
    worker = WorkerClient(run, name="audit", threads=1, nice=0)
    try:
        for epoch in range(manifest.epochs):
            await _audit(site, worker, data, work, manifest, epoch)
    finally:
        await worker.close()


async def _train(site: Site, run: Path, data: Path, work: CheckpointFolder, manifest: Manifest) -> TrainedWith:
    """Have a trainer process probe the device and train the whole budget; returns what the author reports."""
    child = await Child.start("lutetia.node.trainer")
    try:
        question = ProbeQuestion(manifest=run, device=site.device, free_disk=1 << 40)
        await child.send(RunProbe(question=question).to_wire())
        found = None
        async for message in child.messages():
            report = parse_report(message)
            if isinstance(report, ProbeFinished):
                found = report.finding
                site.put("probe", found.precision, detail=f"{found.precision_reason}; {found.shards[0].reason}")
                assignment = Assignment(
                    manifest=run, shard=0, data=data, folder=work.path, epoch=0, parent=None, until=manifest.epochs,
                    device=found.device, precision=found.precision, micro_batch=found.shards[0].micro_batch,
                )  # fmt: skip
                await child.send(StartTraining(assignment=assignment).to_wire())
            if message["say"] == "progress" and message.get("waiting"):
                break
            if message["say"] in ("failed", "exit"):
                raise RuntimeError(f"the trainer process ended: {message.get('text')}")
    finally:
        await child.stop(30)
    return work.kept()[-1].made


async def _audit(site: Site, worker: WorkerClient, data: Path, work: CheckpointFolder, manifest: Manifest, epoch: int) -> None:
    """Replay one whole epoch on the CPU, as the coordinator does, and judge it."""
    end, parent = work.epoch_folder(epoch + 1), work.epoch_folder(epoch) if epoch else None
    kept = work.kept()[epoch]
    job = ReplayEpoch(
        shard=0, epoch=epoch, data=data, weights=_file(parent, "weights"), state=_file(parent, "state"),
        trace=end / "trace.safetensors", precision=kept.made.precision, steps=manifest.steps_per_epoch, epochs=manifest.epochs,
        end=(end / "weights.safetensors", end / "state.safetensors"),
    )  # fmt: skip
    found: Any = await worker.ask(job, limit=300.0)
    losses = [float("nan") if loss is None else loss for loss in found.losses]
    verdict = compare(found.published, losses, found.drift, kept.made, found.made, found.noise)
    site.put(f"audit of epoch {epoch + 1} on the CPU", verdict.outcome, detail=verdict.text[:200])
    site.put(f"audit of epoch {epoch + 1}: drift", found.drift or 0.0, "", f"{kept.made.device} in {kept.made.precision}")


def _file(folder: Path | None, name: str) -> Path | None:
    return folder / f"{name}.safetensors" if folder else None
