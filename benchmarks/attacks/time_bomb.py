"""A cheater whose old lazy epochs lie under honest work in many shards, and who has itself convicted at a moment of its choice.

The coordinator's own judge, with outcomes of replays as `lies.py` measures them: a lazy epoch passes a replay of its first steps
and fails one of the whole epoch. Counted is the honest work that the conviction voids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import CheckDone
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from tests.coordinator.acceptance.judge_driver import drive_judge, make_record


@dataclass(frozen=True)
class BombFound:
    """Epochs of honest authors that were accepted at all, and that were void in the end; whole replays; lazy epochs accepted."""

    accepted: int
    lost: int
    whole_replays: int
    lazy: int


class _Bomb:
    def __init__(self, shards: int, epochs: int, honest_first: int, seed: int) -> None:
        self.driver = drive_judge(shards=shards + 1, epochs=1000, audit=AuditPolicy())
        self.driver.rules = replace(self.driver.rules, secret=b"%d" % seed)
        self.cheat = Identity.derived(f"cheat {seed}")
        self.honest = [Identity.derived(f"honest {index}") for index in range(4)]
        self.shards, self.epochs, self.honest_first = shards, epochs, honest_first
        self.lazy: set[str] = set()
        self.replays = self.accepted = 0

    def run(self) -> BombFound:
        for _ in range(self.honest_first):  # earns trust in the shard where it will be convicted
            self.work(self.cheat, self.shards)
        for shard in range(self.shards):
            self.work(self.honest[shard % 4], shard)
            self.work(self.cheat, shard, lazy=True)
        for epoch in range(3, self.epochs + 1):
            for shard in range(self.shards):
                self.work(self.honest[(epoch + shard) % 4], shard)
        self.work(self.cheat, self.shards, fake=True)
        lineages = [self.driver.state.run.shards[shard].lineage for shard in range(self.shards)]
        left = sum(link.acceptance.author != self.cheat.public_key for lineage in lineages for link in lineage)
        left += sum(self.driver.state.run.shards[shard].epoch - len(lineages[shard]) for shard in range(self.shards))
        return BombFound(self.accepted, self.accepted - left, self.replays, len(self.lazy))

    def work(self, who: Identity, shard: int, lazy: bool = False, fake: bool = False) -> None:
        """Hand in one epoch, and let all audits that are due end. A quarantined cheater gives up."""
        driver = self.driver
        driver.now += 60
        ledger = driver.state.run.shards[shard]
        record = make_record(driver.manifest, who, shard, ledger.epoch + 1, ledger.accepted, f"{driver.now}")
        if driver.offer(record).verdict != "queued":
            return
        base = ledger.acceptance.holdout_loss if ledger.acceptance else 1.0
        loss = base if lazy or fake else 0.99 * base
        driver.send(CheckDone(record, Verdict("valid", "holdout", "", loss, base), driver.now))
        if lazy or fake:
            self.lazy.add(record.digest)
        elif shard < self.shards:
            self.accepted += 1
        while driver.state.auditing:
            audit = driver.state.run.audits[driver.state.auditing]
            caught = audit.checkpoint in self.lazy and (audit.whole or fake)
            self.replays += audit.whole
            driver.finish_audit("invalid" if caught else "valid", audit.checkpoint)


def time_bomb(shards: int = 8, epochs: int = 60, honest_first: int = 0, seed: int = 0) -> BombFound:
    """`honest_first`: honest epochs of the cheater before its lazy ones, so that it is no newcomer any more."""
    return _Bomb(shards, epochs, honest_first, seed).run()
