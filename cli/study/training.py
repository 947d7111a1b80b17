"""One training of a study by a real swarm on this machine: coordinator and workers as processes; cut anywhere, it goes on."""

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
    from lutetia.models.study.plan import Training

_STUDY_DAYS = 36_500.0  # a run that is made again in some years has the same manifest


@dataclass(frozen=True)
class Team:
    """How many workers, and each one's threads."""

    workers: int
    threads: int

    @classmethod
    def of(cls, machines: Machines, shards: int, cores: int) -> Team:
        """As many as there are shards, at most one per core; the cores are shared out among them."""
        workers = min(shards, machines.workers or cores)
        return cls(workers, machines.threads or max(1, cores // workers))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(
    training: Training, data: Path, folder: Path, config: StudyConfig, on_progress: Callable[[str, int, int], None],
    start: Path | None = None,
) -> None:  # fmt: skip
    """Bring `folder/run` to its final mixture. What an earlier call did is kept; once finished, nothing is started.

    `start`: the mixture that its experts begin with.

    Raises LutetiaError when a process fails or the swarm stands still.
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


def create(training: Training, data: Path, run: Path, config: StudyConfig, start: Path | None = None) -> None:
    """The run of `training`, its keys and so its weights a function of study, training and seed."""
    from lutetia.coordinator.admin.create import RunSecrets, create_run
    from lutetia.coordinator.settings import RunSettings
    from lutetia.protocol.schema.manifest import AuditPolicy, Timing

    machines, own = config.machines, {"batch": training.batch, "learning_rate": training.learning_rate}
    settings = RunSettings(
        name=training.name[:64],
        addresses=(f"127.0.0.1:{free_port()}",),
        expert=training.expert,
        warm_start=str(start) if start else None,
        optimisation=config.optimisation.model_copy(update=own),
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
    """A changed `controls.share` gives an arm of the same name another budget. Raises ConfigError where `folder` has the old."""
    from lutetia.coordinator.run_folder import RunFolder

    run = folder / "run"
    if not run.is_dir():
        return
    known = RunFolder(run).read_manifest(now=0.0).manifest
    budget = training.samples_per_shard, training.checkpoint_samples, training.batch
    if (known.samples_per_shard, known.checkpoint_samples, known.optimisation.batch) != budget:
        raise ConfigError(
            f"{run} was trained on {known.samples_per_shard} samples at batch {known.optimisation.batch}, but the study wants "
            f"{training.samples_per_shard} at {training.batch}; name another --folder, or remove {folder}"
        )


def finished(run: Path) -> bool:
    """Whether every budget is done and the final mixture is stitched."""
    status = read_status(run)
    return status is not None and status.finished


def seconds(folder: Path) -> float:
    """How long this training's swarm has run, over all calls."""
    path = folder / "seconds.json"
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0


def _add_seconds(folder: Path, more: float) -> None:
    write_atomic(folder / "seconds.json", json.dumps({"seconds": round(seconds(folder) + more, 1)}).encode())


async def _swarm(training: Training, folder: Path, machines: Machines, on_progress: Callable[[str, int, int], None]) -> None:
    run, team, patience = folder / "run", Team.of(machines, training.experts, cores()), _Patience(training.name, folder, machines)
    watch, most = SwarmPoller(run, folder), 0
    async with LocalSwarm(folder / "logs") as swarm:
        began = time.time()
        coordinator = await swarm.serve(run, "--stitch", "end", "--no-gallery", "--exit-when-done")
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
                most = max(most, sum(samples_done(shard, watch.workers) for shard in status.shards))
                on_progress(training.name, most, training.experts * training.samples_per_shard)
                accepted = sum(shard.samples for shard in status.shards)
                patience.see((accepted, status.events), any(shard.state == "training" for shard in status.shards))
            patience.check()
        swarm.check()
    if not finished(run):
        raise LutetiaError(f"the swarm of {training.name} ended before its budget was done; its logs are in {folder / 'logs'}")


async def _join(swarm: LocalSwarm, watch: SwarmPoller, team: Team, device: str) -> None:
    """Start the workers; each has a state folder of its own, where it finds what it had begun before a cut."""
    ticket = (watch.run / "ticket.txt").read_text().strip()
    threads = str(team.threads)
    for number in range(team.workers):
        name = f"worker-{number}"
        await swarm.join(name, ticket, watch.add(name), "--device", device, "--threads", threads, OMP_NUM_THREADS=threads)


class _Patience:
    """How long nothing may happen. What a trainer says of itself does not count: a shard in training is waited for until the
    coordinator calls it overdue, which it reckons from the trainer's own speed.
    """

    def __init__(self, name: str, folder: Path, machines: Machines) -> None:
        self._name, self._logs, self._seconds = name, folder / "logs", machines.patience
        self._seen: object = None
        self._since = time.monotonic()

    def see(self, what: object, training: bool) -> None:
        if training or what != self._seen:
            self._seen, self._since = what, time.monotonic()

    def check(self) -> None:
        if time.monotonic() - self._since > self._seconds:
            raise LutetiaError(
                f"nothing was accepted in {self._name} for {self._seconds:.0f} s; the logs in {self._logs} say why, "
                "or give it longer by machines.patience"
            )
