"""The costs of lanes: processes are told apart, and the table shows medians and how they grow."""

from __future__ import annotations

import pytest

from benchmarks.teams.lanes.costs import EpochCosts, RunCosts, growth, part_of, table


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (("python", "-m", "lutetia.coordinator.worker", "/run/manifest.json", "merging", "cpu"), "merges"),
        (("python", "-m", "lutetia.coordinator.worker", "/run/manifest.json", "proving-parents", "cpu"), "audits"),
        (("/site-packages/p2pd", "-f=/run/config.json"), "p2pd"),
        (("python", "-m", "lutetia.cli", "coordinator", "serve", "/checking"), "coordinator"),
    ],
)
def test_part_of_a_process_follows_from_its_command_line(command: tuple[str, ...], part: str) -> None:
    assert part_of(command) == part


def test_growth_is_the_power_of_the_number_of_lanes() -> None:
    assert growth([(4, 3.0), (8, 12.0), (16, 48.0)]) == pytest.approx(2.0)
    assert growth([(4, 3.0), (4, 5.0), (8, 0.0)]) is None


def test_table_counts_the_epochs_after_the_first() -> None:
    def run(lanes: int) -> RunCosts:
        epochs = [
            EpochCosts(lanes, epoch, {"checks": lanes * seconds}, 10**6 * lanes, 0, 1.0, 0.5)
            for epoch, seconds in ((1, 9.0), (2, 1.0), (3, 2.0))
        ]
        return RunCosts(tuple(epochs), {"checks": 100.0})

    lines = {line.split("|")[1].strip(): line for line in table([run(4), run(8)]).splitlines()}
    assert lines["of an epoch"] == "| of an epoch | 4 lanes | 8 lanes | grows as |"
    assert lines["checks, processor s"] == "| checks, processor s | 6 (4 to 8) | 12 (8 to 16) | L^1.00 |"
    assert lines["MB received"] == "| MB received | 4 (4 to 4) | 8 (8 to 8) | L^1.00 |"
    assert lines["checks, MiB at most"] == "| checks, MiB at most | 100 | 100 | L^0.00 |"
    assert lines["MB sent"] == "| MB sent | 0 (0 to 0) | 0 (0 to 0) |  |"
