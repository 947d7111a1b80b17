"""Whether p2pd still listens at its TCP port.

A p2pd whose listener ended, for instance by an error of the kernel's, goes on in silence: it answers its owner, keeps its
connections, and nobody new can reach it.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Sequence

CONNECT_TIMEOUT = 3.0
_TCP = re.compile(r"^/ip[46]/([^/]+)/tcp/(\d+)(?:/p2p/\w+)?$")
_REFUSALS = 2
"""So many refused connections in a row prove the loss."""


class ListenerCheck:
    """Connects to p2pd's own port from this machine.

    Args:
        listen: Where p2pd was told to listen; nothing is checked where it listens nowhere.
        addresses: Where it then says that it listens, for the number of a port that the kernel chose.
    """

    def __init__(self, listen: str, addresses: Sequence[str]) -> None:
        self.place = _place(listen, addresses)
        self._seen, self._refused = False, 0

    async def is_lost(self) -> bool:
        """Whether p2pd listened once and now refuses connections. Slow answers, and faults of this process, prove nothing."""
        if self.place is None:
            return False
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, writer = await asyncio.open_connection(*self.place)
        except TimeoutError:
            return False
        except OSError as error:
            self._refused += error.errno == errno.ECONNREFUSED
            return self._seen and self._refused >= _REFUSALS
        writer.close()
        self._seen, self._refused = True, 0
        return False


def _place(listen: str, addresses: Sequence[str]) -> tuple[str, int] | None:
    match = _TCP.match(listen)
    if match is None:
        return None
    host, port = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(match[1], match[1]), int(match[2])
    chosen = [int(found[2]) for address in addresses if (found := _TCP.match(address))]
    port = port or next(iter(chosen), 0)
    return (host, port) if port else None
