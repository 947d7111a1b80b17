"""What lanes cost the coordinator, by their number: the crowd scenario with one node for each lane, in virtual time."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import Machine
from lutetia.simulation.config import SimulationConfig, with_lanes
from lutetia.simulation.runner import SimulationOutcome, simulate
from lutetia.simulation.scenarios.catalogue import SCENARIOS
from lutetia.system.files import write_atomic

SHARDS = 16
HEADS = (
    "lanes in all", "nodes", "checks at once", "lent to nodes", "have a lane", "take steps", "results accepted per hour",
    "work in accepted epochs", "results that wait", "checks busy", "received, MiB/s", "sent, MiB/s", "audits due",
    "stimuli of the judge per second", "processor seconds per virtual hour",
)  # fmt: skip
CROWD = SCENARIOS["crowd"].config
LENT = 16


def study(counts: Sequence[int], seconds: float, out: Path) -> int:
    """Measure what the notes in `out` lack: runs with so many lanes of each of SHARDS shards. Returns 60 if an invariant broke.

    Each is measured with the coordinator's default number of checks at once, and where that is too small for the lanes also with
    as many as they need. Up to LENT lanes of a shard also with checks that are lent, and a quarter more nodes than lanes.
    """
    notes = out / "lanes-simulated.json"
    rows: dict[str, dict[str, Any]] = json.loads(notes.read_text()) if notes.exists() else {}
    for lanes in counts:
        config, default = with_lanes(replace(CROWD, shards=SHARDS), lanes), CROWD.checks_at_once
        variants = [replace(config, checks_at_once=checks) for checks in sorted({default, config.checks_at_once})]
        if 1 < lanes <= LENT:
            variants.append(replace(config, checks_at_once=default, lent=True))
        for variant in variants:
            name = f"{lanes} lanes, {variant.checks_at_once} checks at once, {seconds:.0f} s{', lent' if variant.lent else ''}"
            if name not in rows:
                rows[name] = _measured(variant, lanes, seconds)
                print(name, rows[name], flush=True)
                write_atomic(notes, json.dumps(rows, indent=1).encode())
    (out / "lanes-simulated.md").write_text(report(rows))
    return 60 if any(row["violation"] for row in rows.values()) else 0


def _measured(config: SimulationConfig, lanes: int, seconds: float) -> dict[str, Any]:
    began = time.process_time()
    nodes = SHARDS * lanes * (5 if config.lent else 4) // 4
    outcome = simulate(replace(SCENARIOS["crowd"], config=config), nodes, 1, seconds=seconds, shrink=False)
    gc.collect()  # the simulation itself runs without the collector
    facts, per_hour = outcome.facts, 3600 / seconds
    checked = facts["results_accepted"] * config.check_seconds / (config.checks_at_once * seconds)
    return {
        "lanes": SHARDS * lanes, "nodes": outcome.peers, "checks": config.checks_at_once, "lent": config.lent, "seconds": seconds,
        "utilisation": facts["utilisation"], "training": facts["training"],
        "accepted": facts["results_accepted"] * per_hour, "useful": facts["useful"], "waiting": facts["results_waiting"],
        "busy": checked, "received": _rate(outcome, outcome.costs.received), "sent": _rate(outcome, outcome.costs.served),
        "audits": facts["audits_due"], "judged": facts["judged"] / seconds, "cpu": (time.process_time() - began) * per_hour,
        "violation": str(outcome.violation or ""),
    }  # fmt: skip


def _rate(outcome: SimulationOutcome, size: float) -> float:
    return size / outcome.seconds / 2**20


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0):.0f} %"


def _line(row: dict[str, Any]) -> str:
    cells = (
        row["lanes"], row["nodes"], row["checks"], "yes" if row["lent"] else "no", _percent(row["utilisation"]),
        _percent(row["training"]), f"{row['accepted']:.0f}", _percent(row["useful"]), row["waiting"],
        "-" if row["lent"] else _percent(row["busy"]), f"{row['received']:.1f}", f"{row['sent']:.1f}", row["audits"],
        f"{row['judged']:.1f}", f"{row['cpu']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def report(rows: dict[str, dict[str, Any]]) -> str:
    """The page, from the notes alone."""
    known = list(rows.values())
    seconds = ", ".join(sorted({f"{row['seconds']:.0f}" for row in known}))
    violations = [f"- {name}: {row['violation']}" for name, row in rows.items() if row["violation"]]
    return "\n".join([
        "# What lanes cost the coordinator, simulated", "",
        f"`python -m benchmarks simulate lanes` on {Machine.this()}: the scenario `crowd` with {SHARDS} shards,",
        f"a node for each lane, seed 1, {seconds} virtual seconds, joining included. A node of speed 1 takes "
        f"{CROWD.epoch_seconds:.0f} s",
        f"for an epoch or, where there are lanes, for the median one; their shares fit the speeds of the nodes. A check takes "
        f"{CROWD.check_seconds} s. Nodes send {CROWD.up / 2**20:.0f} MiB/s in the median, the "
        f"coordinator {CROWD.origin_up / 2**20:.0f} MiB/s.", "",
        f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS), *map(_line, known), "",
        "- Have a lane, take steps: shares of the fit devices that are online, means over looks once per lease. The others",
        "  fetch, or wait for a verdict or for the merge of their epoch.",
        "- Work in accepted epochs: steps that stand, of all taken until the end, those of epochs under way included.",
        "- Checks busy: seconds of accepted results' checks, of the seconds of all checks at once. Merges are checked besides.",
        "- Received: results, and what the coordinator fetches for its own audits. Sent: data and epochs to nodes; nodes that",
        "  have a parcel are asked before the coordinator.",
        "- Processor seconds are those of the whole simulation, on a machine that was busy with other work.", "",
        *(violations or ["No invariant was violated."]), "", *_verdict(known), "",
    ])  # fmt: skip


def _verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What breaks first, by the measured rows."""
    size = (CROWD.weights_bytes + CROWD.state_bytes) / 2**20
    own, lent = [row for row in rows if not row["lent"]], [row for row in rows if row["lent"]]
    few, many = own[0], max(own, key=lambda row: (row["lanes"], row["checks"]))
    same = [row for row in own if row["lanes"] == many["lanes"]]
    waiting = ", ".join(f"{row['waiting']} results wait with {row['checks']} checks at once" for row in same)
    return f"""## What breaks first, and the remedy

1. **Audits**, at any number of lanes. Two whole epochs of every newcomer are replayed, by nodes without a lane or, one after
   another, by the coordinator. Where every node has a lane they wait: {few["audits"]} were due at the end with {few["lanes"]}
   lanes, {many["audits"]} with {many["lanes"]}. What is found late is rolled back late. Remedy: more nodes than lanes, or fewer
   audits in the manifest.
2. **The coordinator's line.** A result is {size:.0f} MiB, and the coordinator fetches it once. With {many["lanes"]} lanes it
   received {many["received"]:.1f} MiB/s and sent {many["sent"]:.1f} MiB/s; the model sets no limit to what it receives. A line
   of 100 Mbit/s is full at about {100e6 / 8 / 2**20 / many["received"] * many["lanes"]:.0f} lanes. Nodes are asked for a parcel
   before the coordinator, which bounds what it sends. Remedy: longer epochs, adapters or compact checkpoints; smaller shares of
   a lane do not make a result smaller. That nodes upload to a neighbour who merges is not built: its merge would have to be
   proved like a result.
3. **Checks.** With {many["lanes"]} lanes {waiting}.
   Remedy: a greater `checks_at_once`, on a machine that can bear it.{_lent(lent, own)}
""".rstrip().split("\n")


def _lent(rows: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> str:
    """What lending brought."""
    if not rows:
        return ""
    usual = {row["lanes"]: row for row in reversed(own)}
    compared = "; ".join(
        f"with {row['lanes']} lanes {row['accepted']:.0f} results an hour instead of {usual[row['lanes']]['accepted']:.0f}, and "
        f"{_percent(row['useful'])} of the work in accepted epochs instead of {_percent(usual[row['lanes']]['useful'])}"
        for row in rows
    )
    return f"""
   `lend_checks` ([lent-checks.md](lent-checks.md)) frees the coordinator of them, at a price in time: two nodes check each
   result, and the same nodes replay epochs. With a quarter more nodes than lanes: {compared}.
   The coordinator still merges."""
