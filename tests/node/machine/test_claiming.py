"""The node's decisions on its way to a shard, transition by transition."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.node.machine import messages as m
from lutetia.node.machine.claiming import WAVE
from lutetia.node.machine.state import MachineState, NodeRules, next_wake
from lutetia.protocol.claims import ShardView, rendezvous
from tests.node.machine.machine_driver import ME, OTHER, RULES, T, Walk, claimed


def test_joins_probes_looks_claims_settles_syncs_and_trains():
    walk = Walk()
    assert m.ProbeHardware() in walk.feed(m.Joined(T))
    assert walk.state.phase == "probing"
    actions = walk.feed(m.Probed(T, {0: 1.0, 1: 1.0}))
    assert m.LookAtShards((0, 1)) in actions
    assert walk.state.phase == "idle"
    walk = Walk().training()
    start = walk.said(m.StartTrainer)[0]
    assert start == m.StartTrainer(1, 0, 0, None, until=3, shrink=0)


def test_first_claim_says_claiming_and_the_heartbeat_after_winning_says_training():
    walk = Walk().syncing()
    renewals = walk.said(m.RenewRecords)
    assert renewals == [m.RenewRecords(m.Claim(0, 0, 0, "training"))]


def test_newcomer_never_contests_a_live_claim():
    walk = Walk().idle()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, OTHER, T + 60), claimed(1, OTHER, T + 50))))
    assert walk.state.phase == "idle"
    assert "standing by" in walk.state.why
    assert not walk.said(m.PublishClaim)


def test_standby_looks_when_the_first_claim_may_have_expired_and_takes_over():
    walk = Walk().idle()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, OTHER, T + 60), claimed(1, OTHER, T + 50))))
    look = walk.until(m.LookAtShards)
    assert look == m.LookAtShards((1,))
    assert T + 50 <= walk.now < T + 51
    walk.feed(m.SwarmSeen(walk.now, (ShardView(1),)))
    assert (walk.state.phase, walk.state.target) == ("claiming", 1)


def test_looks_again_before_claiming_and_gives_way_to_whom_it_finds():
    walk = Walk().claiming()
    walk.until(m.LookAtShards)
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, OTHER, walk.now + 60, "claiming"),)))
    assert walk.state.phase == "idle"
    assert not walk.said(m.PublishClaim)


def test_loser_of_simultaneous_claims_yields_and_releases_its_claim():
    walk = Walk().claiming()
    walk.until(m.LookAtShards)
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0),)))
    walk.until(m.LookAtShards)
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, OTHER, walk.now + 60, "training"),)))
    assert walk.state.phase == "idle"
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in walk.actions


def test_an_own_claim_that_is_not_visible_yet_is_waited_for():
    walk = Walk().claiming()
    walk.until(m.LookAtShards)
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0),)))
    walk.until(m.LookAtShards)
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0),)))
    assert walk.state.phase == "claiming"
    walk.until(m.LookAtShards)
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60),)))
    assert walk.state.phase == "syncing"


def test_own_claim_of_an_earlier_daemon_is_no_obstacle():
    walk = Walk().idle({0: 1.0})
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, T + 60), ShardView(1))))
    assert walk.state.phase == "claiming"


def test_remembered_local_work_is_preferred_and_claimed_without_delay():
    walk = Walk()
    walk.state = MachineState(remembered=frozenset({1}))
    walk.idle()
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0), ShardView(1))))
    assert walk.state.target == 1
    assert m.LookAtShards((1,)) in walk.actions, "checks at once"


def test_heartbeat_renews_the_claim_and_looks_at_the_own_shard():
    walk = Walk().training()
    walk.progress(0)
    renewal = walk.until(m.RenewRecords)
    assert renewal == m.RenewRecords(m.Claim(0, 0, 0, "training"))
    assert m.LookAtShards((0,)) in walk.actions


def test_a_late_claimant_with_a_lower_hash_does_not_take_the_shard_from_its_holder():
    for number in range(20):
        walk = Walk().training()
        late = f"{number:064x}"
        walk.feed(m.SwarmSeen(walk.now, (claimed(0, late, walk.now + 60, "claiming"),)))
        assert walk.state.phase == "training"


def test_of_two_holders_after_a_partition_exactly_one_yields():
    verdicts = []
    for me, other in ((ME, OTHER), (OTHER, ME)):
        walk = Walk(NodeRules("ab" * 32, me, shards=2, epochs=4, heartbeat=20.0, propagation=1.0))
        walk.idle({0: 1.0})
        walk.feed(m.SwarmSeen(walk.now, (ShardView(0), ShardView(1))))
        walk.until(m.LookAtShards)
        walk.feed(m.SwarmSeen(walk.now, (ShardView(0),)))
        walk.until(m.LookAtShards)
        walk.feed(m.SwarmSeen(walk.now, (claimed(0, me, walk.now + 60),)))
        walk.feed(m.SyncDone(walk.now, 0, 0, None))
        walk.feed(m.SwarmSeen(walk.now, (claimed(0, other, walk.now + 60),)))
        verdicts.append(walk.state.phase)
    assert sorted(verdicts) == ["idle", "training"]


def test_sleep_past_the_lease_looks_before_renewing():
    walk = Walk().training()
    walk.now += 1000  # the lid was closed
    walk.feed(m.ClockTick(walk.now))
    assert m.RenewRecords(None) in walk.actions
    assert m.LookAtShards((0,)) in walk.actions
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, OTHER, walk.now + 60),)))
    assert walk.state.phase == "idle"
    assert walk.said(m.StopTrainer)


def test_sleep_past_the_lease_goes_on_when_nobody_took_over():
    walk = Walk().training()
    walk.now += 299
    walk.feed(m.ClockTick(walk.now))
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0),)))
    assert walk.state.phase == "training"
    assert m.RenewRecords(m.Claim(0, 0, 0, "training")) in walk.actions


def test_pause_while_joining_is_remembered():
    walk = Walk()
    walk.feed(m.UserVerb(T, "pause"))
    walk.idle()
    assert walk.state.phase == "paused"
    walk.feed(m.UserVerb(walk.now, "resume"))
    assert walk.state.phase == "idle"


def test_box_that_fits_nothing_stands_by_and_probes_again():
    walk = Walk().idle({0: 0.0, 1: 0.0})
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0), ShardView(1))))
    assert walk.state.phase == "idle"
    assert "no device" in walk.state.why
    walk.until(m.ProbeHardware, limit=100)
    walk.feed(m.Probed(walk.now, {0: 1.0, 1: 1.0}))
    walk.until(m.LookAtShards)


def test_failed_probe_is_repeated():
    walk = Walk()
    walk.feed(m.Joined(T))
    walk.feed(m.ProbeFailed(walk.now, "timed out"))
    assert walk.until(m.ProbeHardware)


@pytest.mark.parametrize("where", ["idle", "training"])
def test_a_clock_that_is_set_back_delays_nothing_for_long(where: str):
    walk = getattr(Walk(), where)()
    walk.now -= 10_000
    walk.feed(m.ClockTick(walk.now))
    due = next_wake(walk.rules, walk.state)
    assert due is not None
    assert due <= walk.now + RULES.heartbeat
    walk.until(m.RenewRecords)
    walk.until(m.LookAtShards)
    assert walk.now <= T - 10_000 + 3 * RULES.heartbeat


def test_standby_with_a_duty_looks_at_its_own_shards_only():
    walk = Walk().idle()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, OTHER, T + 60), claimed(1, OTHER, T + 50))))
    walk.feed(m.WatchedShardsSet(walk.now, frozenset({0}), T + 1000))
    assert walk.until(m.LookAtShards) == m.LookAtShards((0,))
    assert T + 60 <= walk.now < T + 61


def test_what_was_seen_of_other_shards_is_too_old_to_act_upon():
    walk = Walk().idle()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, OTHER, T + 60), claimed(1, OTHER, T + 20))))
    walk.feed(m.WatchedShardsSet(walk.now, frozenset(), T + 1000))
    assert walk.state.phase == "idle"
    assert "enough others" in walk.state.why
    while walk.now < T + 55:
        walk.tick()
        assert walk.state.phase == "idle"
        assert not walk.said(m.LookAtShards)


def test_a_duty_that_is_not_given_anew_ends_and_everything_is_looked_at():
    walk = Walk().idle()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, OTHER, T + 20), claimed(1, OTHER, T + 20))))
    walk.feed(m.WatchedShardsSet(walk.now, frozenset(), T + 70))
    assert walk.until(m.LookAtShards) == m.LookAtShards((0, 1))
    assert walk.now >= T + 70


def test_who_has_just_begun_to_stand_by_looks_at_everything():
    walk = Walk().training()
    walk.feed(m.WatchedShardsSet(walk.now, frozenset(), T + 1000))
    assert walk.state.duty is None


MANY = replace(RULES, shards=50)
ALL_FIT = dict.fromkeys(range(50), 1.0)


def looking(walk: Walk) -> m.LookAtShards:
    (look,) = walk.said(m.LookAtShards)
    assert isinstance(look, m.LookAtShards)
    return look


def test_a_newcomer_to_many_shards_claims_among_the_first_that_it_sees():
    """Not after a look at each: that takes minutes where a manifest names thousands."""
    walk = Walk(rules=MANY).idle(ALL_FIT)
    look = looking(walk)
    assert len(look.shards) == WAVE
    favourite = min(ALL_FIT, key=lambda shard: rendezvous(MANY.run, shard, 0, ME))
    walk.feed(m.SwarmSeen(walk.now, tuple(ShardView(shard) for shard in look.shards)))
    assert (walk.state.phase, walk.state.target) == ("claiming", favourite)


def test_what_fits_best_and_what_we_hold_work_of_is_looked_at_first():
    walk = Walk(rules=MANY)
    walk.state = MachineState(remembered=frozenset({49}))
    walk.idle({**ALL_FIT, 31: 2.0, 7: 0.0})
    look = looking(walk)
    assert look.shards[:2] == (49, 31)
    assert 7 not in look.shards


@pytest.mark.parametrize("answered", [True, False])
def test_waves_go_on_until_every_shard_was_looked_at(answered: bool):
    """At once, whether all are held or no look-up succeeds: what fails does not keep us from the rest."""
    walk = Walk(rules=MANY).idle(ALL_FIT)
    seen = []
    while len(seen) < 50:
        look = looking(walk)
        seen += look.shards
        views = tuple(claimed(shard, OTHER, walk.now + 600) for shard in look.shards) if answered else ()
        walk.feed(m.SwarmSeen(walk.now, views))
        assert walk.state.phase == "idle"
        assert (f"looking at {50 - len(seen)} more" in walk.state.why) == (len(seen) < 50)
    assert sorted(seen) == list(range(50))
    assert walk.now == T
    assert not walk.said(m.LookAtShards)
    assert walk.state.look_at >= T + MANY.lease, "and then nothing is asked again in a hurry"
