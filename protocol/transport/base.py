"""What Lutetia needs of a network. `hivemind` (libp2p) and `memory` (virtual time) implement it and pass the same tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

RecordCheck = Callable[[str | None, str, bytes, float], str]
"""(key or None, subkey, value, expires) -> the record's own key; raises RecordRefused. Called on store and on read."""


@dataclass(frozen=True)
class StoredValue:
    """A live value of the DHT and its expiry in Unix seconds."""

    value: bytes
    expires: float


class Stream(ABC):
    """A reliable, ordered, encrypted byte stream to one authenticated peer.

    `origin` is the network that it comes from (see `origins.origin_of`), on inbound streams; "" where that is hidden by a relay.
    Identities cost nothing, addresses do: caps are per origin too.
    """

    peer_id: str
    origin: str = ""

    @abstractmethod
    async def read_exactly(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises ConnectionError when the stream ends before."""

    async def read_into(self, target: memoryview) -> None:
        """Fill `target`, like `read_exactly`; backends that can do it without copies override it."""
        target[:] = await self.read_exactly(len(target))

    @abstractmethod
    async def write(self, data: bytes | memoryview) -> None:
        """Send `data`; waits while the receiver is slow (back-pressure)."""

    @abstractmethod
    async def close(self) -> None:
        """End the stream; idempotent."""


Handler = Callable[[Stream], Awaitable[None]]


class Transport(ABC):
    """One peer's access to the network. Times are Unix seconds of `now()`; record keys are text, subkeys are owners."""

    peer_id: str

    @abstractmethod
    def now(self) -> float:
        """The peer's clock (virtual in simulation)."""

    @abstractmethod
    def addresses(self) -> list[str]:
        """Multiaddrs with peer id under which this peer can be dialled."""

    @abstractmethod
    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        """File a record. False when fewer than one peer (or the local store, if alone) took it."""

    @abstractmethod
    async def get(self, key: str) -> dict[str, StoredValue]:
        """The live, checked records under `key`, newest per subkey."""

    @abstractmethod
    async def open_stream(self, peer_id: str, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        """Dial `peer_id` (by `addresses` where it is not connected). Raises ConnectionError."""

    @abstractmethod
    async def serve(self, protocol: str, handler: Handler) -> None:
        """Answer inbound streams of `protocol`. A failing handler ends its own stream only."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether the network side still works (for hivemind: its p2pd process lives)."""

    @abstractmethod
    async def close(self) -> None:
        """Leave the network and release every process, port and file."""
