"""Compute multipliers: crossings of known curves, and the committed tables, which must follow from `results.json`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lutetia.models.study.report.multiplier import (
    LOSS,
    flops_to_reach,
    isolation,
    multiplier,
    multiplier_of,
    outside_multiplier,
    slope,
)
from lutetia.models.study.report.tables import report
from lutetia.models.study.results import StudyResults, curve

RESULTS = Path(__file__).parents[4] / "docs" / "results"
UNION, BASE_DRAWN, BASE_UNION = RESULTS / "union", RESULTS / "base-drawn", RESULTS / "base-union"


@pytest.fixture(scope="module")
def union() -> StudyResults:
    return StudyResults.model_validate_json((UNION / "results.json").read_bytes())


def power_law(scale: float, steepness: float = 0.25) -> list[tuple[float, float]]:
    """Four points of value = scale * FLOPs ** -steepness."""
    return [(flops, scale * flops**-steepness) for flops in (1e12, 2e12, 3e12, 4e12)]


def test_flops_to_reach_is_exact_on_a_power_law() -> None:
    curve = power_law(1000.0)
    target = 1000.0 * 2.6e12**-0.25
    assert flops_to_reach(curve, target) == pytest.approx(2.6e12)
    assert flops_to_reach(curve, curve[0][1] * 1.5) == 1e12  # the first point is below it already
    assert flops_to_reach(curve, curve[-1][1] * 0.99) is None


def test_multiplier_of_power_laws_is_the_shift_in_flops() -> None:
    other, better = power_law(1000.0), power_law(1000.0 * 2**-0.25)  # the better curve needs half of the FLOPs
    value, bound = multiplier_of(other, better)
    assert value == pytest.approx(2.0)
    assert not bound
    value, bound = multiplier_of(better, other)  # a mixture that is worse has a multiplier below 1
    assert value == pytest.approx(0.5)
    assert not bound


def test_multiplier_is_a_bound_when_the_curve_begins_too_late() -> None:
    assert multiplier_of(power_law(1000.0), power_law(10.0)) == (pytest.approx(4.0), "at least")
    assert multiplier_of(power_law(10.0), power_law(1000.0)) == (pytest.approx(0.25), "at most")


def test_flops_to_reach_takes_the_first_crossing_of_a_curve_that_rises_again() -> None:
    assert flops_to_reach([(1.0, 8.0), (2.0, 4.0), (4.0, 6.0), (8.0, 2.0)], 4.0) == 2.0


def test_slope_of_a_power_law_is_its_exponent() -> None:
    assert slope(power_law(5.0, 0.3)) == pytest.approx(0.3)


def test_multiplier_of_the_union_agrees_with_its_curves(union: StudyResults) -> None:
    by_distance, by_loss = multiplier(union, "monolith", "FVD"), multiplier(union, "monolith", LOSS)
    assert by_distance
    assert by_loss
    assert len(by_distance.by_seed) == len(by_loss.by_seed) == 3
    assert by_distance.figure.value == pytest.approx(math.prod(by_distance.by_seed) ** (1 / 3))
    assert by_distance.figure.low < 1 < by_distance.figure.high  # as the ratio's interval holds 1
    assert by_loss.figure.low > 1
    small = outside_multiplier(union, "small-batch", LOSS)
    assert small
    assert small.by_slope
    assert small.figure.low < 1 < small.figure.high
    assert multiplier(union, "root-rate", "FVD") is None


@pytest.mark.parametrize("fall", [0.0, 1e-7, 1e-3, 0.01, 0.05])
def test_curve_that_hardly_falls_gives_a_page(union: StudyResults, fall: float) -> None:
    """The mixture's distance falls by a share `fall` from its first to its last point; a power of 1 / slope overflows."""
    points = curve(union, "mixture", "FVD")
    by_epoch = {point.epoch: 500 * (1 - fall * math.log(point.flops / points[0].flops)) for point in points}
    evaluated = {}
    for name, each in union.evaluated.items():
        is_flat = each.reading.training.startswith("headline-mixture") and each.reading.epoch in by_epoch
        entries = [
            one.model_copy(update={"figure": one.figure.model_copy(update={"value": by_epoch[each.reading.epoch]})})
            if is_flat and one.name == "FVD"
            else one
            for one in each.entries
        ]
        evaluated[name] = each.model_copy(update={"entries": tuple(entries)})
    flat = union.model_copy(update={"evaluated": evaluated})
    assert "What the mixture is worth" in report(flat, [], [])
    found = multiplier(flat, "monolith", "FVD")
    assert found
    assert (found.figure.method == "none") == (fall < 0.01)
    assert found.figure.low <= found.figure.value <= found.figure.high


def test_isolation_divides_random_clusters_by_both_sides(union: StudyResults) -> None:
    loss = next(row for row in isolation(union) if row.metric == LOSS)
    assert loss.price == pytest.approx(0.7296 / 0.6310, abs=1e-3)
    assert loss.gain == pytest.approx(0.7296 / 0.6070, abs=1e-3)


def test_isolation_at_the_whole_budget_is_read_beside_the_headline() -> None:
    drawn = StudyResults.model_validate_json((BASE_DRAWN / "results.json").read_bytes())
    loss = next(row for row in isolation(drawn) if row.metric == LOSS)
    assert loss.price == pytest.approx(0.5211 / 0.4846, abs=1e-3)
    assert loss.gain == pytest.approx(0.5211 / 0.4446, abs=1e-3)


@pytest.mark.parametrize("folder", [UNION, BASE_DRAWN, BASE_UNION], ids=lambda folder: folder.name)
def test_committed_page_follows_from_its_results(folder: Path) -> None:
    page, results = (folder / "README.md").read_text(), StudyResults.model_validate_json((folder / "results.json").read_bytes())
    sheets = [f"clusters/{sheet.name}" for sheet in sorted((folder / "clusters").glob("*.png"))]
    made = report(results, ["curves.png", "samples.png"], sheets).partition("\n\n")[2]
    title, _, rest = page.partition("\n\n")  # between title and tables is what was written by hand
    assert title.startswith("# Study")
    assert rest.startswith("**By `docs/studies/")
    assert rest.endswith("\n\n" + made)
