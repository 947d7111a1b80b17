"""Dial one peer from a short-lived process, over py-libp2p: TCP, noise, yamux and nothing else.

Noise proves that the other side holds the key of the peer id in the address. No other security protocol is offered: the
plaintext one, which py-libp2p offers by default, proves nothing.

Importing this module loads py-libp2p, so that no open connection has to wait for it: p2pd closes a connection that is not secure
after 15 s, and on a busy machine or a slow disk loading takes longer.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import trio

from lutetia.protocol.light_client import bindings as library

if TYPE_CHECKING:
    from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream

_ADDRESS = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)/p2p/(\w+)")
_READ = 1 << 18
_NEGOTIATION = 10


class LightStream:
    """A stream to one peer. Methods raise ConnectionError. The caller sets time limits."""

    def __init__(self, stream: YamuxStream) -> None:
        self._stream = stream

    async def read_exactly(self, count: int) -> bytes:
        data = bytearray()
        with _as_connection_error():
            while len(data) < count:
                part = await self._stream.read(min(count - len(data), _READ))
                if not part:
                    raise ConnectionError("the answer was cut short")
                data += part
        return bytes(data)

    async def write(self, data: bytes) -> None:
        with _as_connection_error():
            await self._stream.write(data)

    async def close(self) -> None:
        with _as_connection_error():
            await self._stream.close()


class LightConnection:
    """An encrypted, authenticated connection to one peer."""

    def __init__(self, muxer: Yamux) -> None:
        self._muxer = muxer

    async def open_stream(self, protocol: str) -> LightStream:
        """Raises ConnectionError when the peer does not speak `protocol`."""
        with _as_connection_error():
            stream = await self._muxer.open_stream()
            await _select(stream, protocol)
            return LightStream(stream)


@contextlib.asynccontextmanager
async def dial(address: str) -> AsyncIterator[LightConnection]:
    """Connect to a multiaddr with peer id for the duration of the block. Raises ConnectionError with the reason."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConnectionError("not an address of the form /ip4/HOST/tcp/PORT/p2p/ID")
    socket_stream = await _connect(match[1], int(match[2]))
    async with socket_stream:
        muxer = await _upgrade(socket_stream, match[3])
        with _unwrapped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(muxer.start)
                await muxer.event_started.wait()
                yield LightConnection(muxer)
                nursery.cancel_scope.cancel()


async def _connect(host: str, port: int) -> trio.SocketStream:
    try:
        return await trio.open_tcp_stream(host, port)
    except socket.gaierror as error:
        raise ConnectionError(f"the name {host} does not resolve (DNS)") from error
    except OSError as error:
        causes = error.__cause__.exceptions if isinstance(error.__cause__, BaseExceptionGroup) else (error.__cause__ or error,)
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            raise ConnectionError("connection refused (nothing listens there)") from error
        raise ConnectionError(getattr(causes[0], "strerror", None) or str(causes[0])) from error


async def _upgrade(socket_stream: trio.SocketStream, peer_id: str) -> Yamux:
    """Noise, then yamux, under a key made for this connection."""
    peer = library.ID.from_base58(peer_id)
    noise = library.Noise(library.create_new_key_pair(), library.create_noise_key_pair().private_key)
    raw = library.RawConnection(library.TrioTCPStream(socket_stream), initiator=True)
    with _as_connection_error():
        await _select(raw, library.NOISE)
        secure = await noise.secure_outbound(raw, peer)
        await _select(secure, library.YAMUX)
    return library.Yamux(secure, peer, is_initiator=True)


async def _select(connection: Any, protocol: str) -> None:
    """Negotiate `protocol`, and no other."""
    communicator = library.MultiselectCommunicator(connection)
    await library.MultiselectClient().select_one_of([library.TProtocol(protocol)], communicator, _NEGOTIATION)


@contextlib.contextmanager
def _as_connection_error() -> Iterator[None]:
    """Turn the many unrelated errors of py-libp2p into ConnectionError, which callers of the network handle."""
    try:
        yield
    except library.FAILURES as error:
        raise ConnectionError(_reason(error)) from error


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """A nursery raises groups. Raise the caller's own exception from it or, if there is none, a ConnectionError."""
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        others = [error for error in leaves if not isinstance(error, library.FAILURES)]
        if others:
            raise others[0] from None
        raise ConnectionError(_reason(leaves[0])) from group


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _reason(error: BaseException) -> str:
    text = str(error)
    if type(error).__name__ == "PeerIDMismatchesPubkey":
        return "a peer other than the address names answers there"
    if "protocols not supported" in text:
        return "that peer does not offer this protocol"
    return text.splitlines()[0][:200] if text else type(error).__name__
