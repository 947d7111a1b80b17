"""The command line: help, version, one-sentence errors, exit codes, JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lutetia.cli.main import _Reported
from lutetia.protocol.schema.identity import Identity
from tests.child_environment import clean_environment
from tests.cli.command_runner import each, failure, fresh_lutetia, lutetia, processor_time, ticket

COMMANDS = (
    "demo", "join", "status", "pause", "resume", "finish", "leave", "swarm status", "swarm fetch", "run create", "run show",
    "coordinator serve", "coordinator replay", "data build", "data inspect", "data train-autoencoder", "generate", "evaluate",
    "study", "identity show", "identity export", "identity import", "doctor", "simulate", "help exit-codes",
)  # fmt: skip
HELP_SECONDS = 0.3


def test_help_names_every_command_in_time() -> None:
    run, seconds = processor_time(lambda: fresh_lutetia("--help"))
    assert run.returncode == 0
    assert seconds < HELP_SECONDS, f"lutetia --help takes {seconds:.2f} s"
    for command in COMMANDS:
        assert command.split()[0] in run.stdout


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys\nsys.argv[1:] = ['--help']\nfrom lutetia.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'hivemind', 'libp2p', 'pydantic', 'rich', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    run = lutetia(*command.split(), "--help")
    assert run.returncode == 0, run.stderr
    assert f"Usage: lutetia {command}" in run.stdout


def test_without_arguments_the_help_is_shown() -> None:
    run = lutetia()
    assert (run.returncode, run.stdout) == (0, lutetia("--help").stdout)


def test_version_is_printed() -> None:
    assert lutetia("--version").stdout.startswith("lutetia 0.")


def test_exit_codes_are_listed() -> None:
    lines = lutetia("help", "exit-codes").stdout.splitlines()
    assert {int(line.split()[0]) for line in lines} >= {0, 2, 10, 11, 12, 20, 21, 30, 31, 40, 50, 70, 130}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frobnicate",), "no such command"),
        (("join",), "missing argument"),
        (("swarm",), "name a command"),
        (("join", "x", "--clips-every", "-1"), "'--clips-every' (env var: 'lutetia_clips_every'): must be at least 0; see"),
        (("join", "x", "--clips-every", "two"), "must be a whole number; see"),
        (("generate", "x", "--mixture", "m", "--mode", "best"), "'best' is not one of 'top1'"),
        (("pause", "--for", "soon"), "duration"),
    ],
)
def test_wrong_command_line_gives_one_sentence_and_code_2(arguments: tuple[str, ...], words: str) -> None:
    run = lutetia(*arguments)
    assert run.returncode == 2
    assert words in run.stderr.lower()
    assert run.stderr.count("\n") == 1
    assert not any(word in run.stderr for word in ("should", "Value error", "parse"))
    assert failure(lutetia(*arguments, "--json"))["name"] == "usage" or "--json" in run.stderr


@pytest.mark.parametrize("command", [("join",), ("swarm", "status"), ("run", "show")])
def test_truncated_ticket_is_refused_in_one_sentence(command: tuple[str, ...], tmp_path: Path) -> None:
    run = lutetia(*command, ticket()[:-9], LUTETIA_HOME=str(tmp_path))
    assert run.returncode == 10
    assert "cut short or mistyped" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_swarm_status_names_unreachable_bootstraps() -> None:
    error = failure(lutetia("swarm", "status", ticket(), "--json", "--timeout", "2"))
    assert (error["name"], error["code"]) == ("bootstrap", 30)
    assert "127.0.0.1" in error["message"]


def test_ticket_is_read_from_file_or_environment(tmp_path: Path) -> None:
    path = tmp_path / "ticket.txt"
    path.write_text(ticket() + "\n")
    assert lutetia("swarm", "status", path, "--timeout", "2").returncode == 30
    assert lutetia("swarm", "status", "--timeout", "2", LUTETIA_TICKET=ticket()).returncode == 30
    assert lutetia("swarm", "status", tmp_path / "absent.txt").returncode == 10


@pytest.mark.parametrize("verb", ["status", "pause", "resume", "finish", "leave"])
def test_control_commands_without_daemon_name_join(verb: str, tmp_path: Path) -> None:
    error = failure(lutetia(verb, "--state-folder", tmp_path / "none", "--json"))
    assert error["code"] == 31
    assert "lutetia join" in error["message"]


def test_identity_export_and_import_keep_the_key(tmp_path: Path) -> None:
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
    none = ("--state-folder", tmp_path / "none")
    shown, exported, imported = each(
        [
            ("identity", "show", *none),
            ("identity", "export", tmp_path / "new.key", *none),
            ("identity", "import", "MISSING", *none),
        ]
    )
    assert shown.returncode == exported.returncode == imported.returncode == 11
    assert "this node has no identity yet" in shown.stderr == exported.stderr
    assert imported.stderr == "lutetia: there is no file MISSING; name the one that `lutetia identity export` wrote\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("help", "exit-codes"), 0), (("simulate", "--list"), 0), (("status", "--state-folder", "none", "--json"), 31)],
)
def test_closed_pipe_is_no_failure(arguments: tuple[str, ...], code: int, unbuffered: str) -> None:
    """As with `| head -1` under `set -o pipefail`. An error before the first output keeps its exit code."""
    with closed_pipe() as pipe:
        run = run_into(pipe, *arguments, PYTHONUNBUFFERED=unbuffered)
    assert (run.returncode, run.stderr) == (code, "")
    with closed_pipe() as pipe:
        assert run_into(pipe, *arguments, errors=pipe, PYTHONUNBUFFERED=unbuffered).returncode == code


def test_full_disk_under_stdout_is_reported(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "full", stat.S_IFCHR | 0o600, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("needs root to make a device that is always full")
    with (tmp_path / "full").open("w") as full:
        run = run_into(full.fileno(), "help", "exit-codes")
    assert (run.returncode, run.stderr) == (21, "lutetia: cannot write: no space left on device; free space\n")


def test_command_without_stdout_succeeds() -> None:
    run = subprocess.run(["sh", "-c", 'exec "$0" -m lutetia.cli help exit-codes >&-', sys.executable], stderr=subprocess.PIPE)
    assert (run.returncode, run.stderr) == (0, b"")


def test_interrupt_with_json_prints_a_document(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ticket")
    command = [sys.executable, "-m", "lutetia.cli", "swarm", "status", str(tmp_path / "ticket"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        with (tmp_path / "ticket").open("w"):  # returns once the command has opened it, and waits for what it holds
            run.send_signal(signal.SIGINT)
            printed, _ = run.communicate(timeout=60)
        assert run.returncode == 130
    assert json.loads(printed) == {"error": {"name": "interrupted", "code": 130, "message": "interrupted"}}


def test_output_fits_a_stream_that_is_not_utf8(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", NOT_UTF8], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1", "COLUMNS": "200"}
    )
    assert (run.returncode, run.stderr) == (0, b"")
    table, document = run.stdout.decode("latin-1").split("=====")
    assert "experts ##- 2/3 held" in table
    assert "###-----" not in table.splitlines()[0]
    assert json.loads(document) == {"name": "Zürich █ 東京"}


NOT_UTF8 = """
from lutetia.cli.output import emit, print_whatever_the_encoding, show
from lutetia.cli.status_table import render_status
from tests.cli.sample_documents import NOW, status
print_whatever_the_encoding()
emit({}, False, lambda: render_status(status(), NOW))
show("=====")
emit({"name": "Zürich █ 東京"}, True, lambda: None)
"""


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe whose reading end is closed."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def run_into(output: int, *arguments: str, errors: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lutetia.cli", *arguments]
    return subprocess.run(command, stdout=output, stderr=errors, text=True, env={**clean_environment(), **environment})


def test_doctor_passes_on_this_machine(tmp_path: Path) -> None:
    run = lutetia("doctor", "--json", "--state-folder", tmp_path)
    findings = {finding["check"]: finding["verdict"] for finding in json.loads(run.stdout)["findings"]}
    assert run.returncode == 0, run.stdout
    assert "fail" not in findings.values()
    assert {"p2pd", "disk", "identity", "device"} <= set(findings)


def test_missing_device_is_reported_before_any_work(tmp_path: Path) -> None:
    build = tmp_path / "build.toml"
    build.write_text('device = "cuda"\n')
    study = Path(__file__).parents[2] / "docs" / "studies" / "miniature.toml"
    kept = ("--folder", tmp_path / "study")
    runs = each(
        [
            ("evaluate", "nowhere", "nowhere", "--device", "cuda", "--json"),
            ("data", "build", "nowhere", tmp_path / "data", "--config", build, "--json"),
            ("study", study, *kept, "--device", "cuda:1", "--prepare", "--json"),
            ("study", study, *kept, "--device", "cuda", "--json"),
            ("evaluate", "nowhere", "nowhere", "--device", "foo", "--json"),
            ("study", study, *kept, "--device", "foo", "--plan", "--json"),
        ],
        CUDA_VISIBLE_DEVICES="",
    )
    assert [failure(run)["code"] for run in runs] == [20] * 4 + [10] * 2, runs
    assert all("torch sees 0 CUDA devices" in run.stdout for run in runs[:4])
    assert all("device" in failure(run)["message"] for run in runs)
    assert list(tmp_path.iterdir()) == [build]


def test_unexpected_error_of_a_task_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, _Reported(as_json=True):
        raise ExceptionGroup("several", [ExceptionGroup("inner", [ValueError("first")]), OSError("second")])
    assert exit_.value.code == 70
    assert "ValueError: first" in json.loads(capsys.readouterr().out)["error"]["message"]
