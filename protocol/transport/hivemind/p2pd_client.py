"""Client of p2pd's control socket: connect to peers, open streams, serve inbound streams.

p2pd (hivemind's go-libp2p daemon) dials, encrypts and multiplexes. Every request and every stream is one Unix-socket connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

from lutetia.protocol.transport.base import DIAL_TIMEOUT, Handler, Stream
from lutetia.protocol.transport.hivemind.bindings import Multiaddr, PeerID, messages
from lutetia.protocol.transport.hivemind.unix_socket import UnixSocket
from lutetia.protocol.transport.inbound_limits import HandlerTasks
from lutetia.protocol.transport.network_origin import origin_of

CONTROL_TIMEOUT = 10.0


def outside_addresses(addresses: list[str]) -> list[str]:
    """Drop loopback addresses if there are others: a peer on another machine that dialled them would dial itself."""
    outside = [address for address in addresses if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return outside or addresses


class P2pdStream(Stream):
    """A libp2p stream that p2pd forwards over a Unix socket."""

    def __init__(self, peer_id: str, wire: UnixSocket, origin: str = "") -> None:
        self.peer_id, self.origin = peer_id, origin
        self._wire, self._loop = wire, asyncio.get_running_loop()

    async def read_exactly(self, count: int) -> bytes:
        data = await self._wire.read_exactly(count)
        self.moved = self._loop.time()
        return data

    async def read_into(self, target: memoryview) -> None:
        await self._wire.read_into(target)
        self.moved = self._loop.time()

    async def write(self, data: bytes | memoryview) -> None:
        await self._wire.write(data)
        self.moved = self._loop.time()

    @property
    def open(self) -> bool:
        return not self._wire.closed

    async def close(self) -> None:
        self._wire.close()


class P2pdClient:
    """A client of the p2pd whose sockets are in `folder` (no trailing slash)."""

    def __init__(self, folder: str, peer_id: str) -> None:
        self.peer_id = peer_id
        self._folder = folder
        self._handlers: dict[str, Handler] = {}
        self._tasks = HandlerTasks()
        self._streams: WeakSet[P2pdStream] = WeakSet()
        self._greeting: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """The multiaddr of the control socket."""
        return f"/unix{self._folder}/control.sock"

    @property
    def _streams_path(self) -> str:
        """The socket at which p2pd hands inbound streams over."""
        return f"{self._folder}/streams.sock"

    async def addresses(self) -> list[str]:
        """The multiaddrs with peer id at which p2pd believes it can be dialled."""
        response = await self._ask(messages.Request(type=messages.Request.IDENTIFY))
        return outside_addresses([f"{Multiaddr(address)}/p2p/{self.peer_id}" for address in response.identify.addrs])

    async def check(self, seconds: float) -> None:
        """Raises ConnectionError when p2pd does not answer within `seconds`, or its sockets are gone."""
        if self._listener and not await asyncio.to_thread(os.path.exists, self._streams_path):
            raise ConnectionError("its sockets were removed")
        await self._ask(messages.Request(type=messages.Request.IDENTIFY), seconds)

    async def connections(self) -> dict[str, str]:
        """The address of each connected peer as p2pd sees it, by peer id: a direct one where there is one. "" if unknown."""
        response = await self._ask(messages.Request(type=messages.Request.LIST_PEERS))
        seen: dict[str, str] = {}
        for peer in response.peers:
            peer_id, address = PeerID(peer.id).to_base58(), _address_text(peer.addrs[0]) if peer.addrs else ""
            if peer_id not in seen or "/p2p-circuit" in seen[peer_id]:
                seen[peer_id] = address
        return seen

    async def origins(self) -> dict[str, str]:
        """The origin of each connected peer's address (see `network_origin.origin_of`), by peer id."""
        return {peer_id: origin_of(address) for peer_id, address in (await self.connections()).items()}

    def in_use(self, peer_ids: Iterable[str]) -> set[str]:
        """Those peers whose connections are to stay: they carry a stream, or the peer has accepted work."""
        busy = {stream.peer_id for stream in list(self._streams) if stream.open}
        return {peer_id for peer_id in peer_ids if peer_id in busy or self._tasks.known(peer_id)}

    async def disconnect(self, peer_id: str) -> None:
        """Close all connections to a peer."""
        request = messages.DisconnectRequest(peer=_peer_bytes(peer_id))
        await self._ask(messages.Request(type=messages.Request.DISCONNECT, disconnect=request))

    async def connect(self, peer_id: str, addresses: Sequence[str] = (), seconds: float = DIAL_TIMEOUT) -> None:
        """Connect to `peer_id` at `addresses`, or at those that p2pd knows. Raises ConnectionError with p2pd's reason."""
        peer, plain = _peer_bytes(peer_id), [packed for packed in map(_address_bytes, addresses) if packed]
        if addresses and not plain:
            raise ConnectionError(f"none of the addresses given for peer {peer_id} can be dialled")
        connect = messages.ConnectRequest(peer=peer, addrs=plain, timeout=max(1, int(seconds)))
        await self._ask(messages.Request(type=messages.Request.CONNECT, connect=connect), seconds + 1)

    async def open_stream(self, peer_id: str, protocol: str, seconds: float = DIAL_TIMEOUT) -> P2pdStream:
        """Raises ConnectionError when the peer cannot be reached or does not speak `protocol`."""
        peer = _peer_bytes(peer_id)
        opening = messages.StreamOpenRequest(peer=peer, proto=[protocol], timeout=max(1, int(seconds)))
        async with _time_limit(seconds + 1, f"peer {peer_id} did not answer"):
            wire = await self._connection()
            try:
                await _request(wire, messages.Request(type=messages.Request.STREAM_OPEN, streamOpen=opening))
            except BaseException:
                wire.close()
                raise
        stream = P2pdStream(peer_id, wire)
        self._streams.add(stream)
        return stream

    def favour(self, known: Callable[[str], bool]) -> None:
        """See `Transport.favour`."""
        self._tasks.known = known

    async def serve(self, protocol: str, handler: Handler) -> None:
        """Answer inbound streams of `protocol`. Serving it again replaces the handler."""
        path = self._streams_path
        if self._listener is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_unix_server(lambda: UnixSocket(self._connected), path)
        if protocol not in self._handlers:
            address = Multiaddr(f"/unix{path}").to_bytes()
            request = messages.StreamHandlerRequest(addr=address, proto=[protocol], balanced=False)
            await self._ask(messages.Request(type=messages.Request.STREAM_HANDLER, streamHandler=request))
        self._handlers[protocol] = handler

    async def close(self) -> None:
        """Stop listening and cancel the handlers. Idempotent."""
        if self._listener:
            self._listener.close()
        for greeting in self._greeting:
            greeting.cancel()
        await self._tasks.close()

    def _connected(self, wire: UnixSocket) -> None:
        """p2pd opens one connection per inbound stream."""
        task = asyncio.get_running_loop().create_task(self._inbound(wire))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    async def _inbound(self, wire: UnixSocket) -> None:
        """Read p2pd's first message, which names peer and protocol, and start the handler."""
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT):
                info = messages.StreamInfo.FromString(await _read_message(wire))
        except (TimeoutError, OSError):
            wire.close()
            return
        handler = self._handlers.get(info.proto)
        stream = P2pdStream(PeerID(info.peer).to_base58(), wire, origin_of(_address_text(info.addr)))
        self._streams.add(stream)
        if handler is None or not self._tasks.start(info.proto, handler, stream):
            wire.close()

    async def _ask(self, request: Any, seconds: float = CONTROL_TIMEOUT) -> Any:
        async with _time_limit(seconds, "p2pd did not answer"):
            wire = await self._connection()
            try:
                return await _request(wire, request)
            finally:
                wire.close()

    async def _connection(self) -> UnixSocket:
        """Raises ConnectionError when p2pd is gone."""
        try:
            _, wire = await asyncio.get_running_loop().create_unix_connection(UnixSocket, f"{self._folder}/control.sock")
        except FileNotFoundError as error:
            raise ConnectionError("p2pd has ended") from error
        return wire


def _peer_bytes(peer_id: str) -> bytes:
    """Raises ConnectionError for an invalid peer id, which a ticket or a record may contain."""
    try:
        return PeerID.from_base58(peer_id).to_bytes()
    except ValueError as error:
        raise ConnectionError(f"{peer_id} is not a peer id") from error


def _address_text(packed: bytes) -> str:
    try:
        return str(Multiaddr(packed))
    except ValueError:
        return ""


def _address_bytes(address: str) -> bytes | None:
    """None for an impossible address: records can hold hosts and ports that look valid and are not."""
    try:
        return Multiaddr(address.partition("/p2p/")[0]).to_bytes()
    except ValueError:
        return None


@contextlib.asynccontextmanager
async def _time_limit(seconds: float, sentence: str) -> AsyncIterator[None]:
    """A time limit that raises ConnectionError, the error that callers of the network handle."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise ConnectionError(f"{sentence} within {seconds:.0f} s") from error


async def _request(wire: UnixSocket, request: Any) -> Any:
    message = request.SerializeToString()
    await wire.write(_varint(len(message)) + message)
    response = messages.Response.FromString(await _read_message(wire))
    if response.type == messages.Response.ERROR:
        raise ConnectionError(response.error.msg)
    return response


async def _read_message(wire: UnixSocket) -> bytes:
    size = shift = 0
    while True:
        byte = (await wire.read_exactly(1))[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return await wire.read_exactly(size)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
