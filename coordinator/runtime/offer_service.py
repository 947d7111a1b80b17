"""Answers the offer stream: hands results of peers to the judge."""

from __future__ import annotations

from dataclasses import dataclass

from lutetia.coordinator.acceptance.messages import Offered
from lutetia.coordinator.acceptance.rate_limits import Admission
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.protocol.rpc.checkpoint_offer import Offer, OfferReply, serve_offers
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.records import CheckpointRecord, RecordLimits, RecordRefused, open_record, read_envelope
from lutetia.protocol.transport.base import Stream, Transport


@dataclass
class OfferService:
    """`admission` bounds how often one address offers, and how many of its results may be undecided."""

    transport: Transport
    judge_loop: JudgeLoop
    admission: Admission

    async def serve(self) -> None:
        await serve_offers(self.transport, self._answer, self._admit)

    async def offer_found(self, record: CheckpointRecord) -> None:
        """Offer a result that was found in the DHT."""
        await self.judge_loop.submit(Offered(record, self.transport.now(), "poll"))

    def _admit(self, stream: Stream) -> OfferReply | None:
        shards = self.judge_loop.state.run.shards.values()
        undecided = {candidate.record.peer_id for shard in shards for candidate in shard.candidates.values()}
        return self.admission.refusal(stream.peer_id, stream.origin, undecided, self.transport.now())

    async def _answer(self, peer_id: str, offer: Offer) -> OfferReply:
        """Only its owner may offer a result, so that no peer uses up another peer's offers. Raises RecordRefused."""
        data, now = offer.sealed.encode(), self.transport.now()
        owner, timing = read_envelope(data).owner, self.judge_loop.rules.manifest.timing
        limits = RecordLimits(timing.heartbeat, timing.maximum_clock_skew)
        record = open_record(data, key=None, subkey=owner, expires=offer.expires, now=now, limits=limits)
        if not isinstance(record, CheckpointRecord):
            raise RecordRefused(f"a {record.kind} record is no result")
        if peer_id_of(owner) != peer_id:
            raise RecordRefused("only its owner may offer a result, over its own connection")
        reply = await self.judge_loop.submit(Offered(record, now))
        assert isinstance(reply, OfferReply)
        return reply
