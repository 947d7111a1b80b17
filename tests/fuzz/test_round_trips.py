"""Whatever fits a schema is read, and is the same after it was written and read again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from benchmarks.fuzz import examples
from lutetia.coordinator.ledger.events import Event, read_event
from lutetia.coordinator.run_folder import Endpoint
from lutetia.models.data.description import DataDescription
from lutetia.models.mixing.description import SignedMixture
from lutetia.node.control import ControlRequest
from lutetia.node.local_status import LocalStatus
from lutetia.protocol.rpc.checkpoint_offer import Offer, OfferReply
from lutetia.protocol.rpc.introduction import Hello
from lutetia.protocol.schema import records
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.protocol.schema.ticket import Ticket
from tests.fuzz.strategies import documents, manifests

KINDS: dict[str, type[BaseModel]] = {
    kind.__name__: kind
    for kind in (
        Hello, Ticket, Offer, OfferReply, SwarmStatus, SignedMixture, ControlRequest, LocalStatus, Endpoint, DataDescription,
        records.NodeRecord, records.ClaimRecord, records.CheckpointRecord, records.ProviderRecord, records.AcceptanceRecord,
    )
}  # fmt: skip
FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@pytest.mark.parametrize("name", KINDS)
def test_a_document_that_fits_its_schema_survives(name: str) -> None:
    kind = KINDS[name]

    @FEW
    @given(documents(kind))
    def check(data: bytes) -> None:
        try:
            document = kind.model_validate_json(data)
        except ValidationError as error:
            if any(problem["type"] != "value_error" for problem in error.errors()):
                raise
            return  # a cross-check between fields, which a schema cannot say
        again = kind.model_validate_json(canonical(document))
        assert again == document
        assert canonical(again) == canonical(document)

    check()


@FEW
@given(documents(TypeAdapter(Event)))
def test_every_event_survives(data: bytes) -> None:
    event = read_event(data)
    assert read_event(canonical(event)) == event
    assert canonical(read_event(canonical(event))) == canonical(event)


@FEW
@given(manifests())
def test_every_consistent_manifest_can_be_signed_and_opened(manifest: Manifest) -> None:
    owned = manifest.model_copy(update={"owner": examples.OWNER.public_key})
    signed = SignedManifest.sign(owned, examples.OWNER)
    opened = open_manifest(signed.to_bytes(), now=manifest.created - 1)
    assert opened == signed
    assert opened.manifest.run_id == owned.run_id
    assert opened.to_bytes() == signed.to_bytes()


@FEW
@given(documents(Ticket))
def test_every_ticket_is_one_word(data: bytes) -> None:
    ticket = Ticket.model_validate_json(data)
    word = ticket.encode()
    assert word.isalnum()
    assert Ticket.decode(word) == ticket


@FEW
@given(st.sampled_from(examples.all_records()), st.integers(0, 4000), st.binary(min_size=1, max_size=3))
def test_no_change_of_a_sealed_record_is_believed(record: records.Record, place: int, other: bytes) -> None:
    data = examples.sealed(record)
    place %= len(data)
    changed = data[:place] + other + data[place + len(other) :]
    arguments: dict[str, Any] = {
        "key": record.key(), "subkey": record.owner, "expires": examples.NOW + 5, "now": examples.NOW,
        "limits": records.RecordLimits(2.0), "coordinators": (examples.COORDINATOR.public_key,),
    }  # fmt: skip
    if changed == data:
        assert records.open_record(data, **arguments) == record
        return
    try:
        opened = records.open_record(changed, **arguments)
    except records.RecordRefused:
        return
    assert opened == record  # other bytes of equal meaning: another spelling of the same signed content
