"""Runs of honest nodes on few clips do not stand still, as they did under a bare tolerance with final refusals."""

from __future__ import annotations

from benchmarks.simulation.standstill import RULES, one_run, report
from lutetia.simulation.scenarios.few_clips import LONGEST_GAP

SEEDS = (2, 3, 26, 64, 671)
"""Some of those that `python -m benchmarks simulate standstill` runs. In the last three, proofs would take more than five times
the pace if they waited for audits that run already, or if parent and result were replayed one after the other.
"""


def test_no_shard_stands_still_under_interval_and_proofs() -> None:
    runs = [one_run(seed, RULES["interval and proofs"]) for seed in SEEDS]
    assert max(run["gap"] for run in runs) <= LONGEST_GAP
    assert all(run["accepted"] == run["of"] for run in runs)
    assert sum(run["noted"] for run in runs) > 0, "some of these runs need proofs"


def test_shards_stand_still_under_a_bare_tolerance() -> None:
    runs = [one_run(seed, RULES["bare tolerance, final refusals"]) for seed in (2, 4)]
    assert all(run["gap"] > LONGEST_GAP and run["accepted"] < run["of"] for run in runs)
    page = report({"bare tolerance, final refusals": runs})
    assert "| bare tolerance, final refusals | 2 | 6,000 | 2 |" in page
