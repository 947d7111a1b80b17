"""Keeps a run's snapshot new enough while the run is served, and has the one that the coordinator started from verified."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.snapshot.document import LedgerSnapshot, rules_digest
from lutetia.coordinator.snapshot.process import SnapshotOrder, SnapshotReport
from lutetia.system.errors import IntegrityError
from lutetia.system.process import Child

_log = logging.getLogger(__name__)

LEAST_EVENTS = 1000
"""Adding up so many events takes about 0.1 s: for fewer no snapshot is made."""
_SHARE = 20
_LOOK_SECONDS = 30.0
_RETRY_SECONDS = 600.0
"""After a failed attempt to verify a snapshot."""


def due(events: int, covered: int) -> bool:
    """Whether a snapshot that covers `covered` of a ledger's `events` is to be replaced.

    Each new one costs a replay of the whole ledger. It is made when the ledger has grown by a twentieth, so that over its life
    each event is replayed some twenty times, and a start has to add up at most a twentieth of them.
    """
    return events - covered >= max(LEAST_EVENTS, covered // _SHARE)


@dataclass
class SnapshotKeeper:
    """Keeps the snapshot of one run.

    Args:
        folder: the run's files.
        ledger: its ledger; only its length is read here.
        loaded: the snapshot that the ledger was opened with; None: the whole ledger was read and verified.
        on_lie: called when `loaded` does not follow from the ledger.
    """

    folder: RunFolder
    ledger: Ledger
    loaded: LedgerSnapshot | None
    on_lie: Callable[[int], Awaitable[None]]

    def __post_init__(self) -> None:
        self._rules = rules_digest()  # of the code that runs, whatever is on the disk later

    async def run(self) -> None:
        """Verify `loaded`, then make snapshots until cancelled. Raises IntegrityError when the ledger is found damaged."""
        known = self.loaded and self.loaded.header
        covered = known.events if known else 0
        while True:
            head, pause = self.ledger.head[0], _LOOK_SECONDS
            if known or due(head, covered):
                report = await self._replay(SnapshotOrder(rules=self._rules, known=known))
                covered = report.events or head if report else head  # it is tried again when the ledger has grown
                if report:
                    await self._conclude(report)
                    known = known if report.fits is None else None
                pause = _RETRY_SECONDS if known else pause
            await asyncio.sleep(pause)

    async def _replay(self, order: SnapshotOrder) -> SnapshotReport | None:
        """What the child process reports; None, with a line in the log, if it failed."""
        child = await Child.start("lutetia.coordinator.snapshot", str(self.folder.root), order.model_dump_json())
        try:
            found = [SnapshotReport.model_validate(message) async for message in child.messages()]
        except ValueError as error:
            _log.warning("the report of the process that makes the snapshot cannot be read: %s", error)
            found = []
        finally:
            with contextlib.suppress(ProcessLookupError):
                status = await child.kill()
        if not found:
            _log.warning("the process that makes the snapshot ended with status %s before it was done", status)
        return found[0] if found else None

    async def _conclude(self, report: SnapshotReport) -> None:
        if report.broken:
            raise IntegrityError(report.broken)
        if report.unwritten:
            _log.error("no new snapshot of the ledger: %s", report.unwritten)
        elif report.events:
            kib, seconds = report.size / 1024, report.seconds
            _log.info("snapshot of the first %d events written: %.0f KiB, %.1f s of processor time", report.events, kib, seconds)
        if report.fits is False and self.loaded:
            await self.on_lie(self.loaded.header.events)
        elif report.fits:
            _log.info("the snapshot that this coordinator started from follows from the ledger")
