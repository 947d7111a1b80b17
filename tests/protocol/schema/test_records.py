from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.schema import records as r
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from tests.protocol.example_documents import COORDINATOR, NOW, PEER, STRANGER, records

LIMITS = r.RecordLimits(heartbeat=20)
COORDINATORS = (COORDINATOR.public_key,)
KINDS = sorted(records())


def author_of(kind: str) -> Identity:
    return COORDINATOR if kind == "acceptance" else PEER


def opened(data: bytes, kind: str = "claim", *, expires: float = NOW + 30, now: float = NOW, key: str | None = None) -> r.Record:
    record = records()[kind]
    return r.open_record(
        data, key=key or record.key(), subkey=record.owner, expires=expires, now=now, limits=LIMITS, coordinators=COORDINATORS
    )


def sealed(kind: str, expires: float = NOW + 30, signer: Identity | None = None) -> bytes:
    return r.seal(records()[kind], signer or author_of(kind), expires)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_small_and_survives_the_round_trip(kind: str) -> None:
    data = sealed(kind)
    assert len(data) <= r.MAX_RECORD_BYTES
    assert opened(data, kind) == records()[kind] == r.read_envelope(data)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_owner_signs(kind: str) -> None:
    with pytest.raises(r.RecordRefused, match="signature"):
        opened(sealed(kind, signer=STRANGER), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_record_cannot_be_prolonged_or_moved(kind: str) -> None:
    data = sealed(kind)
    with pytest.raises(r.RecordRefused, match="signature"):
        opened(data, kind, expires=NOW + 31)
    with pytest.raises(r.RecordRefused, match="was stored under"):
        opened(data, kind, key=r.claim_key("cd" * 32, 3))
    with pytest.raises(r.RecordRefused, match="expired"):
        opened(data, kind, now=NOW + 30)


def test_a_record_belongs_under_its_owners_subkey() -> None:
    record = records()["claim"]
    with pytest.raises(r.RecordRefused, match="owner"):
        r.open_record(sealed("claim"), key=record.key(), subkey=STRANGER.public_key, expires=NOW + 30, now=NOW, limits=LIMITS)


def test_an_acceptance_by_another_peer_is_refused() -> None:
    by_peer = records()["acceptance"].model_copy(update={"owner": PEER.public_key})
    with pytest.raises(r.RecordRefused, match="not a coordinator"):
        r.open_record(
            r.seal(by_peer, PEER, NOW + 30), key=by_peer.key(), subkey=PEER.public_key, expires=NOW + 30, now=NOW, limits=LIMITS,
            coordinators=COORDINATORS,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "seconds"), [("node", 60), ("claim", 60), ("provider", 600), ("checkpoint", 21600), ("acceptance", 21600)]
)
def test_no_record_outlives_its_kind(kind: str, seconds: float) -> None:
    longest = NOW + seconds + LIMITS.maximum_clock_skew
    assert opened(sealed(kind, longest), kind, expires=longest)
    with pytest.raises(r.RecordRefused, match="would live"):
        opened(sealed(kind, longest + 1), kind, expires=longest + 1)
    year = NOW + 365 * 86400
    with pytest.raises(r.RecordRefused, match="would live"):
        opened(sealed(kind, year), kind, expires=year)


def test_a_future_record_is_refused_beyond_the_clock_skew() -> None:
    assert opened(sealed("claim"), now=NOW - 29)
    with pytest.raises(r.RecordRefused, match="future"):
        opened(sealed("claim"), now=NOW - 31)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["record"].update(extra=1),
        lambda d: d["record"].update(shard=-1),
        lambda d: d["record"].update(shard="3"),
        lambda d: d["record"].update(kind="vote"),
        lambda d: d["record"].pop("epoch"),
        lambda d: d.update(signature="00"),
        lambda d: d.update(comment="x" * 5000),
    ],
)
def test_a_changed_record_is_refused(spoil) -> None:
    document = json.loads(sealed("claim"))
    spoil(document)
    with pytest.raises(r.RecordRefused):
        opened(json.dumps(document).encode())


@given(st.binary(max_size=5000))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(r.RecordRefused):
        opened(data)


@given(st.integers(min_value=0), st.binary(min_size=1, max_size=3))
def test_any_flipped_byte_is_refused(place: int, flip: bytes) -> None:
    data = bytearray(sealed("checkpoint"))
    for offset, bits in enumerate(flip):
        data[(place + offset) % len(data)] ^= bits
    if bytes(data) == sealed("checkpoint"):
        return
    with pytest.raises(r.RecordRefused):
        opened(bytes(data), "checkpoint")


def test_a_result_offered_by_another_peer_keeps_its_digest() -> None:
    mine = records(PEER)["checkpoint"]
    copied = records(STRANGER)["checkpoint"]
    assert isinstance(mine, r.CheckpointRecord)
    assert isinstance(copied, r.CheckpointRecord)
    assert mine.digest == copied.digest
    assert mine.model_copy(update={"epoch": 2}).digest != mine.digest


def test_nodes_spread_over_all_buckets() -> None:
    run = "ab" * 32
    keys = {r.node_key(run, Identity.derived(f"node {i}").public_key) for i in range(400)}
    assert keys == set(r.node_keys(run))


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "\u202egnp.exe", "a" * 33, " Ada", "Ada\n", "Аda", "🦊", "a\x1b[31m"]
)
def test_a_name_that_is_more_than_plain_text_is_left_out_and_the_record_kept(text: str) -> None:
    record = records()["node"]
    document = {**record.model_dump(mode="json"), "name": text}
    signature = PEER.sign(r._signed_bytes(record.key(), NOW + 30, document))
    named = opened(canonical({"record": document, "signature": signature}), "node")
    assert isinstance(named, r.NodeRecord)
    assert named.name == ""


def test_a_record_without_a_name_is_written_as_before() -> None:
    record = records()["node"]
    assert isinstance(record, r.NodeRecord)
    assert "name" not in json.loads(sealed("node"))["record"]
    assert '"name":"Ada 2.0"' in r.seal(record.model_copy(update={"name": "Ada 2.0"}), PEER, NOW + 30).decode()
