"""Claims held without work: how long a squatter keeps a shard, and that a working claim is never ignored."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import examples
from lutetia.node.machine import messages as m
from lutetia.node.machine.machine import advance
from lutetia.node.machine.state import MachineState, NodeRules, next_wake
from lutetia.protocol.claims import LiveClaim, ShardView, free_shards, shard_owner
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import AcceptanceRecord, ClaimRecord
from lutetia.protocol.stalled_claims import IDLE, SLOWEST, Seen, observe_claims, without_stalled

RUN, SHARD = examples.manifest().run_id, 0
HEARTBEAT, TENURE, INTERVAL = 20.0, 600.0, 1000
SQUATTER, HONEST, STANDBY = (Identity.derived(name).public_key for name in ("squatter", "honest", "standby"))
START = examples.NOW


def claim(owner: str, samples: int, now: float, state: str = "training") -> LiveClaim:
    record = ClaimRecord(run=RUN, owner=owner, issued=now, shard=SHARD, epoch=0, samples=samples, state=state)  # type: ignore[arg-type]
    return LiveClaim(record, now + 3 * HEARTBEAT)


def accepted(epoch: int, author: str, now: float) -> AcceptanceRecord:
    return AcceptanceRecord(
        run=RUN, owner=examples.COORDINATOR.public_key, issued=now, shard=SHARD, epoch=epoch, checkpoint="5" * 64, parent=None,
        weights=examples.blob(), state=examples.blob(), samples=epoch * INTERVAL, author=author, tenure_until=now + TENURE,
        holdout_loss=0.5,
    )  # fmt: skip


@dataclass
class Reader:
    """A reader that looks once per lease."""

    seen: Seen
    now: float = START

    def sees(self, *claims: LiveClaim, acceptance: AcceptanceRecord | None = None, seconds: float = 3 * HEARTBEAT) -> ShardView:
        self.now += seconds
        view = ShardView(SHARD, claims, acceptance)
        self.seen = observe_claims(self.seen, view, self.now, 6 * HEARTBEAT)
        return without_stalled(self.seen, view, STANDBY, TENURE, INTERVAL, self.now)


def test_an_idle_claim_is_ignored_after_two_tenures() -> None:
    reader = Reader({})
    while free_shards([reader.sees(claim(SQUATTER, 0, reader.now + 60))], 9, reader.now) == []:
        assert reader.now - START < 10 * TENURE
    held = reader.now - START
    assert IDLE * TENURE < held <= IDLE * TENURE + 3 * 3 * HEARTBEAT


def test_a_claim_that_lies_about_samples_is_ignored_in_the_end() -> None:
    """It reports one more sample at every heartbeat, which looks like a slow node until far too long has passed."""
    reader, samples = Reader({}), 0
    while free_shards([reader.sees(claim(SQUATTER, samples, reader.now + 60))], 9, reader.now) == []:
        samples += 1
        assert reader.now - START < 100 * TENURE
    assert SLOWEST * TENURE < reader.now - START <= SLOWEST * TENURE + 3 * 3 * HEARTBEAT


def test_a_claim_with_a_whole_epoch_gets_the_longer_time() -> None:
    """While the coordinator is down, honest peers wait with whole epochs and keep their shards. A liar does so for a while."""
    reader = Reader({})
    while reader.now - START < SLOWEST * TENURE - 100:
        assert not free_shards([reader.sees(claim(HONEST, INTERVAL, reader.now + 60))], 9, reader.now)
    for _ in range(4):
        view = reader.sees(claim(HONEST, INTERVAL, reader.now + 60))
    assert free_shards([view], 9, reader.now)


@settings(max_examples=200)
@given(
    st.lists(st.floats(0.02, 20.0), min_size=1, max_size=6),  # tenures per epoch, of nodes from fast to very slow
    st.floats(20.0, 100.0),
    st.integers(0, 2**32),
)
def test_a_working_claim_is_never_ignored(paces: list[float], look: float, seed: int) -> None:
    """Honest peers of any speed, one after another, until each has an accepted epoch: the shard never looks free."""
    reader, acceptance = Reader({}), None
    for epoch, pace in enumerate(paces):
        owner = Identity.derived(f"honest {seed} {epoch}").public_key
        begun, length = reader.now, pace * TENURE
        while reader.now - begun < length:
            done = int(INTERVAL * (reader.now - begun) / length)
            view = reader.sees(claim(owner, epoch * INTERVAL + done, reader.now + look), acceptance=acceptance, seconds=look)
            assert not free_shards([view], 99, reader.now)
            assert shard_owner(RUN, view, reader.now) == owner
        acceptance = accepted(epoch + 1, owner, reader.now)


def test_a_reader_with_a_gap_ignores_no_claim() -> None:
    """A laptop that slept for a week has not observed any idle claim."""
    reader = Reader({})
    reader.sees(claim(HONEST, 10, reader.now + 60))
    view = reader.sees(claim(HONEST, 10, reader.now + 7 * 86_400), seconds=7 * 86_400)
    assert not free_shards([view], 9, reader.now)


def test_another_owners_acceptance_does_not_help_the_squatter() -> None:
    reader = Reader({})
    while free_shards([reader.sees(claim(SQUATTER, 0, reader.now + 60))], 9, reader.now) == []:
        pass
    given = accepted(1, HONEST, reader.now)
    view = reader.sees(claim(SQUATTER, 0, reader.now + 60), claim(HONEST, INTERVAL, reader.now + 60), acceptance=given)
    assert view.claimants == {HONEST}
    assert shard_owner(RUN, view, reader.now) == HONEST


def test_a_standby_takes_a_squatters_shard_and_keeps_it() -> None:
    """A node's state machine stands by, ignores the squatter in the end, claims the shard, syncs and keeps it."""
    rules = NodeRules(RUN, STANDBY, shards=1, epochs=9, heartbeat=HEARTBEAT, propagation=1.0, tenure=TENURE, interval=INTERVAL)
    state, now, own = MachineState(), START, None
    queue: list[m.Event] = [m.Joined(now), m.Probed(now, {0: 1.0})]
    while now - START < 4 * TENURE:
        event = queue.pop(0) if queue else m.ClockTick(now := max(now, next_wake(rules, state) or now))
        state, actions = advance(rules, state, event)
        for action in actions:
            match action:
                case m.PublishClaim(claim=made) | m.RenewRecords(claim=m.Claim() as made):
                    own = claim(STANDBY, made.samples, now, made.state)
                case m.LookAtShards():
                    claims = (claim(SQUATTER, 0, now), *([own] if own else []))
                    queue.append(m.SwarmSeen(now, (ShardView(SHARD, claims),)))
                case m.Sync():
                    queue.append(m.SyncDone(now, SHARD, 0, None))
                case m.StartTrainer(run=run):
                    queue.append(m.TrainerProgress(now, run, 0, 1))
    assert state.work is not None
    assert state.phase == "training"
