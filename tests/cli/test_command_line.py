"""The command line as a stranger meets it: help, version, one-sentence errors, exit codes, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lutetia.protocol.identity import Identity
from running import failure, lutetia, processor_time, ticket

COMMANDS = (
    "demo", "join", "status", "pause", "resume", "finish", "leave", "swarm status", "swarm fetch", "run create", "run show",
    "coordinator serve", "coordinator replay", "data build", "data inspect", "data train-autoencoder", "generate", "evaluate",
    "study", "identity show", "identity export", "identity import", "doctor", "simulate", "help exit-codes",
)  # fmt: skip
HELP_SECONDS = 0.3


def test_help_names_every_command_quickly() -> None:
    run, seconds = processor_time(lambda: lutetia("--help"))
    assert run.returncode == 0
    assert seconds < HELP_SECONDS, f"lutetia --help takes {seconds:.2f} s"
    for command in COMMANDS:
        assert command.split()[0] in run.stdout


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys\nsys.argv[1:] = ['--help']\nfrom lutetia.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'hivemind', 'libp2p', 'pydantic', 'rich', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    run = lutetia(*command.split(), "--help")
    assert run.returncode == 0, run.stderr
    assert f"Usage: lutetia {command}" in run.stdout


def test_version() -> None:
    assert lutetia("--version").stdout.startswith("lutetia 0.")


def test_exit_codes_are_documented() -> None:
    lines = lutetia("help", "exit-codes").stdout.splitlines()
    assert {int(line.split()[0]) for line in lines} >= {0, 2, 10, 11, 12, 20, 21, 30, 31, 40, 50, 70, 130}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frobnicate",), "no such command"),
        (("join",), "missing argument"),
        (("swarm",), "name a command"),
        (("join", "x", "--threads", "0"), "threads"),
        (("pause", "--for", "soon"), "duration"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_code_2(arguments: tuple[str, ...], words: str) -> None:
    run = lutetia(*arguments)
    assert run.returncode == 2
    assert words in run.stderr.lower()
    assert run.stderr.count("\n") == 1
    assert failure(lutetia(*arguments, "--json"))["name"] == "usage" or "--json" in run.stderr


@pytest.mark.parametrize("command", [("join",), ("swarm", "status"), ("run", "show")])
def test_a_ticket_cut_short_is_refused_in_one_sentence(command: tuple[str, ...], tmp_path: Path) -> None:
    run = lutetia(*command, ticket()[:-9], LUTETIA_HOME=str(tmp_path))
    assert run.returncode == 10
    assert "cut short or mistyped" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_swarm_status_says_which_bootstraps_are_down() -> None:
    error = failure(lutetia("swarm", "status", ticket(), "--json", "--timeout", "2"))
    assert (error["name"], error["code"]) == ("bootstrap", 30)
    assert "127.0.0.1" in error["message"]


def test_a_ticket_may_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "ticket.txt"
    path.write_text(ticket() + "\n")
    assert lutetia("swarm", "status", path, "--timeout", "2").returncode == 30
    assert lutetia("swarm", "status", "--timeout", "2", LUTETIA_TICKET=ticket()).returncode == 30
    assert lutetia("swarm", "status", tmp_path / "absent.txt").returncode == 10


@pytest.mark.parametrize("verb", ["status", "pause", "resume", "finish", "leave"])
def test_without_a_daemon_the_verbs_say_so(verb: str, tmp_path: Path) -> None:
    error = failure(lutetia(verb, "--state-folder", tmp_path / "none", "--json"))
    assert error["code"] == 31
    assert "lutetia join" in error["message"]


def test_identity_survives_export_and_import(tmp_path: Path) -> None:
    one, two, backup = tmp_path / "one", tmp_path / "two", tmp_path / "backup.key"
    Identity.derived("exported").save(one / "identity.key")
    shown = json.loads(lutetia("identity", "show", "--state-folder", one, "--json").stdout)
    assert lutetia("identity", "export", backup, "--state-folder", one).returncode == 0
    assert backup.stat().st_mode & 0o077 == 0
    assert lutetia("identity", "export", backup, "--state-folder", one).returncode == 11  # never overwritten
    assert lutetia("identity", "import", backup, "--state-folder", two).returncode == 0
    assert json.loads(lutetia("identity", "show", "--state-folder", two, "--json").stdout)["peer_id"] == shown["peer_id"]
    Identity.derived("another").save(two / "identity.key")
    assert lutetia("identity", "import", backup, "--state-folder", two).returncode == 11
    (two / "identity.key").chmod(0o644)
    assert "chmod 600" in lutetia("identity", "show", "--state-folder", two).stderr


def test_a_closed_pipe_ends_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "lutetia.cli", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in run.stderr


def test_doctor_finds_this_box_fit(tmp_path: Path) -> None:
    run = lutetia("doctor", "--json", "--state-folder", tmp_path)
    findings = {finding["check"]: finding["verdict"] for finding in json.loads(run.stdout)["findings"]}
    assert run.returncode == 0, run.stdout
    assert "fail" not in findings.values()
    assert {"p2pd", "disk", "identity", "device"} <= set(findings)
