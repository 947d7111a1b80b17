"""Many made-up peers of one address around a key or in a routing table do not displace others."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Timing
from lutetia.protocol.schema.records import claim_key
from lutetia.protocol.transport.hivemind.bindings import DHTID, PeerID
from lutetia.protocol.transport.hivemind.dht.ip_diversity import NEWCOMERS_AT_ONCE, NewcomerLimit, alternate, member_to_replace
from lutetia.protocol.transport.hivemind.dht.lookup import SILENT_ALLOWED, Lookup, run_lookup
from lutetia.protocol.transport.hivemind.dht.node import REPLICAS, SEARCH_WIDTH
from lutetia.protocol.transport.hivemind.dht.routing_table import DiverseRoutingTable, OriginLookup, position_of
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from tests.attacks.hivemind_swarm import anything, claim, manifest_of_now, network

BUCKET, SPLITS = 20, 5
SYBIL = "203.0.113.5"
ORIGINS = st.lists(st.sampled_from("abc"), max_size=30)


def made_up(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + hashlib.sha256(str(number).encode()).digest())


def table_of(sybils: int, honest: int) -> DiverseRoutingTable:
    """A table to which made-up peers of one address are added, then honest ones with an address each."""
    table = DiverseRoutingTable(position_of(made_up(-1)), BUCKET, SPLITS)
    for number in range(sybils + honest):
        peer = made_up(number)
        table.origins[position_of(peer)] = SYBIL if number < sybils else f"198.51.100.{number - sybils}"
        table.add_or_update_node(position_of(peer), peer)
    return table


def test_a_flood_of_one_origin_replaces_no_other_neighbour() -> None:
    sybils, honest = 20_000, 150
    table = table_of(sybils, honest)
    placed = Counter(table.origins[member] for bucket in table.buckets for member in bucket.nodes_to_peer_id)
    assert placed[SYBIL] == placed.total() - honest, "all honest peers are in, made-up ones get the remaining places"
    assert len(table.uid_to_peer_id) == len(table.peer_id_to_uid) == len(table.origins) <= 2 * BUCKET * len(table.buckets)


def test_a_table_of_one_origin_is_hiveminds() -> None:
    """As in Kademlia, old members stay: nothing changes for many nodes behind one address."""
    table = table_of(400, 0)
    first = {position_of(made_up(number)) for number in range(BUCKET)}
    members = {member for bucket in table.buckets for member in bucket.nodes_to_peer_id}
    assert first <= members
    oldest = next(iter(members))
    del table[oldest]
    assert oldest not in table
    assert oldest not in table.origins


@given(ORIGINS, st.sampled_from("abcd"))
def test_only_the_most_frequent_origin_is_replaced(members: list[str], origin: str) -> None:
    replaced = member_to_replace(dict(enumerate(members)), origin)
    counts = Counter(members)
    if replaced is None:
        assert max(counts.values(), default=0) <= counts[origin] + 1
    else:
        assert counts[members[replaced]] == max(counts.values()) >= counts[origin] + 2
        assert members[replaced] not in members[replaced + 1 :], "the newest of its origin"


@given(ORIGINS)
def test_origins_alternate(origins: list[str]) -> None:
    order = alternate(range(len(origins)), origins)
    assert sorted(order) == list(range(len(origins)))
    total = Counter(origins)
    for end in range(len(order)):
        seen = Counter(origins[place] for place in order[:end])
        assert all(seen[origin] >= min(total[origin], max(seen.values(), default=0) - 1) for origin in total)
    for origin in total:
        mine = [place for place in order if origins[place] == origin]
        assert mine == sorted(mine), "the nearest of each origin come first"


def test_newcomers_of_an_origin_are_limited_in_rate() -> None:
    limit = NewcomerLimit()
    assert sum(limit.admits(SYBIL, 0.0) for _ in range(1000)) == NEWCOMERS_AT_ONCE
    assert limit.admits("198.51.100.7", 0.0)
    assert sum(limit.admits(SYBIL, now / 10) for now in range(1, 601)) == 60
    for number in range(10_000):
        assert limit.admits(f"198.51.100.{number}", 200.0 + number)
    assert len(limit._spent) <= 2 * NEWCOMERS_AT_ONCE + 1, "origins that were quiet for a while are forgotten"


def test_neighbouring_addresses_share_buckets_and_replicas_as_one() -> None:
    crowd = [f"203.0.114.{number}" for number in range(8)]
    assert alternate(range(10), [*crowd, "8.8.4.4", "9.9.9.9"])[:3] == [0, 8, 9]
    assert member_to_replace(dict(enumerate(crowd)), "8.8.4.4") == 7
    assert member_to_replace(dict(enumerate(crowd)), "203.0.114.99") is None


async def test_origins_of_several_newcomers_cost_one_request() -> None:
    asked: list[float] = []

    async def ask() -> dict[str, str]:
        asked.append(time.monotonic())
        return {f"peer {number}": str(number) for number in range(50)}

    origins = OriginLookup(ask)
    assert await origins.of("peer 0") == "0"
    found = await asyncio.gather(
        *(origins.of(f"peer {number}") for number in range(50)), *(origins.of("gone") for _ in range(50))
    )
    assert found == [str(number) for number in range(50)] + [""] * 50
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 0.5


@pytest.mark.timeout(300)
async def test_an_honest_replica_behind_made_up_ones_keeps_the_record(tmp_path: Path) -> None:
    """Real p2pd. There are as many made-up peers as replicas, and they answer that they keep nothing."""
    run = manifest_of_now(timing=Timing(heartbeat=60.0, tenure=600.0))
    async with network(tmp_path, run) as start:
        key = claim_key(run.run_id, 0)
        honest = await start("honest", host="127.0.0.3")
        tries = (f"made up {number}" for number in itertools.count())
        nearer = (name for name in tries if distance(key, Identity.derived(name).peer_id) < distance(key, honest.peer_id))
        for name in itertools.islice(nearer, REPLICAS):
            await start(name, check=anything, bootstrap=honest.addresses(), host="127.0.0.2")
        node = await start("node", bootstrap=honest.addresses())
        assert await claim(node, run.run_id, "node")
        await node.close()
        assert Identity.derived("node").public_key in await honest.get(key)


@pytest.mark.parametrize("honest", [15, 60, 200])
async def test_a_liar_that_names_made_up_peers_hides_no_key(honest: int) -> None:
    """It has many invented ids, none of which it runs, and names those nearest to any key."""
    draw = random.Random(honest)
    peers = [draw.getrandbits(160) for _ in range(honest)]
    invented = [draw.getrandbits(160) for _ in range(20_000)]
    liar, tables = peers[0], {peer: draw.sample(peers, min(honest, 60)) for peer in peers}
    for _ in range(20):
        key, storer = draw.getrandbits(160), draw.choice(peers[1:])
        silent = 0

        async def ask(node: int, key: int = key) -> list[int] | None:
            nonlocal silent
            if node not in tables:
                silent += 1
                return None
            return nearest(invented if node == liar else tables[node], key, 20)

        search = Lookup(key, SEARCH_WIDTH, {liar, *nearest(tables[storer], key, 20)} - {storer})
        await run_lookup(search, ask)
        found = search.nearest()
        assert set(found) <= set(peers)
        assert set(found[: REPLICAS + 1]) >= set(nearest([peer for peer in peers if peer != storer], key, REPLICAS))
        assert silent <= SILENT_ALLOWED + 1, "the cost of a liar is bounded"


async def test_dead_neighbours_do_not_end_a_lookup() -> None:
    """Half of the swarm has just died, and a newcomer knows only one peer."""
    draw = random.Random(3)
    peers = [draw.getrandbits(160) for _ in range(60)]
    dead = set(peers[30:])

    async def ask(node: int) -> list[int] | None:
        return None if node in dead else nearest(peers, key, 20)

    for _ in range(50):
        key = draw.getrandbits(160)
        search = Lookup(key, SEARCH_WIDTH, [peers[0]])
        await run_lookup(search, ask)
        assert set(search.nearest()) >= set(nearest(set(peers) - dead, key, REPLICAS)) & set(nearest(peers, key, 20))


async def test_a_lookup_with_enough_answers_ends() -> None:
    """A peer names others at addresses where every dial hangs."""
    at = asyncio.get_running_loop().time()

    async def ask(node: int) -> list[int]:
        if node >= 100:
            return [1000 + node] if node < 200 else await asyncio.get_running_loop().create_future()
        return [200 + node]

    await run_lookup(search := Lookup(0, 10, range(1, 20)), ask)
    assert search.nearest() == list(range(1, 11))
    assert asyncio.get_running_loop().time() - at < 2


@pytest.mark.timeout(300)
async def test_records_reach_honest_peers_despite_a_real_liar(tmp_path: Path) -> None:
    run = manifest_of_now(timing=Timing(heartbeat=60.0, tenure=600.0))
    invented = {position_of(peer): peer for peer in map(made_up, range(5000))}

    def nearest_invented(query_id: DHTID, k: int, exclude: DHTID | None = None) -> list[tuple[DHTID, PeerID]]:
        return [(DHTID(place), invented[DHTID(place)]) for place in nearest(invented, query_id, k)]

    async with network(tmp_path, run) as start:
        first = await start("first")
        honest = [first, *[await start(f"honest {number}", bootstrap=first.addresses()) for number in range(2)]]
        liar = await start("liar", check=anything, bootstrap=first.addresses(), host="127.0.0.2")
        assert liar._dht
        liar._dht._protocol.routing_table.get_nearest_neighbors = nearest_invented  # type: ignore[method-assign]
        await until_neighbours(liar, honest)
        node = await start("node", bootstrap=first.addresses())
        started = time.monotonic()
        assert await claim(node, run.run_id, "node")
        assert time.monotonic() - started < 10
        key = DHTID.generate(source=claim_key(run.run_id, 0))
        assert all(peer._dht and key in peer._dht._protocol.storage for peer in honest)


async def until_neighbours(peer: HivemindTransport, others: list[HivemindTransport]) -> None:
    for other in others:
        assert other._dht
        assert await other._dht.meet(peer.peer_id)


async def test_origins_of_all_candidates_cost_one_request() -> None:
    asked: list[float] = []

    async def ask() -> dict[str, str]:
        asked.append(time.monotonic())
        return {"peer": "198.51.100.7"}

    origins = OriginLookup(ask)
    assert await origins.of_all(["peer"]) == ["198.51.100.7"]
    assert await origins.of_all([*(f"gone {number}" for number in range(10)), "peer"]) == [*[""] * 10, "198.51.100.7"]
    assert len(asked) == 2


def nearest(peers: Collection[int], key: int, count: int) -> list[int]:
    return sorted(peers, key=lambda peer: peer ^ key)[:count]


def distance(key: str, peer_id: str) -> int:
    away = DHTID.generate(source=key).xor_distance(position_of(PeerID.from_base58(peer_id)))
    assert isinstance(away, int)
    return away
