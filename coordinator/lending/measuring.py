"""Evaluation of mixtures by nodes: two score the new and the current one on equal held-out rows, and choose the routing."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lutetia.coordinator.acceptance.loss_bounds import mean
from lutetia.coordinator.holdouts import Holdouts
from lutetia.coordinator.ledger.events import HoldoutBurnt
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.lending.agreement import numbers
from lutetia.coordinator.lending.loans import LentCheck, loan_seconds_for
from lutetia.coordinator.lending.reserve import Reserve, next_of_reserve
from lutetia.coordinator.lending.service import CheckLender
from lutetia.coordinator.mixtures.archive import MixtureArchive
from lutetia.coordinator.worker.messages import MeasureMixture
from lutetia.models.data.parts.index import parts_of
from lutetia.models.mixing.description import MixtureRouting, SignedMixture
from lutetia.protocol.rpc.check_request import CheckJob, CheckReport, LentMixture, MixtureCheck
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef

_log = logging.getLogger(__name__)

FEWEST_ROWS = 8
"""As `models.mixing.routing.evidence` scores them however long they take."""
PATIENCE = 3
"""For so many times as long as a loan is counted on is waited; then the mixture is made without."""


@dataclass(frozen=True)
class MixtureMeasured:
    """What two nodes agree on. `before`: the losses of the current mixture on the same rows."""

    routing: MixtureRouting | None
    losses: tuple[float, ...]
    before: tuple[float, ...]
    rows_of: str


def may_be_burnt(state: RunState, reserve: Reserve, manifest: Manifest, slots: int = 1) -> bool:
    """Whether the reserve is good for one mixture more than the results that the budgets still allow.

    Args:
        state: of the run.
        reserve: the files of held-out clips for strangers.
        manifest: the run.
        slots: results of each epoch.
    """
    epochs = state.accepted_epochs
    for shard, files in enumerate(reserve.shards):
        left = sum(ref.digest not in state.burnt for ref in files)
        if left <= slots * (manifest.epochs - epochs[shard]):
            return False
    return True


@dataclass
class LentMeasuring:
    """Has mixtures evaluated by nodes.

    Args:
        manifest: the newest one.
        lender: hands the checks out.
        holdouts: the run's held-out clips.
        reserve: files of held-out clips for strangers; None: they go to named checkers.
        archive: says what the current mixture is made of.
        slowest: bytes per second at which borrowers must be able to fetch.
    """

    manifest: Callable[[], Manifest]
    lender: CheckLender
    holdouts: Holdouts
    reserve: Reserve | None
    archive: MixtureArchive
    slowest: float

    async def measure(
        self, weights: Mapping[int, BlobRef], router: BlobRef | None, how: MeasureMixture
    ) -> MixtureMeasured | None:
        """Have the mixture of these weights measured; None where that cannot be had now, which the log explains.

        Args:
            weights: accepted weights by shard.
            router: the run's router; None: it has one shard.
            how: draw, time, and whether to choose the routing.
        """
        name = hashlib.sha256(" ".join(f"{shard} {weights[shard].digest}" for shard in sorted(weights)).encode()).hexdigest()
        clips = await self._held_out(name)
        if clips is None:
            return None
        current = self._current()
        check = MixtureCheck(
            new=LentMixture(weights=dict(weights)), current=current, router=router, holdout=clips,
            draw=self.holdouts.draw(f"mixture {how.draw} {name}"), seconds=how.seconds, choose=how.choose,
        )  # fmt: skip
        report = await self._report_on(check)
        if report is None or report.mode is None or report.temperature is None:
            return None
        losses, before = tuple(numbers(report.averages)), tuple(numbers(report.parent))
        rows_of = hashlib.sha256(" ".join([check.draw, *(ref.digest for ref in clips)]).encode()).hexdigest()
        return MixtureMeasured(_routing(report, losses), losses, before, rows_of)

    async def _report_on(self, check: MixtureCheck) -> CheckReport | None:
        stores = {}
        for ref in check.holdout:
            parts = await asyncio.to_thread(parts_of, self.holdouts.path(ref))
            stores |= {blob.digest: self.holdouts.store for blob in (ref, *(part.blob for part in parts))}
        mixtures = (check.new, *([check.current] if check.current else ()))
        size = sum(ref.size for mixture in mixtures for ref in mixture.weights.values())
        lent = LentCheck(
            name="mixture", kind="mixture", shard=None, since=self.lender.transport.now(), fewest=FEWEST_ROWS,
            seconds=loan_seconds_for(size, self.slowest, self.lender.usual.get("mixture")),
        )  # fmt: skip
        job = CheckJob(id="0" * 64, kind="mixture", shard=0, mixture=check, until=0.0)
        try:
            async with asyncio.timeout(PATIENCE * lent.seconds):
                settled = await self.lender.ask(lent, job, stores)
        except TimeoutError:
            _log.warning("no two nodes have measured the mixture within %.0f s; it is made without", PATIENCE * lent.seconds)
            return None
        if settled.report is None:
            _log.warning("no two of the nodes that measured the mixture agree; it is made without")
        return settled.report

    async def _held_out(self, name: str) -> tuple[BlobRef, ...] | None:
        """The held-out clips of every shard that borrowers get; those for strangers are written down as used up first."""
        shards = self.manifest().shards
        if self.lender.checkers:
            return tuple(shard.holdout for shard in shards)
        run = self.lender.run()
        given = [next_of_reserve(self.reserve, run.burnt, shard.index, name) for shard in shards] if self.reserve else []
        files = [ref for ref in given if ref is not None]
        again = bool(files) and all(run.burnt.get(ref.digest) == name for ref in files)
        slots = self.manifest().lanes
        if self.reserve is None or not (again or may_be_burnt(run, self.reserve, self.manifest(), slots)):
            _log.warning("the mixture is not measured: the rest of the reserve is needed for results; name nodes as checkers")
            return None
        for shard, ref in zip(shards, files, strict=True):
            if ref.digest not in run.burnt:
                event = HoldoutBurnt(time=self.lender.transport.now(), shard=shard.index, holdout=ref.digest, checkpoint=name)
                await self.lender.append(event)
        return tuple(files)

    def _current(self) -> LentMixture | None:
        """The current mixture, if it was measured and its weights are still here."""
        run = self.lender.run()
        if run.mixture is None or not run.is_current(run.mixture):
            return None
        known, found = self.archive.read_losses(run.mixture.mixture), self.archive.find(run.mixture.mixture)
        if found is None or known is None or not known.weights:
            return None
        if not all(self.archive.blobs.has(ref.digest) for ref in known.weights.values()):
            return None
        routing = SignedMixture.model_validate_json(found).mixture.routing
        mode = routing.mode if routing else self.manifest().sampling.mode
        return LentMixture(weights=known.weights, mode=mode, temperature=routing.temperature if routing else 1.0)


def _routing(report: CheckReport, losses: tuple[float, ...]) -> MixtureRouting | None:
    """None where the loss is no finite number: then the mixture routes as the manifest says."""
    assert report.mode
    assert report.temperature
    loss = mean(losses)
    if not math.isfinite(loss):
        return None
    return MixtureRouting(
        mode=report.mode, temperature=report.temperature, loss=loss, rows=len(losses),
        text=f"{report.mode} at temperature {report.temperature:g}, as nodes measured on {len(losses)} held-out rows",
    )  # fmt: skip
