from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.claims import LiveClaim, ShardView, free_shards, latest_acceptance, preferred_shard, rendezvous, shard_owner
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import AcceptanceRecord, ClaimRecord, ResetRecord
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
