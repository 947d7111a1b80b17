"""Many machines together on paper: invariants after every event, under seeded crashes, partitions, pauses and silence."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lutetia.node import messages as m

from .paper_swarm import PaperSwarm

LEASE = 60.0


def started(seed: int, peers: int, shards: int, epochs: int) -> PaperSwarm:
    swarm = PaperSwarm(seed, peers, shards, epochs)
    for peer in swarm.peers:
        swarm.join(peer)
    return swarm


@pytest.mark.parametrize("seed", range(5))
def test_a_swarm_trains_all_shards_to_the_end_without_wasted_epochs(seed: int):
    swarm = started(seed, peers=6, shards=4, epochs=5)
    swarm.run(20)
    assert {shard: len(owners) for shard, owners in swarm.owners().items()} == dict.fromkeys(range(4), 1)
    swarm.run(5 * 60 + 60)
    assert swarm.done
    assert all(len(lineage) == 5 for lineage in swarm.lineage)


@pytest.mark.parametrize("seed", range(5))
def test_shard_of_a_killed_peer_is_trained_elsewhere_within_lease_and_five_seconds(seed: int):
    swarm = started(seed, peers=5, shards=3, epochs=50)
    swarm.run(200)
    victim = next(peer for peer in swarm.peers if peer.state.work)
    shard = victim.state.work.shard  # type: ignore[union-attr]
    victim.alive = False
    swarm.run(LEASE + 5)
    assert len(swarm.owners().get(shard, [])) == 1
    reached = swarm.accepted[shard].epoch  # type: ignore[union-attr]
    swarm.run(120)
    assert swarm.accepted[shard].epoch > reached  # type: ignore[union-attr]


def test_a_thousand_joiners_settle_with_few_claims_per_shard():
    swarm = started(7, peers=1000, shards=8, epochs=9)
    swarm.run(20)
    assert {shard: len(owners) for shard, owners in swarm.owners().items()} == dict.fromkeys(range(8), 1)
    assert max(len(claims) for claims in swarm.claims) <= 30
    for claims in swarm.claims:
        claims.clear()  # all holders die at once, seen by everybody
    for peer in swarm.peers:
        if peer.state.work:
            peer.alive = False
    swarm.run(LEASE + 5)
    assert {shard: len(owners) for shard, owners in swarm.owners().items()} == dict.fromkeys(range(8), 1)


def test_equal_events_give_equal_stories():
    logs = []
    for _ in range(2):
        swarm = started(3, peers=8, shards=3, epochs=4)
        swarm.run(300)
        logs.append([peer.log for peer in swarm.peers])
    assert logs[0] == logs[1]


class Chaos(RuleBasedStateMachine):
    """Anything may happen to six peers; `PaperSwarm.check` asserts after each event, and at the end the run completes."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.swarm = started(seed, peers=6, shards=3, epochs=6)
        self.swarm.run(20)

    @rule(seconds=st.sampled_from([0.3, 5, 21, 61, 100]))
    def time_passes(self, seconds: float) -> None:
        self.swarm.run(seconds)

    @rule(index=st.integers(0, 5), reason=st.sampled_from(["crash", "out-of-memory", "bad-state", "disk-full", "hardware"]))
    def trainer_ends(self, index: int, reason: m.Exit) -> None:
        self.swarm.peers[index].crash_trainer(reason)
        if reason == "disk-full":
            self.swarm.later(30, lambda: self.swarm.peers[index].feed(m.DiskFree(self.swarm.now)))

    @rule(index=st.integers(0, 4), seconds=st.sampled_from([3.0, 50.0]))
    def pause(self, index: int, seconds: float) -> None:
        self.swarm.peers[index].feed(m.UserVerb(self.swarm.now, "pause", self.swarm.now + seconds))

    @rule(index=st.integers(0, 4))
    def network_goes_and_comes(self, index: int) -> None:
        peer = self.swarm.peers[index]
        peer.online = False
        peer.feed(m.NetworkLost(self.swarm.now))

        def back() -> None:
            peer.online = True
            peer.feed(m.NetworkBack(self.swarm.now))

        self.swarm.later(90, back)

    @rule()
    def coordinator_is_away(self) -> None:
        self.swarm.judging = False
        self.swarm.later(40, lambda: setattr(self.swarm, "judging", True))

    @rule(index=st.integers(0, 2), verb=st.sampled_from(["finish", "leave", "resume"]))
    def verb(self, index: int, verb: m.Verb) -> None:
        self.swarm.peers[index].feed(m.UserVerb(self.swarm.now, verb))

    @rule(index=st.integers(0, 2))
    def killed(self, index: int) -> None:
        self.swarm.peers[index].alive = False
        self.swarm.peers[index].trainer = None

    @invariant()
    def one_lineage(self) -> None:
        for lineage in self.swarm.lineage if hasattr(self, "swarm") else []:
            assert all(head.startswith(f"{parent}>") for parent, head in zip(lineage, lineage[1:], strict=False))

    def teardown(self) -> None:
        if hasattr(self, "swarm"):
            self.swarm.judging = True
            self.swarm.run(3600)
            assert self.swarm.done, [(peer.state.phase, peer.state.why) for peer in self.swarm.peers]


TestChaos = Chaos.TestCase
TestChaos.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
