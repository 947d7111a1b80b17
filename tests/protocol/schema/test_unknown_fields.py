"""Fields of a later version: carried, signed over and written again; bounded, and never mistaken for a field of this version."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lutetia.coordinator.ledger.events import ResultSeen, read_event
from lutetia.models.mixing.description import MixtureDocument, SignedMixture, signed_document
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.audit_request import open_request, sign_report
from lutetia.protocol.schema import records as r
from lutetia.protocol.schema.canonical import MOST_UNKNOWN_FIELDS, canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.manifest_upgrade import UpgradeRefused, check_upgrade
from lutetia.protocol.schema.ticket import Ticket
from tests.protocol.example_documents import COORDINATOR, NOW, OWNER, PEER, manifest, records
from tests.protocol.rpc.test_audit_request import report

EXPIRES = NOW + 30
LATER: dict[str, Any] = {"mood": "fïne ✓", "route": {"hops": [1, 2.5, None, True]}, "budget": 2**62}
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
).filter(lambda value: depth(value) <= 3)  # fmt: skip


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, inner), default=0) if isinstance(value, dict | list) else 0


def sealed_with(record: r.Record, unknown: dict[str, Any], inside: str | None = None) -> bytes:
    """The record as software of a later version seals it: with `unknown` fields, in the table `inside` of it if that is named."""
    identity = COORDINATOR if record.kind in r.COORDINATORS_ONLY else PEER
    value = record.model_dump(mode="json")
    (value[inside] if inside else value).update(unknown)
    signed = canonical({"key": record.key(), "expires": EXPIRES, "record": value})
    return canonical({"record": value, "signature": identity.sign(b"lutetia-record-1\n" + signed)})


def opened(data: bytes, record: r.Record) -> r.Record:
    return r.open_record(
        data, key=record.key(), subkey=record.owner, expires=EXPIRES, now=NOW, limits=r.RecordLimits(20),
        coordinators=(COORDINATOR.public_key,),
    )  # fmt: skip


@pytest.mark.parametrize("kind", records())
def test_every_record_may_have_them(kind: str) -> None:
    record = records()[kind]
    found = opened(sealed_with(record, LATER), record)
    assert found.model_dump(mode="json") == record.model_dump(mode="json") | LATER


@pytest.mark.parametrize(("kind", "inside"), [("node", "hardware"), ("checkpoint", "made")])
def test_tables_within_records_may_have_them(kind: str, inside: str) -> None:
    record = records()[kind]
    assert opened(sealed_with(record, LATER, inside), record).model_dump(mode="json")[inside]["mood"] == "fïne ✓"


@given(st.dictionaries(st.from_regex(r"[a-z]{3,9}_", fullmatch=True), values, max_size=4))
def test_any_small_value_survives_sealing_again(unknown: dict[str, Any]) -> None:
    record = records()["claim"]
    data = sealed_with(record, unknown)
    assert r.seal(opened(data, record), PEER, EXPIRES) == data


@pytest.mark.parametrize(
    "unknown",
    [
        {f"a{index}": 1 for index in range(MOST_UNKNOWN_FIELDS + 1)},
        {"a": [[[[[1]]]]]},
        {"a": list(range(300))},
        {"a": 2**64},
        {"a": 10**4000},
        {"a b": 1},
        {"a" * 65: 1},
    ],
    ids=["many", "deep", "long", "large", "endless", "no name", "long name"],
)
def test_they_are_bounded(unknown: dict[str, Any]) -> None:
    record = records()["claim"]
    with pytest.raises(r.RecordRefused):
        opened(sealed_with(record, unknown), record)


def test_they_are_signed_over() -> None:
    record = records()["claim"]
    document = json.loads(sealed_with(record, LATER))
    for change in ({"mood": "bad"}, {"more": 1}):
        changed = {**document, "record": {**document["record"], **change}}
        with pytest.raises(r.RecordRefused, match="signature"):
            opened(canonical(changed), record)
    del document["record"]["mood"]
    with pytest.raises(r.RecordRefused, match="signature"):
        opened(canonical(document), record)


def test_around_a_record_there_are_none() -> None:
    record = records()["claim"]
    with pytest.raises(r.RecordRefused, match="more"):
        opened(canonical({**json.loads(sealed_with(record, {})), "more": 1}), record)


@pytest.mark.parametrize("name", ["peer_id", "addresses", "shard", "key", "digest", "model_dump", "kind_", "__class__"])
def test_none_is_mistaken_for_a_field_or_method(name: str) -> None:
    """A provider record has no shard, a claim no address: such a field of theirs means nothing, whatever it holds."""
    run = manifest()
    check = record_check(run, lambda: NOW)
    for record in (records(run=run.run_id)["claim"].model_copy(update={"shard": 0}), records(run=run.run_id)["provider"]):
        if name not in type(record).model_fields:
            for value in (7, "x", [None], {"a": 1}):
                data = sealed_with(record, {name: value})
                assert check(record.key(), record.owner, data, EXPIRES) == record.key()


def test_the_ledger_keeps_them() -> None:
    record = records()["checkpoint"]
    found = opened(sealed_with(record, LATER), record)
    assert isinstance(found, r.CheckpointRecord)
    event = ResultSeen(time=NOW, record=found, via="offer")
    again = read_event(canonical(event))
    assert isinstance(again, ResultSeen)
    assert canonical(again) == canonical(event)
    assert again.record.model_dump()["budget"] == 2**62
    assert isinstance(record, r.CheckpointRecord)
    assert again.record.digest == record.digest


def test_a_manifest_keeps_them_in_its_name_and_signature() -> None:
    timing = {**manifest().timing.model_dump(), "pulse": 1}
    later = Manifest.model_validate({**manifest().model_dump(), **LATER, "timing": timing})
    signed = SignedManifest.sign(later, OWNER)
    found = open_manifest(signed.to_bytes(), now=NOW, run=later.run_id)
    assert found.to_bytes() == signed.to_bytes()
    assert found.manifest.run_id == later.run_id != manifest().run_id


def test_a_later_manifest_may_change_them_but_not_within_fixed_tables() -> None:
    first = Manifest.model_validate({**manifest().model_dump(), "mood": "fine"})
    second = {**first.model_dump(), "run": first.run_id, "version": 2}
    check_upgrade(first, Manifest.model_validate({**second, "mood": "better"}))
    with pytest.raises(UpgradeRefused):
        check_upgrade(first, Manifest.model_validate({**second, "optimisation": {**second["optimisation"], "mood": 1}}))


def test_an_audit_report_is_signed_over_them() -> None:
    ann = Identity.derived("ann")
    request = sign_report(report().model_validate({**report().model_dump(), **LATER}), ann)
    assert open_request(canonical(request), ann.peer_id) == request
    changed = json.loads(canonical(request))
    changed["report"]["mood"] = "bad"
    with pytest.raises(r.RecordRefused, match="not signed"):
        open_request(canonical(changed), ann.peer_id)


def test_ticket_and_mixture_keep_them() -> None:
    ticket = Ticket.model_validate({
        "run": "a" * 64, "owner": OWNER.public_key, "addresses": (f"/ip4/10.0.0.1/tcp/1/p2p/{PEER.peer_id}",), **LATER
    })  # fmt: skip
    assert Ticket.decode(ticket.encode()) == ticket
    run = manifest()
    document = MixtureDocument.model_validate({
        "name": "x", "run": run.run_id, "manifest": run.run_id, "manifest_version": 1, "latent": run.latent,
        "sampling": run.sampling, "experts": (), "files": {}, **LATER,
    })  # fmt: skip
    signed = SignedMixture.model_validate_json(canonical(SignedMixture.sign(document, COORDINATOR.sign)))
    assert signed_document(signed, (COORDINATOR.public_key,), "x").digest == document.digest


def test_a_document_made_here_cannot_have_others_than_json() -> None:
    with pytest.raises(ValidationError, match="not JSON"):
        Ticket.model_validate({"run": "a" * 64, "owner": "b" * 64, "addresses": ("/ip4/1.1.1.1/tcp/1/p2p/x",), "more": object()})
