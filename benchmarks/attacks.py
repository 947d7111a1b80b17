"""`python -m benchmarks attacks [--tries N] [--labs M] [--keep FILE]`: what the ladder and the audits catch, and whom they wrong.

Each lie is told N times, each time in another run with other data and weights, and put before the coordinator's own ladder, then
before a replay of the first steps, then of the whole epoch. Honest boxes of every kind (threads, micro-batches, precisions, noise
in the data, shards of a single batch) train M runs of four epochs before the same judges. Rates carry exact (Clopper-Pearson)
95 % intervals.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .attacking.lab import BATCH, EPOCHS, SHORT, STEPS, Honest, Lab, Result
from .attacking.lies import EXCUSES, LIES, Scene, trigger_loss
from .report import Machine

WHOLE_SHARE = 0.05  # the manifest's default share of audits that replay the whole epoch


@dataclass(frozen=True)
class Try:
    """One result before the judges. `rung` is where the ladder stopped it, or ""; audits are told only of what passed."""

    who: str
    rung: str
    text: str
    short: str = ""
    whole: str = ""
    drift: str = ""
    effect: float | None = None
    seconds: tuple[tuple[str, float], ...] = ()
    size: int = 0
    excuse: bool = False
    """Whether the liar says that it trained on another kind of device in bfloat16, for which the tolerance is widest."""


async def judged(lab: Lab, who: str, result: Result, parent: Result | None, parent_loss: float | None) -> tuple[Try, Any]:
    verdict = await lab.judged(result, parent_loss)
    seconds = [(cost.rung, cost.seconds) for cost in verdict.costs]
    size = sum(getattr(result, name).stat().st_size for name in ("weights", "state", "trace"))
    if verdict.outcome != "valid":
        return Try(who, verdict.rung, verdict.text, seconds=tuple(seconds), size=size), verdict
    began = time.perf_counter()
    short, long = lab.audited(result, parent)
    seconds.append(("replay of the epoch", time.perf_counter() - began))
    return Try(who, "", "", short.outcome, long.outcome, long.text, None, tuple(seconds), size), verdict


async def lies(folder: Path, seed: int) -> list[Try]:
    """Every lie once, in a run of its own seed."""
    lab = Lab(folder, Honest(seed=seed, noise=(0.05, 0.1, 0.3)[seed % 3], clips=(8, 32)[seed % 2]))
    parent, before = lab.honest(None)
    verdict = await lab.judged(parent, None)
    assert verdict.outcome == "valid", verdict.text
    _, after = lab.honest(parent)
    tries = []
    for number, (name, lie) in enumerate(LIES.items()):
        draw = torch.Generator().manual_seed(1000 * seed + number)
        scene = Scene(lab, before, parent, after, draw, seed)
        snapshot = lie(scene)
        result = lab.publish(snapshot, EXCUSES[seed % 2])
        told, _ = await judged(lab, name, result, parent, verdict.loss)
        effect = _effect(scene, snapshot) if name.startswith("backdoor") else None
        tries.append(Try(**{**asdict(told), "effect": effect, "seconds": told.seconds, "excuse": seed % 2 == 1}))
    return tries


def _effect(scene: Scene, snapshot: Any) -> float:
    """The backdoor's loss on its own prompt, over the honest model's."""
    model = scene.lab.trainer(scene.parent).model
    losses = []
    for weights in (snapshot.ema, scene.after.ema):
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            losses.append(trigger_loss(scene, model).item())
    return losses[0] / losses[1]


def settings(count: int) -> Iterator[Honest]:
    draw = random.Random(1)
    for seed in range(count):
        yield Honest(
            seed=5000 + seed, threads=draw.choice((1, 2)), micro_batch=draw.choice((1, 2, 3, BATCH)),
            clips=draw.choice((BATCH, 8, 32, 64)), noise=draw.choice((0.0, 0.1, 0.5)),
            precision=draw.choice(("float32", "float32", "bfloat16")),
        )  # fmt: skip


async def honest(folder: Path, setting: Honest) -> list[Try]:
    """A whole run of four epochs."""
    lab, parent, parent_loss, tries = Lab(folder, setting), None, None, []
    for _ in range(EPOCHS):
        result, _ = lab.honest(parent)
        told, verdict = await judged(lab, repr(setting), result, parent, parent_loss)
        tries.append(told)
        if told.rung:
            break
        parent, parent_loss = result, verdict.loss
    return tries


def interval(count: int, total: int) -> str:
    """Share with its exact 95 % interval."""
    from scipy.stats import binomtest

    if not total:
        return "-"
    bounds = binomtest(count, total).proportion_ci(0.95, "exact")
    return f"{count}/{total} ({100 * bounds.low:.0f} to {100 * bounds.high:.1f} %)"


def lie_table(tries: Sequence[Try]) -> str:
    heads = (
        "lie", "caught by the ladder", "at rung", f"of the rest: replay of {SHORT} steps", "the same, with an excuse",
        "replay of the epoch: invalid", "inconclusive", "caught per epoch, newcomer", "per epoch at streak 10",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in LIES:
        told = [one for one in tries if one.who == name]
        if not told:
            continue
        passed = [one for one in told if not one.rung]
        rungs = ", ".join(sorted({one.rung for one in told if one.rung})) or "-"
        whole = sum(one.whole == "invalid" for one in passed)
        doubt = sum(one.whole == "inconclusive" for one in passed)
        audited = sum(_audit_chance(one) for one in passed)
        ladder = len(told) - len(passed)
        open_, excused = ([one.short == "invalid" for one in passed if one.excuse == excuse] for excuse in (False, True))
        shares = [interval(sum(found), len(found)) for found in (open_, excused)]
        shares += [interval(count, len(passed)) for count in (whole, doubt)]
        newcomer, trusted = ((ladder + chance * audited) / len(told) for chance in (1.0, 0.1))
        cells = (name, interval(ladder, len(told)), rungs, *shares, f"{newcomer:.2f}", f"{trusted:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _audit_chance(told: Try) -> float:
    """Of being found invalid by one audit, whole with the manifest's share."""
    return (1 - WHOLE_SHARE) * (told.short == "invalid") + WHOLE_SHARE * (told.whole == "invalid")


def summary(told: Sequence[Try], good: Sequence[Try]) -> str:
    wrong = {
        "refused by the ladder": sum(bool(one.rung) for one in good),
        f"convicted by a replay of {SHORT} steps": sum(one.short == "invalid" for one in good),
        "convicted by a replay of the epoch": sum(one.whole == "invalid" for one in good),
        "replay of the epoch inconclusive": sum(one.whole == "inconclusive" for one in good),
    }
    lines = [lie_table(told), "", "| honest results | of all |", "|---|---|"]
    lines += [f"| {what} | {interval(count, len(good))} |" for what, count in wrong.items()]
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


async def study(tries: int, labs: int, keep: Callable[[str, Try], None]) -> None:
    """Honest runs and lies in turns, so that what is there after a while is worth a table."""
    boxes = list(settings(labs))
    with tempfile.TemporaryDirectory() as name:
        rounds = max(2 * tries, labs)
        for number in range(rounds):
            folder = Path(name) / str(number)
            found = [("honest", one) for one in (await honest(folder / "honest", boxes[number]) if number < labs else ())]
            if number % 2 == 0 and number < 2 * tries:
                found += [("lie", one) for one in await lies(folder / "lies", number // 2)]
            for kind, one in found:
                keep(kind, one)
            shutil.rmtree(folder)
            print(f"  {number + 1} of {rounds}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attacks", description=__doc__)
    parser.add_argument("--tries", type=int, default=40, help="times that each lie is told (default 40)")
    parser.add_argument("--labs", type=int, default=60, help=f"honest runs of {EPOCHS} epochs (default 60)")
    parser.add_argument("--keep", type=Path, default=Path(".fuzz/attacks.jsonl"), help="every single try, one per line")
    parser.add_argument("--report", action="store_true", help="only print the tables of what --keep holds")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        arguments.keep.parent.mkdir(parents=True, exist_ok=True)
        with arguments.keep.open("w") as file:
            asyncio.run(
                study(
                    arguments.tries,
                    arguments.labs,
                    lambda kind, one: print(json.dumps({"kind": kind, **asdict(one)}), file=file, flush=True),
                )
            )
    told, good = read(arguments.keep)
    print(f"{Machine.this()}\n\n{STEPS} steps of {BATCH} samples an epoch.\n\n{summary(told, good)}")
    for one in good:
        if one.rung or "invalid" in (one.short, one.whole):
            print(f"wronged: {one.who}: {one.rung} {one.text} {one.drift}", file=sys.stderr)


def read(kept: Path) -> tuple[list[Try], list[Try]]:
    """(lies, honest results)."""
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    of = {
        kind: [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == kind] for kind in ("lie", "honest")
    }
    return [Try(**row) for row in of["lie"]], [Try(**row) for row in of["honest"]]
