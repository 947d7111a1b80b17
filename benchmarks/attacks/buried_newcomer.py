"""A newcomer's lazy epoch under the work of others, while its whole replay takes long: how much honest work its conviction voids.

The coordinator's own judge in virtual time; one replay at a time, as where the coordinator is slower than its nodes or many
newcomers wait. The lazy epoch passes the checks and a replay of its first steps, and fails a whole one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import Audited, CheckDone, JudgeTick, StartAudit
from lutetia.coordinator.ledger.events import LineageRolledBack
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy, Timing
from tests.coordinator.acceptance.judge_driver import drive_judge, make_record

EPOCH_SECONDS = TENURE = 600.0
_FIRST_STEPS_SECONDS, _TICK = 10.0, 10.0
_HONEST_BEFORE = 6


@dataclass(frozen=True)
class BuriedFound:
    """Epochs of others that the conviction voids; the longest time that an honest result waited after its checks, in seconds."""

    lost: int
    longest_wait: float


class _Burial:
    def __init__(self, audit: AuditPolicy, seed: int, replay_seconds: float, improves: bool) -> None:
        timing = Timing(tenure=TENURE)
        self.driver = drive_judge(shards=1, epochs=1000, audit=audit, timing=timing)
        rules = replace(self.driver.rules, secret=b"%d" % seed)
        self.driver.rules = replace(rules, newcomer_epochs=2) if hasattr(rules, "newcomer_epochs") else rules
        self.honest = [Identity.derived(f"honest {seed} {number}") for number in range(3)]
        self.replay_seconds, self.improves = replay_seconds, improves
        self.lazy, self.ends, self.longest = "", 0.0, 0.0

    @property
    def epoch(self) -> int:
        return self.driver.state.run.shards[0].epoch

    def work(self, who: Identity) -> str:
        """The next epoch arrives and passes its checks; it improves on its parent by a percent, or not at all."""
        ledger = self.driver.state.run.shards[0]
        base = ledger.acceptance.holdout_loss if ledger.acceptance else 1.0
        record = make_record(self.driver.manifest, who, 0, ledger.epoch + 1, ledger.accepted, f"{self.driver.now}")
        loss = 0.99 * base if self.improves else base
        self.driver.offer(record)
        self.hear(CheckDone(record, Verdict("valid", "holdout", "", loss, base), self.driver.now))
        return record.digest

    def hear(self, stimulus: JudgeTick | CheckDone | Audited) -> None:
        for action in self.driver.send(stimulus):
            if isinstance(action, StartAudit):
                whole, burying = action.audit.whole, bool(self.lazy) or action.audit.epoch > _HONEST_BEFORE
                seconds = self.replay_seconds if whole else _FIRST_STEPS_SECONDS
                self.ends = self.driver.now + (seconds if burying else 0.0)

    def replay(self) -> None:
        checkpoint = self.driver.state.auditing
        if checkpoint and self.driver.now >= self.ends:
            caught = checkpoint == self.lazy and self.driver.state.run.audits[checkpoint].whole
            finding = AuditFinding(outcome="invalid" if caught else "valid")
            self.hear(Audited(checkpoint, finding, self.driver.now))

    def tick(self) -> None:
        self.driver.now += _TICK
        self.replay()
        self.hear(JudgeTick(self.driver.now))

    def pass_epoch(self) -> None:
        for _ in range(int(EPOCH_SECONDS / _TICK)):
            self.tick()

    def run(self) -> BuriedFound:
        for number in range(_HONEST_BEFORE):
            self.work(self.honest[number % 3])
            self.pass_epoch()
        self.lazy = self.work(Identity.derived(f"newcomer {self.driver.rules.secret!r}"))
        number = 0
        while self._undecided():
            self.pass_epoch()
            before, offered = self.epoch, self.driver.now
            if not self._undecided():
                break
            self.work(self.honest[number % 3])
            while self.epoch == before and self.driver.state.run.shards[0].candidates:
                self.tick()
            self.longest = max(self.longest, self.driver.now - offered)
            number += 1
        rolled = [event for event in self.driver.events if isinstance(event, LineageRolledBack)]
        return BuriedFound(sum(event.dropped - 1 for event in rolled), self.longest)

    def _undecided(self) -> bool:
        shard = self.driver.state.run.shards[0]
        link = shard.link(self.lazy)
        return link is not None and (self.lazy in self.driver.state.run.audits or self.lazy in shard.suspects)


def buried_newcomer(replay_epochs: float, improves: bool = False, audit: AuditPolicy | None = None, seed: int = 0) -> BuriedFound:
    """`replay_epochs`: how many epochs long the whole replay takes. `improves`: whether held-out losses still fall."""
    return _Burial(audit or AuditPolicy(), seed, replay_epochs * EPOCH_SECONDS, improves).run()


@dataclass(frozen=True)
class CopiesFound:
    """After the attack: honest epochs that stand, epochs that an honest author trained, keys of the attacker convicted."""

    standing: int
    trained: int
    convicted: int


def copies_by_new_keys(epochs: int = 40, seed: int = 0) -> CopiesFound:
    """A copy of each accepted epoch is offered at once as the next one, under a new key each time, while one honest author works.

    The copies pass the checks. A replay of the whole epoch takes as long as an epoch of the honest author, and convicts them.
    `epochs`: for how many epochs' time the attack goes on.
    """
    scene = _Burial(AuditPolicy(), seed, EPOCH_SECONDS, improves=True)
    honest, run = scene.honest[0], lambda: scene.driver.state.run
    for _ in range(_HONEST_BEFORE):
        scene.work(honest)
        scene.pass_epoch()
    began, copies, trained = scene.driver.now, 0, 0
    base, ready = run().shards[0].accepted, began + EPOCH_SECONDS
    fakes: set[str] = set()
    scene.lazy = "."
    while scene.driver.now < began + epochs * EPOCH_SECONDS:
        if run().shards[0].accepted != base:
            base, ready = run().shards[0].accepted, scene.driver.now + EPOCH_SECONDS
        own = run().shards[0].acceptance
        waiting = any(one.record.owner != honest.public_key for one in run().shards[0].candidates.values())
        if not waiting and (own is None or own.checkpoint not in fakes):
            copies += 1
            fakes.add(scene.work(Identity.derived(f"copy {seed} {copies}")))
        if scene.driver.now >= ready and not run().shards[0].undecided_of(honest.public_key):
            trained += 1
            scene.work(honest)
        scene.lazy = next((fake for fake in fakes if fake == scene.driver.state.auditing), ".")
        scene.tick()
    standing = run().shards[0].epoch - _HONEST_BEFORE
    above = [link for link in run().shards[0].lineage if link.acceptance.epoch > _HONEST_BEFORE]
    standing = sum(link.acceptance.author == honest.public_key for link in above)
    return CopiesFound(standing, trained, len(run().quarantined))
