"""Does what the operator's commands noted in the folder of a run that is being served: pardons and rollbacks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lutetia.coordinator.admin.pardon import noted_pardons, remove_notes
from lutetia.coordinator.admin.rollback import noted_rollbacks, remove_rollback_notes, rolled_back
from lutetia.coordinator.ledger.events import PeerPardoned
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.judge_loop import JudgeLoop

_log = logging.getLogger(__name__)


@dataclass
class OperatorNotes:
    """The notes of one run. `publish_quarantine` is called after a pardon."""

    folder: RunFolder
    judge_loop: JudgeLoop
    publish_quarantine: Callable[[], Awaitable[None]]

    async def follow(self) -> None:
        """Write what the notes ask for to the ledger, then remove them."""
        await self._pardon()
        await self._roll_back()

    async def _pardon(self) -> None:
        if noted := await asyncio.to_thread(noted_pardons, self.folder):
            run, now = self.judge_loop.state.run, self.judge_loop.now()
            known = run.quarantined.keys() | run.refuted_checkers.keys()
            await self.judge_loop.append(*(PeerPardoned(time=now, owner=owner) for owner in noted if owner in known))
            await asyncio.to_thread(remove_notes, self.folder, noted)
            await self.publish_quarantine()

    async def _roll_back(self) -> None:
        noted = await asyncio.to_thread(noted_rollbacks, self.folder)
        for note in noted:
            if event := rolled_back(self.judge_loop.state.run, note, self.judge_loop.now()):
                await self.judge_loop.append(event)
            else:
                text = (
                    "a rollback of shard %d to epoch %d was asked for, which no longer applies; ask again if it is still needed"
                )
                _log.warning(text, note.shard, note.epoch)
        if noted:
            await asyncio.to_thread(remove_rollback_notes, self.folder, noted)
