"""The acceptance ladder: what a result must pass to become the next epoch of its shard, cheapest rung first.

    signature  the record is signed by its owner, who may take part, and names the owner's own peer id
    lineage    it is epoch+1 on the accepted parent: the fencing that makes claims safe to lose
    size       no blob is larger than the manifest's weights can be, known before a byte is fetched
    transfer   every blob arrives and hashes to its name
    format     safetensors with exactly the manifest's names, shapes and dtypes
    numbers    finite, within norm bounds, and optimiser moments that gradients can have left
    holdout    held-out loss of this shard not worse than the accepted parent's (same noise, same timesteps, a tolerance)
    raw        the raw parameters, from which training goes on, score about as well as the averages that are published
    audit      after the acceptance, where the adaptive rule wants it: replayed from the parent, losses compared (`auditing`)

Rungs up to `size` and the comparison of losses are pure; the others are carried out by `CheckRunner`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.ledger.events import CheckCost, Outcome
from lutetia.coordinator.ledger.run_state import ShardLedger
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.system.errors import DiskError, LutetiaError

_TRACE_BYTES_PER_STEP = 64
_HEADER_ALLOWANCE = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ladder found. `valid` carries both losses; otherwise `rung` is where it stopped and `text` says why.

    `costs` are the rungs that were climbed, each with its own outcome.
    """

    outcome: Outcome
    rung: CheckName
    text: str = ""
    loss: float | None = None
    parent_loss: float | None = None
    costs: tuple[CheckCost, ...] = ()


class CheckFailed(LutetiaError):
    """Raised by a rung that the result does not pass."""

    code, name = 50, "integrity"

    def __init__(self, outcome: Literal["invalid", "inconclusive"], rung: CheckName, text: str) -> None:
        super().__init__(text)
        self.verdict = Verdict(outcome, rung, text)


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


def entitled(record: CheckpointRecord, manifest: Manifest) -> Verdict | None:
    """Rung `signature`, after the record was opened: None when its owner may take part."""
    if record.run != manifest.run_id:
        return Verdict("invalid", "signature", f"the checkpoint is of run {record.run[:12]}, not of {manifest.run_id[:12]}")
    if manifest.allowlist is not None and record.owner not in manifest.allowlist:
        return Verdict("invalid", "signature", f"peer {record.owner[:16]}… is not on the run's allowlist")
    if record.peer_id != peer_id_of(record.owner):
        return Verdict("invalid", "signature", f"the checkpoint names peer {record.peer_id}, which is not its owner's")
    return None


def lineage(record: CheckpointRecord, shard: ShardLedger, manifest: Manifest) -> Verdict | None:
    """Rung `lineage` for a record of epoch `shard.epoch + 1`: None when it stands on the accepted parent with a full interval."""
    if record.epoch > manifest.epochs:
        return Verdict("invalid", "lineage", f"shard {record.shard} ends at epoch {manifest.epochs}, not at {record.epoch}")
    if record.parent != shard.accepted:
        parent, accepted = _short(record.parent), _short(shard.accepted)
        return Verdict(
            "invalid", "lineage", f"its parent is {parent}, but epoch {shard.epoch} of shard {record.shard} is {accepted}"
        )
    if record.samples != (needed := record.epoch * manifest.checkpoint_samples):
        text = f"it says {record.samples} samples of its shard; after {record.epoch} epochs they are {needed}"
        return Verdict("invalid", "lineage", text)
    return None


def sizes(record: CheckpointRecord, limits: SizeLimits) -> Verdict | None:
    """Rung `size`: None when every blob can be what it says it is."""
    for name, size, most in (
        ("weights", record.weights.size, limits.weights),
        ("state", record.state.size, limits.state),
        ("trace", record.trace.size, limits.trace),
    ):
        if size > most:
            return Verdict("invalid", "size", f"its {name} have {size} bytes; the manifest's expert needs at most {most}")
    return None


def compare_losses(loss: float, parent_loss: float, tolerance: float) -> Verdict:
    """Rung `holdout`: valid unless `loss` exceeds the parent's by more than the fraction `tolerance`."""
    if not math.isfinite(loss):
        return Verdict("invalid", "holdout", "its held-out loss is not a number")
    most = parent_loss * (1 + tolerance)
    if loss > most:
        text = f"its held-out loss {loss:.5f} is worse than the accepted parent's {parent_loss:.5f} (at most {most:.5f})"
        return Verdict("invalid", "holdout", text, loss, parent_loss)
    return Verdict("valid", "holdout", "", loss, parent_loss)


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a replay came out after `seconds`. `again`: whether trying again can bring more, where nothing was concluded."""

    finding: AuditFinding
    seconds: float = 0.0
    again: bool = True


class CheckRunner(Protocol):
    """What the rungs with input and output need. Each raises Stopped with its own rung."""

    async def fetch(self, record: CheckpointRecord) -> None:
        """Rung `transfer`."""
        ...

    async def inspect(self, record: CheckpointRecord) -> None:
        """Rungs `format` and `numbers`, on fetched blobs."""
        ...

    async def baseline(self, shard: int) -> float:
        """Held-out loss of the shard's initial model."""
        ...

    async def loss(self, record: CheckpointRecord) -> float:
        """Held-out loss of fetched weights."""
        ...

    async def raw_loss(self, record: CheckpointRecord) -> float:
        """Held-out loss of a fetched state's raw parameters."""
        ...


def compare_raw(raw: float, loss: float, parent_loss: float, tolerance: float) -> Verdict | None:
    """Rung `raw`: None unless the raw parameters are worse than averages and parent by more than the fraction `tolerance`."""
    most = max(loss, parent_loss) * (1 + tolerance)
    if math.isfinite(raw) and raw <= most:
        return None
    text = f"the raw parameters in its state have held-out loss {raw:.5f}, its averages {loss:.5f} (at most {most:.5f})"
    return Verdict("invalid", "raw", text, loss, parent_loss)


@dataclass
class _Climb:
    """What each rung costs, by `clock`; a rung that raises is counted too."""

    clock: Callable[[], float]
    costs: list[CheckCost] = field(default_factory=list)

    async def rung(self, name: CheckName, work: Awaitable[T], size: int = 0) -> T:
        began, outcome = self.clock(), "inconclusive"
        try:
            result = await work
            outcome = "valid"
        except CheckFailed as stop:
            outcome = stop.verdict.outcome
            name = stop.verdict.rung
            raise
        except DiskError:  # the machine's trouble, and nobody can be judged on it
            raise
        except LutetiaError as error:  # a blob that was removed meanwhile, for instance: it says nothing about the result
            raise CheckFailed("inconclusive", name, str(error)) from error
        finally:
            self.costs.append(CheckCost(rung=name, outcome=outcome, seconds=max(0.0, self.clock() - began), size=size))
        return result


async def run_checks(
    record: CheckpointRecord,
    parent_loss: float | None,
    manifest: Manifest,
    tools: CheckRunner,
    clock: Callable[[], float] = time.monotonic,
) -> Verdict:
    """Carry out the rungs from `transfer` to `raw`. `parent_loss` None: measure the initial model first."""
    climbing = _Climb(clock)
    sizes = record.weights.size, record.state.size, record.trace.size
    try:
        await climbing.rung("transfer", tools.fetch(record), sum(sizes))
        await climbing.rung("numbers", tools.inspect(record), sum(sizes))
        if parent_loss is None:
            parent_loss = await climbing.rung("holdout", tools.baseline(record.shard))
        loss = await climbing.rung("holdout", tools.loss(record), record.weights.size)
        verdict = compare_losses(loss, parent_loss, manifest.holdout_tolerance)
        if verdict.outcome == "valid":
            raw = await climbing.rung("raw", tools.raw_loss(record), record.state.size)
            verdict = compare_raw(raw, loss, parent_loss, manifest.raw_tolerance) or verdict
    except CheckFailed as stop:
        return replace(stop.verdict, costs=tuple(climbing.costs))
    last = climbing.costs.pop()
    return replace(verdict, costs=(*climbing.costs, last.model_copy(update={"outcome": verdict.outcome})))


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "the initial model"


Limits = Mapping[int, SizeLimits]
