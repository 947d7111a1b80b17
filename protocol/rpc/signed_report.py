"""Requests of a peer that may carry a signed report: how both streams that lend work open them."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from lutetia.protocol.schema.canonical import WireDocument, canonical, read_json
from lutetia.protocol.schema.fields import PublicKey, Signature
from lutetia.protocol.schema.identity import peer_id_of, verify
from lutetia.protocol.schema.problems import describe_problem
from lutetia.protocol.schema.records import RecordRefused


class OwnedReport(Protocol):
    """What a peer found."""

    @property
    def owner(self) -> PublicKey: ...


class ReportingRequest(Protocol):
    """A peer asks for work, or sends what it found."""

    @property
    def owner(self) -> PublicKey: ...

    @property
    def report(self) -> OwnedReport | None: ...

    @property
    def signature(self) -> Signature | None: ...

    @classmethod
    def model_validate_json(cls, json_data: bytes, *, strict: bool) -> ReportingRequest: ...


Request = TypeVar("Request", bound=ReportingRequest)


def signed_bytes(domain: bytes, report: WireDocument | dict[str, Any]) -> bytes:
    """What a report's signature covers: `report` as its sender wrote it, with fields of later versions."""
    return domain + canonical(report)


def open_reporting_request(data: bytes, peer_id: str, kind: type[Request], domain: bytes, what: str) -> Request:
    """Parse a request from `peer_id`.

    Args:
        data: its bytes.
        peer_id: the peer at the other end of the stream.
        kind: the type of the request.
        domain: what the signatures of its reports begin with.
        what: the work in words, such as "an audit".

    Raises RecordRefused: it is malformed, its owner is another peer, or its owner did not sign the report.
    """
    try:
        sent = read_json(data)
        request = kind.model_validate_json(canonical(sent), strict=True)
    except ValidationError as error:
        raise RecordRefused(f"the request for {what} is malformed: {describe_problem(error)}") from error
    if peer_id_of(request.owner) != peer_id:
        raise RecordRefused(f"the owner of a request for {what} must send it over its own connection")
    report, signature = request.report, request.signature
    signed = report and signature and verify(request.owner, signed_bytes(domain, sent["report"]), signature)
    if report and (report.owner != request.owner or not signed):
        raise RecordRefused(f"the report of {what} is not signed by the peer that sends it")
    return request
