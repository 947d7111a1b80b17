"""The rungs of the ladder that need the network, the disk and the workshop."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import Any, get_args

from lutetia.coordinator.acceptance.audit_comparison import OWN_KIND, AuditFinding, compare, tolerance
from lutetia.coordinator.acceptance.checks import CheckFailed, Replayed, SizeLimits, Verdict
from lutetia.coordinator.acceptance.messages import StartAudit
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed, WorkerRefused
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.schema.manifest import BlobRef, Manifest
from lutetia.protocol.schema.records import CheckpointRecord, TrainedWith, provider_key
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import IntegrityError, UnreachableError

_FETCH_GRACE = 30.0
_INSPECT_LIMIT, _LOSS_LIMIT, _REPLAY_LIMIT = 300.0, 900.0, 24 * 3600.0
_MAX_PROVIDERS = 8
KEPT_STATES = 3


def fetch_limit(size: int, slowest: float) -> float:
    """Seconds within which `size` bytes must arrive, at `slowest` bytes per second and with some grace."""
    return _FETCH_GRACE + size / slowest


@dataclass
class NetworkCheckRunner:
    """Fetches candidates into `incoming`, so that nothing undecided is ever served, and has them looked at by `workshop`.

    `auditor` replays, beside the workshop, so that no acceptance waits for it. `states`: the digests of accepted training states
    that may still be held. `kept_states`: of how many epochs of each shard they are kept beyond those that audits need.
    """

    transport: Transport
    manifest: Manifest
    blobs: BlobStore
    incoming: BlobStore
    workshop: WorkerClient
    auditor: WorkerClient
    slowest_bytes_per_second: float
    states: set[str] = field(default_factory=set)
    kept_states: int = KEPT_STATES

    async def limits(self) -> dict[int, SizeLimits]:
        """Size limits of every shard, from the manifest's weight schema."""
        answer = await self.workshop.ask("limits", limit=_INSPECT_LIMIT)
        steps = self.manifest.steps_per_epoch
        return {
            int(shard): SizeLimits.of(tuple(form["weights"]), tuple(form["state"]), steps)
            for shard, form in answer["shards"].items()
        }

    async def fetch(self, record: CheckpointRecord) -> None:
        """Rung `transfer`: all three blobs, from the author and whoever else says that it holds them."""
        for name, ref in (("weights", record.weights), ("state", record.state), ("trace", record.trace)):
            if store := self._holding(ref.digest):
                _refuse_wrong_size(store, ref, name)
                continue
            seconds = fetch_limit(ref.size, self.slowest_bytes_per_second)
            try:
                async with asyncio.timeout(seconds):
                    await fetch_blob(self.transport, self.incoming, ref, await self._providers(record, ref))
            except TimeoutError as error:
                raise CheckFailed("inconclusive", "transfer", f"its {name} did not arrive within {seconds:.0f} s") from error
            except (UnreachableError, IntegrityError, ConnectionError) as error:
                raise CheckFailed("inconclusive", "transfer", f"its {name} could not be fetched: {error}") from error

    async def _providers(self, record: CheckpointRecord, ref: BlobRef) -> list[Provider]:
        providers = [Provider(record.peer_id, tuple(record.addresses))]
        for other, _ in await read_records(self.transport, provider_key(record.run, ref.digest)):
            if other.kind == "provider" and other.peer_id not in (record.peer_id, self.transport.peer_id):
                providers.append(Provider(other.peer_id, tuple(other.addresses)))
        return providers[:_MAX_PROVIDERS]

    async def inspect(self, record: CheckpointRecord) -> None:
        """Rungs `format` and `numbers`."""
        files = {name: self._path(ref) for name, ref in (("weights", record.weights), ("state", record.state))}
        files["trace"] = self._path(record.trace)
        await self._ask("format", "inspect", _INSPECT_LIMIT, shard=record.shard, epoch=record.epoch, **files)

    async def baseline(self, shard: int) -> float:
        """Held-out loss of the initial model, seeded or given."""
        init = self.manifest.expert_of(shard).init
        return await self._loss(shard, self._path(init) if init else None)

    async def loss(self, record: CheckpointRecord) -> float:
        """Held-out loss of the candidate."""
        return await self._loss(record.shard, self._path(record.weights))

    async def replay(self, audit: StartAudit) -> Replayed:
        """Rung `audit`, by the coordinator's own hands."""
        due, link, parent = audit.audit, audit.link, audit.parent
        if due.epoch > 1 and parent is None:
            return _impossible(f"epoch {due.epoch - 1}, from which it would be replayed, is too long ago")
        held = [self.manifest.shards[due.shard].train, link.trace, *self._start(audit)]
        if due.whole:
            held += [link.acceptance.weights, link.acceptance.state]
        if link.made is None or link.trace is None or not all(self.blobs.has(ref.digest) for ref in held if ref):
            return _impossible("a file that the replay needs is not kept any more")
        began, finding = time.monotonic(), AuditFinding(outcome="inconclusive")
        for epochs in link.budgets if self.manifest.optimisation.schedule == "cosine" else link.budgets[:1]:
            try:
                answer = await self.auditor.ask("replay", limit=_REPLAY_LIMIT, epochs=epochs, **self._question(audit))
            except (WorkerFailed, WorkerRefused, BlobMissing) as error:  # the author's files were looked at before
                return Replayed(AuditFinding(outcome="inconclusive", text=str(error)), time.monotonic() - began)
            finding = finding_of(answer, link.made)
            if finding.outcome == "valid":
                break
        return Replayed(finding, time.monotonic() - began)

    async def published(self, trace: BlobRef) -> list[float]:
        """The losses in an accepted trace. Raises WorkshopFailed, WorkshopRefused or BlobMissing."""
        return (await self.workshop.ask("trace", limit=_INSPECT_LIMIT, path=self._path(trace)))["losses"]

    def _start(self, audit: StartAudit) -> tuple[BlobRef | None, BlobRef | None]:
        """Weights and state from which the epoch was trained."""
        if audit.parent:
            return audit.parent.weights, audit.parent.state
        return self.manifest.expert_of(audit.audit.shard).init, None

    def _question(self, audit: StartAudit) -> dict[str, Any]:
        due, given, made = audit.audit, audit.link.acceptance, audit.link.made
        weights, state = self._start(audit)
        assert audit.link.trace is not None
        assert made is not None
        return {
            "shard": due.shard, "epoch": due.epoch - 1, "data": self._path(self.manifest.shards[due.shard].train),
            "weights": weights and self._path(weights), "state": state and self._path(state),
            "trace": self._path(audit.link.trace), "precision": made.precision, "steps": self.manifest.audit.replay_steps,
            "end": [self._path(given.weights), self._path(given.state)] if due.whole else None, "doubt": doubt_of(made),
        }  # fmt: skip

    async def raw_loss(self, record: CheckpointRecord) -> float:
        """Held-out loss of the parameters that training goes on from."""
        return await self._loss(record.shard, self._path(record.state), raw=True)

    async def _loss(self, shard: int, weights: str | None, raw: bool = False) -> float:
        rung: CheckName = "raw" if raw else "holdout"
        holdout = str(self.blobs.path(self.manifest.shards[shard].holdout.digest))
        answer = await self._ask(rung, "loss", _LOSS_LIMIT, shard=shard, weights=weights, holdout=holdout, raw=raw)
        loss = answer["loss"]
        return loss if isinstance(loss, float) else math.nan

    async def _ask(self, rung: CheckName, verb: str, limit: float, **fields: Any) -> dict[str, Any]:
        """A crash of the workshop says nothing about the result: inconclusive, and tried again."""
        try:
            return await self.workshop.ask(verb, limit=limit, **fields)
        except WorkerRefused as error:
            found = error.rung if error.rung in get_args(CheckName) else rung
            raise CheckFailed("invalid", found, str(error)) from error  # pyright: ignore[reportArgumentType]
        except WorkerFailed as error:
            raise CheckFailed("inconclusive", rung, str(error)) from error

    def _holding(self, digest: str) -> BlobStore | None:
        """The store that has it."""
        return next((store for store in (self.blobs, self.incoming) if store.has(digest)), None)

    def _path(self, ref: BlobRef) -> str:
        """Raises BlobMissing."""
        return str((self._holding(ref.digest) or self.incoming).path(ref.digest))

    def still_whole(self, record: CheckpointRecord) -> Verdict | None:
        """None when all that was judged is here to be kept, else that it cannot be accepted now."""
        missing = [digest for digest in _named(record) if self._holding(digest) is None]
        return Verdict("inconclusive", "transfer", f"blob {min(missing)[:12]} went missing meanwhile") if missing else None

    def keep(self, record: CheckpointRecord) -> None:
        """The result was accepted: its blobs are served from now on. Blocks on the disk.

        Weights and traces are kept for good, training states (several times as large) while `forget` finds a use for them.
        """
        for ref in (record.weights, record.state, record.trace):
            if not self.blobs.has(ref.digest):
                self.blobs.adopt(self.incoming.path(ref.digest), self.incoming.table(ref.digest))
                self.incoming.remove(ref.digest)
        self.states.add(record.state.digest)

    def forget(self, run: RunState) -> None:
        """Remove the training states that nobody goes on from, and no due audit or undecided result needs. Blocks on the disk."""
        for digest in self.states - needed_states(run, self.kept_states) - undecided_blobs(run):
            self.blobs.remove(digest)
            self.states.discard(digest)

    def discard(self, record: CheckpointRecord, run: RunState) -> None:
        """The result is out: forget what was fetched of it, but nothing that a result still undecided names, too."""
        for digest in _named(record) - undecided_blobs(run):
            self.incoming.remove(digest)


def doubt_of(author: TrainedWith) -> dict[str, Any]:
    """Ends that are neither near nor far: there the workshop measures the epoch's own noise (`models.training.replay.Doubt`)."""
    bounds = tolerance(author, TrainedWith(precision=author.precision))
    near, far = bounds.drift
    return {"near": near, "far": far, "coarse": bounds is not OWN_KIND}


def finding_of(answer: dict[str, Any], author: TrainedWith) -> AuditFinding:
    """What the workshop's answer to `replay` says of an author's work."""
    losses = [math.nan if loss is None else loss for loss in answer["losses"]]
    made = TrainedWith.model_validate(answer["made"])
    return compare(answer["published"], losses, answer["drift"], author, made, answer["noise"])


def _named(record: CheckpointRecord) -> set[str]:
    return {ref.digest for ref in (record.weights, record.state, record.trace)}


def undecided_blobs(run: RunState) -> set[str]:
    """The digests of all blobs that results in judgement name. Anybody may name those of another's result."""
    waiting = (candidate.record for shard in run.shards.values() for candidate in shard.candidates.values())
    return {digest for record in waiting for digest in _named(record)}


def _refuse_wrong_size(store: BlobStore, ref: BlobRef, name: str) -> None:
    """A blob's name covers its size: under a wrong one nobody could fetch what is here."""
    if (size := store.table(ref.digest).size) != ref.size:
        raise CheckFailed("invalid", "transfer", f"of its {name} it claims {ref.size} bytes; the blob of that name has {size}")


def needed_states(run: RunState, kept: int) -> set[str]:
    """The digests of the training states of each shard's last `kept` epochs, and of those that due audits begin or end with."""
    needed = {link.acceptance.state.digest for shard in run.shards.values() for link in shard.lineage[-kept:]}
    for audit in run.audits.values():
        shard = run.shards[audit.shard]
        link = shard.link(audit.checkpoint)
        before = link and shard.before(link)
        needed |= {found.acceptance.state.digest for found in (link, before) if found}
    return needed


def _impossible(text: str) -> Replayed:
    """Nobody will ever be able to replay it here."""
    return Replayed(AuditFinding(outcome="inconclusive", text=text), again=False)
