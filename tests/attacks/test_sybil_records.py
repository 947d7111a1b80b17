"""Many made-up owners at one address flood the DHT with records: they get that origin's share and no more."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Timing
from lutetia.protocol.schema.records import claim_key
from lutetia.protocol.transport.hivemind.bindings import DHTID
from lutetia.protocol.transport.hivemind.dht.ip_diversity import NewcomerLimit
from lutetia.protocol.transport.hivemind.dht.record_quota import PER_KEY, PER_ORIGIN, RecordQuota
from lutetia.protocol.transport.hivemind.dht.storage import RecordStorage
from lutetia.protocol.transport.network_origin import PREFIX_FACTOR
from tests.attacks.hivemind_swarm import claim, manifest_of_now, network

CLAIMS = f"{'0' * 64}/claims/0"


def test_one_origin_gets_its_share_of_a_key_and_of_all_keys() -> None:
    quota = RecordQuota(per_origin=100)
    most = PER_KEY["claims"]
    taken = [quota.admits(CLAIMS, f"sybil {n}", "203.0.113.5", 60.0, 0.0) for n in range(200)]
    assert taken == [True] * most + [False] * (200 - most)
    assert quota.admits(CLAIMS, "honest", "198.51.100.7", 60.0, 0.0)
    assert quota.admits(CLAIMS, "sybil 0", "203.0.113.5", 90.0, 0.0), "a held record may be renewed"
    others = [quota.admits(f"{'0' * 64}/providers/{n}", "sybil", "203.0.113.5", 60.0, 0.0) for n in range(100)]
    assert sum(others) == 100 - most
    assert quota.admits(CLAIMS, "sybil 150", "203.0.113.5", 99.0, 61.0), "expired records free their places"


def test_addresses_of_one_prefix_share_four_quotas_of_a_key_and_of_all_keys() -> None:
    quota = RecordQuota(per_origin=100)
    taken = [quota.admits(CLAIMS, f"sybil {n}", f"8.8.4.{n}", 60.0, 0.0) for n in range(250)]
    taken += [quota.admits(CLAIMS, f"sybil {n}", f"8.8.4.{n % 250}", 60.0, 0.0) for n in range(250, 500)]
    assert sum(taken) == PREFIX_FACTOR * PER_KEY["claims"]
    assert quota.admits(CLAIMS, "honest", "9.9.9.9", 60.0, 0.0)
    others = [quota.admits(f"{'0' * 64}/x/{n}", "sybil", f"8.8.4.{n % 250}", 60.0, 0.0) for n in range(500)]
    assert sum(others) == PREFIX_FACTOR * (100 - PER_KEY["claims"])
    quota._forget(61.0)
    assert not quota._under_key
    assert not quota._of_origin


def test_calls_from_addresses_of_one_prefix_share_four_buckets() -> None:
    limit = NewcomerLimit(at_once=10, per_second=1.0)
    assert sum(limit.admits(f"8.8.4.{n % 250}", 0.0) for n in range(1000)) == PREFIX_FACTOR * 10
    assert limit.admits("9.9.9.9", 0.0)
    assert sum(limit.admits(f"8.8.4.{n % 250}", 5.0) for n in range(1000)) == PREFIX_FACTOR * 5


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from(["a", "b", ""]), st.integers(1, 40)), max_size=80)
)
def test_the_quota_counts_live_records(records: list[tuple[int, int, str, int]]) -> None:
    quota = RecordQuota(per_key={"claims": 3}, per_origin=6)
    for now, (key, owner, origin, life) in enumerate(records):
        quota.admits(f"run/claims/{key}", str(owner), origin, now + life + owner / 10, now)
        held = list(quota._held.items())
        assert all(expires > now for _, (_, expires) in held)
        assert sum(quota._of_origin.values()) == sum(quota._under_key.values()) == len(held)
        assert max(quota._under_key.values(), default=0) <= 3
        assert max(quota._of_origin.values(), default=0) <= 6
    quota._forget(1e9)
    assert (quota._held, dict(quota._under_key), dict(quota._of_origin)) == ({}, {}, {})
    assert PER_KEY["claims"] < PER_ORIGIN


def test_storing_a_record_again_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, key, now = RecordStorage(), DHTID.generate(source=CLAIMS), time.time()
    clock = sys.modules["hivemind.utils.timed_storage"]
    assert storage.store_subkey(key, "owner", b"old", now + 1)
    assert storage.store_subkey(key, "owner", b"new", now + 60)
    for ends in (now + 1, now + 60):
        assert not storage.is_newer(key, "owner", ends)
        assert not any(storage.store_subkey(key, "owner", b"old", ends) for _ in range(1000))
    records = storage.of(key)
    assert records
    assert len(records.expiration_heap) + len(storage.expiration_heap) < 10
    monkeypatch.setattr(clock, "get_dht_time", lambda: now + 2)
    assert records.entries() == [("owner", b"new", now + 60)]
    assert key in storage
    monkeypatch.setattr(clock, "get_dht_time", lambda: now + 61)
    assert records.entries() == []
    assert key not in storage


def test_renewing_all_the_time_costs_no_memory() -> None:
    storage, quota, key, now = RecordStorage(), RecordQuota(), DHTID.generate(source=CLAIMS), time.time()
    for number in range(10_000):
        assert storage.store_subkey(key, f"owner {number % 10}", b"new", now + 60 + number / 1000)
        assert quota.admits(CLAIMS, f"owner {number % 10}", "203.0.113.5", now + 60 + number / 1000, now)
    records = storage.of(key)
    assert records
    assert max(len(records.expiration_heap), len(storage.expiration_heap), len(quota._ends)) < 200
    assert sorted(ends for _, _, ends in records.entries()) == [now + 60 + number / 1000 for number in range(9990, 10_000)]


@pytest.mark.timeout(300)
async def test_a_flood_of_claims_leaves_the_honest_claim(tmp_path: Path) -> None:
    run = manifest_of_now(timing=Timing(heartbeat=60.0, tenure=600.0))
    most = PER_KEY["claims"]
    async with network(tmp_path, run) as start:
        keeper = await start("keeper")
        sybil = await start("sybil", bootstrap=keeper.addresses(), host="127.0.0.2")
        taken = [await claim(sybil, run.run_id, f"made up {number}") for number in range(most + 12)]
        assert 0 < sum(taken) <= most
        honest = await start("honest", bootstrap=keeper.addresses(), host="127.0.0.3")
        assert await claim(honest, run.run_id, "honest")
        await sybil.close()  # it returns what it keeps itself; what others keep counts here
        found = await keeper.get(claim_key(run.run_id, 0))
        assert Identity.derived("honest").public_key in found
        assert sum(taken) <= len(found) - 1 <= most
