"""What a restored coordinator recovers of its own records from the DHT: acceptances, rollbacks, quarantines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import CheckDone, DiscardCandidate, LedgerFacts, LimitsKnown
from lutetia.coordinator.acceptance.transition import JudgeState
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    Event,
    MixtureStitched,
    PeerPardoned,
    QuarantineRecovered,
    ResetRecovered,
)
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.reducer import LedgerOutOfOrder, apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.coordinator.runtime.announcer import Announcer
from lutetia.coordinator.runtime.recovery import SignedLineages, forgotten
from lutetia.coordinator.runtime.split_brain import refuse_split_brain
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.records import AcceptanceRecord, QuarantineRecord
from lutetia.system.errors import IdentityError
from tests.coordinator.acceptance.judge_driver import (
    COORDINATOR,
    OWNER,
    PEERS,
    JudgeDriver,
    drive_judge,
    first_event,
    limits_of,
    make_record,
)
from tests.memory_transport.network import MemoryNetwork

CHEAT, HONEST = PEERS[0], PEERS[1]


# --- while a result of that shard is checked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["valid", "invalid"])
@pytest.mark.parametrize("word", ["an acceptance", "a reset"])
def test_recovered_event_ends_the_checks_that_it_overtakes(outcome, word: str):
    c = drive_judge(epochs=9)
    c.accept(HONEST)
    given = c.state.run.shards[0].acceptance
    assert given
    late = make_record(c.manifest, CHEAT, 0, 2, given.checkpoint)
    assert c.offer(late).verdict == "queued"
    event: Event = ResetRecovered(time=c.now, shard=0, term=1)
    if word == "an acceptance":
        newer = given.model_copy(update={"epoch": 4, "checkpoint": "c" * 64})
        event = AcceptanceRecovered(time=c.now, acceptance=newer)
    actions = c.send(LedgerFacts((event,), c.now))
    assert [action.record for action in actions if isinstance(action, DiscardCandidate)] == [late]
    assert not c.state.checking
    assert not c.state.pending
    before = c.state
    assert c.send(CheckDone(late, Verdict(outcome, "holdout", "x", 0.4, 0.5), c.now)) == ()
    assert c.state == before


def test_recovered_acceptance_that_the_ledger_has_is_ignored():
    c = drive_judge()
    c.accept(HONEST)
    given = c.state.run.shards[0].acceptance
    assert given
    assert c.send(LedgerFacts((AcceptanceRecovered(time=c.now, acceptance=given),), c.now)) == ()
    assert c.send(LedgerFacts((), c.now)) == ()


def test_recovered_quarantine_refuses_results_of_the_peer():
    c = drive_judge()
    waiting = make_record(c.manifest, CHEAT)
    c.offer(waiting)
    c.send(LedgerFacts((QuarantineRecovered(time=c.now, owner=CHEAT.public_key),), c.now))
    assert c.state.run.shards[0].candidates == {}
    reply = c.offer(waiting)
    assert (reply.verdict, reply.check) == ("invalid", "quarantine")
    assert "was lost" in reply.text
    shown = status(c.state.run, c.manifest, LiveView(), c.now).quarantined
    assert [(why.owner, why.epoch) for why in shown] == [(CHEAT.public_key, 0)]
    assert "is quarantined" in sentence(c.state.run.quarantined[CHEAT.public_key])
    c.send(LedgerFacts((PeerPardoned(time=c.now, owner=CHEAT.public_key),), c.now))
    assert c.offer(make_record(c.manifest, CHEAT, text="after the pardon")).verdict == "queued"


def test_recovered_reset_rolls_back_to_the_beginning():
    c = drive_judge(shards=1, epochs=1)
    c.accept(CHEAT)
    c.send(LedgerFacts((MixtureStitched(time=c.now, epochs=(1,), terms=(0,), mixture="a" * 64),), c.now))
    c.send(LedgerFacts((ResetRecovered(time=c.now, shard=0, term=2),), c.now))
    shard = c.state.run.shards[0]
    assert (shard.epoch, shard.term, shard.acceptance, shard.baseline) == (0, 2, None, 0.5)
    assert not c.state.run.audits
    assert c.state.run.mixture is None
    with pytest.raises(LedgerOutOfOrder, match="cannot be reset in term 2"):
        apply(c.state.run, ResetRecovered(time=c.now, shard=0, term=2))
    c.accept(HONEST)
    assert c.state.run.shards[0].term == 2


# --- an old ledger, and newer records in the DHT -----------------------------------------------------------------------------


@dataclass
class Swarm:
    """A coordinator in a memory network that convicts a peer; `backup` are the first events of its ledger."""

    root: Path
    room: JudgeDriver = field(init=False)
    network: MemoryNetwork = field(init=False)
    backup: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.room = c = drive_judge(epochs=5)
        c.now = time.time()
        c.manifest = c.manifest.model_copy(update={"created": c.now - 10, "expires": c.now + 1e6})
        c.rules = replace(c.rules, manifest=c.manifest)
        c.events = [first_event(c.manifest, c.now)]
        c.state = JudgeState(apply(RunState(), c.events[0]), limits=limits_of(2))
        self.network = MemoryNetwork(latency=0.001)
        self.transport = self.network.peer(COORDINATOR, record_check(c.manifest, time.time))
        self.network.peer(PEERS[5], record_check(c.manifest, time.time))

    async def show(self) -> None:
        """Publish what the coordinator with the newest ledger keeps in the DHT."""
        await Announcer(self.transport, COORDINATOR, lambda: self.room.rules, lambda: self.room.state.run).renew()

    def ledger(self, events: list[Event]) -> Ledger:
        first, *rest = events
        ledger = Ledger.create(self.root / f"{len(events)}.sqlite", first)  # pyright: ignore[reportArgumentType]
        ledger.append(rest)
        return ledger

    @property
    def lineage(self) -> SignedLineages:
        live = LiveManifest(SignedManifest.sign(self.room.manifest, OWNER))
        return SignedLineages(self.transport, live, COORDINATOR.public_key)


async def convicted(root: Path, honest: int) -> Swarm:
    """Shard 0 has `honest` epochs and then one of the cheater, who is convicted after the backup."""
    swarm = Swarm(root)
    for _ in range(honest):
        swarm.room.accept(HONEST)
        swarm.room.audited("valid")
    faked = swarm.room.accept(CHEAT)
    swarm.backup = list(swarm.room.events)
    swarm.room.audited("invalid", faked.digest)
    await swarm.show()
    return swarm


@pytest.mark.parametrize("honest", [0, 2], ids=["to the beginning", "to a later epoch"])
async def test_old_ledger_without_a_rollback_is_refused(tmp_path: Path, honest: int):
    swarm = await convicted(tmp_path, honest)
    old, new = swarm.ledger(swarm.backup), swarm.ledger(swarm.room.events)
    await refuse_split_brain(swarm.transport, new, COORDINATOR.public_key)
    with pytest.raises(IdentityError, match="this folder is an old copy"):
        await refuse_split_brain(swarm.transport, old, COORDINATOR.public_key)
    old.close()
    new.close()


@pytest.mark.parametrize("honest", [0, 2], ids=["to the beginning", "to a later epoch"])
async def test_restored_ledger_recovers_rollbacks_and_quarantines(tmp_path: Path, honest: int):
    swarm = await convicted(tmp_path, honest)
    ledger = swarm.ledger(swarm.backup)
    await swarm.lineage.recover(ledger, 0.0)
    shard = ledger.state.shards[0]
    newest = swarm.room.state.run.shards[0]
    assert (shard.term, shard.epoch, shard.accepted) == (1, honest, newest.accepted)
    assert set(ledger.state.quarantined) == {CHEAT.public_key}
    assert await swarm.lineage.lost(lambda: ledger.state) == []
    await refuse_split_brain(swarm.transport, ledger, COORDINATOR.public_key)
    assert ledger.replay() == ledger.state

    c = swarm.room
    c.state = JudgeState(ledger.state, limits=limits_of(2))
    again = make_record(c.manifest, CHEAT, 0, honest + 1, shard.accepted)
    assert c.offer(again).check == "quarantine"
    assert c.accept(HONEST, text="again").epoch == honest + 1
    ledger.close()


async def test_recovered_quarantine_is_carried_out_on_all_shards(tmp_path: Path):
    """Undecided results of the peer are refused, and its accepted epochs on other shards are audited again."""
    swarm = Swarm(tmp_path)
    c = swarm.room
    elsewhere = c.accept(CHEAT, shard=1)
    c.finish_audit("valid", elsewhere.digest)
    c.offer(make_record(c.manifest, CHEAT, 1, 2, elsewhere.digest))
    swarm.backup = list(c.events)
    faked = c.accept(CHEAT)
    c.finish_audit("invalid", faked.digest)
    await swarm.show()

    ledger = swarm.ledger(swarm.backup)
    await swarm.lineage.recover(ledger, 0.0)
    assert [(due.shard, due.epoch, due.whole) for due in ledger.state.audits.values()] == [(1, 1, True)]
    assert ledger.state.shards[1].candidates
    c.state, c.events = JudgeState.restored(ledger.state), []
    c.send(LimitsKnown(limits_of(2), c.now))
    assert not c.state.run.shards[1].candidates
    assert not c.state.checking
    assert [why.check for why in c.state.run.refusals[-1:]] == ["quarantine"]
    ledger.close()


async def test_unknown_quarantine_alone_stops_an_old_ledger(tmp_path: Path):
    """A newer record may hide the rollback, but not the quarantine."""
    swarm = await convicted(tmp_path, 0)
    events = [*swarm.backup, ResetRecovered(time=time.time(), shard=0, term=1)]
    ledger = swarm.ledger(events)
    with pytest.raises(IdentityError, match="a quarantine under this coordinator's key"):
        await refuse_split_brain(swarm.transport, ledger, COORDINATOR.public_key)
    ledger.close()


def test_pardon_is_not_undone_by_an_older_record():
    c = drive_judge()
    c.accept(CHEAT)
    c.finish_audit("invalid")
    word = QuarantineRecord(run=c.manifest.run_id, owner=COORDINATOR.public_key, issued=c.now, peers=(CHEAT.public_key,))
    assert forgotten(c.state.run, [word]) == []
    c.now += 100
    c.send(LedgerFacts((PeerPardoned(time=c.now, owner=CHEAT.public_key),), c.now))
    assert forgotten(c.state.run, [word]) == []
    later = word.model_copy(update={"issued": c.now + 3600})
    assert forgotten(c.state.run, [word, later]) == [CHEAT.public_key], "a newer ledger has convicted it again"


def test_acceptance_of_a_later_term_voids_the_mixture():
    c = drive_judge(shards=1, epochs=1)
    c.accept(CHEAT)
    c.send(LedgerFacts((MixtureStitched(time=c.now, epochs=(1,), terms=(0,), mixture="a" * 64),), c.now))
    given = c.state.run.shards[0].acceptance
    assert isinstance(given, AcceptanceRecord)
    c.send(
        LedgerFacts(
            (AcceptanceRecovered(time=c.now, acceptance=given.model_copy(update={"term": 1, "checkpoint": "b" * 64})),), c.now
        )
    )
    assert c.state.run.mixture is None
