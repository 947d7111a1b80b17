"""What the web API shows: the run's folder, ledger, manifest and present state, and a signal when events are added."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lutetia.coordinator.alerts.fault import BootstrapFault
from lutetia.coordinator.ledger.log import Ledger, LedgerRow
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.web.api.history import History
from lutetia.coordinator.web.api.people import People
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.status import SwarmStatus

_ROWS_AT_ONCE = 500
"""Events that are added up before other tasks get their turn."""


@dataclass
class RunSource:
    """The run that is shown.

    Args:
        folder: the run's files.
        ledger: its ledger; only read here.
        manifest: the newest manifest.
        status: makes the status document.
        earlier: reads the history of the ledger's first events, if a snapshot has it; else it is None. May block on the disk.
        about: what the owner says of the run, in one sentence.
        names: what peers with accepted work are called, by public key.
        bootstrap: the addresses of the ticket that do not answer now.
        process: id of the coordinator's process; None: it is this one.
    """

    folder: RunFolder
    ledger: Ledger
    manifest: Callable[[], Manifest]
    status: Callable[[], SwarmStatus]
    earlier: Callable[[], History | None] = lambda: None
    about: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    bootstrap: Callable[[], Sequence[BootstrapFault]] = lambda: ()
    process: int | None = None
    history: History = field(default_factory=History)
    _more: set[asyncio.Event] = field(default_factory=set)
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def notify(self) -> None:
        """Events were added."""
        for waiting in self._more:
            waiting.set()

    async def wait_for_more(self, after: int, seconds: float) -> bool:
        """Wait until the ledger has more than `after` events, at most so many seconds. Returns whether it has."""
        if self.ledger.head[0] > after:
            return True
        more = asyncio.Event()
        self._more.add(more)
        try:
            async with asyncio.timeout(seconds):
                while self.ledger.head[0] <= after:
                    await more.wait()
                    more.clear()
        except TimeoutError:
            return False
        finally:
            self._more.discard(more)
        return True

    def rows(self, after: int, limit: int) -> list[LedgerRow]:
        """At most `limit` events after the first `after`."""
        return self.ledger.rows_after(after, limit)

    async def up_to_date(self) -> History:
        """The history of all events in the ledger now. The first call reads what no snapshot has, later ones what was added."""
        async with self._reading:
            if not self.history.events:
                self.history = await asyncio.to_thread(self.earlier) or self.history
            head = self.ledger.head[0]
            while self.history.events < head:
                for row in self.rows(self.history.events, _ROWS_AT_ONCE):
                    self.history.add(row.id, row.event())
                await asyncio.sleep(0)
        return self.history

    def people(self) -> People:
        """What is known of the peers now, besides their results."""
        return People(self.ledger.state, self.names, orders=self.manifest().orders)

    def tag(self) -> str:
        """Changes with every event of the ledger, and with the manifest."""
        count, chain = self.ledger.head
        return f"{count}-{chain[:16]}-{self.manifest().version}"
