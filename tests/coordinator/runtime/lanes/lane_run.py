"""A run with lanes whose judge loop, stores and worker processes are real; results are put into the store instead of fetched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from lutetia.coordinator.acceptance.messages import Offered
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.holdouts import Holdouts, holdout_store
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.runtime.lanes.merger import LaneMerger
from lutetia.coordinator.runtime.staging import restored_incoming
from lutetia.coordinator.settings import RunSettings
from lutetia.coordinator.worker.client import WorkerClient
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, ResetRecord
from tests.coordinator.scripted_node import until
from tests.coordinator.tiny_data import build_tiny, clips

RETRY_SECONDS = 0.2


class ArrivedCheckRunner(NetworkCheckRunner):
    """Every result has arrived."""

    async def fetch(self, record: CheckpointRecord, patience: float = 1.0) -> None:
        assert all(self._store_with(ref.digest) for ref in (record.weights, record.state, record.trace))


@dataclass
class LaneRun:
    """One run on disk. `start` and `stop` are those of its coordinator, of which a stop leaves what a SIGKILL leaves."""

    folder: RunFolder
    manifest: Manifest
    now: Callable[[], float]
    workers: dict[str, WorkerClient] = field(default_factory=dict)
    published: list[AcceptanceRecord | ResetRecord] = field(default_factory=list)
    _running: asyncio.Task[None] | None = None

    @classmethod
    def create(cls, root: Path, team: TeamSpec, now: Callable[[], float], **settings: Any) -> LaneRun:
        torch.set_num_threads(1)
        own = {"preset": "tiny", "holdout_tolerance": 1.0, "raw_tolerance": 1.0}
        created = create_run(build_tiny(root / "data", shards=1), root / "run", RunSettings(**{**own, **settings}))
        folder = RunFolder(created.folder)
        needs = (*created.manifest.needs, LANES)
        manifest = Manifest.model_validate({**created.manifest.model_dump(), "team": team, "needs": needs})
        signed = SignedManifest.sign(manifest, Identity.load(folder.owner_key))
        folder.manifest.write_bytes(signed.to_bytes())
        run = cls(folder, manifest, now)
        for name in ("checking", "auditing", "merging"):
            run.workers[name] = WorkerClient(folder.manifest, name=name, threads=1, nice=0)
        return run

    def start(self) -> None:
        """Start from the ledger, as `coordinator.service` does."""
        self.ledger = Ledger.open(self.folder.ledger, None)
        self.blobs, identity = BlobStore(self.folder.blobs), Identity.load(self.folder.coordinator_key)
        self.incoming = restored_incoming(self.folder, self.blobs, self.ledger.state)
        self.runner = self.make_runner(Holdouts(holdout_store(self.folder), b"secret"))
        rules = JudgeRules(self.manifest, identity.public_key, b"secret", retry_delay=RETRY_SECONDS, checks_at_once=1)
        self.judge = JudgeLoop(rules, self.ledger, self.runner, self._publish, self.now)
        merger = LaneMerger(
            self.folder.merging, lambda: self.manifest, identity, self.blobs, self.incoming, self.workers["merging"], self.now
        )
        self.judge.merge = merger.merge
        self._running = asyncio.create_task(self.judge.run())

    def make_runner(self, holdouts: Holdouts) -> NetworkCheckRunner:
        """Who checks and replays. Called at each start, before there is a judge."""
        nobody, checks, audits = cast(Any, None), self.workers["checking"], self.workers["auditing"]
        return ArrivedCheckRunner(nobody, self.manifest, self.blobs, self.incoming, checks, audits, 1.0, holdouts)

    async def stop(self) -> None:
        """End it as a SIGKILL would: what is running is lost, the process that merges ends, and the ledger is not told."""
        assert self._running
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.workers["merging"].close()
        self.ledger.close()

    async def close(self) -> None:
        await self.stop()
        await asyncio.gather(*(worker.close() for worker in self.workers.values()))

    @property
    def state(self) -> RunState:
        return self.judge.state.run

    async def _publish(self, record: AcceptanceRecord | ResetRecord) -> None:
        self.published.append(record)

    def train(self, name: str, lane: int, trained: int | None = None) -> CheckpointRecord:
        """A peer's first epoch of a lane, in the store of undecided results. `trained`: the lane that it really trains."""
        peer, folder = Identity.derived(name), self.folder.root / name
        trainer = ExpertTrainer(self.manifest, 0, clips(0, 6, 5), lane=lane if trained is None else trained)
        trainer.step()
        while not trainer.at_epoch_end:
            trainer.step()
        snapshot = trainer.snapshot()
        folder.mkdir()
        write_weights(snapshot, folder / "weights")
        write_state(snapshot, folder / "state", ema=False)
        write_tensors(folder / "trace", {"trace": torch.tensor(snapshot.trace)})
        weights, state, trace = (self.incoming.add_file(folder / each) for each in ("weights", "state", "trace"))
        return CheckpointRecord(
            run=self.manifest.run_id, owner=peer.public_key, issued=self.now(), shard=0, epoch=1, parent=None, lane=lane,
            weights=weights, state=state, trace=trace, samples=self.manifest.checkpoint_samples, loss=0.5, peer_id=peer.peer_id,
        )  # fmt: skip

    async def offer(self, record: CheckpointRecord) -> None:
        reply = await self.judge.submit(Offered(record, self.now()))
        assert reply is not None

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        async def holds() -> bool:
            assert self._running
            assert not self._running.done(), self._running
            return condition()

        await until(holds, what, every=0.05)
