"""The audit stream: a peer without a shard asks the coordinator for an audit, replays it, and hands its signed report in.

One message and one answer per stream. The peer is not told what the author published: it returns the losses that it found, and
the coordinator compares.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from lutetia.protocol.rpc.request_response import exchange, serve_exchange
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.identity import Identity, peer_id_of, verify
from lutetia.protocol.schema.manifest import BlobRef, Digest, PublicKey, Signature, first_problem
from lutetia.protocol.schema.records import RecordRefused, TrainedWith
from lutetia.protocol.transport.base import Stream, Transport

AUDIT = "/lutetia/audit/1"
AUDIT_TIMEOUT = 15.0
MAX_STEPS = 1 << 14
_LONGEST_LOSS, _REST_OF_REPORT = 26, 4096
_MAX_MESSAGE_BYTES = _REST_OF_REPORT + MAX_STEPS * _LONGEST_LOSS
_SIGNING_DOMAIN = b"lutetia-audit-1\n"

Loss = Annotated[float, Field(ge=-1e30, le=1e30)] | None


class AuditJob(Frozen):
    """Replay the first `steps` steps of `epoch` of `shard` under a budget of `epochs`, on top of the parent's blobs, by `until`.

    `weights` and `state` are the parent's (None where the epoch is the first). With `end_weights` and `end_state` the whole epoch
    is replayed, and its end compared with them.
    """

    checkpoint: Digest
    shard: int = Field(ge=0)
    epoch: int = Field(ge=1)
    epochs: int = Field(ge=1)
    steps: int = Field(ge=1, le=MAX_STEPS)
    precision: Literal["float32", "bfloat16"]
    weights: BlobRef | None = None
    state: BlobRef | None = None
    end_weights: BlobRef | None = None
    end_state: BlobRef | None = None
    until: float


class AuditReport(Frozen):
    """What a replay of `checkpoint` gave: its losses (None: not a number), its distance from the author's end, and with what."""

    run: Digest
    owner: PublicKey
    checkpoint: Digest
    losses: tuple[Loss, ...] = Field(max_length=MAX_STEPS)
    drift: float | None = Field(default=None, ge=0)
    made: TrainedWith
    seconds: float = Field(ge=0, le=1e7)


class AuditRequest(Frozen):
    """`owner` wants work, or hands in a `report` with its signature."""

    owner: PublicKey
    report: AuditReport | None = None
    signature: Signature | None = None


class AuditAnswer(Frozen):
    """A job; or none, and when to ask again. A report is answered with neither."""

    job: AuditJob | None = None
    retry_after: float = Field(default=0.0, ge=0)
    text: str = Field(default="", max_length=500)


Answer = Callable[[AuditRequest], Awaitable[AuditAnswer]]
"""May raise RecordRefused."""
Admit = Callable[[Stream], AuditAnswer | None]
"""The answer to whoever must come later, before his request is even parsed."""


def _signed_bytes(report: AuditReport) -> bytes:
    return _SIGNING_DOMAIN + canonical(report)


def sign_report(report: AuditReport, identity: Identity) -> AuditRequest:
    """The request that hands `report` in."""
    return AuditRequest(owner=identity.public_key, report=report, signature=identity.sign(_signed_bytes(report)))


def open_request(data: bytes, peer_id: str) -> AuditRequest:
    """Raises RecordRefused: malformed, asked over another peer's connection, or a report that its owner did not sign."""
    try:
        request = AuditRequest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise RecordRefused(f"the request for an audit is malformed: {first_problem(error)}") from error
    if peer_id_of(request.owner) != peer_id:
        raise RecordRefused("audits are asked for and reported by their owner, over its own connection")
    report, signature = request.report, request.signature
    if report and (report.owner != request.owner or not signature or not verify(request.owner, _signed_bytes(report), signature)):
        raise RecordRefused("the report of an audit is not signed by who hands it in")
    return request


async def ask_audit(transport: Transport, peer_id: str, request: AuditRequest, addresses: Sequence[str] = ()) -> AuditAnswer:
    """Ask coordinator `peer_id` for work, or hand a report in. Raises ConnectionError when it is away or answers nonsense."""
    return await exchange(
        transport, peer_id, AUDIT, request, AuditAnswer, addresses=addresses, limit=_MAX_MESSAGE_BYTES, seconds=AUDIT_TIMEOUT
    )


async def serve_audits(transport: Transport, answer: Answer, admit: Admit = lambda stream: None, steps: int = MAX_STEPS) -> None:
    """Answer requests; one that is too large, too slow or malformed ends its own stream only.

    `admit` is asked first. `steps`: of the longest report that anybody is asked for, which bounds what is read.
    """

    async def reply(stream: Stream, data: bytes) -> AuditAnswer:
        try:
            return admit(stream) or await answer(open_request(data, stream.peer_id))
        except RecordRefused as error:
            return AuditAnswer(retry_after=3600.0, text=str(error)[:500])

    limit = _REST_OF_REPORT + min(steps, MAX_STEPS) * _LONGEST_LOSS
    await serve_exchange(transport, AUDIT, reply, limit=limit, seconds=AUDIT_TIMEOUT)
