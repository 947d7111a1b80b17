"""Whether a new mixture becomes the current one. Pure.

Both are scored on equal held-out rows with equal noise, so their losses are compared row by row: what is worse than the noise of
the differences explains is kept, and not made current. So that the run's mixture never stands still for ever, a new one becomes
current without a comparison

- when it is the first, or the first after a rollback: the one before holds an epoch that is void;
- when the two cannot be compared: one was not measured, or the manifest or its held-out clips have changed since;
- after MOST_HELD_BACK mixtures in a row that were not made current.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lutetia.coordinator.acceptance.loss_bounds import compare_rows, in_common, mean
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.mixtures.archive import HeldOutLosses

MOST_HELD_BACK = 32
"""By then a few rows that happen to suit the current mixture are likelier than so many new ones that are all worse."""


@dataclass(frozen=True, slots=True)
class Succession:
    """Whether a mixture becomes current, and why, in words."""

    current: bool
    text: str


def succession(state: RunState, new: HeldOutLosses | None, old: HeldOutLosses | None) -> Succession:
    """What becomes of a new mixture.

    Args:
        state: of the run, before the mixture is recorded.
        new: its held-out losses; None: not measured.
        old: those of the current mixture; None: not known.
    """
    if state.mixture is None or not state.is_current(state.mixture):
        return Succession(True, "there is no current one whose epochs are all valid")
    if new is None:
        return Succession(True, "it was not measured on held-out clips")
    if old is None:
        return Succession(True, "the one before was not measured on held-out clips")
    if new.rows_of != old.rows_of:
        return Succession(True, "the manifest or its held-out clips have changed since the one before")
    ours, theirs = in_common(new.losses, old.losses)
    if not math.isfinite(mean(theirs)):
        return Succession(True, "the held-out loss of the one before is not finite")
    excess = compare_rows(ours, theirs, 0.0)
    text = f"held-out loss {excess.loss:.6g} after {excess.base:.6g} on {excess.rows} equal rows"
    if excess.passes:
        return Succession(True, text)
    if state.held_back >= MOST_HELD_BACK:
        return Succession(True, f"{text}; {state.held_back} before it were held back")
    return Succession(False, f"{text}, more than the {excess.bound:.6g} that their noise explains")
