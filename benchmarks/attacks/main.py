"""`python -m benchmarks attacks [--tries N] [--labs M] [--only WORDS] [--keep FILE]`: what checks and audits catch and refuse.

Each lie is tried N times, in runs with different data and weights. It goes through the coordinator's own checks, and then, for
each device that a liar may claim, through an audit of the first steps and one of the whole epoch. Honest nodes of every kind
(threads, micro-batches, precisions, noise in the data, shards of a single batch, two held-out clips) train M runs of four
epochs, and their results go through the same checks and audits. Rates have exact (Clopper-Pearson) 95 % intervals.
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from benchmarks.attacks.lab import BATCH, EPOCHS, STEPS, Honest, Lab, Result
from benchmarks.attacks.lies import EXCUSES, LIES, OF_ADAPTERS, WEDGES, Scene, trigger_loss
from benchmarks.attacks.tables import Replays, Try, checks_table, summary
from benchmarks.report import Machine
from lutetia.coordinator.runtime.check_runner import CHECK_SECONDS
from lutetia.models.experts.trained import load_trained
from lutetia.protocol.schema.records import TrainedWith


class Kind(TypedDict):
    """What is alike in all runs of a study: see `Honest`."""

    adapter: bool
    compact: bool
    muon: bool


def audits(lab: Lab, result: Result, parent: Result | None, devices: Mapping[str, TrainedWith | None]) -> Iterator[Replays]:
    for name, claimed in devices.items():
        audited = lab.audited(result, parent, claimed)
        first, whole = audited.first, audited.whole
        yield Replays(
            name, audited.begun_short, audited.chance, first.closer, whole.outcome, whole.text, audited.drift, audited.noise
        )


async def judged(
    lab: Lab,
    who: str,
    result: Result,
    parent: Result | None,
    devices: Mapping[str, TrainedWith | None],
    replayed: bool = True,
) -> tuple[Try, Any]:
    verdict = await lab.judged(result, parent)
    seconds = [(cost.check, cost.seconds) for cost in verdict.costs]
    size = sum(getattr(result, name).stat().st_size for name in ("weights", "state", "trace"))
    if verdict.outcome != "valid" or not replayed:
        return Try(
            who, "" if verdict.outcome == "valid" else verdict.check, verdict.text, seconds=tuple(seconds), size=size
        ), verdict
    began = time.perf_counter()
    replays = tuple(audits(lab, result, parent, devices))
    seconds.append(("replay of the epoch", (time.perf_counter() - began) / len(replays)))
    return Try(who, "", "", replays, seconds=tuple(seconds), size=size), verdict


async def lies(folder: Path, seed: int, only: str, kind: Kind, few: bool = False) -> list[Try]:
    """Try every lie whose name holds `only` once, in the run of `seed`."""
    setting = Honest(seed=seed, noise=(0.05, 0.1, 0.3)[seed % 3], clips=(8, 32)[seed % 2], **kind)
    lab = Lab(folder, setting, _seconds(few))
    parent, before = lab.honest(None)
    verdict = await lab.judged(parent, None)
    assert verdict.outcome == "valid", verdict.text
    _, after = lab.honest(parent)
    tries = []
    for number, (name, lie) in enumerate({**LIES, **(OF_ADAPTERS if setting.adapter else {})}.items()):
        draw = torch.Generator().manual_seed(1000 * seed + number)
        if only not in name:
            continue
        scene = Scene(lab, before, parent, after, draw, seed)
        snapshot = lie(scene)
        result = lab.publish(snapshot)
        one, _ = await judged(lab, name, result, parent, EXCUSES, not few)
        one = replace(one, effect=_effect(scene, snapshot) if name.startswith("backdoor") else None)
        tries.append(replace(one, wedged=await _wedged(lab, result)) if name in WEDGES and not one.check else one)
    return tries


def _seconds(few: bool) -> float:
    """What scoring one result may take: next to nothing, so that the fewest rows are scored, or the default."""
    return 1e-9 if few else CHECK_SECONDS


async def _wedged(lab: Lab, accepted: Result) -> bool:
    """Whether the checks refuse the honest epoch after `accepted`."""
    following, _ = lab.honest(accepted)
    return (await lab.judged(following, accepted)).outcome != "valid"


def _effect(scene: Scene, snapshot: Any) -> float:
    """The backdoor's loss on its own prompt, over the honest model's."""
    model = scene.lab.trainer(scene.parent).model
    losses = []
    for weights in (snapshot.ema, scene.after.ema):
        load_trained(model, weights)
        with torch.no_grad():
            losses.append(trigger_loss(scene, model).item())
    return losses[0] / losses[1]


def settings(count: int, kind: Kind) -> Iterator[Honest]:
    draw = random.Random(1)
    for seed in range(count):
        yield Honest(
            seed=5000 + seed, threads=draw.choice((1, 2)), micro_batch=draw.choice((1, 2, 3, BATCH)),
            clips=draw.choice((BATCH, 8, 32, 64)), holdout=draw.choice((2, 4, 16)), noise=draw.choice((0.0, 0.1, 0.5)),
            precision=draw.choice(("float32", "float32", "bfloat16")), **kind,
        )  # fmt: skip


def truths(setting: Honest) -> dict[str, TrainedWith | None]:
    """What an honest node may claim: float32 is at least as exact as any claim; bfloat16 must not be claimed as float32."""
    return {"": None, **{name: claim for name, claim in EXCUSES.items() if setting.precision in ("float32", claim.precision)}}


async def honest(folder: Path, setting: Honest, few: bool = False) -> list[Try]:
    """A whole run of four epochs."""
    lab, parent, tries = Lab(folder, setting, _seconds(few)), None, []
    for _ in range(EPOCHS):
        result, _ = lab.honest(parent)
        one, _ = await judged(lab, repr(setting), result, parent, truths(setting), not few)
        tries.append(one)
        if one.check:
            break
        parent = result
    return tries


async def study(
    tries: int, labs: int, only: str, kind: Kind, few: bool, keep: Callable[[str, Try], None], done: tuple[int, int]
) -> None:
    """Honest runs and lies alternate, so that an unfinished study has both. `done`: tries and labs that an earlier one made."""
    honest_settings = list(settings(labs, kind))
    with tempfile.TemporaryDirectory() as root:
        rounds = max(2 * tries, labs)
        for number in range(rounds):
            folder = Path(root) / str(number)
            found = [
                ("honest", one)
                for one in (await honest(folder / "honest", honest_settings[number], few) if done[1] <= number < labs else ())
            ]
            if number % 2 == 0 and 2 * done[0] <= number < 2 * tries:
                found += [("lie", one) for one in await lies(folder / "lies", number // 2, only, kind, few)]
            for name, one in found:
                keep(name, one)
            shutil.rmtree(folder, ignore_errors=True)
            print(f"  {number + 1} of {rounds}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attacks", description=__doc__)
    parser.add_argument("--tries", type=int, default=40, help="times that each lie is tried (default 40)")
    parser.add_argument("--labs", type=int, default=60, help=f"honest runs of {EPOCHS} epochs (default 60)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the lies whose names hold these words")
    parser.add_argument("--adapter", action="store_true", help="experts are adapters (LoRA) on a trained base")
    parser.add_argument("--compact", action="store_true", help="checkpoints in the compact form")
    parser.add_argument("--muon", action="store_true", help="Muon trains the hidden matrices")
    parser.add_argument("--fewest-rows", action="store_true", help="score the fewest rows, and replay nothing")
    parser.add_argument("--keep", type=Path, default=Path(".fuzz/attacks.jsonl"), help="file for all tries, one per line")
    parser.add_argument("--go-on", action="store_true", help="make what is missing in --keep, from the same arguments")
    parser.add_argument("--report", action="store_true", help="only print the tables of what --keep holds")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        arguments.keep.parent.mkdir(parents=True, exist_ok=True)
        done = made(*read(arguments.keep)) if arguments.go_on and arguments.keep.exists() else (0, 0)
        with arguments.keep.open("a" if arguments.go_on else "w") as file:
            asyncio.run(
                study(
                    arguments.tries,
                    arguments.labs,
                    arguments.only,
                    {"adapter": arguments.adapter, "compact": arguments.compact, "muon": arguments.muon},
                    arguments.fewest_rows,
                    lambda kind, one: print(json.dumps({"kind": kind, **asdict(one)}), file=file, flush=True),
                    done,
                )
            )
    lying, good = read(arguments.keep)
    table = checks_table if arguments.fewest_rows else summary
    print(f"{Machine.this()}\n\n{STEPS} steps of {BATCH} samples an epoch.\n\n{table(lying, good)}")
    for one in good:
        wrong = [found for found in one.audits if "invalid" in (found.short, found.whole)]
        if one.check or wrong:
            print(f"wrongly refused: {one.who}: {one.check} {one.text} {wrong}", file=sys.stderr)


def made(lying: Sequence[Try], good: Sequence[Try]) -> tuple[int, int]:
    """How many times every lie was tried, and in how many runs honest nodes trained."""
    return min(Counter(one.who for one in lying).values(), default=0), len({one.who for one in good})


def read(kept: Path) -> tuple[list[Try], list[Try]]:
    """(lies, honest results)."""
    of: dict[str, list[Try]] = {"lie": [], "honest": []}
    for row in map(json.loads, kept.read_text().splitlines()):
        kind, found = row.pop("kind"), tuple(Replays(*found) for found in row.pop("audits"))
        of[kind].append(Try(**row, audits=found))
    return of["lie"], of["honest"]
