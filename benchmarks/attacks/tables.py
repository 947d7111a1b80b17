"""The tables of `benchmarks attacks`: what was caught, what was wrongly refused, what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.attacks.lab import SHORT
from benchmarks.attacks.lies import EXCUSES, LIES, OF_ADAPTERS, WEDGES

WHOLE_SHARE = 0.05  # the manifest's default share of audits that replay the whole epoch
OWN, *OTHERS = EXCUSES


class Replays(NamedTuple):
    """What audits of one result find when its author claims that it was made on `device` ("": the truth).

    `short` begins with the first SHORT steps; `closer`: it also replayed the whole epoch. `chance`: the probability that an audit
    of a secret number of first steps convicts. `whole` replays the whole epoch at once.
    """

    device: str
    short: str
    chance: float
    closer: bool
    whole: str
    text: str
    drift: float | None
    noise: float | None


@dataclass(frozen=True)
class Try:
    """One result. `check` is the check that it failed, or ""; only results that passed are audited."""

    who: str
    check: str
    text: str
    audits: tuple[Replays, ...] = ()
    effect: float | None = None
    wedged: bool | None = None
    """Whether the honest epoch after it was refused."""
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
    """Share of the results that passed the checks, without an interval to save space."""
    replays = [replay for one in tries for replay in one.audits if replay.device == device]
    return f"{sum(map(counts, replays))}/{len(replays)}" if replays else "-"


def lie_table(tries: Sequence[Try]) -> str:
    """Checks, and audits that begin with a few steps, by the device that the liar claims."""
    heads = ("lie", "caught by the checks", "at check", *EXCUSES, "newcomer", "newcomer, best excuse", "streak 10")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in (*LIES, *OF_ADAPTERS):
        if lies := [one for one in tries if one.who == name]:
            caught_by_checks = sum(bool(one.check) for one in lies)
            checks = ", ".join(sorted({one.check for one in lies if one.check})) or "-"
            caught = [_share(lies, device, lambda replay: replay.short == "invalid") for device in EXCUSES]
            chances = {device: sum(_audit_chance(one, device) for one in lies) for device in EXCUSES}
            worst = min(chances, key=lambda device: chances[device])
            newcomer, excused, trusted = (
                f"{(caught_by_checks + share * chances[device]) / len(lies):.3f}"
                for device, share in ((OWN, 1), (worst, 1), (worst, 0.1))
            )
            cells = (name, interval(caught_by_checks, len(lies)), checks, *caught, newcomer, excused, trusted)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def whole_table(tries: Sequence[Try]) -> str:
    """Replays of the whole epoch: how many are invalid, and how many inconclusive, which resets the author's streak."""
    lines = [f"| lie | {' | '.join(EXCUSES)} |", "|---" * (1 + len(EXCUSES)) + "|"]
    for name in (*LIES, *OF_ADAPTERS):
        lies = [one for one in tries if one.who == name and not one.check]
        if lies:
            cells = [
                f"{_share(lies, device, lambda replay: replay.whole == 'invalid')}, in doubt "
                f"{_share(lies, device, lambda replay: replay.whole == 'inconclusive').partition('/')[0]}"
                for device in EXCUSES
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _audit_chance(lie: Try, device: str) -> float:
    """The chance that one audit finds it invalid, when WHOLE_SHARE of audits replay the whole epoch."""
    replay = next((one for one in lie.audits if one.device == device), None)
    return (1 - WHOLE_SHARE) * replay.chance + WHOLE_SHARE * (replay.whole == "invalid") if replay else 0.0


def honest_table(good: Sequence[Try]) -> str:
    """How often honest results are refused or need a longer replay, by the device that their author claims."""
    passed = [one for one in good if not one.check]
    devices = {"the truth": "", **{device: device for device in EXCUSES}}
    lines = [f"| honest results; device that their author claims | {' | '.join(devices)} |", "|---" * (1 + len(devices)) + "|"]
    refused = interval(sum(bool(one.check) for one in good), len(good))
    lines.append(f"| refused by the checks | {refused} |{' |' * len(EXCUSES)}")
    rows: dict[str, Callable[[Replays], bool]] = {
        f"convicted by an audit that begins with {SHORT} steps": lambda found: found.short == "invalid",
        "convicted by a replay of the epoch": lambda found: found.whole == "invalid",
        "inconclusive after a replay of the epoch": lambda found: found.whole == "inconclusive",
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


def wedge_table(tries: Sequence[Try]) -> str:
    """What follows for the next honest epoch, and whether the replay that its refusal asks for convicts.

    A convicted epoch is rolled back. A shard stays stopped where the next epoch is refused and the replay does not convict.
    """
    heads = (
        "lie",
        "passes the checks",
        "refuses the next honest epoch",
        "a replay of the epoch convicts",
        "the shard stays stopped",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in WEDGES:
        if lies := [one for one in tries if one.who == name]:
            passed = [one for one in lies if not one.check]
            convicted = [one for one in passed if all(replay.whole == "invalid" for replay in one.audits)]
            wedged = [one for one in passed if one.wedged]
            stopped = [one for one in wedged if one not in convicted]
            cells = (
                interval(len(group), len(of))
                for group, of in ((passed, lies), (wedged, passed), (convicted, passed), (stopped, passed))
            )
            lines.append(f"| {' | '.join((name, *cells))} |")
    return "\n".join(lines)


def checks_table(lies: Sequence[Try], good: Sequence[Try]) -> str:
    """What the checks alone catch, and how many honest results they refuse."""
    lines = ["| result | refused by the checks | at check |", "|---|---|---|"]
    groups = {name: [one for one in lies if one.who == name] for name in LIES} | {"honest": list(good)}
    for name, tries in groups.items():
        if tries:
            checks = ", ".join(sorted({one.check for one in tries if one.check})) or "-"
            lines.append(f"| {name} | {interval(sum(bool(one.check) for one in tries), len(tries))} | {checks} |")
    return "\n".join(lines)


def summary(lies: Sequence[Try], good: Sequence[Try]) -> str:
    """All tables."""
    lines = [lie_table(lies), "", whole_table(lies), "", wedge_table(lies), "", honest_table(good)]
    lines += ["", "| backdoor | its prompt's loss over the honest model's, median |", "|---|---|"]
    for name in (name for name in LIES if name.startswith("backdoor")):
        effects = sorted(one.effect for one in lies if one.who == name and one.effect is not None)
        if effects:
            lines.append(f"| {name} | {effects[len(effects) // 2]:.2f} |")
    costs: dict[str, list[float]] = {}
    for one in good:
        for check, seconds in one.seconds:
            costs.setdefault(check, []).append(seconds)
    size = sum(one.size for one in good) / max(1, len(good))
    lines += ["", f"| cost of checking one honest result of {size / 1024:.0f} KiB | median ms |", "|---|---|"]
    lines += [f"| {check} | {1000 * sorted(values)[len(values) // 2]:.0f} |" for check, values in costs.items()]
    return "\n".join(lines)
