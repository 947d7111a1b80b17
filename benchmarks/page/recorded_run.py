"""A run on disk as months of work leave it: made-up events in the order and mixture in which a judge writes them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lutetia.coordinator.ledger.events import (
    AuditDone,
    AuditDue,
    BaselineMeasured,
    CheckCost,
    CheckpointAccepted,
    Event,
    ManifestPublished,
    MixtureStitched,
    ResultRefused,
    ResultSeen,
    ResultSuperseded,
    RouterTrained,
    RunCreated,
)
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import ShardLedger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.protocol.schema.verdicts import CHECK_NAMES
from tests.coordinator.acceptance.judge_driver import COORDINATOR, blob, make_manifest

SECONDS_PER_RESULT = 20.0
AUDITED, REFUSED, SECOND = 0.15, 0.05, 0.02
"""Shares of the accepted results that are audited, and of those beside which one is refused or comes second."""
STITCHED_AFTER = 500
_AT_ONCE = 2000


@dataclass
class MadeUpRun:
    """Events of a run of `shards` shards and `peers` peers that ends at `now` (Unix seconds)."""

    shards: int
    peers: int
    events: int
    now: float
    seed: int = 7
    people: list[Identity] = field(init=False)
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        self.people = [Identity.derived(f"volunteer {index}") for index in range(self.peers)]
        created = self.now - self.events / 2 * SECONDS_PER_RESULT
        self.manifest = make_manifest(
            self.shards, epochs=2 * self.events // self.shards, name="Long run", created=created, expires=self.now + 1e7
        )

    def write(self, folder: Path) -> Ledger:
        """The run's ledger, ticket and folders in `folder`. Returns the open ledger."""
        root = RunFolder(folder)
        root.gallery.mkdir(parents=True)
        COORDINATOR.save(root.coordinator_key)
        root.ticket.write_text("lutetia1" + "qpzry9x8gf2tvdw0s3jn54khce6mua7l" * 8 + "\n")
        first, *rest = self.history()
        assert isinstance(first, RunCreated)
        ledger = Ledger.create(root.ledger, first)
        for start in range(0, len(rest), _AT_ONCE):
            ledger.append(rest[start : start + _AT_ONCE])
        return ledger

    def history(self) -> list[Event]:
        """All events, oldest first."""
        found = list(self._beginning())
        generator, moment = random.Random(self.seed), self.manifest.created
        lineages = [Lineage(self.manifest, index) for index in range(self.shards)]
        count = 0
        while len(found) < self.events:
            moment += SECONDS_PER_RESULT
            lineage = generator.choice(lineages)
            author = self.people[(37 * lineage.shard + generator.randrange(max(1, self.peers // 8))) % self.peers]
            other = generator.choice(self.people)
            found += lineage.epoch_done(author, other, moment, generator)
            count += 1
            if count % STITCHED_AFTER == 0:
                found += _stitched(lineages, moment, count)
        return found[: self.events]

    def _beginning(self) -> Iterator[Event]:
        manifest = self.manifest
        yield RunCreated(
            time=manifest.created, run=manifest.run_id, name=manifest.name, owner=manifest.owner,
            coordinator=COORDINATOR.public_key, shards=self.shards, epochs=manifest.epochs,
        )  # fmt: skip
        yield ManifestPublished(time=manifest.created, version=1, digest=manifest.run_id, expires=manifest.expires)
        for shard in range(self.shards):
            yield BaselineMeasured(time=manifest.created, shard=shard, loss=1.5)


class Lineage:
    """The results of one shard."""

    def __init__(self, manifest: Manifest, shard: int) -> None:
        self.manifest, self.shard, self.epoch, self.loss = manifest, shard, 0, 1.5
        self.parent: str | None = None

    @classmethod
    def after(cls, manifest: Manifest, shard: ShardLedger, index: int) -> Lineage:
        """The lineage that goes on from the accepted epoch of a shard."""
        lineage = cls(manifest, index)
        lineage.epoch, lineage.parent = shard.epoch, shard.accepted
        if shard.acceptance:
            lineage.loss = shard.acceptance.holdout_loss
        return lineage

    def epoch_done(self, author: Identity, other: Identity, moment: float, generator: random.Random) -> Iterator[Event]:
        """A result is accepted; maybe another one is refused or comes second, and maybe it is audited."""
        record, before = self._record(author, "good", moment), self.loss
        self.loss = 0.4 + (self.loss - 0.4) * generator.uniform(0.97, 1.0)
        yield ResultSeen(time=moment, record=record, via="offer")
        rival = self._record(other, "other", moment) if other.public_key != author.public_key else None
        if rival and (chance := generator.random()) < REFUSED + SECOND:
            yield ResultSeen(time=moment + 0.1, record=rival, via="poll")
            about = {"shard": self.shard, "epoch": record.epoch, "owner": rival.owner, "checkpoint": rival.digest}
            if chance < REFUSED:
                text = f"the loss on held-out clips rose from {before:.5f} to {before + 0.2:.5f}, more than the tolerance allows"
                yield ResultRefused(time=moment + 2, verdict="invalid", check="holdout", text=text, costs=_costs(6), **about)
            else:
                yield ResultSuperseded(time=moment + 2, by=record.digest, **about)
        accepted = AcceptanceRecord(
            run=record.run, owner=COORDINATOR.public_key, issued=moment + 3, shard=self.shard, epoch=record.epoch,
            checkpoint=record.digest, parent=record.parent, weights=record.weights, state=record.state, samples=record.samples,
            author=record.owner, tenure_until=moment + 60, holdout_loss=self.loss,
        )  # fmt: skip
        yield CheckpointAccepted(time=moment + 3, acceptance=accepted, parent_loss=before, build="0.1.0 dit", costs=_costs(9))
        if generator.random() < AUDITED:
            about = {"shard": self.shard, "epoch": record.epoch, "owner": record.owner, "checkpoint": record.digest}
            yield AuditDue(time=moment + 3, streak=3, why="lottery", **about)
            text = "step 0: it published 0.61, the replay gave 0.61 (may differ by 1e-04; two processors, float32)"
            yield AuditDone(time=moment + 9, outcome="valid", text=text, seconds=5.0, **about)
        self.epoch, self.parent = record.epoch, record.digest

    def _record(self, author: Identity, word: str, moment: float) -> CheckpointRecord:
        name, epoch = f"{self.shard} {self.epoch} {word} {author.public_key}", self.epoch + 1
        return CheckpointRecord(
            run=self.manifest.run_id, owner=author.public_key, issued=moment, shard=self.shard, epoch=epoch, parent=self.parent,
            weights=blob("weights" + name), state=blob("state" + name), trace=blob("trace" + name),
            samples=epoch * self.manifest.checkpoint_samples, loss=self.loss, peer_id=author.peer_id,
        )  # fmt: skip


def _costs(count: int) -> tuple[CheckCost, ...]:
    return tuple(CheckCost(check=name, outcome="valid", seconds=0.01, size=1000) for name in CHECK_NAMES[:count])


def _stitched(lineages: list[Lineage], moment: float, count: int) -> Iterator[Event]:
    epochs = tuple(lineage.epoch for lineage in lineages)
    bins = tuple(0.95 - 0.05 * index for index in range(10))
    yield RouterTrained(
        time=moment + 5, epochs=epochs, router=blob(f"router {count}"), accuracy=0.8, accuracy_by_time=bins,
        calibration_error=0.03,
    )  # fmt: skip
    digest = hashlib.sha256(f"mixture {count}".encode()).hexdigest()
    yield MixtureStitched(time=moment + 6, epochs=epochs, terms=(0,) * len(lineages), mixture=digest)
