"""Speaking with p2pd over its control socket: connect, open streams, take inbound streams.

p2pd (hivemind's go-libp2p daemon) dials, encrypts and multiplexes. Every request and every stream is one Unix-socket connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .handlers import HandlerTasks
from .transport import Handler, Stream
from .transport_hivemind_library import Multiaddr, PeerID, messages

DIAL_TIMEOUT = 8.0
CONTROL_TIMEOUT = 10.0
READ_LIMIT = 4 << 20
LINGER = 30.0


class DaemonStream(Stream):
    """A libp2p stream as p2pd passes it on."""

    def __init__(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peer_id = peer_id
        self._reader, self._writer = reader, writer

    async def read_exactly(self, count: int) -> bytes:
        try:
            return await self._reader.readexactly(count)
        except asyncio.IncompleteReadError as error:
            early = count - len(error.partial)
            raise ConnectionError(f"the stream of {self.peer_id} ended {early} bytes early") from error

    async def write(self, data: bytes | memoryview) -> None:
        if self._writer.is_closing():
            raise ConnectionError(f"the stream to {self.peer_id} is closed")
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        """What was written still goes out, for at most LINGER seconds."""
        if not self._writer.is_closing() and self._writer.transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(LINGER, self._writer.transport.abort)
        self._writer.close()


class Control:
    """A client of the p2pd whose sockets lie in `folder` (no trailing slash)."""

    def __init__(self, folder: str, peer_id: str) -> None:
        self.peer_id = peer_id
        self._folder = folder
        self._handlers: dict[str, Handler] = {}
        self._tasks = HandlerTasks()
        self._listener: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """The multiaddr of the control socket."""
        return f"/unix{self._folder}/control.sock"

    async def addresses(self) -> list[str]:
        """The multiaddrs, with peer id, that p2pd believes it can be dialled under."""
        response = await self._ask(messages.Request(type=messages.Request.IDENTIFY))
        return [f"{Multiaddr(address)}/p2p/{self.peer_id}" for address in response.identify.addrs]

    async def connected(self) -> list[str]:
        """The ids of all peers with a live connection."""
        response = await self._ask(messages.Request(type=messages.Request.LIST_PEERS))
        return [PeerID(peer.id).to_base58() for peer in response.peers]

    async def connect(self, peer_id: str, addresses: Sequence[str] = (), seconds: float = DIAL_TIMEOUT) -> None:
        """Connect to `peer_id`, by `addresses` or by what the DHT knows. Raises ConnectionError with p2pd's reason."""
        peer = PeerID.from_base58(peer_id).to_bytes()
        plain = [Multiaddr(address.partition("/p2p/")[0]).to_bytes() for address in addresses]
        connect = messages.ConnectRequest(peer=peer, addrs=plain, timeout=max(1, int(seconds)))
        await self._ask(messages.Request(type=messages.Request.CONNECT, connect=connect), seconds + 1)

    async def open_stream(self, peer_id: str, protocol: str, seconds: float = DIAL_TIMEOUT) -> DaemonStream:
        """Raises ConnectionError when the peer cannot be reached or does not speak `protocol`."""
        peer = PeerID.from_base58(peer_id).to_bytes()
        opening = messages.StreamOpenRequest(peer=peer, proto=[protocol], timeout=max(1, int(seconds)))
        reader, writer = await self._connection()
        try:
            async with _time_limit(seconds + 1, f"peer {peer_id} did not answer"):
                await _request(reader, writer, messages.Request(type=messages.Request.STREAM_OPEN, streamOpen=opening))
        except BaseException:
            writer.close()
            raise
        return DaemonStream(peer_id, reader, writer)

    async def serve(self, protocol: str, handler: Handler) -> None:
        """Answer inbound streams of `protocol`; serving it again replaces the handler."""
        path = f"{self._folder}/streams.sock"
        if self._listener is None:
            self._listener = await asyncio.start_unix_server(self._inbound, path, limit=READ_LIMIT)
        if protocol not in self._handlers:
            address = Multiaddr(f"/unix{path}").to_bytes()
            request = messages.StreamHandlerRequest(addr=address, proto=[protocol], balanced=False)
            await self._ask(messages.Request(type=messages.Request.STREAM_HANDLER, streamHandler=request))
        self._handlers[protocol] = handler

    async def close(self) -> None:
        """Stop listening and cancel the handlers. Idempotent."""
        if self._listener:
            self._listener.close()
        await self._tasks.close()

    async def _inbound(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """p2pd connects once per inbound stream and says first whose it is."""
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT):
                info = messages.StreamInfo.FromString(await _read_message(reader))
        except (TimeoutError, OSError, EOFError):
            writer.close()
            return
        handler = self._handlers.get(info.proto)
        stream = DaemonStream(PeerID(info.peer).to_base58(), reader, writer)
        if handler is None or not self._tasks.start(info.proto, handler, stream):
            writer.close()

    async def _ask(self, request: Any, seconds: float = CONTROL_TIMEOUT) -> Any:
        reader, writer = await self._connection()
        try:
            async with _time_limit(seconds, "p2pd did not answer"):
                return await _request(reader, writer, request)
        finally:
            writer.close()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises ConnectionError when p2pd is gone."""
        try:
            return await asyncio.open_unix_connection(f"{self._folder}/control.sock", limit=READ_LIMIT)
        except FileNotFoundError as error:
            raise ConnectionError("p2pd has ended") from error


@contextlib.asynccontextmanager
async def _time_limit(seconds: float, sentence: str) -> AsyncIterator[None]:
    """Time out as ConnectionError, which is what callers of the network handle."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise ConnectionError(f"{sentence} within {seconds:.0f} s") from error


async def _request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> Any:
    message = request.SerializeToString()
    writer.write(_varint(len(message)) + message)
    await writer.drain()
    try:
        response = messages.Response.FromString(await _read_message(reader))
    except EOFError as error:
        raise ConnectionError("p2pd hung up") from error
    if response.type == messages.Response.ERROR:
        raise ConnectionError(response.error.msg)
    return response


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    size = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return await reader.readexactly(size)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
