"""The audit stream: a peer without a shard asks the coordinator for an audit, replays it and sends its signed report.

One message and one answer per stream. The peer does not learn which losses the author published: it returns those of its own
replay, and the coordinator compares.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from lutetia.protocol.rpc.request_response import exchange, serve_exchange
from lutetia.protocol.rpc.signed_report import open_reporting_request, signed_bytes
from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import (
    Digest,
    EpochNumber,
    LaneIndex,
    Moment,
    OpenWord,
    PublicKey,
    Seconds,
    Sentence,
    ShardIndex,
    Signature,
    added,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import RecordRefused, TrainedWith
from lutetia.protocol.transport.base import Stream, Transport

AUDIT = "/lutetia/audit/1"
AUDIT_TIMEOUT = 15.0
MAX_STEPS = 1 << 14
_LONGEST_LOSS, _REST_OF_REPORT = 26, 4096
_MAX_MESSAGE_BYTES = _REST_OF_REPORT + MAX_STEPS * _LONGEST_LOSS
_SIGNING_DOMAIN = b"lutetia-audit-1\n"

Loss = Annotated[float, Field(ge=-1e30, le=1e30)] | None
Drift = Annotated[float, Field(ge=0, le=1e39), BeforeValidator(lambda value: min(value, 1e39) if type(value) is float else value)]
"""Whatever lies beyond is equally far off."""


class AuditJob(WireDocument):
    """Which steps of which epoch to replay. With `end_weights` and `end_state` it is the whole epoch, and its end is compared."""

    checkpoint: Digest = Field(description="Digest of the result under audit")
    shard: ShardIndex = Field(description="Index of its shard")
    epoch: EpochNumber = Field(description="Its epoch, 1 for the first")
    epochs: EpochNumber = Field(description="Budget of the shard under which it was trained, in epochs")
    lane: LaneIndex = added(0, "Lane that the author trained, in a run with lanes")
    steps: int = Field(ge=1, le=MAX_STEPS, description="How many steps to replay, from the start of the epoch")
    precision: Literal["float32", "bfloat16"] = Field(description="Precision in which the author trained")
    moments: Literal["float32", "8bit"] = added("float32", "Form in which the author kept AdamW's moments")
    kept_weights: Literal["float32", "bfloat16"] = added("float32", "Form in which the author kept the weights")
    kernels: OpenWord = added("plain", "The author's attention kernel and whether it compiled, as in its record")
    weights: BlobRef | None = Field(default=None, description="Weights of the parent; null for the first epoch")
    state: BlobRef | None = Field(default=None, description="Training state of the parent; null for the first epoch")
    end_weights: BlobRef | None = Field(default=None, description="The author's weights after the whole epoch")
    end_state: BlobRef | None = Field(default=None, description="The author's training state after the whole epoch")
    until: Moment = Field(description="Deadline of the report in Unix seconds")


class AuditReport(WireDocument):
    """What a replay gave."""

    run: Digest = Field(description="Run id")
    owner: PublicKey = Field(description="Public key of the peer that replayed")
    checkpoint: Digest = Field(description="Digest of the result that was replayed")
    losses: tuple[Loss, ...] = Field(max_length=MAX_STEPS, description="Training loss of each replayed step; null: not a number")
    drift: Drift | None = Field(
        default=None, description="Relative distance of the replayed end from the author's; null: not compared"
    )
    made: TrainedWith = Field(description="Device, precision and software of the replay")
    seconds: float = Field(ge=0, le=1e7, description="Duration of the replay in seconds")


class AuditRequest(WireDocument):
    """A peer asks for work, or sends the report of its last audit."""

    owner: PublicKey = Field(description="Public key of the asking peer")
    report: AuditReport | None = Field(default=None, description="The finished audit; null: the peer asks for work")
    signature: Signature | None = Field(default=None, description="Signature of `owner` over the report")


class AuditAnswer(WireDocument):
    """A job, or when to ask again. The answer to a report holds neither."""

    job: AuditJob | None = Field(default=None, description="The audit to carry out; null: there is none")
    retry_after: Seconds = Field(default=0.0, description="Seconds to wait before asking again")
    text: Sentence = Field(default="", description="Reason of a refusal, for people")
    lends_checks: bool = added(False, "Whether this coordinator also lends checks, on /lutetia/check/1")


Answer = Callable[[AuditRequest], Awaitable[AuditAnswer]]
"""May raise RecordRefused."""
Admit = Callable[[Stream], AuditAnswer | None]
"""The answer to a peer that must ask later, given before its request is parsed; None lets it in."""


def sign_report(report: AuditReport, identity: Identity) -> AuditRequest:
    """The request that carries `report`, signed."""
    return AuditRequest(owner=identity.public_key, report=report, signature=identity.sign(signed_bytes(_SIGNING_DOMAIN, report)))


def open_request(data: bytes, peer_id: str) -> AuditRequest:
    """Parse a request from `peer_id`. Raises RecordRefused like `open_reporting_request`."""
    return open_reporting_request(data, peer_id, AuditRequest, _SIGNING_DOMAIN, "an audit")


async def ask_audit(transport: Transport, peer_id: str, request: AuditRequest, addresses: Sequence[str] = ()) -> AuditAnswer:
    """Ask coordinator `peer_id` for work, or send it a report. Raises ConnectionError: away, too slow, or no valid answer."""
    return await exchange(
        transport, peer_id, AUDIT, request, AuditAnswer, addresses=addresses, limit=_MAX_MESSAGE_BYTES, seconds=AUDIT_TIMEOUT
    )


async def serve_audits(transport: Transport, answer: Answer, admit: Admit = lambda stream: None, steps: int = MAX_STEPS) -> None:
    """Answer requests. One that is too large, too slow or malformed ends only its own stream.

    Args:
        transport: Where to serve.
        answer: Answers a request that passed all checks of its form.
        admit: Asked first; its answer, if any, ends the exchange.
        steps: Steps of the longest report that is asked for, which bounds the bytes read.
    """

    async def reply(stream: Stream, data: bytes) -> AuditAnswer:
        try:
            return admit(stream) or await answer(open_request(data, stream.peer_id))
        except RecordRefused as error:
            return AuditAnswer(retry_after=3600.0, text=str(error))

    limit = _REST_OF_REPORT + min(steps, MAX_STEPS) * _LONGEST_LOSS
    await serve_exchange(transport, AUDIT, reply, limit=limit, seconds=AUDIT_TIMEOUT)
