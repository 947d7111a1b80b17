"""The acceptance checks of a coordinator that computes nothing itself: nodes carry them out, and it compares their reports."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import CheckFailed, Replayed, SizeLimits
from lutetia.coordinator.acceptance.loss_bounds import FEWEST_ROWS, Losses
from lutetia.coordinator.acceptance.messages import StartAudit
from lutetia.coordinator.ledger.events import HoldoutBurnt
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.lending.agreement import Settled, numbers
from lutetia.coordinator.lending.loans import PROOF_AHEAD, LentCheck, loan_seconds_for
from lutetia.coordinator.lending.reserve import Reserve, next_of_reserve
from lutetia.coordinator.lending.service import CheckLender
from lutetia.coordinator.lending.trace_file import read_trace_file
from lutetia.coordinator.runtime.audit_service import job_of
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner, finding_of, noise_bounds
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed
from lutetia.coordinator.worker.messages import EpochReplayed, Job, SizesMeasured
from lutetia.models.data.parts.index import parts_of
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.check_request import MOST_ROWS, CheckJob, CheckReport, ReplayCheck, ResultCheck
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.system.errors import ConfigError, IntegrityError

NOISES = 4
"""Rows of each held-out clip (`models.training.holdout_loss`)."""
_REMEMBERED = 64


class NoWorker(WorkerClient):
    """In the place of a worker process where none is started."""

    def __init__(self) -> None:
        super().__init__(Path(), name="none", threads=1, nice=0)

    async def ask(self, job: Job, **_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise WorkerFailed(f"this coordinator starts no worker process, and has the job {job.name()} done by nodes")


def read_sizes(path: Path) -> SizesMeasured:
    """The sizes that a worker process measured when the run was first served. Raises ConfigError."""
    try:
        return SizesMeasured.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error.strerror
        raise ConfigError(f"cannot read {path} ({why}); remove it, and it is made again at the next start") from error


@dataclass
class LentCheckRunner(NetworkCheckRunner):
    """Fetches and keeps blobs as its base does, and lends what needs torch.

    Args:
        lender: hands the checks out.
        sizes: of every shard's files.
        reserve: files of held-out clips for strangers; None: the held-out clips go to named checkers.
    """

    lender: CheckLender = field(kw_only=True)
    sizes: SizesMeasured = field(kw_only=True)
    reserve: Reserve | None = field(default=None, kw_only=True)
    _found: OrderedDict[str, CheckReport] = field(default_factory=OrderedDict, init=False)

    @property
    def run(self) -> RunState:
        return self.lender.run()

    async def limits(self) -> dict[int, SizeLimits]:
        steps = self.manifest.steps_per_epoch
        return {shard: SizeLimits.of(size, self.sizes.state[shard], steps) for shard, size in self.sizes.weights.items()}

    async def inspect(self, record: CheckpointRecord, lanes: tuple[int, ...] = ()) -> None:
        """Have the same nodes inspect the files and score them, so that each fetches them once."""
        report = self._found.get(record.digest) or await self._report_on(record, lanes)
        if report.outcome == "refused":
            raise CheckFailed("invalid", report.check or "format", report.text)
        self._found[record.digest] = report
        while len(self._found) > _REMEMBERED:
            self._found.popitem(last=False)

    async def parent_losses(self, record: CheckpointRecord, parent: AcceptanceRecord | None) -> Losses:
        return numbers(self._found[record.digest].parent)

    async def losses(self, record: CheckpointRecord) -> Losses:
        return numbers(self._found[record.digest].averages)

    async def raw_losses(self, record: CheckpointRecord) -> Losses:
        return numbers(self._found[record.digest].raw)

    async def published(self, trace: BlobRef) -> Sequence[float]:
        """Raises WorkerFailed: the trace cannot be read, which its check has looked at."""
        try:
            return await asyncio.to_thread(read_trace_file, self._path(trace))
        except IntegrityError as error:
            raise WorkerFailed(str(error)) from error

    async def replay(self, audit: StartAudit) -> Replayed:
        """Have two nodes replay the epoch; what they agree on is compared with what the author published."""
        link, made, began = audit.link, audit.link.made, time.monotonic()
        if (why := self._not_kept(audit)) or made is None or link.trace is None:
            return Replayed(AuditFinding(outcome="inconclusive", text=why or "its record is not known"), again=False)
        published, finding = await self.published(link.trace), AuditFinding(outcome="inconclusive")
        for epochs in link.budgets if self.manifest.optimisation.schedule == "cosine" else link.budgets[:1]:
            report = (await self._lend_replay(audit, epochs)).report
            if report is None or report.made is None:
                text = "no two of the nodes that replayed it agree"
                return Replayed(AuditFinding(outcome="inconclusive", text=text), time.monotonic() - began)
            answer = EpochReplayed(
                published=tuple(published[: len(report.losses)]), losses=report.losses, drift=report.drift,
                noise=report.noise, made=report.made,
            )  # fmt: skip
            finding = finding_of(answer, made)
            if finding.outcome == "valid":
                break
        return Replayed(finding, time.monotonic() - began)

    # --- what is lent -------------------------------------------------------------------------------------------------------

    async def _report_on(self, record: CheckpointRecord, lanes: tuple[int, ...]) -> CheckReport:
        """Raises CheckFailed: inconclusive, as no two nodes agree or no held-out clips are left for strangers."""
        holdout, clips = await self._holdout_for(record)
        parent = self.run.shards[record.shard].acceptance
        weights = parent.weights if parent else self.manifest.expert_of(record.shard).init
        fewest = min(FEWEST_ROWS, NOISES * clips)
        job = CheckJob(
            id="0" * 64, kind="result", shard=record.shard, epoch=record.epoch, until=0.0,
            result=ResultCheck(
                weights=record.weights, state=record.state, trace=record.trace, parent=weights, holdout=holdout,
                draw=self.holdouts.draw(record.digest), rows=min(MOST_ROWS, NOISES * clips), fewest=fewest,
                seconds=self.check_seconds, lanes=lanes or ((record.lane,) if record.lane else ()),
            ),
        )  # fmt: skip
        parts = [part.blob for part in await asyncio.to_thread(parts_of, self.holdouts.path(holdout))]
        lent = [record.weights, record.state, record.trace, holdout, *parts]
        gathered = self.run.shards[record.shard].gathered
        authors = {record.owner, *(gathered[lane].acceptance.author for lane in lanes if lane in gathered)}
        settled = await self._lend(job, authors, record.digest, lent, fewest)
        if settled.report is None:
            raise CheckFailed("inconclusive", "holdout", "no two of the nodes that checked it agree")
        return settled.report

    async def _holdout_for(self, record: CheckpointRecord) -> tuple[BlobRef, int]:
        """The held-out clips that borrowers get, and how many they are. Those for strangers are written down as used up first."""
        shard = self.manifest.shards[record.shard]
        if self.lender.checkers:
            return shard.holdout, shard.holdout_clips
        ref = self.reserve and next_of_reserve(self.reserve, self.run.burnt, record.shard, record.digest)
        if self.reserve is None or ref is None:
            text = (
                f"no held-out clips of shard {record.shard} are left that strangers may see; name nodes in the setting checkers, "
                "or serve with worker processes"
            )
            raise CheckFailed("inconclusive", "holdout", text)
        if ref.digest not in self.run.burnt:
            event = HoldoutBurnt(time=self.transport.now(), shard=record.shard, holdout=ref.digest, checkpoint=record.digest)
            await self.lender.append(event)
        return ref, self.reserve.clips

    async def _lend_replay(self, audit: StartAudit, epochs: int) -> Settled:
        due, made, given = audit.audit, audit.link.made, audit.link.acceptance
        assert made is not None
        replayed = job_of(audit, 0.0, self.manifest).model_copy(update={"epochs": epochs})
        bounds = noise_bounds(made)
        job = CheckJob(
            id="0" * 64, kind="replay", shard=due.shard, epoch=due.epoch, until=0.0,
            replay=ReplayCheck(audit=replayed, near=bounds.near, far=bounds.far, coarse=bounds.coarse),
        )  # fmt: skip
        lent = [given.weights, given.state] if due.whole else []
        if audit.parent:
            lent += [audit.parent.weights, audit.parent.state]
        ahead = 0.0 if audit.process == "audit" else PROOF_AHEAD
        return await self._lend(job, {due.owner}, f"{due.checkpoint} {epochs}", lent, ahead=ahead)

    async def _lend(
        self, job: CheckJob, authors: Collection[str], name: str, refs: Iterable[BlobRef], fewest: int = 1, ahead: float = 0.0
    ) -> Settled:
        """`authors`: who trained what is checked; of a merged epoch those of its lanes, who gain by its acceptance."""
        stores = {ref.digest: store for ref in refs if (store := self._lending_store(ref.digest))}
        size = sum(ref.size for ref in refs)
        check = LentCheck(
            name=f"{job.kind} {name}", kind=job.kind, shard=job.shard, since=self.transport.now(),
            excluded=frozenset().union(*map(self.lender.excluded, authors)), fewest=fewest, ahead=ahead,
            seconds=loan_seconds_for(size, self.slowest_bytes_per_second, self.lender.usual.get(job.kind)),
        )  # fmt: skip
        return await self.lender.ask(check, job, stores)

    def _lending_store(self, digest: str) -> BlobStore | None:
        stores = (self.blobs, self.incoming, self.holdouts.store)
        return next((store for store in stores if store.has(digest)), None)

    def _not_kept(self, audit: StartAudit) -> str:
        """Why this audit can never be carried out; empty if it can."""
        due, link, parent = audit.audit, audit.link, audit.parent
        if due.epoch > 1 and parent is None:
            return f"epoch {due.epoch - 1}, from which it would be replayed, is too long ago"
        files = [link.trace, *((parent.weights, parent.state) if parent else ())]
        if due.whole:
            files += [link.acceptance.weights, link.acceptance.state]
        missing = any(ref is not None and self._store_with(ref.digest) is None for ref in files)
        return "a file that the replay needs is not kept any more" if missing else ""

    def keep(self, record: CheckpointRecord, of_lane: bool = False) -> None:
        self._found.pop(record.digest, None)
        super().keep(record, of_lane)

    def discard(self, record: CheckpointRecord, run: RunState) -> None:
        self._found.pop(record.digest, None)
        super().discard(record, run)
