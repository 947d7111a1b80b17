"""The primary table of a study: what the mixture is worth in compute, against every arm of the whole budget."""

from __future__ import annotations

from lutetia.models.metrics.stats.intervals import Figure
from lutetia.models.study.report.markdown import table
from lutetia.models.study.report.multiplier import (
    LOSS,
    Multiplier,
    encoded_ratio,
    final_ratio,
    floor,
    isolation,
    multiplier,
    outside_multiplier,
    outside_ratios,
)
from lutetia.models.study.results import StudyResults, curve, main_distance

OPPONENTS = {"monolith": "the monolith", "small-batch": "the small batch", "root-rate": "the monolith at √K times the rate"}
"""The arms that the mixture must be compared with at the whole budget, by the words of the table."""


def compute_section(results: StudyResults) -> str:
    """The section, or "" as long as no arm has a curve."""
    name = main_distance(results)
    if len(curve(results, "mixture", name)) < 2:
        return ""
    rows = [_row(results, arm, words, name) for arm, words in _arms(results).items()]
    head = [
        "mixture against", f"compute multiplier by {name}", "by seed", "by held-out loss", "by seed",
        f"ratio of debiased {name} from coded real clips", f"ratio of {name}",
    ]  # fmt: skip
    lines = [
        "## What the mixture is worth in compute",
        f"The *compute multiplier* says how many times the mixture's FLOPs the other arm spends for the same quality, read off "
        f"the learning curves (N = {results.config['evaluation']['curve_clips']}); above 1 the mixture needs less. Intervals are "
        f"95 %: by {name} over clips and seeds, by held-out loss over seeds.",
        table(head, rows),
    ]
    return "\n\n".join([*lines, *_notes(results, name)])


def _arms(results: StudyResults) -> dict[str, str]:
    others = [*results.config["controls"].get("full", ()), *results.outside]
    return OPPONENTS | {arm: arm for arm in others if arm not in OPPONENTS}


def _row(results: StudyResults, arm: str, words: str, name: str) -> list[str]:
    cells = [words]
    for metric in (name, LOSS):
        found = multiplier(results, arm, metric) or outside_multiplier(results, arm, metric)
        cells += [_multiplier(found), ", ".join(f"{value:.2f}" for value in found.by_seed) if found else "–"]
    encoded, ratio = encoded_ratio(results, arm), final_ratio(results, arm)
    outside = outside_ratios(results, arm, name)
    shown = str(ratio) if ratio else ", ".join(f"{value:.2f}" for value in outside.values()) or "–"
    if cells[1:] == ["–"] * 4 and ratio is None:
        return [f"{words}: not trained at the whole budget", *cells[1:], "–", "–"]
    return [*cells, str(encoded or "–"), shown]


def _multiplier(found: Multiplier | None) -> str:
    if found is None:
        return "–"
    mark = f"{found.bound} " if found.bound else ""
    return f"**{mark}{found.figure}**" + (" (by slope)" if found.by_slope else "")


def _notes(results: StudyResults, name: str) -> list[str]:
    notes = []
    if results.outside:
        notes.append(_outside(results, name))
    if text := _two(results, name):
        notes.append(text)
    if found := isolation(results):
        rows = [[each.metric, *(f"{value:.2f}" for value in (each.price, each.gain, each.gain / each.price))] for each in found]
        head = ["by", "price of isolation (random clusters ÷ monolith)", "gain of specialisation (random clusters ÷ mixture)"]
        notes.append("Experts on random clusters are isolated, but not specialised; one training of each arm:")
        notes.append(table([*head, "gain ÷ price"], rows))
    return notes


def _outside(results: StudyResults, name: str) -> str:
    rows = [
        [arm, str(each.seed), each.prompts, str(each.clips), f"{each.distance:.0f}", f"{each.loss:.3f}"]
        for arm, readings in results.outside.items()
        for each in readings
    ]
    head = ["arm", "seed", "prompts", "N", name, "held-out loss"]
    note = (
        "Arms that were carried out in runs of their own have final figures only. Their multiplier is *by slope*: the ratio to "
        "the mixture of the same seed, to the power 1 / (slope of the mixture's curve)."
    )
    return f"{note}\n\n{table(head, rows)}"


def _two(results: StudyResults, name: str) -> str:
    """What a plain ratio of 2.0 would take."""
    lowest, prompts = floor(results), results.config["evaluation"]["prompts"][0]
    row = next((row for row in results.headline.get(prompts, ()) if row.name == name), None)
    if lowest is None or row is None:
        return ""
    above: list[float] = [_above(side, lowest) for side in (row.first, row.second)]
    return (
        f"The floor F, {name} of real clips that the autoencoder encoded and decoded, is {lowest} (N = {lowest.n}). A plain "
        f"ratio of 2.0 takes M ≥ 2 X + F, with M and X the monolith and the mixture above the floor. Here X = {above[1]:.0f}, "
        f"so M would have to be {2 * above[1] + lowest.value:.0f}; it is {above[0]:.0f}."
    )


def _above(side: Figure, lowest: Figure) -> float:
    return side.value - lowest.value
