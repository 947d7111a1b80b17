"""The check stream: a peer without a shard asks the coordinator for a check, carries it out and sends its signed report.

One message and one answer per stream, as for audits. A coordinator that lends no checks does not serve it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from lutetia.protocol.rpc.audit_request import MAX_STEPS, AuditJob, Drift, Loss
from lutetia.protocol.rpc.request_response import exchange, serve_exchange
from lutetia.protocol.rpc.signed_report import open_reporting_request, signed_bytes
from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import (
    MOST_LANES,
    MOST_SHARDS,
    Digest,
    LaneIndex,
    Moment,
    OpenWord,
    Positive,
    PublicKey,
    Seconds,
    Sentence,
    ShardIndex,
    Share,
    Signature,
    added,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.training_spec import MixtureMode
from lutetia.protocol.schema.records import RecordRefused, TrainedWith
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.protocol.transport.base import Stream, Transport

CHECK = "/lutetia/check/1"
CHECK_TIMEOUT = 30.0
MOST_ROWS = 4096
KINDS: tuple[str, ...] = ("result", "replay", "router", "router-report", "mixture", "gallery")
"""The kinds of check that this version of a node carries out."""
OF_ALL_SHARDS = frozenset({"mixture", "gallery"})
"""Those that run the experts of all shards."""
_LONGEST_NUMBER, _REST_OF_REPORT = 26, 16384
MAX_REPORT_BYTES = _REST_OF_REPORT + _LONGEST_NUMBER * (3 * MOST_ROWS + MAX_STEPS)
_MAX_ANSWER_BYTES = 65536
_MAX_REQUEST_BYTES = MAX_REPORT_BYTES + 8 * MOST_SHARDS
_SIGNING_DOMAIN = b"lutetia-check-1\n"

Rows = Annotated[tuple[Loss, ...], Field(max_length=MOST_ROWS)]


class ResultCheck(WireDocument):
    """Inspect the files of a result, then score it, its raw parameters and its parent on the same held-out rows."""

    weights: BlobRef = Field(description="Weights of the result")
    state: BlobRef = Field(description="Its training state")
    trace: BlobRef = Field(description="Its trace")
    parent: BlobRef | None = Field(default=None, description="Weights of the accepted parent; null: the shard's initial model")
    holdout: BlobRef = Field(description="The held-out clips to score on, which only borrowers of a check can fetch")
    draw: Digest = Field(description="Fixes noise and times of the rows, and their order")
    rows: int = Field(ge=1, le=MOST_ROWS, description="How many rows to score at most, the first ones of the drawn order")
    fewest: int = Field(ge=1, le=MOST_ROWS, description="How many rows to score however long they take")
    seconds: Seconds = Field(description="Time that further rows may take")
    lanes: Annotated[tuple[LaneIndex, ...], Field(max_length=MOST_LANES)] = added(
        (), "Lane that trained it, or the lanes that were merged into it; empty: lane 0"
    )


class ReplayCheck(WireDocument):
    """Replay an epoch; where the distance of its end lies between `near` and `far`, measure the epoch's own noise, too."""

    audit: AuditJob = Field(description="What to replay")
    near: Drift = Field(description="Distance up to which no noise is measured")
    far: Drift = Field(description="Distance beyond which no noise is measured")
    coarse: bool = Field(description="Measure it in the other precision, not with micro-batches of one")


class LentMixture(WireDocument):
    """The parts of a mixture that its loss depends on."""

    weights: dict[ShardIndex, BlobRef] = Field(min_length=1, max_length=MOST_SHARDS, description="Accepted weights by shard")
    mode: MixtureMode | None = Field(default=None, description="How it routes; null: as the manifest says, or is to be chosen")
    temperature: Positive = Field(default=1.0, description="By which the router's logits are divided")


class MixtureCheck(WireDocument):
    """Score a mixture on held-out clips, and the current one on the same rows."""

    new: LentMixture = Field(description="The mixture that is about to be made")
    current: LentMixture | None = Field(default=None, description="The current one; null: there is none to compare with")
    router: BlobRef | None = Field(default=None, description="The run's router; null: it has one shard")
    holdout: tuple[BlobRef, ...] = Field(max_length=MOST_SHARDS, description="Held-out clips of every shard, in order")
    draw: Digest = Field(description="Fixes rows, noise and times")
    seconds: Seconds = Field(description="Time that rows beyond the fewest may take")
    choose: bool = Field(description="Choose mode and temperature by what is measured")


class GalleryCheck(WireDocument):
    """Sample the manifest's prompts from a mixture."""

    mixture: BlobRef = Field(description="Its signed description, which only the borrower can fetch; its files are served to all")
    real: bool = Field(default=False, description="Add the training clip that fits each prompt best")


class CheckJob(WireDocument):
    """One check. The field that its kind needs is set."""

    id: Digest = Field(description="Names this loan; every borrower of a check gets another")
    kind: OpenWord = Field(description="result, replay, router, router-report, mixture or gallery")
    shard: ShardIndex = Field(description="Index of the shard; 0 for what is of all shards")
    epoch: int = Field(default=0, ge=0, le=10**9, description="Epoch of the result; 0 for what is of all shards")
    result: ResultCheck | None = Field(default=None, description="For the kind result")
    replay: ReplayCheck | None = Field(default=None, description="For the kind replay")
    router: BlobRef | None = Field(default=None, description="For the kind router-report: the weights to report on")
    mixture: MixtureCheck | None = added(None, "For the kind mixture")
    gallery: GalleryCheck | None = added(None, "For the kind gallery")
    until: Moment = Field(description="Until when it is lent, in Unix seconds; asking again prolongs it")


class CheckReport(WireDocument):
    """What a check found. `refused`: the result fails `check`. `failed`: the check could not be carried out."""

    run: Digest = Field(description="Run id")
    owner: PublicKey = Field(description="Public key of the peer that checked")
    id: Digest = Field(description="Id of the job")
    outcome: Literal["done", "refused", "failed"] = Field(description="How it ended")
    check: CheckName | None = Field(default=None, description="The check that the result's files fail")
    text: Sentence = Field(default="", description="Why, in words")
    parent: Rows = Field(
        default=(), description="Held-out losses of the parent, or of the current mixture, row by row; null: not a number"
    )
    averages: Rows = Field(default=(), description="Held-out losses of the result's published averages, or of the new mixture")
    raw: Rows = Field(default=(), description="Held-out losses of its raw parameters")
    losses: tuple[Loss, ...] = Field(default=(), max_length=MAX_STEPS, description="Training loss of each replayed step")
    drift: Drift | None = Field(default=None, description="Distance of the replayed end from the author's")
    noise: Drift | None = Field(default=None, description="Distance between two replays of the epoch")
    farthest: OpenWord | None = Field(default=None, description="The part of the end that `drift` was measured on")
    made: TrainedWith | None = Field(default=None, description="Device, precision and software of the replay")
    router: BlobRef | None = Field(default=None, description="The router that was trained")
    accuracy: Share | None = Field(default=None, description="The router's accuracy on noisy clips that it was not trained on")
    accuracy_by_time: tuple[Share, ...] = Field(default=(), max_length=64, description="The same in equal bins of the time t")
    calibration_error: Share | None = Field(default=None, description="Its expected calibration error")
    mode: MixtureMode | None = added(None, "The way of routing that was chosen for the new mixture")
    temperature: Positive | None = added(None, "The temperature of the router's logits in that way")
    pictures: BlobRef | None = added(None, "The sampled clips, a safetensors file")
    seconds: float = Field(ge=0, le=1e7, description="Duration of the check in seconds")


class CheckRequest(WireDocument):
    """A peer asks for a check, or sends the report of its last one."""

    owner: PublicKey = Field(description="Public key of the asking peer")
    kinds: tuple[OpenWord, ...] = Field(default=(), max_length=32, description="The kinds of check that it can carry out")
    shards: tuple[ShardIndex, ...] = Field(
        default=(), max_length=MOST_SHARDS, description="Shards whose experts its device can run"
    )
    report: CheckReport | None = Field(default=None, description="The finished check; null: the peer asks for one")
    signature: Signature | None = Field(default=None, description="Signature of `owner` over the report")


class CheckAnswer(WireDocument):
    """A job, or when to ask again. The answer to a report holds neither."""

    job: CheckJob | None = Field(default=None, description="The check to carry out; null: there is none")
    retry_after: Seconds = Field(default=0.0, description="Seconds to wait before asking again")
    text: Sentence = Field(default="", description="Reason of a refusal, for people")


CheckReply = Callable[[CheckRequest, str], Awaitable[CheckAnswer]]
"""Answers a request from a network origin. May raise RecordRefused."""
AdmitCheck = Callable[[Stream], CheckAnswer | None]
"""The answer to a peer that must ask later, given before its request is parsed; None lets it in."""


def sign_check_report(report: CheckReport, identity: Identity) -> CheckRequest:
    """The request that carries `report`, signed."""
    return CheckRequest(owner=identity.public_key, report=report, signature=identity.sign(signed_bytes(_SIGNING_DOMAIN, report)))


def open_check_request(data: bytes, peer_id: str) -> CheckRequest:
    """Parse a request from `peer_id`. Raises RecordRefused like `open_reporting_request`."""
    return open_reporting_request(data, peer_id, CheckRequest, _SIGNING_DOMAIN, "a check")


async def ask_check(transport: Transport, peer_id: str, request: CheckRequest, addresses: Sequence[str] = ()) -> CheckAnswer:
    """Ask coordinator `peer_id` for a check, or send it a report. Raises ConnectionError: away, too slow, or no valid answer."""
    return await exchange(
        transport, peer_id, CHECK, request, CheckAnswer, addresses=addresses, limit=_MAX_ANSWER_BYTES, seconds=CHECK_TIMEOUT
    )


async def serve_checks(transport: Transport, answer: CheckReply, admit: AdmitCheck = lambda stream: None) -> None:
    """Answer requests. One that is too large, too slow or malformed ends only its own stream."""

    async def reply(stream: Stream, data: bytes) -> CheckAnswer:
        try:
            return admit(stream) or await answer(open_check_request(data, stream.peer_id), stream.origin)
        except RecordRefused as error:
            return CheckAnswer(retry_after=3600.0, text=str(error))

    await serve_exchange(transport, CHECK, reply, limit=_MAX_REQUEST_BYTES, seconds=CHECK_TIMEOUT)
