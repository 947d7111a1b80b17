"""The audit stream: requests and reports arrive, forged, foreign or oversized ones are refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from lutetia.protocol.rpc.audit_request import (
    AUDIT,
    AuditAnswer,
    AuditReport,
    AuditRequest,
    ask_audit,
    open_request,
    serve_audits,
    sign_report,
)
from lutetia.protocol.rpc.framing import read_message, write_message
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import RecordRefused, TrainedWith
from lutetia.protocol.transport.base import Stream
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual

ANN, BOB = Identity.derived("ann"), Identity.derived("bob")


def report(owner: Identity = ANN, **changes) -> AuditReport:
    fields = {
        "run": "0" * 64, "owner": owner.public_key, "checkpoint": "1" * 64, "losses": (0.5, None), "made": TrainedWith(),
        "seconds": 1.0,
    }  # fmt: skip
    return AuditReport(**{**fields, **changes})


def test_a_signed_report_is_opened_and_everything_else_refused():
    good = sign_report(report(), ANN)
    assert open_request(canonical(good), ANN.peer_id) == good
    bare = AuditRequest(owner=ANN.public_key)
    assert open_request(canonical(bare), ANN.peer_id).report is None
    for request, peer, words in (
        (good, BOB.peer_id, "its own connection"),
        (good.model_copy(update={"signature": "0" * 128}), ANN.peer_id, "not signed"),
        (good.model_copy(update={"signature": None}), ANN.peer_id, "not signed"),
        (good.model_copy(update={"report": report(seconds=2.0)}), ANN.peer_id, "not signed"),
        (sign_report(report(BOB), ANN), ANN.peer_id, "not signed"),
    ):
        with pytest.raises(RecordRefused, match=words):
            open_request(canonical(request), peer)
    for junk in (b"", b"[]", b"\xff\xff", b'{"owner":1}', b'{"owner":"' + b"0" * 64 + b'","more":[[[[[1]]]]]}', b"[" * 100_000):
        with pytest.raises(RecordRefused, match="malformed"):
            open_request(junk, ANN.peer_id)
    endless = canonical(good).replace(b"0.5,null", b"0.5," * 20_000 + b"null")
    with pytest.raises(RecordRefused, match="malformed"):
        open_request(endless, ANN.peer_id)


def simulated(scenario: Callable[[MemoryTransport, MemoryTransport], Awaitable[None]]) -> Callable[[], None]:
    """Ann asks, Bob is the coordinator."""

    def run() -> None:
        async def main() -> None:
            network = MemoryNetwork(seed=1)
            ann, bob = (network.peer(identity, lambda key, subkey, value, expires: key or "") for identity in (ANN, BOB))
            await scenario(ann, bob)

        run_virtual(main)

    run.__name__ = scenario.__name__
    run.__doc__ = scenario.__doc__
    return run


@simulated
async def test_requests_arrive_and_refusals_are_answered(ann: MemoryTransport, bob: MemoryTransport) -> None:
    heard: list[AuditRequest] = []

    async def answer(request: AuditRequest) -> AuditAnswer:
        heard.append(request)
        if request.report:
            raise RecordRefused("no audit of that result was lent to this peer")
        return AuditAnswer(retry_after=7.0)

    await serve_audits(bob, answer)
    assert (await ask_audit(ann, bob.peer_id, AuditRequest(owner=ANN.public_key))).retry_after == 7.0
    refused = await ask_audit(ann, bob.peer_id, sign_report(report(), ANN))
    assert "not lent" not in refused.text
    assert "was lent" in refused.text
    stolen = await ask_audit(ann, bob.peer_id, AuditRequest(owner=BOB.public_key))
    assert "own connection" in stolen.text
    assert len(heard) == 2, "a refused request is not processed"


@simulated
async def test_an_oversized_or_silent_request_ends_its_own_stream(ann: MemoryTransport, bob: MemoryTransport) -> None:
    async def answer(request: AuditRequest) -> AuditAnswer:
        return AuditAnswer(retry_after=7.0)

    await serve_audits(bob, answer)
    for message in (b"x" * ((1 << 20) + 1), None):
        stream = await ann.open_stream(bob.peer_id, AUDIT)
        if message is not None:
            await write_message(stream, message)
        with pytest.raises(ConnectionError):
            await read_message(stream, 1 << 20)
    assert (await ask_audit(ann, bob.peer_id, AuditRequest(owner=ANN.public_key))).retry_after == 7.0


@simulated
async def test_an_invalid_or_missing_answer_is_a_connection_error(ann: MemoryTransport, bob: MemoryTransport) -> None:
    async def nonsense(stream: Stream) -> None:
        await read_message(stream, 1 << 20)
        await write_message(stream, b"{}{}")
        await stream.read_exactly(1)

    async def silence(stream: Stream) -> None:
        await stream.read_exactly(1 << 20)

    for handler in (nonsense, silence):
        await bob.serve(AUDIT, handler)
        with pytest.raises(ConnectionError):
            await ask_audit(ann, bob.peer_id, AuditRequest(owner=ANN.public_key))
