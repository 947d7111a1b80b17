"""Hands results of peers to the judge: those that are offered by stream, and those that were read from the DHT."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.intake.fetch_queue import is_known
from lutetia.coordinator.acceptance.intake.rate_limits import Admission, OwnerDials, may_become_candidate
from lutetia.coordinator.acceptance.messages import Offered
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.protocol.blobs.stream import BLOB
from lutetia.protocol.rpc.checkpoint_offer import Offer, OfferReply, serve_offers
from lutetia.protocol.schema.identity import peer_id_of, public_key_of
from lutetia.protocol.schema.records import CheckpointRecord, RecordLimits, RecordRefused, open_record, read_envelope
from lutetia.protocol.transport.base import Stream, Transport

DIAL_SECONDS = 5.0
"""Seconds in which the owner of a result that was read from the DHT must answer."""


@dataclass
class OfferService:
    """`admission` bounds how often one address offers, and how many of its results may be undecided."""

    transport: Transport
    judge_loop: JudgeLoop
    admission: Admission
    dials: OwnerDials = field(default_factory=OwnerDials)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self) -> None:
        await serve_offers(self.transport, self._answer, self._admit)

    async def offer_found(self, record: CheckpointRecord) -> None:
        """Offer a result that was found in the DHT, once its owner has answered, unless its accepted work speaks for it."""
        run = self.judge_loop.state.run
        if not may_become_candidate(run, record):
            return
        if is_known(run, record.owner):
            await self.judge_loop.submit(Offered(record, self.transport.now(), "poll"))
            return
        self.dials.add(record)
        self._news.set()

    async def dial_owners(self) -> None:
        """Dial the owners of found results until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._news.clear()
                for record in self.dials.start(self.transport.now()):
                    group.create_task(self._dial(record))
                await self._news.wait()

    async def _dial(self, record: CheckpointRecord) -> None:
        answered = False
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(DIAL_SECONDS):
                await (await self.transport.open_stream(record.peer_id, BLOB, record.addresses)).close()
                answered = True
        self.dials.ended(record, answered, self.transport.now())
        self._news.set()
        if answered:
            await self.judge_loop.submit(Offered(record, self.transport.now(), "poll"))

    def _admit(self, stream: Stream) -> OfferReply | None:
        orders = self.judge_loop.rules.manifest.orders
        if orders.bans(stream.peer_id):
            return OfferReply(verdict="invalid", check="quarantine", text=orders.refusal_of(public_key_of(stream.peer_id) or ""))
        shards = self.judge_loop.state.run.shards.values()
        undecided = [candidate.record.peer_id for shard in shards for candidate in shard.candidates.values()]
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
        reply = await self.judge_loop.submit(Offered(record, now, origin=self.admission.origin(peer_id)))
        assert isinstance(reply, OfferReply)
        return reply
