"""Streams whose other end sends the fuzzer's bytes, for the parsers that read from the network."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.fuzz import examples
from benchmarks.fuzz.contract import Target
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BlobClient, BlobServer
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.joining import _introduce
from lutetia.protocol.rpc import checkpoint_offer
from lutetia.protocol.rpc.checkpoint_offer import OFFER, Offer, OfferReply, offer_checkpoint, serve_offers
from lutetia.protocol.rpc.framing import framed, read_framed
from lutetia.protocol.rpc.introduction import MANIFEST, MAX_DOCUMENT_BYTES, ask_document
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.records import RecordLimits, open_record, read_envelope
from lutetia.protocol.transport.base import Handler, RecordCheck, StoredValue, Stream, Transport

LIMITS = RecordLimits(2.0)


class Tape(Stream):
    """A stream that plays `data` and then ends; what is written is kept."""

    def __init__(self, data: bytes) -> None:
        self.peer_id = examples.PEER.peer_id
        self._data, self._place = data, 0
        self.written = bytearray()

    async def read_exactly(self, count: int) -> bytes:
        if self._place + count > len(self._data):
            raise ConnectionError("the stream ended")
        self._place += count
        return self._data[self._place - count : self._place]

    async def write(self, data: bytes | memoryview) -> None:
        self.written += data

    async def close(self) -> None:
        return None


class Player(Transport):
    """A network with one other peer, which plays a tape on every stream."""

    def __init__(self, data: bytes) -> None:
        self.peer_id = examples.COORDINATOR.peer_id
        self._data = data
        self.handlers: dict[str, Handler] = {}

    def now(self) -> float:
        return examples.NOW

    def addresses(self) -> list[str]:
        return []

    async def connections(self) -> dict[str, str]:
        return {}

    async def dial_each(self, addresses: Sequence[str]) -> dict[str, str]:
        return {}

    async def find_double(self, addresses: Sequence[str]) -> str | None:
        return None

    async def enter_dht(self, check: RecordCheck, bootstrap: Sequence[str] = ()) -> None:
        return None

    def favour(self, known: Callable[[str], bool]) -> None:
        return None

    def every(self, period: float, action: Callable[[], Awaitable[None]]) -> None:
        return None

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        return False

    async def get(self, key: str) -> dict[str, StoredValue]:
        return {}

    async def open_stream(self, peer_id: str, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        return Tape(self._data)

    async def serve(self, protocol: str, handler: Handler) -> None:
        self.handlers[protocol] = handler

    def alive(self) -> bool:
        return True

    async def close(self) -> None:
        return None


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return _loop().run_until_complete(work)


@cache
def _store() -> BlobStore:
    store = BlobStore(Path(tempfile.mkdtemp(prefix="lutetia-fuzz-")))
    store.add_bytes(b"some blob" * 100)
    return store


def frames(data: bytes) -> None:
    """Messages of a stream until it ends."""

    async def read() -> None:
        tape = Tape(data)
        while True:
            await read_framed(tape.read_exactly, MAX_DOCUMENT_BYTES)

    run(read())


def introduction(data: bytes) -> None:
    """Hello and manifest of a peer that a new node asks. `_introduce` returns its error."""
    found = run(_introduce(Player(data), examples.PEER.peer_id))
    if isinstance(found, ConnectionError):
        raise found


def document(data: bytes) -> None:
    run(ask_document(Player(data), examples.PEER.peer_id, MANIFEST))


def offered(data: bytes) -> None:
    """An offer as the coordinator reads it; the reply must always be readable."""

    async def answer(peer_id: str, offer: Offer) -> OfferReply:
        sealed = offer.sealed.encode()
        owner = read_envelope(sealed).owner
        open_record(sealed, key=None, subkey=owner, expires=offer.expires, now=examples.NOW, limits=LIMITS)
        return OfferReply(verdict="queued")

    reply = run(checkpoint_offer._answered(answer, examples.PEER.peer_id, data))
    OfferReply.model_validate_json(canonical(reply))


def offer_stream(data: bytes) -> None:
    """The whole stream of an offer, with its frame."""

    async def answer(peer_id: str, offer: Offer) -> OfferReply:
        return OfferReply(verdict="queued")

    async def serve() -> None:
        player = Player(b"")
        await serve_offers(player, answer)
        await player.handlers[OFFER](Tape(data))

    run(serve())


def offer_reply(data: bytes) -> None:
    run(offer_checkpoint(Player(framed(data)), examples.COORDINATOR.peer_id, b"{}", examples.NOW))


def blob_requests(data: bytes) -> None:
    """A client of the blob service."""
    run(BlobServer(_store(), RateLimit(None)).answer(Tape(data)))


def blob_answer(data: bytes) -> None:
    """A provider of blobs."""

    async def ask() -> None:
        client = BlobClient(Tape(data), _store().table(_store().digests()[0]).ref)
        await client.table()
        await client.ask_chunks(0, 1)
        await client.read_into(memoryview(bytearray(900)))

    run(ask())


def _requests() -> list[bytes]:
    digest = bytes.fromhex(_store().digests()[0])
    table, chunk = digest + bytes(8), digest + bytes(4) + b"\0\0\0\1"
    return [table + b"\6", chunk + b"\6", table + b"\6" + chunk + b"\6", bytes(40), digest + b"\xff" * 8]


def _answers() -> list[bytes]:
    table, data = _store().table(_store().digests()[0]).hashes, b"some blob" * 100
    good = b"\0" + len(table).to_bytes(8, "big") + table + b"\0" + len(data).to_bytes(8, "big") + data
    return [good, b"\1" + bytes(8), b"\0" + b"\xff" * 8]


def _offers() -> list[bytes]:
    sealed = examples.sealed(examples.checkpoint()).decode()
    return [canonical(Offer(sealed=sealed, expires=examples.NOW + 5))]


def _replies() -> list[bytes]:
    verdicts = ("queued", "busy", "accepted", "superseded", "invalid", "inconclusive")
    return [canonical(OfferReply(verdict=verdict, text="a word")) for verdict in verdicts]


STREAMS = (
    Target("frames", frames, lambda: [framed(b"one") + framed(b""), framed(bytes(300)), b"\xff\xff\xff\xff"], (ConnectionError,)),
    Target("introduction", introduction, lambda: [framed(canonical(examples.hello())), b"\0\0\0\2{}"], (ConnectionError,)),
    Target("document", document, lambda: [framed(examples.signed_manifest())], (ConnectionError,)),
    Target("offer", offered, _offers),
    Target("offer-stream", offer_stream, lambda: [framed(offer) + b"\6" for offer in _offers()]),
    Target("offer-reply", offer_reply, _replies, (ConnectionError,)),
    Target("blob-requests", blob_requests, _requests, (ConnectionError,)),
    Target("blob-answers", blob_answer, _answers, (ConnectionError,)),
)
