"""Scenarios: faults of single machines, such as crashes, sleep, full disks, failing devices; and of the coordinator."""

from __future__ import annotations

from random import Random

from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.faults.step import Step
from lutetia.simulation.scenarios.scenario import Scenario, advanced, all_held, completed, joins, stopped_itself, up_to_date

_LONG = SimulationConfig(shards=4, epochs=200)


def _killed(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """SIGKILL at any moment: in a step, while a checkpoint is written, while it is offered. Most nodes come back."""
    steps = joins(config, peers, rng)
    for index in range(1, peers):
        for _ in range(2):
            at = rng.uniform(60, 900)
            steps.append(Step(at, "kill", (index,)))
            if rng.random() < 0.7:
                steps.append(Step(at + rng.uniform(1, 150), "join", (index,)))
    return steps


def _drain(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """SIGTERM: every second node finishes its current checkpoint and leaves."""
    return joins(config, peers, rng) + [Step(rng.uniform(100, 500), "finish", (index,)) for index in range(0, peers, 2)]


def _sleep(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Laptops sleep for longer than a lease, then wake."""
    steps = joins(config, peers, rng)
    for index in range(peers // 2):
        at = rng.uniform(60, 700)
        steps += [Step(at, "stop", (index,)), Step(at + rng.uniform(config.lease, 4 * config.lease), "continue", (index,))]
    return steps


def _coordinator_crash(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """It crashes four times, once between writing an acceptance and publishing it, and restarts from its ledger."""
    steps = joins(config, peers, rng)
    for number in range(4):
        at = 100 + 250 * number + rng.uniform(0, 100)
        steps.append(Step(at, "coordinator dies before publishing" if number == 2 else "coordinator crashes"))
        steps.append(Step(at + 90 + rng.uniform(0, 40), "coordinator starts"))
    return steps


def _two_coordinators(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A second one starts on a copy of the ledger; then the first crashes."""
    return [
        *joins(config, peers, rng), Step(rng.uniform(150, 250), "second coordinator"),
        Step(rng.uniform(500, 700), "coordinator crashes"),
    ]  # fmt: skip


def _second_after_cut(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """The coordinator is cut off, so its owner starts a second one on a copy of its ledger; then the first is back."""
    at, all_nodes = rng.uniform(150, 250), tuple(range(peers))
    return [
        *joins(config, peers, rng), Step(at, "partition", all_nodes, detail="with the second"),
        Step(at + rng.uniform(10, 40), "second coordinator"), Step(at + rng.uniform(200, 500), "heal"),
    ]  # fmt: skip


def _old_copy(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """The coordinator's folder is replaced by an old copy: it refuses to serve until it is started with `recover`."""
    at = rng.uniform(300, 600)
    return [
        *joins(config, peers, rng), Step(at, "old ledger", value=rng.uniform(150, 250)),
        Step(at + 5, "coordinator starts"), Step(at + 60, "coordinator starts", detail="recover"),
    ]  # fmt: skip


def _upgrade(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """The owner raises the budget twice: while a third is cut off, and while the coordinator is down. Two nodes die meanwhile."""
    first, second = rng.uniform(100, 500), rng.uniform(700, 1100)
    third = tuple(sorted(rng.sample(range(peers), peers // 3)))
    dying = rng.sample(range(peers), 2)
    return [
        *joins(config, peers, rng), Step(first - 20, "partition", third), Step(first, "budget raised", value=4),
        Step(first + rng.uniform(30, 200), "heal"), Step(second - 20, "coordinator crashes"),
        Step(second, "budget raised", value=3), Step(second + rng.uniform(5, 100), "coordinator starts"),
        *(Step(rng.uniform(first, second), "kill", (index,)) for index in dying),
        *(Step(second + rng.uniform(10, 60), "join", (index,)) for index in dying),
    ]  # fmt: skip


def _bootstraps_down(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """The only bootstrap peer is down while some nodes join, and later while others restart, which know other peers then."""
    steps = [Step(at, "join", (index,)) for index, at in enumerate(sorted(rng.uniform(20, 120) for _ in range(peers)))]
    steps += [Step(60.0, "coordinator crashes"), Step(160.0, "coordinator starts")]
    steps += [Step(300.0, "coordinator crashes"), Step(500.0, "coordinator starts")]
    for index in range(0, peers, 3):
        at = rng.uniform(310, 400)
        steps += [Step(at, "kill", (index,)), Step(at + 20, "join", (index,))]
    return steps


def _disks(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Disks fill up while checkpoints are written or shards fetched; one stays full, one fails and loses all its data."""
    steps = joins(config, peers, rng)
    for index in range(1, peers):
        at = rng.uniform(10, 700)
        steps.append(Step(at, "disk full", (index,)))
        if index != 1:
            steps.append(Step(at + rng.uniform(5, 500), "disk free", (index,)))
    return [*steps, Step(rng.uniform(200, 600), "disk lost", (0,)), Step(800.0, "join", (0,))]


def _devices(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Drivers that load late, memory that runs out, devices that fall off the bus."""
    steps = joins(config, peers, rng)
    for index in range(peers // 3):
        steps += [Step(0.0, "device lost", (index,)), Step(rng.uniform(50, 400), "device back", (index,))]
    for index in range(peers // 3, peers):
        steps.append(Step(rng.uniform(40, 900), "trainer fails", (index,), detail="out-of-memory"))
        if rng.random() < 0.5:
            at = rng.uniform(40, 700)
            steps += [Step(at, "device lost", (index,)), Step(at + rng.uniform(20, 400), "device back", (index,))]
    return steps


def _churn(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Each node dies after 100 s on average and is back after 30 s on average (Poisson)."""
    steps = []
    for index in range(peers):
        at = rng.uniform(0, config.join_within)
        while at < 3600:
            steps.append(Step(at, "join", (index,)))
            at += rng.expovariate(1 / 100)
            steps.append(Step(at, "kill", (index,)))
            at += rng.expovariate(1 / 30)
    return steps


def _collapse(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Nineteen of twenty nodes die at the same moment and do not come back."""
    dead = tuple(sorted(rng.sample(range(peers), peers - peers // 20)))
    return [*joins(config, peers, rng), Step(300.0 + rng.uniform(0, 60), "kill", dead)]


def _resume(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Nodes with equal devices are killed at random steps and restarted: the weights are those of an uninterrupted run."""
    steps = joins(config, peers, rng)
    for index in range(peers):
        for _ in range(4):
            at = rng.uniform(40, 900)
            steps += [Step(at, "kill", (index,)), Step(at + rng.uniform(0.5, 8), "join", (index,))]
    return steps


def _commands(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Volunteers pause, resume, finish and leave at random."""
    steps = joins(config, peers, rng)
    for index in range(1, peers):
        at = rng.uniform(30, 800)
        steps.append(Step(at, rng.choice(("pause", "pause", "finish", "leave")), (index,), value=rng.uniform(0, 200)))
        steps.append(Step(at + rng.uniform(1, 200), rng.choice(("resume", "resume", "join")), (index,)))
    return steps


MACHINE_SCENARIOS = (
    Scenario(
        "killed",
        "nodes are killed at any moment, most come back",
        1,
        _killed,
        config=_LONG,
        ends=(all_held, advanced(0.35)),
        min_peers=2,
    ),
    Scenario(
        "drain",
        "every second node is told to finish: it offers its checkpoint and leaves",
        2,
        _drain,
        config=_LONG,
        ends=(all_held, advanced(0.35)),
    ),
    Scenario("sleep", "nodes sleep for longer than a lease, then wake", 3, _sleep, config=_LONG, ends=(all_held, advanced(0.35))),
    Scenario(
        "coordinator-crash",
        "the coordinator crashes four times and restarts from its ledger",
        4,
        _coordinator_crash,
        config=_LONG,
        ends=(all_held, advanced(0.3)),
    ),
    Scenario(
        "two-coordinators",
        "a second coordinator runs on a copy of the ledger, then the first crashes",
        4,
        _two_coordinators,
        config=_LONG,
        ends=(
            all_held,
            advanced(0.2),
        ),  # the second may have stopped itself, and then no result is accepted after the first has crashed
    ),
    Scenario(
        "rival",
        "the coordinator is cut off and replaced by a second one with its key; when it is back, it stops itself",
        4,
        _second_after_cut,
        config=_LONG,
        ends=(all_held, advanced(0.3), stopped_itself),
    ),
    Scenario(
        "old-copy",
        "the coordinator's folder is replaced by an old copy: it refuses to serve, then recovers its own records",
        4,
        _old_copy,
        config=_LONG,
        ends=(all_held, advanced(0.3), stopped_itself),
    ),
    Scenario(
        "upgrade",
        "the owner raises the budget while some nodes are cut off, and while the coordinator is down",
        16,
        _upgrade,
        seconds=2700,
        peers=9,
        config=SimulationConfig(epochs=6),
        ends=(completed, up_to_date),
        min_peers=6,
    ),
    Scenario(
        "bootstraps-down",
        "the bootstrap peer is down before and after nodes join",
        5,
        _bootstraps_down,
        config=_LONG,
        peers=9,
        ends=(all_held, advanced(0.25)),
    ),
    Scenario("disks", "disks fill up, one fails", 9, _disks, config=_LONG, ends=(all_held, advanced(0.25)), min_peers=3),
    Scenario(
        "devices",
        "late drivers, memory that runs out, devices that disappear",
        15,
        _devices,
        config=_LONG,
        ends=(all_held, advanced(0.2)),
        min_peers=3,
    ),
    Scenario(
        "churn",
        "every node dies after 100 s on average and comes back",
        14,
        _churn,
        seconds=3600,
        peers=32,
        config=SimulationConfig(shards=8, epochs=500),
        ends=(advanced(0.1),),
    ),
    Scenario(
        "collapse",
        "nineteen of twenty nodes die at once, and few standbys are left",
        14,
        _collapse,
        seconds=700,
        peers=160,
        config=SimulationConfig(shards=6, epochs=500, unfit=0.2),
        ends=(advanced(0.2),),
        min_peers=20,
    ),
    Scenario(
        "resume",
        "nodes with equal devices are killed at random steps and resume",
        20,
        _resume,
        peers=6,
        config=SimulationConfig(shards=3, epochs=8, one_device=True, save_every=5.0),
        seconds=2400,
        ends=(completed,),
    ),
    Scenario(
        "wishes",
        "volunteers pause, resume, finish and leave",
        2,
        _commands,
        config=_LONG,
        ends=(all_held, advanced(0.25)),
        min_peers=2,
    ),
)
