"""The interface of a network backend. A new backend is one folder that implements `Transport` and is named in `backend.py`.

`hivemind` (libp2p) is the real one. The tests have one in memory; both pass `tests/protocol/transport/test_contract.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.dial_policy import DialPolicy

DIAL_TIMEOUT = 8.0
"""Seconds after which a peer that does not accept a stream counts as unreachable."""
RPC_TIMEOUT = 3.0
"""Seconds after which a DHT peer that does not answer counts as absent."""

RecordCheck = Callable[[str | None, str, bytes, float], str]
"""(key or None, subkey, value, expiry) -> the record's own key. Raises RecordRefused. Called on every store and every read."""


@dataclass(frozen=True)
class StoredValue:
    """A live value of the DHT and its expiry in Unix seconds."""

    value: bytes
    expires: float


class Stream(ABC):
    """A reliable, ordered, encrypted byte stream to one authenticated peer.

    `origin` is the network from which an inbound stream comes (see `network_origin.origin_of`), "" if a relay hides it.
    Identities cost nothing but addresses do, so limits apply per origin too.
    """

    peer_id: str
    origin: str = ""
    moved: float = 0.0
    """When its last byte came or went, in seconds of the event loop's clock."""

    @abstractmethod
    async def read_exactly(self, count: int) -> bytes:
        """Read exactly `count` bytes. Raises ConnectionError when the stream ends before."""

    async def read_into(self, target: memoryview) -> None:
        """Fill `target`, like `read_exactly`. Backends that can do it without copies override it."""
        target[:] = await self.read_exactly(len(target))

    @abstractmethod
    async def write(self, data: bytes | memoryview) -> None:
        """Send `data`. Waits while the receiver is slow (back-pressure)."""

    @abstractmethod
    async def close(self) -> None:
        """End the stream. Idempotent."""


Handler = Callable[[Stream], Awaitable[None]]


class RecordStore(Protocol):
    """What publishing records needs of a transport."""

    def now(self) -> float: ...

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool: ...

    async def get(self, key: str) -> dict[str, StoredValue]: ...


class Transport(ABC):
    """One peer's access to the network: streams from the start, records once it has entered the DHT.

    Times are Unix seconds of `now()`. Record keys are text, subkeys are public keys of owners.
    """

    peer_id: str

    def limit_dials(self, policy: DialPolicy) -> None:
        """Dial only where `policy` allows from now on. A backend without addresses has nothing to limit."""
        return None

    @abstractmethod
    def now(self) -> float:
        """The peer's clock in Unix seconds (virtual in tests)."""

    @abstractmethod
    def addresses(self) -> list[str]:
        """Multiaddrs with peer id at which others can dial this peer."""

    @abstractmethod
    async def connections(self) -> dict[str, str]:
        """The multiaddr, without peer id, of each peer that is connected now, by peer id. "" where it is not known."""

    @abstractmethod
    async def dial_each(self, addresses: Sequence[str]) -> dict[str, str]:
        """Dial those of `addresses` that the dial policy allows at once. Returns the reason for each one that failed.

        After the first success the others get a second more; those that have not answered by then count as failed.
        """

    @abstractmethod
    async def find_double(self, addresses: Sequence[str]) -> str | None:
        """Find another peer with this peer's key: one of `addresses` at which a peer proves that key, or None."""

    @abstractmethod
    async def enter_dht(self, check: RecordCheck, bootstrap: Sequence[str] = ()) -> None:
        """Join the DHT through those of `bootstrap` that answer, or alone if it is empty.

        `check` is applied to every record from then on. Raises BootstrapError when none of `bootstrap` answers.
        """

    @abstractmethod
    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        """Store a record until `expires`. False when no other peer took it although there are others."""

    @abstractmethod
    async def get(self, key: str) -> dict[str, StoredValue]:
        """The live, checked records under `key`, the newest of each subkey."""

    @abstractmethod
    async def open_stream(self, peer_id: str, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        """Open a stream to `peer_id`, dialling `addresses` if it is not connected.

        Raises ConnectionError. Its text says no more than that the peer is not reached, unless the ticket names `addresses`:
        what a dial finds out about a network that a record names must not be published.
        """

    @abstractmethod
    async def serve(self, protocol: str, handler: Handler) -> None:
        """Answer inbound streams of `protocol`. A handler that fails ends only its own stream."""

    @abstractmethod
    def favour(self, known: Callable[[str], bool]) -> None:
        """Keep places for inbound streams of the peers that `known` names, by peer id: those with accepted work."""

    @abstractmethod
    def every(self, period: float, action: Callable[[], Awaitable[None]]) -> None:
        """Run `action` every `period` seconds while this peer is online, and ignore its ConnectionErrors."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether the network side still works (for hivemind: whether its p2pd process lives)."""

    @abstractmethod
    async def close(self) -> None:
        """Leave the network and release every process, port and file. Idempotent."""


class StartTransport(Protocol):
    """Starts a backend: how `joining` gets on the network. The peer has streams then, and no DHT yet."""

    async def __call__(self, identity: Identity, *, listen: str, state_folder: Path, announce: Sequence[str] = ()) -> Transport:
        """Start a peer.

        Args:
            identity: The key under which it is on the network.
            listen: The multiaddr to listen at, for instance /ip4/0.0.0.0/tcp/41000; port 0 takes a free one.
            state_folder: A folder for this peer's files, used by one process at a time.
            announce: Multiaddrs to publish in place of the ones that the backend finds out.

        Raises UnreachableError (the address is taken) or IdentityError (the state folder is in use).
        """
        ...
