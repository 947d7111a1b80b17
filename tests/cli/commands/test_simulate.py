"""`lutetia simulate`: table, JSON, the trace of a violation with the command that repeats it, and exit codes."""

from __future__ import annotations

import json

from tests.cli.command_runner import each, lutetia


def test_held_invariants_give_code_0_and_a_table() -> None:
    run = lutetia("simulate", "partition", "--peers", "6", "--seed", "3", "--seconds", "300")
    assert run.returncode == 0, run.stderr
    assert "all held" in run.stdout
    assert "virtual seconds 300/300" in run.stderr


def test_violation_gives_code_60_and_a_repeatable_command() -> None:
    first = lutetia("simulate", "resume", "--seed", "1", "--broken", "resume-elsewhere")
    assert first.returncode == 60
    assert "I7" in first.stdout
    again = next(line for line in first.stdout.splitlines() if line.startswith("Run it again: lutetia "))
    second = lutetia(*again.removeprefix("Run it again: lutetia ").split(), "--json")
    assert second.returncode == 60
    violation = json.loads(second.stdout)["violation"]
    assert violation["invariant"] == "I7"
    assert violation["trace"]
    assert violation["text"] in " ".join(first.stdout.split())


def test_list_names_scenarios_and_what_is_not_simulated() -> None:
    document = json.loads(lutetia("simulate", "--list", "--json").stdout)
    assert {"churn", "partition", "forgers"} <= {row["name"] for row in document["scenarios"]}
    assert "19" in document["not_simulated"]
    assert {"accept-twice", "believe-auditors"} <= document["broken"].keys()


def test_wrong_arguments_give_one_sentence_and_code_2() -> None:
    wrong = [("nowhere",), (), ("disks", "--peers", "1"), ("calm", "--broken", "nothing")]
    wrong += [("calm", f"--keep={steps}") for steps in ("x", "99", "0,99", "-1")]
    for run in each([("simulate", *arguments) for arguments in wrong]):
        assert run.returncode == 2, run.args
        assert run.stderr.count("\n") == 1


def test_keep_carries_out_part_of_a_plan_or_none() -> None:
    kept = each([("simulate", "calm", "--peers", "3", "--seconds", "60", f"--keep={steps}", "--json") for steps in ("0,1", "-")])
    assert [json.loads(run.stdout)["steps"] for run in kept] == [2, 0]
