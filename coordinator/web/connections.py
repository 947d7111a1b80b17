"""Limits on HTTP connections: how many there are, how many come from one origin, and how long each may do nothing.

uvicorn has no deadline for a request that never becomes whole and no limit that closes a connection, so that idle sockets would
take every descriptor of the coordinator's process.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lutetia.protocol.transport.network_origin import PREFIX_FACTOR, origin_of, prefix_of

BACKLOG = 256
"""Connections that the kernel accepts ahead of the server. The server takes them all at once, whatever its limits are."""


@dataclass(frozen=True)
class HttpLimits:
    """What HTTP clients may take from the coordinator.

    Args:
        connections: open connections, over all clients.
        per_origin: open connections of one IPv4 address or IPv6 /64; of all addresses of one prefix PREFIX_FACTOR times as many.
        request_seconds: until a request's head has arrived, counted from the connection or from the last answer.
        stall_seconds: without any byte of an answer leaving.
    """

    connections: int = 400
    per_origin: int = 16
    request_seconds: float = 10.0
    stall_seconds: float = 30.0


LIMITS = HttpLimits()


@dataclass(eq=False)
class ConnectionTimes:
    """One connection, as the limits see it.

    Args:
        origin: see `network_origin.origin_of`.
        opened: seconds of the loop's clock.
        waiting_since: when it began to wait for a request; None while a request is answered.
        unsent: bytes of the answer that wait to be sent.
        moved: when `unsent` last changed.
    """

    origin: str
    opened: float
    waiting_since: float | None
    unsent: int = 0
    moved: float = 0.0

    def observe(self, unsent: int, now: float) -> None:
        """Note how much waits to be sent now."""
        if unsent != self.unsent:
            self.unsent, self.moved = unsent, now

    def overdue(self, now: float, limits: HttpLimits) -> bool:
        """Whether the connection has used up its time."""
        if self.unsent:
            return now - self.moved >= limits.stall_seconds
        return self.waiting_since is not None and now - max(self.waiting_since, self.moved) >= limits.request_seconds


def crowded_out(held: Collection[ConnectionTimes], newest: ConnectionTimes, limits: HttpLimits) -> ConnectionTimes | None:
    """The connection to close now that `newest` has come; None while there are few enough.

    It is one of `newest`'s origin or prefix when that has too many, else one of the prefix that has most, and there of the origin
    that has most. Of these a connection that waits for a request goes before one that is answered, and the oldest first. So new
    clients get in, however many others idle.
    """
    crowd = Counter(connection.origin for connection in held)
    prefixes = Counter(prefix_of(connection.origin) for connection in held)
    own = prefix_of(newest.origin)
    if crowd[newest.origin] > limits.per_origin:
        origins = {newest.origin}
    elif prefixes[own] > PREFIX_FACTOR * limits.per_origin or len(held) > limits.connections:
        prefix = own if prefixes[own] > PREFIX_FACTOR * limits.per_origin else max(prefixes, key=lambda name: prefixes[name])
        most = max(crowd[origin] for origin in crowd if prefix_of(origin) == prefix)
        origins = {origin for origin in crowd if prefix_of(origin) == prefix and crowd[origin] == most}
    else:
        return None
    same = [connection for connection in held if connection.origin in origins]
    return min(same, key=lambda connection: (connection.waiting_since is None, connection.opened))


class LimitedConfig(uvicorn.Config):
    """uvicorn's configuration with `limits`, for connections that keep them."""

    limits = LIMITS


class LimitedProtocol(H11Protocol):
    """An HTTP/1.1 connection that keeps the limits of its LimitedConfig."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        now = self.loop.time()
        self.times = ConnectionTimes(origin_of_host(self.client[0] if self.client else ""), now, now, moved=now)
        held = {connection.times: connection for connection in self.connections if isinstance(connection, LimitedProtocol)}
        if victim := crowded_out(held, self.times, _limits(self.config)):
            held[victim].end()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.times.waiting_since = None

    def on_response_complete(self) -> None:
        self.times.waiting_since = self.loop.time()
        super().on_response_complete()

    def end_if_overdue(self, now: float) -> None:
        """Close the connection if it has used up its time."""
        self.times.observe(self.transport.get_write_buffer_size(), now)
        if self.times.overdue(now, _limits(self.config)):
            self.end()

    def end(self) -> None:
        """Close the connection at once, and count it no more."""
        self.connections.discard(self)
        self.transport.abort()


def _limits(config: uvicorn.Config) -> HttpLimits:
    return config.limits if isinstance(config, LimitedConfig) else LIMITS


def origin_of_host(host: str) -> str:
    """The origin of an IP address."""
    return origin_of(f"/ip6/{host}" if ":" in host else f"/ip4/{host}")


def end_overdue(connections: Collection[object], now: float) -> None:
    """Close the connections that have used up their time. `now`: seconds of the loop's clock."""
    for connection in list(connections):
        if isinstance(connection, LimitedProtocol):
            connection.end_if_overdue(now)
