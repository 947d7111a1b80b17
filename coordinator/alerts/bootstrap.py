"""Whether the addresses in the run's ticket answer, as far as the coordinator's machine can tell.

An address of another peer is dialled: it answers if the peer that it names proves its key. The coordinator's own addresses are
asked for a TCP connection. Many routers do not lead a machine back to itself over its public address, so a public address of its
own that does not answer counts only while no peer is connected.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lutetia.coordinator.alerts.fault import BootstrapFault
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.dial_policy import host_of
from lutetia.protocol.transport.reachability import answers
from lutetia.system.errors import LutetiaError

LOOK_SECONDS = 60.0
LOOKS = 3
"""An address that did not answer so many looks in a row is down."""


@dataclass(frozen=True)
class FailedLooks:
    """Looks in a row at one address that failed. `since`: the first of them, in Unix seconds."""

    since: float
    count: int
    why: str


def ticket_addresses(path: Path) -> tuple[str, ...]:
    """The addresses in the ticket in the file `path`; none if it cannot be read."""
    try:
        return Ticket.decode(path.read_text()).addresses
    except (OSError, ValueError, LutetiaError):
        return ()


def after_look(known: Mapping[str, FailedLooks], refused: Mapping[str, str], now: float) -> dict[str, FailedLooks]:
    """What is known after a look at `now`, in which those of `refused` did not answer, for the reasons given."""
    found = {}
    for address, why in refused.items():
        before = known.get(address) or FailedLooks(now, 0, why)
        found[address] = FailedLooks(before.since, before.count + 1, why)
    return found


def faults_of(known: Mapping[str, FailedLooks]) -> tuple[BootstrapFault, ...]:
    """The addresses that are down."""
    down = ((address, looks) for address, looks in sorted(known.items()) if looks.count >= LOOKS)
    return tuple(BootstrapFault(address=address, since=looks.since, why=looks.why) for address, looks in down)


def says_something(address: str, connected: int) -> bool:
    """Whether it means anything that this machine's own `address` does not answer; `connected`: peers that are connected."""
    host = host_of(address)
    return not connected or (host is not None and not host.is_global)


@dataclass
class BootstrapWatch:
    """Looks at `addresses`, those of the ticket, every LOOK_SECONDS."""

    transport: Transport
    addresses: Sequence[str]
    probe: Callable[[str], Awaitable[bool]] = answers
    known: dict[str, FailedLooks] = field(default_factory=dict)

    def faults(self) -> tuple[BootstrapFault, ...]:
        return faults_of(self.known)

    async def run(self) -> None:
        """Look until cancelled."""
        while self.addresses:
            with contextlib.suppress(ConnectionError):  # the coordinator itself is off the network, which is seen elsewhere
                await self.look_once()
            await asyncio.sleep(LOOK_SECONDS)

    async def look_once(self) -> None:
        connected = len(await self.transport.connections())
        reasons = await asyncio.gather(*(self._refusal(address, connected) for address in self.addresses))
        refused = {address: why for address, why in zip(self.addresses, reasons, strict=True) if why}
        self.known = after_look(self.known, refused, self.transport.now())

    async def _refusal(self, address: str, connected: int) -> str:
        """Why the address does not answer; empty: it does, or nobody can tell from here."""
        if not address.endswith(f"/p2p/{self.transport.peer_id}"):
            return (await self.transport.dial_each([address])).get(address, "")
        if await self.probe(address) or not says_something(address, connected):
            return ""
        return "nothing accepts a connection there, tried from the coordinator's own machine"
