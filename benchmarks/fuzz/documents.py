"""Documents that arrive as one piece of bytes: records, tickets, manifests, events, status, mixtures, control messages."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from pydantic import ValidationError

from benchmarks.fuzz import examples
from benchmarks.fuzz.contract import Target
from benchmarks.fuzz.decisions import restart
from benchmarks.fuzz.views import describe_event, show_everywhere
from lutetia.cli.commands.swarm import read_status
from lutetia.cli.fetch_mixture import read_description
from lutetia.coordinator.ledger import events
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.models.mixing.layout import check_weights_index, read_index
from lutetia.node.control import read_answer, read_request
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.records import MAX_RECORD_BYTES, RecordLimits, open_record, read_envelope
from lutetia.protocol.schema.status import MAX_STATUS_BYTES
from lutetia.protocol.schema.ticket import MAX_TICKET_CHARACTERS, PREFIX, Ticket

LIMITS = RecordLimits(2.0)


def record(data: bytes) -> None:
    """Open a record as the DHT's check does."""
    try:
        owner = read_envelope(data).owner
    except ValidationError:
        owner = ""
    found = open_record(
        data, key=None, subkey=owner, expires=examples.NOW + 5, now=examples.NOW, limits=LIMITS,
        coordinators=(examples.COORDINATOR.public_key,),
    )  # fmt: skip
    assert len(found.key()) < 200


def ticket(data: bytes) -> None:
    found = Ticket.decode(data.decode("utf-8", "replace"))
    assert Ticket.decode(found.encode()) == found


def ticket_body(data: bytes) -> None:
    """Any content with correct packing and checksum."""
    import base64

    body = zlib.compress(data, 1)
    packed = body + zlib.crc32(body).to_bytes(4, "big")
    ticket((PREFIX + base64.b32encode(packed).decode().lower().rstrip("=")).encode())


def manifest(data: bytes) -> None:
    signed = open_manifest(data, now=examples.NOW)
    assert open_manifest(signed.to_bytes(), now=examples.NOW) == signed


def manifest_body(data: bytes) -> None:
    """A manifest with its owner's signature and any content: an owner may be hostile, too."""
    try:
        inside = Manifest.model_validate_json(data, strict=True).model_copy(update={"owner": examples.OWNER.public_key})
    except ValidationError:
        return
    manifest(SignedManifest.sign(inside, examples.OWNER).to_bytes())


def event_log(data: bytes) -> None:
    """Events of a ledger, applied one after another and described; then a coordinator that starts from them."""
    state = RunState()
    for line in data.splitlines():
        event = events.read_event(line)
        assert events.read_event(canonical(event)) == event
        state = apply(state, event)
        describe_event(event)
    if len(state.shards) == len(examples.manifest().shards):
        restart(state)


def status_document(data: bytes) -> None:
    """A status, as any coordinator may send it, in every view."""
    show_everywhere(read_status(data))


def mixture(data: bytes) -> None:
    """Read a mixture's description, and decide which files are fetched, as `swarm fetch` does."""
    described = read_description(data).mixture
    assert described.known_files.items() <= described.files.items()


def _event_logs() -> Sequence[bytes]:
    lines = [canonical(event) for event in examples.all_events()]
    return [b"\n".join(lines), *lines]


DOCUMENTS = (
    Target("record", record, lambda: [examples.sealed(each) for each in examples.all_records()], most_bytes=2 * MAX_RECORD_BYTES),
    Target("ticket", ticket, lambda: [examples.ticket().encode().encode()], most_bytes=2 * MAX_TICKET_CHARACTERS),
    Target("ticket-body", ticket_body, lambda: [canonical(examples.ticket())]),
    Target("manifest", manifest, lambda: [examples.signed_manifest()], most_bytes=MAX_MANIFEST_BYTES + 1),
    Target("manifest-body", manifest_body, lambda: [canonical(examples.manifest())], most_bytes=MAX_MANIFEST_BYTES),
    Target("events", event_log, _event_logs, (ValidationError,)),
    Target("status", status_document, lambda: [examples.status_document()], most_bytes=MAX_STATUS_BYTES),
    Target("mixture", mixture, lambda: [examples.signed_mixture()]),
    Target("mixture-index", read_index, lambda: [examples.mixture_index()]),
    Target(
        "weights-index",
        check_weights_index,
        lambda: [b'{"weight_map":{"a":"diffusion_pytorch_model-00001-of-00002.safetensors"}}'],
        (ValueError,),
    ),
    Target("control-request", read_request, lambda: [b'{"verb":"status"}', b'{"verb":"pause","seconds":60.5}'], most_bytes=4096),
    Target(
        "control-answer",
        read_answer,
        lambda: [b'{"ok":true,"answer":{"state":"idle"}}', b'{"ok":false,"error":{"code":2,"message":"no"}}'],
    ),
)
