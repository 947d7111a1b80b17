"""The tables of `benchmarks attacks`: what was caught, whom it wronged, what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.attacks.lab import SHORT
from benchmarks.attacks.lies import EXCUSES, LIES

WHOLE_SHARE = 0.05  # the manifest's default share of audits that replay the whole epoch
OWN, *OTHERS = EXCUSES


class Replays(NamedTuple):
    """What audits of one result find when its author says that it was made on `device` ("": the truth).

    `short` begins with the first steps; `closer`: it went on to the whole epoch. `whole` replays that at once.
    """

    device: str
    short: str
    closer: bool
    whole: str
    text: str
    drift: float | None
    noise: float | None


@dataclass(frozen=True)
class Try:
    """One result before the judges. `rung` is where the ladder stopped it, or ""; audits are told only of what passed."""

    who: str
    rung: str
    text: str
    audits: tuple[Replays, ...] = ()
    effect: float | None = None
    seconds: tuple[tuple[str, float], ...] = ()
    size: int = 0


def interval(count: int, total: int) -> str:
    """Share with its exact 95 % interval."""
    from scipy.stats import binomtest

    if not total:
        return "-"
    bounds = binomtest(count, total).proportion_ci(0.95, "exact")
    return f"{count}/{total} ({100 * bounds.low:.0f} to {100 * bounds.high:.1f} %)"


def _share(tries: Sequence[Try], device: str, counts: Callable[[Replays], bool]) -> str:
    """Of the results that passed the ladder; short, where an interval would fill the page."""
    found = [one for told in tries for one in told.audits if one.device == device]
    return f"{sum(map(counts, found))}/{len(found)}" if found else "-"


def lie_table(tries: Sequence[Try]) -> str:
    """Ladder, and audits that begin with a few steps, by what the liar says of its device."""
    heads = ("lie", "caught by the ladder", "at rung", *EXCUSES, "newcomer", "newcomer, best excuse", "streak 10")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in LIES:
        if told := [one for one in tries if one.who == name]:
            ladder = sum(bool(one.rung) for one in told)
            rungs = ", ".join(sorted({one.rung for one in told if one.rung})) or "-"
            caught = [_share(told, device, lambda found: found.short == "invalid") for device in EXCUSES]
            chances = {device: sum(_audit_chance(one, device) for one in told) for device in EXCUSES}
            worst = min(chances, key=lambda device: chances[device])
            newcomer, excused, trusted = (
                f"{(ladder + share * chances[device]) / len(told):.3f}" for device, share in ((OWN, 1), (worst, 1), (worst, 0.1))
            )
            cells = (name, interval(ladder, len(told)), rungs, *caught, newcomer, excused, trusted)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def whole_table(tries: Sequence[Try]) -> str:
    """Replays of the whole epoch: invalid, and of the others how many leave doubt, which takes all trust."""
    lines = [f"| lie | {' | '.join(EXCUSES)} |", "|---" * (1 + len(EXCUSES)) + "|"]
    for name in LIES:
        told = [one for one in tries if one.who == name and not one.rung]
        if told:
            cells = [
                f"{_share(told, device, lambda found: found.whole == 'invalid')}, in doubt "
                f"{_share(told, device, lambda found: found.whole == 'inconclusive').partition('/')[0]}"
                for device in EXCUSES
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _audit_chance(told: Try, device: str) -> float:
    """Of being found invalid by one audit, whole with the manifest's share."""
    found = next((one for one in told.audits if one.device == device), None)
    return (1 - WHOLE_SHARE) * (found.short == "invalid") + WHOLE_SHARE * (found.whole == "invalid") if found else 0.0


def honest_table(good: Sequence[Try]) -> str:
    """Whom the judges wrong, and how often an honest box costs a closer look, by what it says of its device."""
    passed = [one for one in good if not one.rung]
    devices = {"the truth": "", **{device: device for device in EXCUSES}}
    lines = [f"| honest results, which say that they were made by | {' | '.join(devices)} |", "|---" * (1 + len(devices)) + "|"]
    refused = interval(sum(bool(one.rung) for one in good), len(good))
    lines.append(f"| refused by the ladder | {refused} |{' |' * len(EXCUSES)}")
    rows: dict[str, Callable[[Replays], bool]] = {
        f"convicted by an audit that begins with {SHORT} steps": lambda found: found.short == "invalid",
        "convicted by a replay of the epoch": lambda found: found.whole == "invalid",
        "left in doubt by a replay of the epoch": lambda found: found.whole == "inconclusive",
        f"{SHORT} steps asked for the whole epoch": lambda found: found.closer,
        "the whole epoch asked for a second replay": lambda found: found.noise is not None,
    }
    for what, counts in rows.items():
        lines.append(f"| {what} | {' | '.join(_share(passed, device, counts) for device in devices.values())} |")
    worst = [
        max((found.drift or 0.0 for one in passed for found in one.audits if found.device == d), default=0.0)
        for d in devices.values()
    ]
    lines.append(f"| largest drift | {' | '.join(f'{drift:.2g}' for drift in worst)} |")
    return "\n".join(lines)


def summary(told: Sequence[Try], good: Sequence[Try]) -> str:
    """All tables."""
    lines = [lie_table(told), "", whole_table(told), "", honest_table(good)]
    lines += ["", "| backdoor | its prompt's loss over the honest model's, median |", "|---|---|"]
    for name in (name for name in LIES if name.startswith("backdoor")):
        effects = sorted(one.effect for one in told if one.who == name and one.effect is not None)
        if effects:
            lines.append(f"| {name} | {effects[len(effects) // 2]:.2f} |")
    costs: dict[str, list[float]] = {}
    for one in good:
        for rung, seconds in one.seconds:
            costs.setdefault(rung, []).append(seconds)
    size = sum(one.size for one in good) / max(1, len(good))
    lines += ["", f"| cost of judging one honest result of {size / 1024:.0f} KiB | median ms |", "|---|---|"]
    lines += [f"| {rung} | {1000 * sorted(values)[len(values) // 2]:.0f} |" for rung, values in costs.items()]
    return "\n".join(lines)
