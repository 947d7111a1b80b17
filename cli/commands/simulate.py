"""`lutetia simulate`: simulate a swarm in virtual time from a seed, and check its invariants after every event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lutetia.cli.arguments import setting
from lutetia.cli.output import JsonFlag, emit
from lutetia.system.errors import InvariantError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lutetia.simulation.runner import SimulationOutcome


def register(app: typer.Typer) -> None:
    app.command("simulate")(simulate)


def simulate(
    scenario: Annotated[str | None, typer.Argument(help="Name of a scenario; --list prints all.", metavar="[SCENARIO]")] = None,
    peers: Annotated[int | None, setting("SIMULATE_PEERS", "Number of nodes. Default: the scenario's.", min=1)] = None,
    seed: Annotated[int, setting("SIMULATE_SEED", "Seed of all random choices.")] = 0,
    seconds: Annotated[float | None, setting("SIMULATE_SECONDS", "Virtual seconds. Default: the scenario's.", min=1)] = None,
    shards: Annotated[
        int | None, setting("SIMULATE_SHARDS", "Number of shards. Default: the scenario's.", min=1, max=4096)
    ] = None,
    lanes: Annotated[
        int | None, setting("SIMULATE_LANES", "Lanes of each shard. Default: the scenario's.", min=1, max=256)
    ] = None,
    keep: Annotated[
        str | None, setting("SIMULATE_KEEP", "Carry out only these steps of the plan, like 0,3,17 (none: -).")
    ] = None,
    broken: Annotated[str | None, setting("SIMULATE_BROKEN", "Break this rule on purpose; --list prints all.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the scenarios, and the rules for --broken.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Simulate a swarm: real state machines, virtual time, every invariant checked after every event.

    Exit codes: 0 all invariants held, 2 no such scenario, 60 one was violated (its shortest plan is printed).
    """
    if listed:
        emit(_catalogue(), as_json, _catalogue_table)
        return
    if scenario is None:
        raise UsageError("name a scenario; `lutetia simulate --list` prints all of them")
    outcome = _run(scenario, peers, seed, seconds, shards, lanes, keep, broken)
    emit(_document(outcome), as_json, lambda: _table(outcome))
    if outcome.violation is not None:
        if not as_json:
            from lutetia.cli.output import console

            console().print(_explanation(outcome, _command(outcome, seconds, shards, lanes, broken)), soft_wrap=True)
        raise typer.Exit(InvariantError.code)


def _run(
    name: str, peers: int | None, seed: int, seconds: float | None, shards: int | None, lanes: int | None, keep: str | None,
    broken: str | None,
) -> SimulationOutcome:  # fmt: skip
    from dataclasses import replace

    from lutetia.cli.progress import progress
    from lutetia.simulation.config import with_lanes
    from lutetia.simulation.faults.mutants import mutant_rules
    from lutetia.simulation.runner import simulate as run
    from lutetia.simulation.runner import steps_of
    from lutetia.simulation.scenarios.catalogue import scenario as find

    chosen = find(name)
    if shards is not None:
        chosen = replace(chosen, config=replace(chosen.config, shards=shards))
    if lanes is not None:
        chosen = replace(chosen, config=with_lanes(chosen.config, lanes))
    count = chosen.peers if peers is None else peers
    if count < chosen.min_peers:
        raise UsageError(f"scenario {name} needs at least {chosen.min_peers} peers")
    decide = mutant_rules(broken) if broken else None
    kept = None if keep is None else _numbers(keep, len(steps_of(chosen, count, seed)))
    with progress(f"simulating {name}") as report:
        return run(
            chosen, count, seed, seconds=seconds, keep=kept, decide=decide,
            on_progress=lambda done, total: report("virtual seconds", round(done), round(total)),
        )  # fmt: skip


def _numbers(text: str, steps: int) -> list[int]:
    """Parse step numbers of a plan of `steps` steps. Raises UsageError for a malformed or too large number."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip() not in ("", "-")]
    except ValueError:
        raise UsageError(f"cannot read the steps {text!r}; write their numbers like 0,3,17") from None
    if beyond := [number for number in numbers if not 0 <= number < steps]:
        raise UsageError(f"the plan has no step {beyond[0]}; its {steps} steps count from 0")
    return numbers


def _document(outcome: SimulationOutcome) -> dict[str, Any]:
    violation = outcome.violation
    return {
        "scenario": outcome.scenario, "peers": outcome.peers, "seed": outcome.seed, "virtual_seconds": outcome.seconds,
        "wall_seconds": round(outcome.wall, 3), "events": outcome.events, "steps": outcome.steps, "checks": outcome.checks,
        "accepted": outcome.accepted, "owners": outcome.owners, "facts": outcome.facts,
        "messages": dict(outcome.costs.messages), "bytes": dict(outcome.costs.bytes),
        "violation": None if violation is None else {
            "invariant": violation.name, "text": str(violation), "keep": list(outcome.shortest), "steps": list(outcome.plan),
            "trace": list(outcome.trace), "tries": outcome.tries,
        },
    }  # fmt: skip


def _table(outcome: SimulationOutcome) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    facts, costs = outcome.facts, outcome.costs
    hours = outcome.seconds / 3600
    rows = (
        ("scenario", f"{outcome.scenario}, {outcome.peers} peers, seed {outcome.seed}, {outcome.steps} steps in the plan"),
        ("virtual time", f"{outcome.seconds:g} s in {outcome.wall:.2f} s ({outcome.seconds / max(outcome.wall, 1e-9):.0f} ×)"),
        ("events", f"{outcome.events} ({outcome.events / max(outcome.wall, 1e-9):.0f}/s)"),
        ("accepted", f"{outcome.accepted} epochs; per shard {_short(facts['epochs'])}"),
        ("holders", ", ".join(f"{shard}: {'+'.join(map(str, held))}" for shard, held in list(outcome.owners.items())[:12])
                    or "-"),
        ("at the end", f"{facts['peers_online']} peers online, {facts['refused']} results refused, "
                       f"useful share {facts['useful']}"),
        ("utilisation", f"{_percent(facts['utilisation'])} of the fit devices have a shard or lane; "
                        f"{_percent(facts['training'])} take steps, the others fetch or wait for a verdict or a merge"),
        ("checked", ", ".join(f"{name} {count}" for name, count in sorted(outcome.checks.items()))),
        ("cost", f"{sum(costs.messages.values()) / outcome.peers / outcome.seconds:.2f} messages/s and "
                 f"{sum(costs.bytes.values()) / outcome.peers / outcome.seconds:.0f} bytes/s per peer, "
                 f"{costs.judged / hours:.0f} coordinator events an hour"),
        ("invariants", "all held" if outcome.violation is None else f"VIOLATED: {outcome.violation}"),
    )  # fmt: skip
    for name, text in rows:
        table.add_row(name, text)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:16])) + (f" … ({len(numbers)})" if len(numbers) > 16 else "")


def _explanation(outcome: SimulationOutcome, command: str) -> str:
    steps = "\n".join(f"  {line}" for line in outcome.plan) or "  (empty: it happens without any fault)"
    trace = "\n".join(f"  {line}" for line in outcome.trace)
    return (
        f"\nThe shortest plan that causes it ({len(outcome.shortest)} of {outcome.steps} steps, {outcome.tries} runs):\n{steps}\n"
        f"\nWhat led to it:\n{trace}\n\nRun it again: {command}"
    )


def _command(outcome: SimulationOutcome, seconds: float | None, shards: int | None, lanes: int | None, broken: str | None) -> str:
    parts = ["lutetia simulate", outcome.scenario, f"--peers {outcome.peers} --seed {outcome.seed}"]
    parts += [f"--seconds {seconds:g}"] if seconds is not None else []
    parts += [f"--shards {shards}"] if shards is not None else []
    parts += [f"--lanes {lanes}"] if lanes is not None else []
    parts += [f"--keep {','.join(map(str, outcome.shortest)) or '-'}"]
    return " ".join([*parts, *([f"--broken {broken}"] if broken else [])])


def _catalogue() -> dict[str, Any]:
    from lutetia.simulation.faults.mutants import MUTANTS
    from lutetia.simulation.scenarios.catalogue import NOT_SIMULATED, SCENARIOS

    return {
        "scenarios": [
            {"name": s.name, "fault": s.fault or None, "summary": s.summary, "peers": s.peers, "virtual_seconds": s.seconds}
            for s in SCENARIOS.values()
        ],
        "not_simulated": {str(number): why for number, why in NOT_SIMULATED.items()},
        "broken": {name: rule.summary for name, rule in MUTANTS.items()},
    }


def _catalogue_table() -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    catalogue = _catalogue()
    table = Table("SCENARIO", "FAULT", "PEERS", "SECONDS", "WHAT HAPPENS", box=None, pad_edge=False)
    for row in catalogue["scenarios"]:
        table.add_row(row["name"], str(row["fault"] or ""), str(row["peers"]), f"{row['virtual_seconds']:g}", row["summary"])
    rules = Table("--broken", "RULE, AND THE INVARIANT THAT IT VIOLATES", box=None, pad_edge=False)
    for name, summary in catalogue["broken"].items():
        rules.add_row(name, summary)
    missing = [f"fault {number} is not simulated: {why}" for number, why in catalogue["not_simulated"].items()]
    return Group(table, "", *missing, "", rules)
