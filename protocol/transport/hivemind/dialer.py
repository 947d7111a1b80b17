"""Dial peers through p2pd: only where the dial policy allows, few addresses of a host at once, and with growing pauses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from weakref import WeakValueDictionary

from lutetia.protocol.async_helpers import gather_quickly
from lutetia.protocol.transport.base import DIAL_TIMEOUT
from lutetia.protocol.transport.dial_policy import (
    ADDRESSES_DIALLED,
    DIALS_PER_HOST,
    LONGEST_TRUSTED_PAUSE,
    DialBackoff,
    DialPolicy,
    host_of,
)
from lutetia.protocol.transport.hivemind.p2pd_client import P2pdClient
from lutetia.protocol.transport.reachability import why_unreachable
from lutetia.system.log_limit import LimitedLog

log = logging.getLogger(__name__)


class Dialer:
    """Dials for one peer. `policy` can be replaced at any time."""

    def __init__(self, control: P2pdClient, policy: DialPolicy) -> None:
        self.policy = policy
        self._control = control
        self._backoff = DialBackoff()
        self._log_failure = LimitedLog(log)
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def reach(self, peer_id: str, addresses: Sequence[str]) -> None:
        """Connect to a peer at addresses that it or a ticket names, unless it is connected.

        Nothing is dialled if none of them may be: p2pd may know a relay. Raises ConnectionError.
        """
        allowed = [address for address in addresses if self.policy.allows(address)][:ADDRESSES_DIALLED]
        due = self._due(allowed)
        if due:
            await self._dial(peer_id, due)
        elif allowed and peer_id not in await self._control.connections():
            raise ConnectionError("no answer a moment ago")

    def trusts(self, addresses: Sequence[str]) -> bool:
        """Whether the ticket or this peer's settings name all `addresses`, so that details of a failure are this peer's own."""
        return bool(addresses) and all(address in self.policy.trusted for address in addresses)

    async def dial_each(self, addresses: Sequence[str]) -> dict[str, str]:
        """Dial all `addresses` at once; see `Transport.dial_each`."""
        reasons = await gather_quickly([self._why_not(address) for address in addresses], lambda reason: reason == "")
        given = ("no answer yet" if reason is None else reason for reason in reasons)
        return {address: reason for address, reason in zip(addresses, given, strict=True) if reason}

    async def redial(self, addresses: Sequence[str]) -> list[str]:
        """Dial again those of `addresses` whose pause is over. Returns those that answered."""
        due = [address for address in addresses if self._backoff.allows(address, _now())]
        refused = await self.dial_each(due)
        trusted = [address for address in refused if address in self.policy.trusted]
        self._backoff.failed(trusted, _now(), LONGEST_TRUSTED_PAUSE)
        return [address for address in due if address not in refused]

    async def _why_not(self, address: str) -> str:
        """Connect to one address. Returns the reason why it failed, or ""."""
        if not self.policy.allows(address):
            return "not an address of this run's network"
        if not self._due([address]):
            return "no answer a moment ago"
        try:
            await self._dial(address.rpartition("/p2p/")[2], [address])
        except OSError as error:
            return why_unreachable(address, str(error))
        return ""

    def _due(self, addresses: Iterable[str]) -> list[str]:
        return [each for each in addresses if each in self.policy.trusted or self._backoff.allows(each, _now())]

    async def _dial(self, peer_id: str, addresses: Sequence[str]) -> None:
        async with self._turn([address for address in addresses if address not in self.policy.trusted]):
            addresses = self._due(addresses)  # others of the same host may have failed while this one waited
            if not addresses:
                raise ConnectionError("no answer a moment ago")
            try:
                await self._control.connect(peer_id, addresses, DIAL_TIMEOUT)
            except ConnectionError as error:
                self._backoff.failed([each for each in addresses if each not in self.policy.trusted], _now())
                text = "cannot connect to peer %s: %s"
                self._log_failure(logging.DEBUG, str(host_of(addresses[0])), text, peer_id, error)
                raise
        if len(addresses) == 1:  # else p2pd does not say which one answered
            self._backoff.answered(addresses[0])

    @contextlib.asynccontextmanager
    async def _turn(self, addresses: Sequence[str]) -> AsyncIterator[None]:
        """Wait for a slot of every host, so that few addresses of one are dialled at once. Raises ConnectionError."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(DIAL_TIMEOUT):
                    for host in sorted({str(host_of(address)) for address in addresses}):
                        await stack.enter_async_context(self._slots.setdefault(host, asyncio.Semaphore(DIALS_PER_HOST)))
            except TimeoutError as error:
                raise ConnectionError("too many other addresses of that host are being dialled") from error
            yield


def _now() -> float:
    return asyncio.get_running_loop().time()
