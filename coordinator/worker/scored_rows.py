"""Scores results on held-out rows in a worker process, within a time, and keeps what was scored when a job is cut off."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

from lutetia.coordinator.acceptance.loss_bounds import FEWEST_ROWS, Losses
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed
from lutetia.coordinator.worker.messages import MeasureLoss

Part = Literal["parent", "averages", "raw"]
"""What of a result is scored: its parent, its published averages, its raw parameters."""
PARTS = 3
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class _Scored:
    drawn: bool
    rows: tuple[float, ...]
    whole: bool


@dataclass
class RowScores:
    """Scores the parts of results one after another on the same rows: as many as the parent got in its share of the time.

    Args:
        worker: computes.
        seconds: what the three parts of a result may take together, beyond the fewest rows.
    """

    worker: WorkerClient
    seconds: float
    _kept: OrderedDict[tuple[str, Part], _Scored] = field(default_factory=OrderedDict)

    async def measure(self, result: str, part: Part, job: MeasureLoss, patience: float) -> Losses:
        """The losses of `part` of the result with digest `result`, row by row. An earlier attempt is continued.

        Raises WorkerRefused, WorkerFailed.
        """
        known, parent = self._kept.get((result, part)), self._kept.get((result, "parent"))
        if known and known.whole:
            return known.rows
        like = known or parent
        limited = job.model_copy(
            update={
                "seconds": self.seconds / PARTS, "fewest": FEWEST_ROWS, "drawn": like.drawn if like else None,
                "count": len(parent.rows) if parent and part != "parent" else None, "known": known.rows if known else (),
            }
        )  # fmt: skip
        try:
            answer = await self.worker.ask(limited, limit=patience)
        except WorkerFailed as error:
            if error.progress and error.progress.rows:
                self._keep(result, part, _Scored(error.progress.drawn, error.progress.rows, whole=False))
            raise
        self._keep(result, part, _Scored(answer.drawn, answer.rows, whole=True))
        return answer.rows

    def forget(self, result: str) -> None:
        """The result is decided."""
        for key in [key for key in self._kept if key[0] == result]:
            del self._kept[key]

    def _keep(self, result: str, part: Part, scored: _Scored) -> None:
        self._kept[result, part] = scored
        self._kept.move_to_end((result, part))
        while len(self._kept) > PARTS * _REMEMBERED:
            self._kept.popitem(last=False)
