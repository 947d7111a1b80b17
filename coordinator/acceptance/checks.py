"""The acceptance checks: what a result must pass to become the next epoch of its shard, cheapest first.

    signature   the record is signed by its owner, who may take part, and names the owner's own peer id
    quarantine  its author is neither quarantined nor banned
    lineage     it is epoch+1 on the accepted parent: this fencing makes it safe to lose a claim
    size        no blob is larger than the manifest's weights can be; known before a byte is fetched
    transfer    every blob arrives and hashes to its name
    format      safetensors with exactly the manifest's names, shapes and dtypes
    numbers     finite, within norm bounds, and optimiser moments that gradients can have produced
    holdout     held-out loss of this shard not worse than the accepted parent's (a tolerance, an interval). Both are scored on
                the same rows, whose noise and times are drawn from the coordinator's secret for this result
    raw         the raw parameters, from which training goes on, score about as well as the published averages
    audit       after the acceptance, when the adaptive rule asks for it: replayed from the parent, losses compared

`ACCEPTANCE_CHECKS` is the list. To add a check, add its name to `CheckName`, write its function here and put it into the list.
The judge runs the free checks when a result is offered, `run_transfer` fetches, `run_checks` reads and computes.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding, compare
from lutetia.coordinator.acceptance.loss_bounds import Losses, compare_rows, in_common, mean
from lutetia.coordinator.ledger.events import CheckCost, Outcome, QuarantineRecovered
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.system.errors import DiskError, LutetiaError

_TRACE_BYTES_PER_STEP = 64
_HEADER_ALLOWANCE = 1 << 20
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks found. `valid` carries both losses; otherwise `check` is the one that failed and `text` says why.

    A failed loss check carries both losses, too, unless one is not a number. A `valid` with a text is accepted with that note.

    `costs` are the checks that were run, each with its own outcome. `rules` is the manifest's version under which they were run.
    `over` says by which fraction a loss exceeds its bound.
    """

    outcome: Outcome
    check: CheckName
    text: str = ""
    loss: float | None = None
    parent_loss: float | None = None
    costs: tuple[CheckCost, ...] = ()
    rules: int | None = None
    over: float | None = None


class CheckFailed(LutetiaError):
    """The result does not pass a check, or could not be checked."""

    code, name = 50, "integrity"

    def __init__(self, outcome: Literal["invalid", "inconclusive"], check: CheckName, text: str) -> None:
        super().__init__(text)
        self.verdict = Verdict(outcome, check, text)


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Most bytes that a shard's blobs may have."""

    weights: int
    state: int
    trace: int

    @classmethod
    def of(cls, weights: tuple[int, int], state: tuple[int, int], steps: int) -> SizeLimits:
        """From the manifest's weight schema: `weights` and `state` are (bytes, tensors), `steps` those of an epoch."""
        trace = _HEADER_ALLOWANCE + _TRACE_BYTES_PER_STEP * steps
        headers = [_HEADER_ALLOWANCE + 1024 * tensors for _, tensors in (weights, state)]
        return cls(weights[0] + headers[0], state[0] + headers[1] + trace, trace)


Limits = Mapping[int, SizeLimits]
"""Shard -> size limits of its blobs."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay of `seconds` found. `again`: whether another try can find more when this one was inconclusive."""

    finding: AuditFinding
    seconds: float = 0.0
    again: bool = True


# --- free checks: pure, on the record alone ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordUnderCheck:
    """An offered record of one of the run's shards, and what it is compared with. `limits` None: not known yet."""

    record: CheckpointRecord
    run: RunState
    manifest: Manifest
    limits: Limits | None


def check_signature(offered: RecordUnderCheck) -> Verdict | None:
    """The record was opened, so its signature is right: may its owner take part?"""
    record, manifest = offered.record, offered.manifest
    if record.run != manifest.run_id:
        return Verdict("invalid", "signature", f"the checkpoint is of run {record.run[:12]}, not of {manifest.run_id[:12]}")
    if manifest.allowlist is not None and record.owner not in manifest.allowlist:
        return Verdict("invalid", "signature", f"peer {record.owner[:16]}… is not on the run's allowlist")
    if record.peer_id != peer_id_of(record.owner):
        return Verdict("invalid", "signature", f"the checkpoint names peer {record.peer_id}, which is not its owner's")
    return None


def check_quarantine(offered: RecordUnderCheck) -> Verdict | None:
    """Neither is its author quarantined, nor has the owner banned it."""
    if banned := offered.manifest.orders.refusal_of(offered.record.owner):
        return Verdict("invalid", "quarantine", banned)
    why = offered.run.quarantined.get(offered.record.owner)
    if why is None:
        return None
    if isinstance(why, QuarantineRecovered):
        what = why.text
    else:
        what = f"an audit found its epoch {why.epoch} of shard {why.shard} invalid ({why.text[:600]})"
    return Verdict("invalid", "quarantine", f"this peer is quarantined: {what}; ask the run's operator")


def check_lineage(offered: RecordUnderCheck) -> Verdict | None:
    """For a record of the shard's next epoch: its parent is the accepted checkpoint, and it has all samples up to its epoch."""
    record, manifest = offered.record, offered.manifest
    shard = offered.run.shards[record.shard]
    if record.lane >= manifest.lanes:
        return Verdict("invalid", "lineage", f"shard {record.shard} has {manifest.lanes} lanes, and none of number {record.lane}")
    if record.epoch > manifest.epochs:
        return Verdict("invalid", "lineage", f"shard {record.shard} ends at epoch {manifest.epochs}, not at {record.epoch}")
    if record.parent != shard.accepted:
        parent, accepted = _short(record.parent), _short(shard.accepted)
        return Verdict(
            "invalid", "lineage", f"its parent is {parent}, but epoch {shard.epoch} of shard {record.shard} is {accepted}"
        )
    if record.samples != (needed := record.epoch * manifest.checkpoint_samples):
        text = f"it reports {record.samples} samples of its shard; after {record.epoch} epochs they are {needed}"
        return Verdict("invalid", "lineage", text)
    return None


def check_size(offered: RecordUnderCheck) -> Verdict | None:
    """Passes as long as the limits are unknown; the judge repeats it before a byte is fetched."""
    if offered.limits is None:
        return None
    record, limits = offered.record, offered.limits[offered.record.shard]
    for name, size, most in (
        ("weights", record.weights.size, limits.weights),
        ("state", record.state.size, limits.state),
        ("trace", record.trace.size, limits.trace),
    ):
        if size > most:
            return Verdict("invalid", "size", f"its {name} have {size} bytes; the manifest's expert needs at most {most}")
    return None


# --- checks that fetch, read or compute -------------------------------------------------------------------------------------


class CheckRunner(Protocol):
    """The network, disk and computation that checks need. Each method raises CheckFailed."""

    async def fetch(self, record: CheckpointRecord, patience: float = 1.0) -> None:
        """Fetch all blobs, within the fraction `patience` of the usual time, and compare them with their names."""
        ...

    async def inspect(self, record: CheckpointRecord, lanes: tuple[int, ...] = ()) -> None:
        """Checks `format` and `numbers` of fetched blobs. `lanes`: those that were merged into it, if it is a merged epoch."""
        ...

    async def parent_losses(self, record: CheckpointRecord, parent: AcceptanceRecord | None) -> Losses:
        """Held-out losses of the accepted parent (None: the shard's initial model) on the rows that score `record`."""
        ...

    async def losses(self, record: CheckpointRecord) -> Losses:
        """Held-out losses of fetched weights."""
        ...

    async def raw_losses(self, record: CheckpointRecord) -> Losses:
        """Held-out losses of a fetched state's raw parameters."""
        ...


@dataclass(slots=True)
class CandidateUnderCheck:
    """A result while `run_checks` works on it: what the checks before have measured, and what they cost by `clock`."""

    record: CheckpointRecord
    manifest: Manifest
    runner: CheckRunner
    clock: Callable[[], float]
    parent: AcceptanceRecord | None = None
    patience: float = 1.0
    lanes: tuple[int, ...] = ()
    parent_losses: Losses = ()
    losses: Losses = ()
    check: CheckName = "transfer"
    costs: list[CheckCost] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.record.weights.size + self.record.state.size + self.record.trace.size

    async def measure(self, work: Awaitable[T], size: int = 0) -> T:
        """Await `work` of the running check, on `size` bytes. Its cost is counted also when it raises."""
        began, outcome, name = self.clock(), "inconclusive", self.check
        try:
            result = await work
            outcome = "valid"
        except CheckFailed as failure:
            outcome, name = failure.verdict.outcome, failure.verdict.check
            raise
        except DiskError:  # a fault of the coordinator's machine: it says nothing about any result
            raise
        except LutetiaError as error:  # for instance a blob that was removed meanwhile: it says nothing about the result
            raise CheckFailed("inconclusive", name, str(error)) from error
        finally:
            self.costs.append(CheckCost(check=name, outcome=outcome, seconds=max(0.0, self.clock() - began), size=size))
        return result


async def check_transfer(candidate: CandidateUnderCheck) -> Verdict | None:
    await candidate.measure(candidate.runner.fetch(candidate.record, candidate.patience), candidate.size)
    return None


async def check_contents(candidate: CandidateUnderCheck) -> Verdict | None:
    await candidate.measure(candidate.runner.inspect(candidate.record, candidate.lanes), candidate.size)
    return None


async def check_holdout(candidate: CandidateUnderCheck) -> Verdict | None:
    """The parent is scored again for each result: on other rows, its earlier loss says nothing."""
    record, runner = candidate.record, candidate.runner
    size = candidate.parent.weights.size if candidate.parent else 0
    candidate.parent_losses = await candidate.measure(runner.parent_losses(record, candidate.parent), size)
    candidate.losses = await candidate.measure(runner.losses(record), record.weights.size)
    candidate.losses, candidate.parent_losses = in_common(candidate.losses, candidate.parent_losses)
    return compare_losses(candidate.losses, candidate.parent_losses, candidate.manifest.holdout_tolerance)


async def check_raw(candidate: CandidateUnderCheck) -> Verdict | None:
    raw = await candidate.measure(candidate.runner.raw_losses(candidate.record), candidate.record.state.size)
    return compare_raw(*in_common(raw, candidate.losses, candidate.parent_losses), candidate.manifest.raw_tolerance)


def compare_losses(losses: Losses, parent_losses: Losses, tolerance: float) -> Verdict | None:
    """None unless `losses` exceed the parent's by more than the fraction `tolerance` and the interval of so few rows."""
    found = compare_rows(losses, parent_losses, tolerance)
    if found.passes:
        return None
    if not math.isfinite(found.loss):
        return Verdict("invalid", "holdout", "its held-out loss is not a number")
    text = (
        f"its held-out loss {found.loss:.5f} is worse than the accepted parent's {found.base:.5f} "
        f"(at most {found.bound:.5f} on {found.rows} rows)"
    )
    return Verdict("invalid", "holdout", text, found.loss, found.base, over=found.over)


def compare_raw(raw: Losses, losses: Losses, parent_losses: Losses, tolerance: float) -> Verdict | None:
    """None unless the raw parameters are worse than averages and parent by more than `tolerance` and the interval."""
    base = losses if mean(losses) > mean(parent_losses) else parent_losses
    found = compare_rows(raw, base, tolerance)
    if found.passes:
        return None
    if not math.isfinite(found.loss):
        return Verdict("invalid", "raw", "the held-out loss of the raw parameters in its state is not a number")
    text = (
        f"the raw parameters in its state have held-out loss {found.loss:.5f}, its averages {mean(losses):.5f} "
        f"(at most {found.bound:.5f} on {found.rows} rows)"
    )
    return Verdict("invalid", "raw", text, mean(losses), mean(parent_losses), over=found.over)


# --- the list ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AcceptanceCheck(Generic[F]):
    """One check of the list.

    `cost` says what it takes, and so where it runs: `free` in the judge, `replay` after the acceptance, the others in between.
    `run` gives None when the result passes. `includes` names checks that the same call carries out before.
    """

    name: CheckName
    cost: Literal["free", "network", "disk", "compute", "replay"]
    run: F
    includes: tuple[CheckName, ...] = ()


FREE_CHECKS: tuple[AcceptanceCheck[Callable[[RecordUnderCheck], Verdict | None]], ...] = (
    AcceptanceCheck("signature", "free", check_signature),
    AcceptanceCheck("quarantine", "free", check_quarantine),
    AcceptanceCheck("lineage", "free", check_lineage),
    AcceptanceCheck("size", "free", check_size),
)
RunnerCheck = AcceptanceCheck[Callable[[CandidateUnderCheck], Awaitable[Verdict | None]]]
NETWORK_CHECKS: tuple[RunnerCheck, ...] = (AcceptanceCheck("transfer", "network", check_transfer),)
LOCAL_CHECKS: tuple[RunnerCheck, ...] = (
    AcceptanceCheck("numbers", "disk", check_contents, includes=("format",)),
    AcceptanceCheck("holdout", "compute", check_holdout),
    AcceptanceCheck("raw", "compute", check_raw),
)
AUDIT_CHECK = AcceptanceCheck("audit", "replay", compare)
ACCEPTANCE_CHECKS: tuple[AcceptanceCheck[Any], ...] = (*FREE_CHECKS, *NETWORK_CHECKS, *LOCAL_CHECKS, AUDIT_CHECK)
"""All checks in the order in which a result meets them."""


def first_failure(offered: RecordUnderCheck) -> Verdict | None:
    """The verdict of the first free check that the record does not pass, or None."""
    return next((verdict for check in FREE_CHECKS if (verdict := check.run(offered))), None)


async def run_checks(
    record: CheckpointRecord,
    parent: AcceptanceRecord | None,
    manifest: Manifest,
    runner: CheckRunner,
    clock: Callable[[], float],
    lanes: tuple[int, ...] = (),
) -> Verdict:
    """Run the checks from `format` to `raw`; the first that fails ends it.

    Args:
        record: a result that has passed the free checks and whose blobs have arrived.
        parent: the accepted epoch before it; None: the initial model.
        manifest: the run's manifest, for its tolerances.
        runner: fetches, reads and computes.
        clock: seconds, for what each check costs.
        lanes: the lanes whose results were merged into it; empty: it is the result of its record's lane.
    """
    candidate = CandidateUnderCheck(record, manifest, runner, clock, parent, lanes=lanes)
    return replace(await _first_failure(candidate, LOCAL_CHECKS), rules=manifest.version)


async def run_transfer(
    record: CheckpointRecord, manifest: Manifest, runner: CheckRunner, clock: Callable[[], float], patience: float = 1.0
) -> Verdict:
    """Run the check `transfer`, which waits for peers, within the fraction `patience` of the usual time."""
    candidate = CandidateUnderCheck(record, manifest, runner, clock, patience=patience)
    return replace(await _first_failure(candidate, NETWORK_CHECKS), rules=manifest.version)


async def _first_failure(candidate: CandidateUnderCheck, checks: Sequence[RunnerCheck]) -> Verdict:
    try:
        for check in checks:
            candidate.check = check.name
            if failed := await check.run(candidate):
                last = candidate.costs.pop()  # the work was done, and the comparison after it failed
                return replace(failed, costs=(*candidate.costs, last.model_copy(update={"outcome": failed.outcome})))
    except CheckFailed as failure:
        return replace(failure.verdict, costs=tuple(candidate.costs))
    if not candidate.losses:
        return Verdict("valid", candidate.check, costs=tuple(candidate.costs))
    loss, parent_loss = mean(candidate.losses), mean(candidate.parent_losses)
    return Verdict("valid", "holdout", "", loss, parent_loss, tuple(candidate.costs))


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "the initial model"
