"""The acceptance checks that need the network, the disk or a worker process."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lutetia.coordinator.acceptance.audit_comparison import OWN_KIND, AuditFinding, compare, tolerance
from lutetia.coordinator.acceptance.checks import CheckFailed, Replayed, SizeLimits, Verdict
from lutetia.coordinator.acceptance.loss_bounds import Losses
from lutetia.coordinator.acceptance.messages import StartAudit
from lutetia.coordinator.acceptance.retention import blobs_of, needed_blobs, undecided_blobs
from lutetia.coordinator.holdouts import Holdouts
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed, WorkerRefused
from lutetia.coordinator.worker.messages import (
    EpochReplayed,
    InspectFiles,
    Job,
    MeasureLoss,
    MeasureSizes,
    NoiseBounds,
    ReadTrace,
    ReplayEpoch,
)
from lutetia.coordinator.worker.scored_rows import Part, RowScores
from lutetia.coordinator.worker.time_limits import patience_for
from lutetia.protocol.blobs.author_first import fetch_author_first
from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import Provider
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, TrainedWith, provider_key
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.protocol.transport.base import DIAL_TIMEOUT, Transport
from lutetia.system.errors import ConfigError, IntegrityError, UnreachableError

_FETCH_GRACE = 30.0
_FIRST_ANSWER = DIAL_TIMEOUT + 2.0
"""Seconds in which a peer must be found, dialled and have answered."""
_SHORTEST_WAIT = 3.0
_MAX_PROVIDERS = 8
KEPT_STATES = 3
CHECK_SECONDS = 900.0
A = TypeVar("A")


def fetch_limit(size: int, slowest: float) -> float:
    """Seconds within which `size` bytes must arrive, at `slowest` bytes per second and with some grace."""
    return _FETCH_GRACE + size / slowest


def chunk_limit(size: int, slowest: float) -> float:
    """Seconds within which the first chunk of a blob must arrive, and then each next one."""
    return _FIRST_ANSWER + min(size, CHUNK) / slowest


@dataclass
class ChunkDeadline:
    """Moves the deadline of a fetch on with each chunk: `chunk_limit` seconds from now, but never beyond the end."""

    deadline: asyncio.Timeout
    step: float
    end: float
    arrived: int | None = None

    def __call__(self, here: int, _: int) -> None:
        """Called with the number of bytes that are here; the first call tells of those from earlier fetches."""
        if self.arrived is not None and here > self.arrived and not self.deadline.expired():
            self.deadline.reschedule(min(self.end, asyncio.get_running_loop().time() + self.step))
        self.arrived = here


@dataclass
class NetworkCheckRunner:
    """Fetches candidates into `incoming`, so that nothing undecided is ever served, and checks them in a worker process.

    Args:
        blobs: the store that is served to peers.
        incoming: the store of results that are not decided yet.
        worker: checks the files of results.
        audit_worker: replays epochs, in a process of its own, so that no acceptance waits for a replay.
        slowest_bytes_per_second: a checkpoint that arrives slower is inconclusive.
        holdouts: the held-out clips, which are never served.
        accepted: digests of accepted results' blobs that may still be in `blobs` and are to be removed when nothing needs them.
        kept_states: for how many epochs of each shard training states are kept, beyond those that audits need.
        proof_worker: replays doubted results, for which a shard waits; None: `audit_worker` does.
        parent_worker: replays accepted epochs for which a doubted result waits; None: `audit_worker` does.
        check_seconds: what scoring one result may take; fewer held-out rows are scored where all would take longer.
        keep_all_weights: keep weights and traces of all accepted epochs for good.
        mixture_blobs: digests of the blobs that mixtures name, which are kept.
    """

    transport: Transport
    manifest: Manifest
    blobs: BlobStore
    incoming: BlobStore
    worker: WorkerClient
    audit_worker: WorkerClient
    slowest_bytes_per_second: float
    holdouts: Holdouts
    accepted: set[str] = field(default_factory=set)
    kept_states: int = KEPT_STATES
    proof_worker: WorkerClient | None = None
    parent_worker: WorkerClient | None = None
    check_seconds: float = CHECK_SECONDS
    keep_all_weights: bool = False
    mixture_blobs: Callable[[], Collection[str]] = field(default=tuple)

    def __post_init__(self) -> None:
        self._scores = RowScores(self.worker, self.check_seconds)

    async def limits(self) -> dict[int, SizeLimits]:
        """Size limits of every shard, from the manifest's weight schema."""
        try:
            sizes = await self.worker.ask(MeasureSizes(), limit=patience_for(0))
        except WorkerRefused as error:
            raise ConfigError(str(error)) from error
        steps = self.manifest.steps_per_epoch
        return {shard: SizeLimits.of(weights, sizes.state[shard], steps) for shard, weights in sizes.weights.items()}

    async def fetch(self, record: CheckpointRecord, patience: float = 1.0) -> None:
        """Check `transfer`: all three blobs, from the author and from peers that announce them.

        `patience`: the fraction of the usual time that may pass until the first chunk, from one chunk to the next, and in all.
        """
        for name, ref in (("weights", record.weights), ("state", record.state), ("trace", record.trace)):
            if store := self._store_with(ref.digest):
                _refuse_wrong_size(store, ref, name)
                continue
            try:
                await self._fetch_blob(record, ref, patience)
            except TimeoutError as error:
                raise CheckFailed("inconclusive", "transfer", f"its {name} did not arrive: {error}") from error
            except (UnreachableError, IntegrityError, ConnectionError) as error:
                raise CheckFailed("inconclusive", "transfer", f"its {name} could not be fetched: {error}") from error

    async def _fetch_blob(self, record: CheckpointRecord, ref: BlobRef, patience: float) -> None:
        """Raises TimeoutError when a chunk, or all of them, take too long."""
        now, slowest = asyncio.get_running_loop().time(), self.slowest_bytes_per_second
        step = max(_SHORTEST_WAIT, patience * chunk_limit(ref.size, slowest))
        most = max(_SHORTEST_WAIT, patience * fetch_limit(ref.size, slowest))
        progress: ChunkDeadline | None = None
        try:
            async with asyncio.timeout(min(step, most)) as deadline:
                progress = ChunkDeadline(deadline, step, now + most)
                author = Provider(record.peer_id, tuple(record.addresses))
                await fetch_author_first(
                    self.transport, self.incoming, ref, author, lambda: self._other_providers(record, ref), progress
                )
        except TimeoutError as error:
            here = (progress and progress.arrived) or 0
            text = f"{here} of {ref.size} bytes were here when no chunk came for {step:.0f} s, or {most:.0f} s had passed"
            raise TimeoutError(text) from error

    async def _other_providers(self, record: CheckpointRecord, ref: BlobRef) -> list[Provider]:
        providers = []
        for other, _ in await read_records(self.transport, provider_key(record.run, ref.digest)):
            if other.kind == "provider" and other.peer_id not in (record.peer_id, self.transport.peer_id):
                providers.append(Provider(other.peer_id, tuple(other.addresses)))
        return providers[: _MAX_PROVIDERS - 1]

    async def inspect(self, record: CheckpointRecord, lanes: tuple[int, ...] = ()) -> None:
        """Checks `format` and `numbers`."""
        weights, state, trace = (self._path(ref) for ref in (record.weights, record.state, record.trace))
        job = InspectFiles(
            shard=record.shard, epoch=record.epoch, weights=weights, state=state, trace=trace, lanes=lanes or (record.lane,)
        )
        await self._ask("format", job, record.weights.size + record.state.size)

    async def parent_losses(self, record: CheckpointRecord, parent: AcceptanceRecord | None) -> Losses:
        """Held-out losses of the parent: an accepted epoch, or the initial model, drawn from a seed or given by the manifest."""
        weights = parent.weights if parent else self.manifest.expert_of(record.shard).init
        return await self._losses(record, "parent", self._path(weights) if weights else None)

    async def losses(self, record: CheckpointRecord) -> Losses:
        """Held-out losses of the candidate."""
        return await self._losses(record, "averages", self._path(record.weights))

    async def replay(self, audit: StartAudit) -> Replayed:
        """Check `audit`, by the coordinator itself."""
        due, link, parent = audit.audit, audit.link, audit.parent
        workers = {"proof": self.proof_worker, "parent": self.parent_worker}
        worker = workers.get(audit.process) or self.audit_worker
        if due.epoch > 1 and parent is None:
            return _impossible(f"epoch {due.epoch - 1}, from which it would be replayed, is too long ago")
        files = [self.manifest.shards[due.shard].train, link.trace, *self._start(audit)]
        if due.whole:
            files += [link.acceptance.weights, link.acceptance.state]
        if link.made is None or link.trace is None or not all(self._store_with(ref.digest) for ref in files if ref):
            return _impossible("a file that the replay needs is not kept any more")
        began, finding = time.monotonic(), AuditFinding(outcome="inconclusive")
        patience = patience_for(sum(ref.size for ref in files if ref))
        for epochs in link.budgets if self.manifest.optimisation.schedule == "cosine" else link.budgets[:1]:
            try:
                answer = await worker.ask(self._replay_job(audit, epochs), limit=patience)
            except (WorkerFailed, WorkerRefused, BlobMissing) as error:  # the author's files passed their checks before
                return Replayed(AuditFinding(outcome="inconclusive", text=str(error)), time.monotonic() - began)
            finding = finding_of(answer, link.made)
            if finding.outcome == "valid":
                break
        return Replayed(finding, time.monotonic() - began)

    async def published(self, trace: BlobRef) -> Sequence[float]:
        """The losses in an accepted trace. Raises WorkerFailed, WorkerRefused or BlobMissing."""
        return (await self.worker.ask(ReadTrace(path=self._path(trace)), limit=patience_for(trace.size))).losses

    def _start(self, audit: StartAudit) -> tuple[BlobRef | None, BlobRef | None]:
        """Weights and state from which the epoch was trained."""
        if audit.parent:
            return audit.parent.weights, audit.parent.state
        return self.manifest.expert_of(audit.audit.shard).init, None

    def _replay_job(self, audit: StartAudit, epochs: int) -> ReplayEpoch:
        """Raises BlobMissing."""
        due, given, made = audit.audit, audit.link.acceptance, audit.link.made
        weights, state = self._start(audit)
        assert audit.link.trace is not None
        assert made is not None
        return ReplayEpoch(
            shard=due.shard, epoch=due.epoch - 1, data=self._path(self.manifest.shards[due.shard].train),
            weights=weights and self._path(weights), state=state and self._path(state),
            trace=self._path(audit.link.trace), precision=made.precision, moments=made.moments,
            kept_weights=made.weights, steps=audit.steps, epochs=epochs, lane=due.lane,
            end=(self._path(given.weights), self._path(given.state)) if due.whole else None, doubt=noise_bounds(made),
        )  # fmt: skip

    async def raw_losses(self, record: CheckpointRecord) -> Losses:
        """Held-out losses of the raw parameters, from which training continues."""
        return await self._losses(record, "raw", self._path(record.state))

    async def _losses(self, record: CheckpointRecord, part: Part, weights: Path | None) -> Losses:
        check: CheckName = "raw" if part == "raw" else "holdout"
        holdout, draw = self.holdouts.path(self.manifest.shards[record.shard].holdout), self.holdouts.draw(record.digest)
        averages = self._path(record.weights) if part == "raw" else None
        job = MeasureLoss(shard=record.shard, weights=weights, holdout=holdout, draw=draw, raw=part == "raw", averages=averages)
        patience = patience_for(record.weights.size + record.state.size)
        return await self._checked(check, self._scores.measure(record.digest, part, job, patience))

    async def _ask(self, check: CheckName, job: Job[A], size: int) -> A:
        return await self._checked(check, self.worker.ask(job, limit=patience_for(size)))

    async def _checked(self, check: CheckName, work: Awaitable[A]) -> A:
        """A crash of the worker process says nothing about the result: inconclusive, and tried again."""
        try:
            return await work
        except WorkerRefused as error:
            raise CheckFailed("invalid", error.check or check, str(error)) from error
        except WorkerFailed as error:
            raise CheckFailed("inconclusive", check, str(error)) from error

    def _store_with(self, digest: str) -> BlobStore | None:
        return next((store for store in (self.blobs, self.incoming) if store.has(digest)), None)

    def _path(self, ref: BlobRef) -> Path:
        """Raises BlobMissing."""
        return (self._store_with(ref.digest) or self.incoming).path(ref.digest)

    def still_whole(self, record: CheckpointRecord) -> Verdict | None:
        """None when all blobs of a checked result are still here, else the verdict that it cannot be accepted now."""
        missing = [digest for digest in blobs_of(record) if self._store_with(digest) is None]
        return Verdict("inconclusive", "transfer", f"blob {min(missing)[:12]} went missing meanwhile") if missing else None

    def keep(self, record: CheckpointRecord, of_lane: bool = False) -> None:
        """Serve the blobs of an accepted result, of an epoch or of a lane, from now on. Blocks on the disk.

        They are kept until `forget` removes them (`acceptance.retention`).
        """
        self._scores.forget(record.digest)
        for ref in (record.weights, record.state, record.trace):
            if not self.blobs.has(ref.digest):
                self.blobs.adopt(self.incoming.path(ref.digest), self.incoming.table(ref.digest))
            self.incoming.remove(ref.digest)
        self.accepted |= blobs_of(record)
        if self.keep_all_weights and not of_lane:
            self.accepted -= {record.weights.digest, record.trace.digest}

    def forget(self, run: RunState) -> None:
        """Remove the blobs of accepted results that nothing needs any more. Blocks on the disk."""
        given = {spec.init.digest for spec in map(self.manifest.expert_of, range(len(self.manifest.shards))) if spec.init}
        for digest in self.accepted - needed_blobs(run, self.kept_states) - given - set(self.mixture_blobs()):
            self.blobs.remove(digest)
            self.accepted.discard(digest)

    def discard(self, record: CheckpointRecord, run: RunState) -> None:
        """Remove what was fetched of a result that was not accepted, except blobs that another undecided result names, too."""
        self._scores.forget(record.digest)
        for digest in blobs_of(record) - undecided_blobs(run):
            self.incoming.remove(digest)


def noise_bounds(author: TrainedWith) -> NoiseBounds:
    """The drifts between near and far, where a replay also measures the epoch's own noise."""
    bounds = tolerance(author, TrainedWith(precision=author.precision, moments=author.moments, weights=author.weights))
    near, far = bounds.drift
    return NoiseBounds(near=near, far=far, coarse=bounds is not OWN_KIND)


def finding_of(answer: EpochReplayed, author: TrainedWith) -> AuditFinding:
    """What a replay says about the author's work."""
    losses = [math.nan if loss is None else loss for loss in answer.losses]
    return compare(answer.published, losses, answer.drift, author, answer.made, answer.noise, answer.farthest or "end")


def _refuse_wrong_size(store: BlobStore, ref: BlobRef, name: str) -> None:
    """A blob's digest covers its size: with a wrong size no peer could fetch it."""
    if (size := store.table(ref.digest).size) != ref.size:
        raise CheckFailed("invalid", "transfer", f"it gives its {name} {ref.size} bytes; the blob of that digest has {size}")


def _impossible(text: str) -> Replayed:
    """This coordinator will never be able to replay it."""
    return Replayed(AuditFinding(outcome="inconclusive", text=text), again=False)
