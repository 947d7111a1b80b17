"""What each release sent and stored is still read by this version, and is written again byte for byte."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from lutetia.coordinator.ledger.events import read_event
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.models.mixing.description import SignedMixture, signed_document
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.accepted_checkpoints import AcceptedDocument, read_accepted
from lutetia.protocol.rpc.audit_request import AuditAnswer, AuditRequest, open_request
from lutetia.protocol.rpc.checkpoint_offer import Offer, OfferReply
from lutetia.protocol.rpc.introduction import Hello
from lutetia.protocol.schema.canonical import canonical, digest_of
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.ledger_head import SignedHead
from lutetia.protocol.schema.manifest import Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.manifest_upgrade import check_upgrade
from lutetia.protocol.schema.records import CheckpointRecord, read_envelope
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.protocol.schema.ticket import Ticket
from tests.protocol.recorded.record import NOW, main

RELEASES = sorted(path for path in Path(__file__).parent.iterdir() if (path / "records.json").is_file())
MESSAGES: dict[str, type[BaseModel]] = {
    "hello": Hello, "offer": Offer, "reply": OfferReply, "audit-wanted": AuditRequest, "audit-report": AuditRequest,
    "audit": AuditAnswer, "accepted": AcceptedDocument, "ledger-head": SignedHead,
}  # fmt: skip
each_release = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)


def data_of(release: Path, name: str) -> bytes:
    return (release / name).read_bytes().removesuffix(b"\n")


def table(release: Path, name: str) -> dict[str, Any]:
    return json.loads(data_of(release, name))


@cache
def manifest(release: Path) -> Manifest:
    return open_manifest(data_of(release, "manifest-1.json"), now=NOW).manifest


@each_release
def test_its_manifests_are_verified_and_name_the_same_run(release: Path) -> None:
    first, run = manifest(release), table(release, "names.json")["run"]
    second = open_manifest(data_of(release, "manifest-2.json"), now=NOW, run=run, owner=first.owner)
    assert first.run_id == digest_of(first) == run
    check_upgrade(first, second.manifest)
    assert second.to_bytes() == data_of(release, "manifest-2.json")
    assert SignedManifest(manifest=first, signature=second.signature).manifest.epochs < second.manifest.epochs


@each_release
def test_its_records_pass_the_check_of_every_peer(release: Path) -> None:
    check = record_check(manifest(release), lambda: NOW)
    for kind, sent in table(release, "records.json").items():
        sealed = sent["sealed"].encode()
        assert check(sent["key"], sent["owner"], sealed, sent["expires"]) == sent["key"], kind
        assert canonical(read_envelope(sealed)) == canonical(json.loads(sealed)["record"]), kind


@each_release
def test_its_result_has_the_same_name(release: Path) -> None:
    record = read_envelope(table(release, "records.json")["checkpoint"]["sealed"].encode())
    assert isinstance(record, CheckpointRecord)
    assert record.digest == table(release, "names.json")["result"]


@each_release
def test_this_version_writes_the_same_bytes(release: Path, tmp_path: Path) -> None:
    """So a peer of that release reads whatever uses nothing newer. The status, which it reads with gaps, may have more fields."""
    main(tmp_path)
    for name in ("records.json", "messages.json", "manifest-1.json", "manifest-2.json", "mixture.json", "ticket.txt"):
        assert data_of(tmp_path, name) == data_of(release, name), name
    assert covers(table(tmp_path, "status.json"), table(release, "status.json"))


def covers(now: Any, then: Any) -> bool:
    """Whether all that a document said then is in that of now."""
    if isinstance(then, dict):
        return all(name in now and covers(now[name], value) for name, value in then.items())
    if isinstance(then, list):
        return len(now) == len(then) and all(map(covers, now, then))
    return now == then


@each_release
def test_its_messages_are_read_and_written_alike(release: Path) -> None:
    for name, text in table(release, "messages.json").items():
        kind = next(kind for prefix, kind in MESSAGES.items() if name.startswith(prefix))
        assert canonical(kind.model_validate_json(text, strict=True)).decode() == text, name


@each_release
def test_its_signed_messages_hold(release: Path) -> None:
    messages, run = table(release, "messages.json"), manifest(release)
    report = open_request(messages["audit-report"].encode(), peer_id_of(json.loads(messages["audit-report"])["owner"])).report
    assert report is not None
    assert report.losses == (0.5, None, 0.25)
    [(accepted, holders)] = read_accepted(messages["accepted"].encode(), run, NOW)
    assert (accepted.shard, len(holders)) == (1, 1)
    assert SignedHead.model_validate_json(messages["ledger-head"]).holds(run.run_id, run.coordinators)


@each_release
def test_its_ledger_adds_up(release: Path) -> None:
    state = RunState()
    for line in data_of(release, "ledger.jsonl").splitlines():
        state = apply(state, read_event(line))
    assert state.events == len(data_of(release, "ledger.jsonl").splitlines())
    assert (state.accepted, state.terms, state.finished) == (2, (1, 1), True)


@each_release
def test_its_status_mixture_and_ticket_are_read(release: Path) -> None:
    run = manifest(release)
    status = SwarmStatus.model_validate_json(data_of(release, "status.json"))
    assert status.ledger
    assert status.ledger.holds(run.run_id, run.coordinators)
    assert [refusal.check for refusal in status.refusals] == ["transfer", "holdout"]
    mixture = SignedMixture.model_validate_json(data_of(release, "mixture.json"))
    assert signed_document(mixture, run.coordinators, "recorded").digest == digest_of(mixture.mixture)
    assert Ticket.decode(data_of(release, "ticket.txt").decode()).run == run.run_id
