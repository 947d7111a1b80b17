"""A mixture that is worse beyond the noise of equal rows does not become current, and the run's mixture never stands still."""

from __future__ import annotations

import math
import random

import pytest

from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import MixtureStitched
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.coordinator.mixtures.archive import HeldOutLosses
from lutetia.coordinator.mixtures.stitcher import next_step
from lutetia.coordinator.mixtures.succession import MOST_HELD_BACK, succession
from tests.coordinator.acceptance.judge_driver import PEERS, START, JudgeDriver, drive_judge

NOISE = random.Random(3)
ROWS = [NOISE.uniform(0.1, 2.0) for _ in range(64)]


def losses(factor: float, spread: float = 0.02, rows_of: str = "rows") -> HeldOutLosses:
    """The rows times `factor`, each with noise of its own of `spread`."""
    noise = random.Random(7)
    return HeldOutLosses(rows_of=rows_of, losses=tuple(row * factor + noise.gauss(0, spread) for row in ROWS))


BEFORE = HeldOutLosses(rows_of="rows", losses=tuple(ROWS))


def stitched_run() -> JudgeDriver:
    """Its one expert's first epoch was accepted and stitched."""
    c = drive_judge(shards=1, epochs=3)
    c.accept(PEERS[0])
    c.state = c.state.__class__(**{**vars_of(c.state), "run": apply(c.state.run, event("a" * 64, c))})
    return c


def vars_of(state: object) -> dict[str, object]:
    return {name: getattr(state, name) for name in state.__dataclass_fields__}  # pyright: ignore


def event(digest: str, c: JudgeDriver, current: bool = True, text: str = "") -> MixtureStitched:
    run = c.state.run
    return MixtureStitched(time=START, epochs=run.accepted_epochs, terms=run.terms, mixture=digest, current=current, text=text)


@pytest.mark.parametrize(("factor", "spread", "current"), [(0.9, 0.02, True), (1.0, 0.02, True), (1.2, 0.02, False)])
def test_worse_beyond_its_noise_is_not_current(factor: float, spread: float, current: bool):
    decided = succession(stitched_run().state.run, losses(factor, spread), BEFORE)
    assert decided.current is current, decided.text
    assert "on 64 equal rows" in decided.text


def test_the_interval_is_that_of_differences_row_by_row():
    """Rows differ by a factor of 20, so a bare comparison of means could not see 1 %; an excess within the noise passes."""
    run = stitched_run().state.run
    assert not succession(run, losses(1.01, 0.001), BEFORE).current
    assert succession(run, losses(1.01, 0.3), BEFORE).current


def test_fewer_rows_are_compared_with_the_first_of_the_others():
    run = stitched_run().state.run
    few = HeldOutLosses(rows_of="rows", losses=tuple(row * 1.5 for row in ROWS[:8]))
    decided = succession(run, few, BEFORE)
    assert (decided.current, "on 8 equal rows" in decided.text) == (False, True)


@pytest.mark.parametrize(
    ("new", "old", "words"),
    [
        (None, BEFORE, "it was not measured"),
        (losses(2.0), None, "the one before was not measured"),
        (losses(2.0, rows_of="other"), BEFORE, "have changed since"),
        (losses(2.0), HeldOutLosses.model_construct(rows_of="rows", losses=(math.nan,) * 64), "not finite"),
    ],
)
def test_what_cannot_be_compared_becomes_current(new: HeldOutLosses | None, old: HeldOutLosses | None, words: str):
    decided = succession(stitched_run().state.run, new, old)
    assert decided.current
    assert words in decided.text


def test_first_mixture_and_the_first_after_a_rollback_become_current():
    c = drive_judge(shards=1, epochs=1)
    assert succession(c.state.run, losses(2.0), BEFORE).current
    rolled = stitched_run()
    rolled.finish_audit("invalid")
    run = rolled.state.run
    assert (run.shards[0].term, run.mixture, run.stitched, run.held_back) == (1, None, None, 0)
    assert succession(run, losses(2.0), BEFORE).current


def test_after_many_held_back_the_next_becomes_current():
    c = stitched_run()
    run = c.state.run
    for number in range(MOST_HELD_BACK):
        assert not succession(run, losses(1.2), BEFORE).current
        run = apply(run, event(f"{number:064x}", c, current=False, text="worse"))
    decided = succession(run, losses(1.2), BEFORE)
    assert decided.current
    assert f"{MOST_HELD_BACK} before it were held back" in decided.text
    assert apply(run, event("c" * 64, c)).held_back == 0


def test_held_back_mixture_is_made_once_and_status_and_ledger_say_why():
    c = stitched_run()
    c.finish_audit("valid")
    c.accept(PEERS[0])
    run: RunState = c.state.run
    assert next_step(run, when="refresh", rested=True) == "mixture"
    held = event("b" * 64, c, current=False, text="held-out loss 2 after 1")
    run = apply(run, held)
    assert next_step(run, when="refresh", rested=True) == "nothing", "it is not stitched again"
    shown = status(run, c.manifest, LiveView(), c.now)
    assert (shown.mixture, shown.mixture_epochs) == ("a" * 64, (1,))
    assert shown.held_mixture
    assert (shown.held_mixture.mixture, shown.held_mixture.text) == ("b" * 64, "held-out loss 2 after 1")
    assert "it is not current: held-out loss 2 after 1" in sentence(held)
    better = apply(run, event("c" * 64, c))
    assert (status(better, c.manifest, LiveView(), c.now).held_mixture, better.held_back) == (None, 0)
