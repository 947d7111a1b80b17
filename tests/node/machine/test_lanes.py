"""A node in a run with lanes: which slot it takes, and how it goes on from one merge to the next."""

from dataclasses import replace

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView, slot_of
from lutetia.protocol.schema.model.team_spec import TeamSpec
from tests.node.machine.machine_driver import ME, OTHER, RULES, MachineDriver, T, acceptance, claimed

TEAM = replace(RULES, team=TeamSpec(lanes=3, shares=(1.0, 1.0, 0.25), deadline=100.0), interval=1000, max_pending=1, max_ahead=1)
SECOND = slot_of(0, 1)


def merged(epoch: int, digest: str, term: int = 0, slot: int = SECOND) -> ShardView:
    """The slot after a merge, which the coordinator has accepted in its own name; our claim lives."""
    return claimed(slot, ME, T + 1e6, accepted=acceptance(0, epoch, digest, "coordinator", term=term))


def training(rules=TEAM) -> MachineDriver:
    """A node that trains lane 1 of shard 0."""
    driver = MachineDriver(rules)
    driver.feed(m.Joined(driver.now))
    driver.feed(m.Probed(driver.now, {0: 1.0, 1: 0.0}))
    views = [claimed(0, OTHER, driver.now + 1e6), *(ShardView(slot) for slot in rules.slots if slot)]
    driver.feed(m.SwarmSeen(driver.now, tuple(views)))
    assert (driver.state.target, driver.state.why) == (SECOND, "lane 1 of shard 0 is free")
    driver.until(m.LookAtShards)
    driver.feed(m.SwarmSeen(driver.now, (ShardView(SECOND),)))
    driver.until(m.LookAtShards)
    driver.feed(m.SwarmSeen(driver.now, (claimed(SECOND, ME, driver.now + 60, "claiming"),)))
    driver.feed(m.SyncDone(driver.now, SECOND, 0, None))
    return driver


def finished(driver: MachineDriver) -> list[m.Action]:
    own = m.OwnCheckpoint(SECOND, 1, "own", None)
    return driver.feed(m.CheckpointReady(driver.now, driver.state.trainers_started, own))


def test_slow_node_gets_a_lane_whose_share_it_trains_in_time() -> None:
    driver = MachineDriver(TEAM).idle({0: 1.0, 1: 1.0})
    assert {slot: value > 0 for slot, value in driver.state.fitness.items()} == dict.fromkeys(TEAM.slots, True)
    driver.feed(m.Probed(driver.now, {0: 1.0, 1: 1.0}, rate=5.0))  # 200 s for a whole epoch, 50 s for a quarter
    assert [slot for slot in TEAM.slots if driver.state.fitness[slot] > 0] == [slot_of(0, 2), slot_of(1, 2)]
    driver.feed(m.Probed(driver.now, {0: 1.0, 1: 1.0}, rate=2.0))
    driver.feed(m.SwarmSeen(driver.now, tuple(ShardView(slot) for slot in TEAM.slots)))
    assert driver.state.why == "this device trains 2 samples/s and the smallest lane needs 2.5 to be in time; standing by"


def test_node_that_stands_by_claims_a_lane_within_two_leases_after_it_is_free() -> None:
    driver = MachineDriver(TEAM).idle({0: 1.0, 1: 0.0})
    held = {slot: claimed(slot, OTHER, driver.now + 1e6) for slot in TEAM.slots}
    driver.feed(m.SwarmSeen(driver.now, tuple(held.values())))
    assert driver.state.why == "every lane of every shard has a holder; standing by"
    held[SECOND], freed = ShardView(SECOND), driver.now
    while driver.state.phase != "claiming":
        look = driver.until(m.LookAtShards)
        driver.feed(m.SwarmSeen(driver.now, tuple(held[slot] for slot in look.shards)))  # type: ignore[union-attr]
    assert driver.state.target == SECOND
    assert driver.now <= freed + 2 * TEAM.lease


def test_standby_says_why_it_takes_none_of_the_free_lanes() -> None:
    driver = MachineDriver(TEAM)
    driver.feed(m.Joined(driver.now))
    driver.feed(m.Probed(driver.now, {0: 1.0, 1: 0.0}, rate=5.0))  # in time with a quarter of an epoch alone
    held = {slot: claimed(slot, OTHER, driver.now + 1e6) for slot in TEAM.slots}
    held[SECOND] = ShardView(SECOND)
    driver.feed(m.SwarmSeen(driver.now, tuple(held.values())))
    assert driver.state.why == (
        "lane 1 of shard 0 is free, and needs 10 samples/s to be in time; this device trains 5; standing by"
    )
    quarter = slot_of(0, 2)
    driver.state = replace(driver.state, avoided_until={quarter: driver.now + 90})
    driver.feed(m.SwarmSeen(driver.now, (claimed(SECOND, OTHER, driver.now + 1e6), ShardView(quarter))))
    assert driver.state.why == (
        "lane 2 of shard 0 is free, was given up here before, and is tried again within 90 s; standing by"
    )
    other = MachineDriver(TEAM).idle({0: 1.0, 1: 0.0})
    other.feed(m.WatchedShardsSet(other.now, frozenset({SECOND}), other.now + 1e6))
    other.feed(m.SwarmSeen(other.now, (claimed(SECOND, OTHER, other.now + 1e6),)))
    assert other.state.why == "every lane of every shard that this node watches has a holder; standing by"


def test_lane_with_unfinished_work_comes_before_a_lower_one() -> None:
    driver = MachineDriver(TEAM)
    driver.state = replace(driver.state, remembered=frozenset({SECOND}))
    driver.idle({0: 1.0, 1: 1.0})
    driver.feed(m.SwarmSeen(driver.now, tuple(ShardView(slot) for slot in TEAM.slots)))
    assert (driver.state.phase, driver.state.target) == ("claiming", SECOND)


def test_gathered_result_waits_for_the_merge_and_training_goes_on_from_it() -> None:
    driver = training()
    start = driver.actions_of(m.StartTrainer)[0]
    assert (start.shard, start.until) == (SECOND, 1)  # type: ignore[union-attr]
    assert [action.candidate.digest for action in finished(driver) if isinstance(action, m.PublishCheckpoint)] == ["own"]
    driver.feed(m.OfferAnswered(driver.now, "own", "gathered"))
    driver.feed(m.TrainerProgress(driver.now, driver.state.trainers_started, 1, 1000, waiting=True))
    assert "waits for the merge of the lanes" in driver.state.why
    waited = driver.now
    for look in range(1, 4):
        driver.until(m.LookAtShards)
        driver.feed(m.SwarmSeen(driver.now, (claimed(SECOND, ME, T + 1e6),)))
        assert driver.now - waited <= look * 1.25 * RULES.heartbeat / 4, "the merge is seen soon after it"
    driver.feed(m.SwarmSeen(driver.now, (merged(1, "all"),)))
    assert driver.actions_of(m.Sync) == [m.Sync(SECOND, 1, "all")]
    driver.feed(m.SyncDone(driver.now, SECOND, 1, "all"))
    start = driver.actions_of(m.StartTrainer)[0]
    assert (start.epoch, start.checkpoint, start.until) == (1, "all", 2)  # type: ignore[union-attr]
    assert not driver.state.work.gathered  # type: ignore[union-attr]


def test_late_lane_goes_on_from_every_merge_without_giving_the_shard_up() -> None:
    driver = training()
    for epoch in range(1, 4):
        driver.feed(m.SwarmSeen(driver.now, (merged(epoch, f"all {epoch}"),)))
        assert driver.state.left_out == (
            f"the lanes of shard 0 were merged into epoch {epoch} before this node's result was there; "
            "it is left out, which is nobody's fault and costs this node nothing"
        )
        assert driver.actions_of(m.Sync) == [m.Sync(SECOND, epoch, f"all {epoch}")]
        assert not [action for action in driver.actions if isinstance(action, m.LogSentence) and action.level == "warning"]
        driver.feed(m.SyncDone(driver.now, SECOND, epoch, f"all {epoch}"))
    driver.feed(m.SwarmSeen(driver.now, (merged(4, "all 4"),)))
    assert (driver.state.phase, driver.state.work) == ("idle", None)  # the budget is done


def test_result_that_came_too_late_is_told_of_until_one_is_in_time() -> None:
    driver = training()
    finished(driver)
    driver.feed(m.OfferAnswered(driver.now, "own", "superseded", text="merged before"))
    assert driver.state.left_out.startswith("the result of lane 1 of shard 0 came too late for epoch 1; it is left out, which is")
    driver.feed(m.SwarmSeen(driver.now, (merged(1, "all"),)))
    assert driver.state.left_out.startswith("the lanes of shard 0 were merged into epoch 1 before this node's result was there; ")
    driver.feed(m.SyncDone(driver.now, SECOND, 1, "all"))
    second = m.OwnCheckpoint(SECOND, 2, "second", "all")
    driver.feed(m.CheckpointReady(driver.now, driver.state.trainers_started, second))
    driver.feed(m.OfferAnswered(driver.now, "second", "gathered"))
    assert driver.state.left_out == ""
    driver.feed(m.SwarmSeen(driver.now, (merged(2, "all 2"),)))
    assert driver.state.left_out == ""


def test_merge_is_made_again_after_a_rollback() -> None:
    driver = training()
    driver.feed(m.SwarmSeen(driver.now, (merged(1, "with a liar"),)))
    driver.feed(m.SyncDone(driver.now, SECOND, 1, "with a liar"))
    driver.feed(m.SwarmSeen(driver.now, (merged(1, "without", term=1),)))
    assert driver.actions_of(m.StopTrainer)
    assert driver.actions_of(m.Sync) == [m.Sync(SECOND, 1, "without")]


def test_finishing_node_leaves_when_its_lane_is_gathered() -> None:
    driver = training()
    driver.feed(m.UserVerb(driver.now, "finish"))
    finished(driver)
    driver.feed(m.TrainerExited(driver.now, driver.state.trainers_started, "stopped"))
    driver.feed(m.OfferAnswered(driver.now, "own", "gathered"))
    assert driver.state.phase == "left"
