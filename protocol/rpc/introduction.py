"""Documents over streams, bounded in size and time; among them the introduction that a newcomer asks every peer for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from pydantic import Field, ValidationError

from lutetia.protocol.rpc.framing import read_message, write_message
from lutetia.protocol.schema.canonical import WireDocument, canonical
from lutetia.protocol.schema.capabilities import CAPABILITIES, AnnouncedCapabilities
from lutetia.protocol.schema.fields import Count, Digest, Moment, Word, added
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.transport.base import Stream, Transport

HELLO = "/lutetia/hello/2"
HELLO_1 = "/lutetia/hello/1"
"""The introduction of release 0.1, which refuses every field that it does not know. Served and understood until 0.3."""
MANIFEST = "/lutetia/manifest/1"
STATUS = "/lutetia/status/1"
MIXTURE = "/lutetia/mixture/1"
"""The signed description of the current mixture (`mixture.json`), empty before the first. Its files are served as blobs."""
MIXTURE_BY_DIGEST = "/lutetia/mixture/2"
"""The signed description of the mixture that the request names by its digest or at least 12 first letters; empty: unknown."""
PROTOCOL_VERSION = 2
OLDEST_PROTOCOL = 1
"""Peers of this version and of all between are understood."""
ProtocolNumber = Annotated[int, Field(ge=0, le=1_000_000)]

MAX_DOCUMENT_BYTES = 4 << 20
MAX_HELLO_BYTES = 4096
MAX_NAME_BYTES = 64
SERVE_TIMEOUT = 30.0
ACK = b"\x06"


class Hello(WireDocument):
    """The introduction of a peer."""

    run: Digest = Field(description="Run id")
    protocol: ProtocolNumber = Field(description="Version of the protocol between peers")
    software: Word = Field(description="Version of Lutetia that the peer runs")
    clock: Moment = Field(description="The peer's clock at the moment of the answer, in Unix seconds")
    manifest_version: Count = Field(description="Version of the manifest that the peer serves")
    oldest: ProtocolNumber | None = added(None, "Oldest version of the protocol that the peer understands; null: only its own")
    capabilities: AnnouncedCapabilities = added((), "Words for what the peer can do; unknown ones are passed over")

    @property
    def understood(self) -> bool:
        """Whether this version and the peer's understand each other."""
        return self.protocol >= OLDEST_PROTOCOL and (self.oldest or self.protocol) <= PROTOCOL_VERSION


@dataclass(frozen=True)
class HelloAnswer:
    """An introduction, and when it was asked for and received: Unix seconds of this peer's clock."""

    hello: Hello
    sent: float
    received: float


def software_version() -> str:
    """The version of the installed package, for instance 0.1.0."""
    try:
        return version("lutetia")
    except PackageNotFoundError:
        return "unknown"


async def serve_document(transport: Transport, protocol: str, produce: Callable[[], bytes]) -> None:
    """Answer every stream of `protocol` with what `produce()` returns at that moment: length, bytes, then wait for the ACK."""

    async def answer(stream: Stream) -> None:
        async with asyncio.timeout(SERVE_TIMEOUT):
            await write_message(stream, produce())
            await stream.read_exactly(1)  # closing before all of it has arrived could cut it short

    await transport.serve(protocol, answer)


async def serve_named_document(transport: Transport, protocol: str, produce: Callable[[str], bytes]) -> None:
    """Like `serve_document`, of what the other side names in its request: a message of at most 64 bytes of ASCII."""

    async def answer(stream: Stream) -> None:
        async with asyncio.timeout(SERVE_TIMEOUT):
            name = (await read_message(stream, MAX_NAME_BYTES)).decode("ascii", "replace")
            await write_message(stream, await asyncio.to_thread(produce, name))
            await stream.read_exactly(1)

    await transport.serve(protocol, answer)


async def ask_document(
    transport: Transport,
    peer_id: str,
    protocol: str,
    addresses: Sequence[str] = (),
    limit_bytes: int = MAX_DOCUMENT_BYTES,
    timeout: float = 10.0,  # noqa: ASYNC109 - the caller wants a ConnectionError, not a TimeoutError
) -> bytes:
    """Fetch what `peer_id` serves under `protocol`.

    Args:
        transport: How to reach it.
        peer_id: The peer to ask.
        protocol: Name of the document's stream.
        addresses: Where to dial the peer if it is not connected.
        limit_bytes: Longest document that is accepted.
        timeout: Seconds for the whole exchange.

    Raises ConnectionError: away, too slow, or too large.
    """
    try:
        async with asyncio.timeout(timeout):
            stream = await transport.open_stream(peer_id, protocol, addresses)
            try:
                data = await read_message(stream, limit_bytes)
                await stream.write(ACK)
                return data
            finally:
                await stream.close()
    except TimeoutError as error:
        raise ConnectionError(f"peer {peer_id} did not answer {protocol} within {timeout:.0f} s") from error


async def ask_hello(transport: Transport, peer_id: str, addresses: Sequence[str] = ()) -> HelloAnswer:
    """The introduction of a peer of this version or of the one before. Raises ConnectionError."""
    try:
        return await _hello(transport, peer_id, HELLO, addresses)
    except ConnectionError as error:
        if isinstance(error.__cause__, TimeoutError | ValidationError):
            raise  # it is too slow or says nonsense: it is not too old
        return await _hello(transport, peer_id, HELLO_1, addresses)


async def _hello(transport: Transport, peer_id: str, protocol: str, addresses: Sequence[str]) -> HelloAnswer:
    sent = transport.now()
    data = await ask_document(transport, peer_id, protocol, addresses, limit_bytes=MAX_HELLO_BYTES)
    try:
        return HelloAnswer(Hello.model_validate_json(data), sent, transport.now())
    except ValidationError as error:
        raise ConnectionError(f"peer {peer_id} introduces itself in another protocol than {OLDEST_PROTOCOL} or later") from error


async def serve_introduction(transport: Transport, manifest: Callable[[], SignedManifest]) -> None:
    """Answer HELLO, HELLO_1 and MANIFEST, so that newcomers of this version and of the one before can join through this peer."""

    def hello_1() -> Hello:
        current = manifest().manifest
        return Hello(
            run=current.run_id, protocol=1, software=software_version(), clock=transport.now(), manifest_version=current.version
        )

    def hello() -> Hello:
        later = {"protocol": PROTOCOL_VERSION, "oldest": OLDEST_PROTOCOL, "capabilities": CAPABILITIES}
        return hello_1().model_copy(update=later)

    await serve_document(transport, HELLO, lambda: canonical(hello()))
    await serve_document(transport, HELLO_1, lambda: canonical(hello_1()))
    await serve_document(transport, MANIFEST, lambda: manifest().to_bytes())
