"""One training of a study by a real local swarm: coordinator and nodes are processes. A later call resumes it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.cli.local.poller import SwarmPoller, polls, read_status, samples_done
from lutetia.cli.local.processes import LocalSwarm, free_port
from lutetia.system.errors import ConfigError, LutetiaError
from lutetia.system.files import write_atomic

if TYPE_CHECKING:
    from lutetia.models.study.config import Machines, StudyConfig
    from lutetia.models.study.trainings import Training

_STUDY_DAYS = 36_500.0  # long enough that a study repeated years later has the same manifest


@dataclass(frozen=True)
class Team:
    """The nodes of a local swarm.

    Attributes:
        workers: number of nodes.
        threads: threads of each node.
    """

    workers: int
    threads: int

    @classmethod
    def of(cls, machines: Machines, shards: int, cores: int) -> Team:
        """One node per shard, at most one per core; the cores are divided among them."""
        workers = min(shards, machines.workers or cores)
        return cls(workers, machines.threads or max(1, cores // workers))


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(
    training: Training, data: Path, folder: Path, config: StudyConfig, on_progress: Callable[[str, int, int], None],
    start: str | None = None,
) -> None:  # fmt: skip
    """Train until `folder/run` has its final mixture; resume what an earlier call began. Does nothing if it is finished.

    Args:
        training: from the plan.
        data: built data of its clustering.
        folder: holds the run, the state of the nodes, and logs.
        config: the study.
        on_progress: called with the name of the training, samples done and samples in all.
        start: folder or hub id of the weights that its experts start from.

    Raises LutetiaError if a process fails or the swarm makes no progress.
    """
    run = folder / "run"
    if finished(run):
        return
    if not run.is_dir():
        create(training, data, run, config, start)
    began = time.monotonic()
    try:
        asyncio.run(_swarm(training, folder, config.machines, on_progress))
    finally:
        _add_seconds(folder, time.monotonic() - began)


def create(training: Training, data: Path, run: Path, config: StudyConfig, start: str | None = None) -> None:
    """Create the run of `training`. Its keys, and so its weights, depend only on the names of study and training."""
    from lutetia.coordinator.admin.create import RunSecrets, create_run
    from lutetia.coordinator.settings import RunSettings
    from lutetia.protocol.schema.manifest import AuditPolicy, Timing

    machines, changes = config.machines, {"batch": training.batch, "learning_rate": training.learning_rate}
    settings = RunSettings(
        name=training.name[:64],
        addresses=(f"127.0.0.1:{free_port()}",),
        expert=training.expert,
        warm_start=start,
        optimisation=config.optimisation.model_copy(update=changes),
        samples_per_shard=training.samples_per_shard,
        checkpoint_samples=training.checkpoint_samples,
        holdout_tolerance=config.holdout_tolerance,
        router=config.router,
        sampling=config.sampling,
        timing=Timing(heartbeat=machines.heartbeat, tenure=max(60.0, 10 * machines.heartbeat)),
        audit=AuditPolicy() if machines.audits else AuditPolicy(replay_steps=0, whole_epoch=0.0),
        valid_days=_STUDY_DAYS,
    )
    create_run(data, run, settings, RunSecrets.of_seed(f"{config.name}|{training.name}"))


def check_budget(training: Training, folder: Path) -> None:
    """Raises ConfigError if the run in `folder` has another budget: `controls.share` may have changed since."""
    from lutetia.coordinator.run_folder import RunFolder

    run = folder / "run"
    if not run.is_dir():
        return
    manifest = RunFolder(run).read_manifest(now=0.0).manifest
    budget = training.samples_per_shard, training.checkpoint_samples, training.batch
    if (manifest.samples_per_shard, manifest.checkpoint_samples, manifest.optimisation.batch) != budget:
        raise ConfigError(
            f"{run} was trained on {manifest.samples_per_shard} samples at batch {manifest.optimisation.batch}, but the "
            f"study wants {training.samples_per_shard} at {training.batch}; name another --folder, or remove {folder}"
        )


def finished(run: Path) -> bool:
    """Whether every shard has its budget and the final mixture is stitched."""
    status = read_status(run)
    return status is not None and status.finished


def seconds(folder: Path) -> float:
    """Time that the swarm of this training ran, over all calls, seconds."""
    path = folder / "seconds.json"
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0


def _add_seconds(folder: Path, more: float) -> None:
    write_atomic(folder / "seconds.json", json.dumps({"seconds": round(seconds(folder) + more, 1)}).encode())


async def _swarm(training: Training, folder: Path, machines: Machines, on_progress: Callable[[str, int, int], None]) -> None:
    run, team, patience = folder / "run", Team.of(machines, training.experts, cores()), _Patience(training.name, folder, machines)
    watch, most_done = SwarmPoller(run, folder), 0
    async with LocalSwarm(folder / "logs") as swarm:
        began = time.time()
        coordinator = await swarm.serve(run, "--stitch", "end", "--no-gallery", "--exit-when-done", "--keep-all-weights")
        up = False
        async for _ in polls(swarm):
            if not coordinator.running:
                break
            await watch.poll(swarm)
            status = watch.status
            if status is not None and status.time >= began:
                if not up:
                    await _join(swarm, watch, team, machines.device)
                up = True
                most_done = max(most_done, sum(samples_done(shard, watch.workers) for shard in status.shards))
                on_progress(training.name, most_done, training.experts * training.samples_per_shard)
                accepted = sum(shard.samples for shard in status.shards)
                patience.see((accepted, status.events), any(shard.state == "training" for shard in status.shards))
            patience.check()
        swarm.check()
    if not finished(run):
        raise LutetiaError(f"the swarm of {training.name} ended before its budget was done; its logs are in {folder / 'logs'}")


async def _join(swarm: LocalSwarm, watch: SwarmPoller, team: Team, device: str) -> None:
    """Start the nodes. Each has its own state folder, so it resumes what it began before an interruption."""
    ticket = (watch.run / "ticket.txt").read_text().strip()
    threads = str(team.threads)
    for number in range(team.workers):
        name = f"worker-{number}"
        await swarm.join(name, ticket, watch.add(name), "--device", device, "--threads", threads, OMP_NUM_THREADS=threads)


class _Patience:
    """Stops a swarm that makes no progress.

    A shard in training counts as progress until the coordinator calls it overdue; the coordinator knows the speed of the trainer.
    What a trainer reports of itself does not count.
    """

    def __init__(self, name: str, folder: Path, machines: Machines) -> None:
        self._name, self._logs, self._seconds = name, folder / "logs", machines.patience
        self._last: object = None
        self._since = time.monotonic()

    def see(self, progress: object, training: bool) -> None:
        if training or progress != self._last:
            self._last, self._since = progress, time.monotonic()

    def check(self) -> None:
        if time.monotonic() - self._since > self._seconds:
            raise LutetiaError(
                f"nothing was accepted in {self._name} for {self._seconds:.0f} s; read the logs in {self._logs}, "
                "or raise machines.patience"
            )
