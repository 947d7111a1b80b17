from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.claims import (
    LiveClaim,
    ShardView,
    free_shards,
    lane_fitness,
    latest_acceptance,
    preferred_shard,
    rendezvous,
    shard_and_lane,
    shard_owner,
    slot_of,
    slots_of,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import AcceptanceRecord, ClaimRecord, ResetRecord, claim_key
from lutetia.protocol.stalled_claims import ClaimHistory, observe_claims, without_stalled
from tests.protocol.example_documents import COORDINATOR, NOW, RUN, blob

PEERS = [Identity.derived(f"peer {i}").public_key for i in range(6)]
STATES = st.sampled_from(["claiming", "training", "draining", "released"])


def claim(owner: str, expires: float = NOW + 30, state: str = "claiming", shard: int = 0) -> LiveClaim:
    record = ClaimRecord(run=RUN, owner=owner, issued=NOW - 1, shard=shard, epoch=0, samples=0, state=state)  # type: ignore[arg-type]
    return LiveClaim(record, expires)


def acceptance(author: str, epoch: int = 1, tenure: float = NOW + 60, checkpoint: str = "1" * 64) -> AcceptanceRecord:
    return AcceptanceRecord(
        run=RUN, owner=COORDINATOR.public_key, issued=NOW - 1, shard=0, epoch=epoch, checkpoint=checkpoint, parent=None,
        weights=blob("2"), state=blob("3"), samples=8, author=author, tenure_until=tenure, holdout_loss=0.5,
    )  # fmt: skip


def claims_of(peers: list[str]) -> st.SearchStrategy[list[LiveClaim]]:
    one = st.builds(claim, st.sampled_from(peers), st.sampled_from([NOW - 1, NOW, NOW + 1, NOW + 30]), STATES)
    return st.lists(one, max_size=6, unique_by=lambda c: c.record.owner)


@given(claims_of(PEERS), st.randoms(), st.none() | st.sampled_from(PEERS))
def test_every_reader_names_the_same_live_claimant(claims: list[LiveClaim], order, author: str | None) -> None:
    accepted = acceptance(author) if author else None
    owner = shard_owner(RUN, ShardView(0, tuple(claims), accepted), NOW)
    shuffled = list(claims)
    order.shuffle(shuffled)
    assert owner == shard_owner(RUN, ShardView(0, tuple(shuffled), accepted), NOW)
    live = {c.record.owner for c in claims if c.expires > NOW and c.record.state != "released"}
    assert (owner in live) if live else owner is None


@given(claims_of(PEERS), st.sampled_from(PEERS))
def test_tenure_wins_while_its_claim_lives_and_no_longer(others: list[LiveClaim], author: str) -> None:
    others = [c for c in others if c.record.owner != author]
    accepted = acceptance(author)
    assert shard_owner(RUN, ShardView(0, (*others, claim(author)), accepted), NOW) == author
    assert shard_owner(RUN, ShardView(0, (*others, claim(author, expires=NOW)), accepted), NOW) != author


def test_a_late_claim_never_takes_a_shard_from_its_holder() -> None:
    for holder in PEERS:
        claims = tuple(claim(peer, state="training" if peer == holder else "claiming") for peer in PEERS)
        assert shard_owner(RUN, ShardView(0, claims), NOW) == holder


def test_among_equal_claims_the_lowest_rendezvous_hash_wins() -> None:
    claims = tuple(claim(peer) for peer in PEERS)
    assert shard_owner(RUN, ShardView(0, claims), NOW) == min(PEERS, key=lambda peer: rendezvous(RUN, 0, 0, peer))


def test_a_shard_is_free_with_work_left_and_no_claim() -> None:
    views = [
        ShardView(0, (claim(PEERS[0]),)),
        ShardView(1, (claim(PEERS[0], expires=NOW - 1, shard=1),)),
        ShardView(2, (claim(PEERS[0], state="released", shard=2),)),
        ShardView(3, (), acceptance(PEERS[0], epoch=4)),
    ]
    assert [view.shard for view in free_shards(views, epochs=4, now=NOW)] == [1, 2]


def test_joiners_of_equal_fitness_spread_over_the_free_shards() -> None:
    free = [ShardView(shard) for shard in range(4)]
    fitness = dict.fromkeys(range(4), 1.0)
    chosen = [preferred_shard(RUN, Identity.derived(f"joiner {i}").public_key, free, fitness) for i in range(400)]
    counts = [sum(view is not None and view.shard == shard for view in chosen) for shard in range(4)]
    assert min(counts) > 60


def test_fitness_decides_and_zero_means_unfit() -> None:
    free = [ShardView(0), ShardView(1)]
    best = preferred_shard(RUN, PEERS[0], free, {0: 0.5, 1: 2.0})
    assert best is not None
    assert best.shard == 1
    assert preferred_shard(RUN, PEERS[0], free, {0: 0.0}) is None


def test_of_two_acceptances_all_readers_take_the_same() -> None:
    one, two = acceptance(PEERS[0], 2, checkpoint="1" * 64), acceptance(PEERS[1], 2, checkpoint="2" * 64)
    assert latest_acceptance([two, one, acceptance(PEERS[0], 1)]) == latest_acceptance([one, two]) == one
    assert latest_acceptance([]) is None


def test_a_rolled_back_lineage_beats_the_longer_one_it_replaces() -> None:
    old = acceptance(PEERS[0], 5)
    back = acceptance(PEERS[1], 2).model_copy(update={"term": 1})
    start = ResetRecord(run=RUN, owner=COORDINATOR.public_key, issued=NOW, shard=0, term=2)
    again = acceptance(PEERS[1], 1).model_copy(update={"term": 2})
    assert latest_acceptance([old, back]) == back
    assert latest_acceptance([start, old, back]) == start
    assert latest_acceptance([old, again, back, start]) == again
    places = [ShardView(0, (), old), ShardView(0, (), back), ShardView(0, reset=2), ShardView(0, (), again)]
    assert [view.place for view in places] == sorted(view.place for view in places)
    assert places[2].stand == (2, 0, None)


def test_joiners_spread_over_shards_first_then_over_lanes() -> None:
    """One after the other, each knowing the claims of those before it."""
    slots, taken = slots_of(3, 2), list[int]()
    for peer in PEERS:
        free = [ShardView(slot) for slot in slots if slot not in taken]
        chosen = preferred_shard(RUN, peer, free, dict.fromkeys(slots, 1.0))
        assert chosen is not None
        taken.append(chosen.shard)
    assert sorted(taken[:3]) == [0, 1, 2]
    assert sorted(map(shard_and_lane, taken[3:])) == [(0, 1), (1, 1), (2, 1)]


def test_of_lanes_above_the_first_the_largest_share_that_fits_comes_first_then_the_lowest() -> None:
    slots, peer = slots_of(2, 5), PEERS[0]
    shares = (1.0, 0.25, 0.5, 1.0, 0.5)  # of each lane; this peer is too slow for the whole epoch

    def chosen(*held: int) -> int | None:
        fitness = {slot: 0.0 if shares[lane] == 1 else shares[lane] for slot in slots for _, lane in [shard_and_lane(slot)]}
        free = [ShardView(slot) for slot in slots if slot not in held]
        best = preferred_shard(RUN, peer, free, fitness)
        return None if best is None else shard_and_lane(best.shard)[1]

    assert chosen() == 2
    second, fourth = ([slot_of(shard, lane) for shard in range(2)] for lane in (2, 4))
    assert chosen(*second) == 4
    assert chosen(*second, *fourth) == 1


def test_lane_enters_keys_and_digests_only_above_zero() -> None:
    first = ClaimRecord(run=RUN, owner=PEERS[0], issued=NOW, shard=2, epoch=0, samples=0, state="claiming")
    assert first.key() == claim_key(RUN, 2) == claim_key(RUN, 2, 0)
    assert "lane" not in first.model_dump()
    second = first.model_copy(update={"lane": 1})
    assert second.key() != first.key()
    assert second.model_dump()["lane"] == 1
    assert {shard_and_lane(slot_of(shard, lane)) for shard in (0, 4095) for lane in (0, 255)} == {
        (0, 0), (0, 255), (4095, 0), (4095, 255),
    }  # fmt: skip


def test_lane_is_worth_its_share_where_the_node_is_in_time() -> None:
    assert lane_fitness(0.5, 1.0, rate=10, samples=1000, seconds=100) == 0.5
    assert lane_fitness(0.5, 1.0, rate=9, samples=1000, seconds=100) == 0
    assert lane_fitness(0.5, 0.25, rate=9, samples=1000, seconds=100) == 0.125
    assert lane_fitness(0.5, 1.0, rate=0, samples=1000, seconds=100) == 0.5  # a speed that is not known


def test_claim_on_a_lane_lives_while_its_lane_is_merged() -> None:
    slot, tenure = slot_of(0, 1), 10.0
    seen: dict[str, ClaimHistory] = {}
    for turn in range(60):
        now = NOW + turn * tenure
        merged = acceptance(COORDINATOR.public_key, epoch=turn + 1).model_copy(update={"lanes": (0,)})
        seen = observe_claims(seen, ShardView(slot, (claim(PEERS[0], now + 30, "training"),), merged), now, 2 * tenure)
    view = ShardView(slot, (claim(PEERS[0], now + 30, "training"),), merged)
    assert without_stalled(seen, view, None, tenure, 8, now).claims == ()  # its own lane was never among the merged ones
    with_lane = merged.model_copy(update={"epoch": 61, "lanes": (0, 1)})
    seen = observe_claims(seen, ShardView(slot, view.claims, with_lane), now, 2 * tenure)
    assert without_stalled(seen, ShardView(slot, view.claims, with_lane), None, tenure, 8, now).claims


def test_author_of_a_merged_lane_has_tenure_in_that_lane_alone() -> None:
    author, rival = sorted(PEERS[:2], key=lambda peer: rendezvous(RUN, slot_of(0, 2), 1, peer), reverse=True)
    accepted = acceptance(COORDINATOR.public_key).model_copy(update={"lanes": (0, 2), "authors": (PEERS[3], author)})
    live = tuple(claim(peer, state="training") for peer in (author, rival))
    assert shard_owner(RUN, ShardView(slot_of(0, 2), live, accepted), NOW) == author
    assert shard_owner(RUN, ShardView(slot_of(0, 2), live, accepted.model_copy(update={"authors": ()})), NOW) == rival
    assert shard_owner(RUN, ShardView(slot_of(0, 2), live, accepted), NOW + 61) is None, "its claim has expired"
    other = tuple(claim(peer, state="training") for peer in (author, rival))
    winner = min((author, rival), key=lambda peer: rendezvous(RUN, slot_of(0, 1), 1, peer))
    assert shard_owner(RUN, ShardView(slot_of(0, 1), other, accepted), NOW) == winner


def test_merge_proves_the_claim_of_the_lanes_author_and_no_other() -> None:
    slot, before = slot_of(0, 2), {peer: ClaimHistory((0, 0), 5, 1.0, 1.0, NOW - 1) for peer in PEERS[:2]}
    accepted = acceptance(COORDINATOR.public_key).model_copy(update={"lanes": (2,), "authors": (PEERS[0],)})
    live = tuple(claim(peer, state="training") for peer in PEERS[:2])
    seen = observe_claims(before, ShardView(slot, live, accepted), NOW, 60.0)
    assert [seen[peer].since for peer in PEERS[:2]] == [NOW, 1.0]
