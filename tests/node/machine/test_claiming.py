"""The node's decisions while it looks for a shard."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.node.machine import messages as m
from lutetia.node.machine.claiming import WAVE
from lutetia.node.machine.state import MachineState, NodeRules, next_wake
from lutetia.protocol.claims import ShardView, rendezvous
from tests.node.machine.machine_driver import ME, OTHER, RULES, MachineDriver, T, claimed


def test_node_joins_probes_claims_syncs_and_trains():
    machine = MachineDriver()
    assert m.ProbeHardware() in machine.feed(m.Joined(T))
    assert machine.state.phase == "probing"
    actions = machine.feed(m.Probed(T, {0: 1.0, 1: 1.0}))
    assert m.LookAtShards((0, 1)) in actions
    assert machine.state.phase == "idle"
    machine = MachineDriver().training()
    start = machine.actions_of(m.StartTrainer)[0]
    assert start == m.StartTrainer(1, 0, 0, None, until=3, halvings=0)


def test_heartbeat_after_a_won_claim_says_training():
    machine = MachineDriver().syncing()
    renewals = machine.actions_of(m.RenewRecords)
    assert renewals == [m.RenewRecords(m.Claim(0, 0, 0, "training"))]


def test_newcomer_never_contests_a_live_claim():
    machine = MachineDriver().idle()
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, T + 60), claimed(1, OTHER, T + 50))))
    assert machine.state.phase == "idle"
    assert "standing by" in machine.state.why
    assert not machine.actions_of(m.PublishClaim)


def test_standby_takes_over_after_the_first_claim_expires():
    machine = MachineDriver().idle()
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, T + 60), claimed(1, OTHER, T + 50))))
    look = machine.until(m.LookAtShards)
    assert look == m.LookAtShards((1,))
    assert T + 50 <= machine.now < T + 51
    machine.feed(m.SwarmSeen(machine.now, (ShardView(1),)))
    assert (machine.state.phase, machine.state.target) == ("claiming", 1)


def test_claim_found_on_second_look_wins():
    machine = MachineDriver().claiming()
    machine.until(m.LookAtShards)
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, machine.now + 60, "claiming"),)))
    assert machine.state.phase == "idle"
    assert not machine.actions_of(m.PublishClaim)


def test_loser_of_simultaneous_claims_releases_its_claim():
    machine = MachineDriver().claiming()
    machine.until(m.LookAtShards)
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0),)))
    machine.until(m.LookAtShards)
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, machine.now + 60, "training"),)))
    assert machine.state.phase == "idle"
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in machine.actions


def test_own_claim_not_visible_yet_is_awaited():
    machine = MachineDriver().claiming()
    machine.until(m.LookAtShards)
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0),)))
    machine.until(m.LookAtShards)
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0),)))
    assert machine.state.phase == "claiming"
    machine.until(m.LookAtShards)
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60),)))
    assert machine.state.phase == "syncing"


def test_own_claim_from_before_a_restart_is_ignored():
    machine = MachineDriver().idle({0: 1.0})
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, T + 60), ShardView(1))))
    assert machine.state.phase == "claiming"


def test_shard_with_local_work_is_claimed_without_delay():
    machine = MachineDriver()
    machine.state = MachineState(remembered=frozenset({1}))
    machine.idle()
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0), ShardView(1))))
    assert machine.state.target == 1
    assert m.LookAtShards((1,)) in machine.actions, "checks at once"


def test_heartbeat_renews_the_claim_and_looks_at_its_shard():
    machine = MachineDriver().training()
    machine.progress(0)
    renewal = machine.until(m.RenewRecords)
    assert renewal == m.RenewRecords(m.Claim(0, 0, 0, "training"))
    assert m.LookAtShards((0,)) in machine.actions


def test_late_claim_with_lower_hash_does_not_take_the_shard():
    for number in range(20):
        machine = MachineDriver().training()
        late = f"{number:064x}"
        machine.feed(m.SwarmSeen(machine.now, (claimed(0, late, machine.now + 60, "claiming"),)))
        assert machine.state.phase == "training"


def test_two_holders_after_a_partition_exactly_one_yields():
    verdicts = []
    for me, other in ((ME, OTHER), (OTHER, ME)):
        machine = MachineDriver(NodeRules("ab" * 32, me, shards=2, epochs=4, heartbeat=20.0, propagation=1.0))
        machine.idle({0: 1.0})
        machine.feed(m.SwarmSeen(machine.now, (ShardView(0), ShardView(1))))
        machine.until(m.LookAtShards)
        machine.feed(m.SwarmSeen(machine.now, (ShardView(0),)))
        machine.until(m.LookAtShards)
        machine.feed(m.SwarmSeen(machine.now, (claimed(0, me, machine.now + 60),)))
        machine.feed(m.SyncDone(machine.now, 0, 0, None))
        machine.feed(m.SwarmSeen(machine.now, (claimed(0, other, machine.now + 60),)))
        verdicts.append(machine.state.phase)
    assert sorted(verdicts) == ["idle", "training"]


def test_sleep_past_the_lease_looks_before_renewing():
    machine = MachineDriver().training()
    machine.now += 1000  # the lid was closed
    machine.feed(m.ClockTick(machine.now))
    assert m.RenewRecords(None) in machine.actions
    assert m.LookAtShards((0,)) in machine.actions
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, machine.now + 60),)))
    assert machine.state.phase == "idle"
    assert machine.actions_of(m.StopTrainer)


def test_sleep_past_the_lease_keeps_an_untaken_shard():
    machine = MachineDriver().training()
    machine.now += 299
    machine.feed(m.ClockTick(machine.now))
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0),)))
    assert machine.state.phase == "training"
    assert m.RenewRecords(m.Claim(0, 0, 0, "training")) in machine.actions


def test_pause_while_joining_is_remembered():
    machine = MachineDriver()
    machine.feed(m.UserVerb(T, "pause"))
    machine.idle()
    assert machine.state.phase == "paused"
    machine.feed(m.UserVerb(machine.now, "resume"))
    assert machine.state.phase == "idle"


def test_node_that_fits_nothing_probes_again():
    machine = MachineDriver().idle({0: 0.0, 1: 0.0})
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0), ShardView(1))))
    assert machine.state.phase == "idle"
    assert "no device" in machine.state.why
    machine.until(m.ProbeHardware, limit=100)
    machine.feed(m.Probed(machine.now, {0: 1.0, 1: 1.0}))
    machine.until(m.LookAtShards)


def test_failed_probe_is_repeated():
    machine = MachineDriver()
    machine.feed(m.Joined(T))
    machine.feed(m.ProbeFailed(machine.now, "timed out"))
    assert machine.until(m.ProbeHardware)


@pytest.mark.parametrize("where", ["idle", "training"])
def test_clock_set_back_keeps_deadlines_within_a_heartbeat(where: str):
    machine = getattr(MachineDriver(), where)()
    machine.now -= 10_000
    machine.feed(m.ClockTick(machine.now))
    due = next_wake(machine.rules, machine.state)
    assert due is not None
    assert due <= machine.now + RULES.heartbeat
    machine.until(m.RenewRecords)
    machine.until(m.LookAtShards)
    assert machine.now <= T - 10_000 + 3 * RULES.heartbeat


def test_standby_looks_at_its_watched_shards_only():
    machine = MachineDriver().idle()
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, T + 60), claimed(1, OTHER, T + 50))))
    machine.feed(m.WatchedShardsSet(machine.now, frozenset({0}), T + 1000))
    assert machine.until(m.LookAtShards) == m.LookAtShards((0,))
    assert T + 60 <= machine.now < T + 61


def test_old_view_of_an_unwatched_shard_is_ignored():
    machine = MachineDriver().idle()
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, T + 60), claimed(1, OTHER, T + 20))))
    machine.feed(m.WatchedShardsSet(machine.now, frozenset(), T + 1000))
    assert machine.state.phase == "idle"
    assert "other standbys" in machine.state.why
    while machine.now < T + 55:
        machine.tick()
        assert machine.state.phase == "idle"
        assert not machine.actions_of(m.LookAtShards)


def test_expired_watch_list_looks_at_all_shards():
    machine = MachineDriver().idle()
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, T + 20), claimed(1, OTHER, T + 20))))
    machine.feed(m.WatchedShardsSet(machine.now, frozenset(), T + 70))
    assert machine.until(m.LookAtShards) == m.LookAtShards((0, 1))
    assert machine.now >= T + 70


def test_watch_list_set_while_training_is_ignored():
    machine = MachineDriver().training()
    machine.feed(m.WatchedShardsSet(machine.now, frozenset(), T + 1000))
    assert machine.state.watched_shards is None


MANY = replace(RULES, shards=50)
ALL_FIT = dict.fromkeys(range(50), 1.0)


def looking(machine: MachineDriver) -> m.LookAtShards:
    (look,) = machine.actions_of(m.LookAtShards)
    assert isinstance(look, m.LookAtShards)
    return look


def test_newcomer_claims_among_the_first_shards_seen():
    """A look at each shard first would take minutes in a run of thousands."""
    machine = MachineDriver(rules=MANY).idle(ALL_FIT)
    look = looking(machine)
    assert len(look.shards) == WAVE
    favourite = min(ALL_FIT, key=lambda shard: rendezvous(MANY.run, shard, 0, ME))
    machine.feed(m.SwarmSeen(machine.now, tuple(ShardView(shard) for shard in look.shards)))
    assert (machine.state.phase, machine.state.target) == ("claiming", favourite)


def test_local_work_and_best_fit_are_looked_at_first():
    machine = MachineDriver(rules=MANY)
    machine.state = MachineState(remembered=frozenset({49}))
    machine.idle({**ALL_FIT, 31: 2.0, 7: 0.0})
    look = looking(machine)
    assert look.shards[:2] == (49, 31)
    assert 7 not in look.shards


@pytest.mark.parametrize("answered", [True, False])
def test_looks_continue_until_every_shard_was_seen(answered: bool):
    """Without a pause, whether all shards are held or all look-ups fail."""
    machine = MachineDriver(rules=MANY).idle(ALL_FIT)
    seen = []
    while len(seen) < 50:
        look = looking(machine)
        seen += look.shards
        views = tuple(claimed(shard, OTHER, machine.now + 600) for shard in look.shards) if answered else ()
        machine.feed(m.SwarmSeen(machine.now, views))
        assert machine.state.phase == "idle"
        assert (f"looking at {50 - len(seen)} more" in machine.state.why) == (len(seen) < 50)
    assert sorted(seen) == list(range(50))
    assert machine.now == T
    assert not machine.actions_of(m.LookAtShards)
    assert machine.state.look_at >= T + MANY.lease, "the next look waits for a lease"
