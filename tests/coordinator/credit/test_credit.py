"""Credit: it is the sum of what stands, of audits and of copies, whatever happens to a run, and equal after every replay."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.coordinator.credit.accounts import HALF_LIFE, ShardCredit, credit_in_flops
from lutetia.coordinator.credit.copies import CopyKeeping
from lutetia.coordinator.credit.lent import counted, samples_of
from lutetia.coordinator.ledger.events import (
    AuditDone,
    AuditDue,
    AuditReported,
    CheckpointAccepted,
    CopiesKept,
    CopyKept,
    Event,
    LentCheckCounted,
    LineageRolledBack,
    PeerPardoned,
    PeerQuarantined,
    ResetRecovered,
    SampleCostMeasured,
    read_event,
)
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import HISTORY, RunState
from lutetia.coordinator.lending.agreement import Settled
from lutetia.protocol.rpc.check_request import CheckJob, CheckReport
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.records import AcceptanceRecord
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, first_event, make_manifest, make_record

SAMPLES = 4
"""Of an epoch of the made-up manifest."""
FLOPS = (10, 1000)
MANIFEST = make_manifest(epochs=200)
CREATED = first_event(MANIFEST).model_copy(update={"flops": FLOPS})


@dataclass
class Epoch:
    """What the rule says of one accepted epoch, kept the plain way: as a list that only grows."""

    author: str
    shard: int
    number: int
    checkpoint: str
    stands: bool = True
    counts: bool = True


@dataclass
class Bookkeeper:
    """Makes random events that can follow each other, and adds their credit up by reading the whole history."""

    state: RunState = field(default_factory=lambda: apply(RunState(), CREATED))
    events: list[Event] = field(default_factory=lambda: [CREATED])
    epochs: list[Epoch] = field(default_factory=list)
    extra: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(peer, shard) -> samples for audits and copies."""

    def write(self, event: Event) -> None:
        self.state = apply(self.state, event)
        self.events.append(event)

    @property
    def now(self) -> float:
        return START + 3600.0 * len(self.events)

    def credited(self, owner: str) -> bool:
        return any(epoch.author == owner for epoch in self.epochs) or any(
            peer == owner and samples for (peer, _), samples in self.extra.items()
        )

    def accept(self, who: int, shard: int) -> None:
        ledger, peer = self.state.shards[shard], PEERS[who].public_key
        if peer in self.state.quarantined:
            return
        text = str(len(self.events))
        record = make_record(MANIFEST, PEERS[who], shard, ledger.epoch + 1, ledger.accepted, text=text)
        given = AcceptanceRecord(
            run=record.run, owner=COORDINATOR.public_key, issued=self.now, shard=shard, epoch=record.epoch,
            checkpoint=record.digest, parent=record.parent, weights=record.weights, state=record.state, samples=record.samples,
            author=peer, tenure_until=self.now, holdout_loss=0.5, term=ledger.term,
        )  # fmt: skip
        self.write(CheckpointAccepted(time=self.now, acceptance=given, parent_loss=0.6))
        self.epochs.append(Epoch(peer, shard, record.epoch, record.digest))

    def audit(self, who: int, shard: int, place: int, outcome: str, trusted: bool) -> None:
        """A peer replays an accepted epoch; without trust the coordinator's own replay decides whether its report counts."""
        lineage = self.state.shards[shard].lineage
        if not lineage:
            return
        given, auditor = lineage[place % len(lineage)].acceptance, PEERS[who].public_key
        names = {"shard": shard, "epoch": given.epoch, "owner": given.author, "checkpoint": given.checkpoint}
        self.write(AuditDue(time=self.now, **names, streak=0, whole=True))  # pyright: ignore[reportArgumentType]
        if trusted:
            self.write(AuditDone(time=self.now, **names, outcome="valid", by=auditor, samples=SAMPLES))  # pyright: ignore
            self.extra[auditor, shard] += SAMPLES
            return
        self.write(AuditReported(time=self.now, **names, by=auditor, outcome="valid", samples=SAMPLES))  # pyright: ignore
        self.write(AuditDone(time=self.now, **names, outcome=outcome))  # pyright: ignore[reportArgumentType]
        self.extra[auditor, shard] += SAMPLES * (outcome == "valid")
        if outcome == "invalid":
            for epoch in self.epochs:
                epoch.counts = epoch.counts and epoch.checkpoint != given.checkpoint
            self.write(PeerQuarantined(time=self.now, **names, text="faked"))  # pyright: ignore[reportArgumentType]

    def keep_copies(self, who: int, shard: int) -> None:
        owner = PEERS[who].public_key
        if self.credited(owner):
            self.extra[owner, shard] += 3
        self.write(CopiesKept(time=self.now, copies=(CopyKept(owner=owner, shard=shard, samples=3),)))

    def check(self, who: int, other: int, shard: int) -> None:
        """Two peers, or one, carry out a check that is lent."""
        owners = tuple(dict.fromkeys((PEERS[who].public_key, PEERS[other].public_key)))
        self.extra.update({(owner, shard): 2 for owner in owners})
        self.write(LentCheckCounted(time=self.now, shard=shard, epoch=1, check="result", samples=2, owners=owners))

    def go_back(self, shard: int, place: int, lost: bool) -> None:
        """A rollback; `lost`: as a recovered reset to the beginning."""
        ledger = self.state.shards[shard]
        target = 0 if lost or not ledger.epoch else place % ledger.epoch
        known = {link.acceptance.epoch for link in ledger.lineage}
        if lost:
            target = 0
            self.write(ResetRecovered(time=self.now, shard=shard, term=ledger.term + 1))
        elif ledger.epoch and (target == 0 or target in known):
            first = next(link for link in ledger.lineage if link.acceptance.epoch > target).acceptance.checkpoint
            dropped = ledger.epoch - target
            self.write(
                LineageRolledBack(
                    time=self.now, shard=shard, epoch=target, term=ledger.term + 1, dropped=dropped, checkpoint=first
                )
            )
        else:
            return
        for epoch in self.epochs:
            if epoch.shard == shard and epoch.stands and epoch.number > target:
                epoch.stands = False
                epoch.counts = epoch.counts and epoch.author not in self.state.quarantined

    def pardon(self, who: int) -> None:
        self.write(PeerPardoned(time=self.now, owner=PEERS[who].public_key))

    def expected(self) -> Counter[tuple[str, int]]:
        work = Counter({(epoch.author, epoch.shard): 0 for epoch in self.epochs})
        for epoch in self.epochs:
            work[epoch.author, epoch.shard] += SAMPLES * epoch.counts
        return Counter({key: samples for key, samples in (work + self.extra).items() if samples})

    def held(self) -> Counter[tuple[str, int]]:
        credits = self.state.credit.items()
        return Counter({(owner, shard): each.total for owner, shards in credits for shard, each in shards.items() if each.total})


_who, _shard, _place = st.integers(0, 3), st.integers(0, 1), st.integers(0, 99)
STEPS = st.one_of(
    st.tuples(st.just("accept"), _who, _shard),
    st.tuples(st.just("accept"), _who, _shard),
    st.tuples(st.just("audit"), _who, _shard, _place, st.sampled_from(["valid", "invalid", "inconclusive"]), st.booleans()),
    st.tuples(st.just("keep_copies"), _who, _shard),
    st.tuples(st.just("check"), _who, _who, _shard),
    st.tuples(st.just("go_back"), _shard, _place, st.booleans()),
    st.tuples(st.just("pardon"), _who),
)


@given(st.lists(STEPS, max_size=40))
def test_credit_is_what_stands_and_what_the_rule_keeps(steps):
    book = Bookkeeper()
    for name, *arguments in steps:
        getattr(book, name)(*arguments)
        assert book.held() == book.expected()
    assert all(credit.recent >= 0 for shards in book.state.credit.values() for credit in shards.values())
    replayed = RunState()
    for event in book.events:
        replayed = apply(replayed, read_event(canonical(event)))
    assert {owner: dict(shards) for owner, shards in replayed.credit.items()} == {
        owner: dict(shards) for owner, shards in book.state.credit.items()
    }


def test_reset_of_a_shard_reaches_epochs_that_are_older_than_the_history():
    """Of a liar all of the shard is taken, though its first epochs are no longer known one by one; others keep theirs."""
    book = Bookkeeper()
    for number in range(HISTORY + 6):
        book.accept(number % 2, 0)
    book.audit(2, 0, 7, "invalid", False)
    liar = book.state.shards[0].lineage[7].acceptance.author
    book.go_back(0, 0, True)
    left = {owner: shards[0].total for owner, shards in book.state.credit.items() if shards[0].total}
    assert liar not in left
    assert sum(left.values()) == SAMPLES * (HISTORY + 6) // 2


def test_lent_checks_count_for_known_peers_that_agree_and_by_what_two_confirm():
    def report(peer: int, rows: int, **fields: object) -> CheckReport:
        losses = dict.fromkeys(("parent", "averages", "raw"), (0.5,) * rows)
        about = {"run": "a" * 64, "owner": PEERS[peer].public_key, "id": "b" * 64, "outcome": "done", "seconds": 1.0}
        return CheckReport.model_validate({**about, **losses, **fields})

    job = CheckJob(id="b" * 64, kind="result", shard=1, epoch=4, until=0.0)
    reports = (report(0, 8), report(1, 400), report(2, 8), report(3, 8))
    settled = Settled(reports[0], liars=frozenset({PEERS[2].public_key}))
    event = counted(job, reports, {peer.public_key for peer in PEERS[:3]}, settled, 8, START)
    assert event is not None
    assert (event.owners, event.samples) == ((PEERS[0].public_key, PEERS[1].public_key), 8)
    assert counted(job, reports, (), settled, 8, START) is None, "strangers"
    assert counted(job, reports, {PEERS[0].public_key}, Settled(None), 8, START) is None, "no two agree"
    assert samples_of("replay", report(0, 0, losses=(0.5,) * 6), batch=8) == 48
    for kind in ("router", "mixture", "gallery", "something new"):
        assert samples_of(kind, reports[1], batch=8) == 0


def test_newcomers_that_only_keep_copies_cost_no_memory():
    book = Bookkeeper()
    book.keep_copies(3, 1)
    assert not len(book.state.credit)


def test_recent_average_of_steady_work_is_its_rate_and_halves_in_a_week():
    credit = ShardCredit()
    for hour in range(24 * 7 * 12):
        credit = credit.plus("standing", 50, hour * 3600.0)
    assert credit.recent == pytest.approx(1200, rel=0.01)
    later = credit.at + HALF_LIFE
    assert credit.recent_at(later) == credit.recent / 2
    taken = credit.minus(50, credit.at)
    assert taken.plus("standing", 50, credit.at).recent == pytest.approx(credit.recent)


def test_credit_is_shown_in_flops_of_each_shard_once_they_are_known():
    book = Bookkeeper(state=apply(RunState(), created := CREATED.model_copy(update={"flops": ()})), events=[created])
    book.accept(0, 0)
    book.accept(0, 1)
    mine = book.state.credit[PEERS[0].public_key]
    assert credit_in_flops(mine, book.state.flops, book.now).total == 0
    book.write(SampleCostMeasured(time=book.now, flops=FLOPS))
    shown = credit_in_flops(mine, book.state.flops, book.now)
    assert shown.total == shown.epochs == SAMPLES * sum(FLOPS)
    assert 0 < shown.recent < shown.total / 7


def test_copies_of_a_shard_are_worth_one_batch_an_hour_however_many_share_it():
    keeping, hours = CopyKeeping(batch=8), 9
    holders = {0: [peer.public_key for peer in PEERS[:3]], 1: [PEERS[0].public_key]}
    written = []
    for look in range(6 * hours + 1):
        keeping.look(holders, START + 600.0 * look)
        written.append(keeping.due(START + 600.0 * look))
    written.append(keeping.due(START + 3600.0 * hours, last=True))
    entries = [copy for event in written if event for copy in event.copies]
    assert sum(copy.samples for copy in entries if copy.shard == 1) == 8 * hours
    assert 0 <= 8 * hours - sum(copy.samples for copy in entries if copy.shard == 0) < 3
    assert len([event for event in written if event]) == 2
    keeping.look(holders, START + 1e7)
    assert keeping.kept[PEERS[0].public_key, 1] == pytest.approx(8 / 6)  # nobody looked for long: ten minutes count
