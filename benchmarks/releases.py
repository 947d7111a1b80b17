"""`python -m benchmarks releases --old PYTHON`: a run that the release before made, served by each release, with a node of each.

PYTHON is the interpreter of an environment that has the release before, as `.venv/bin/python` in a checkout of it. That release
makes data and run. The run is served once by this release and once by the other; in both a node of each trains a shard, and each
fetches the mixture. Then this release replays the ledger. It writes docs/results/releases.md, or --out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Machine
from lutetia.cli.local.processes import free_port
from lutetia.models.data.ingest.synthetic import make_clips

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "releases.md"
DATA = 'experts = 2\nframes = 8\nheight = 16\nwidth = 16\nlatents = "pixels"\nsmallest = 8\n'
RUN = "samples_per_shard = 720\ncheckpoint_samples = 240\n[timing]\nheartbeat = 5.0\ntenure = 300.0\n"
EPOCHS = 2 * 3
CLIPS = 48


Running = tuple[subprocess.Popen[bytes], Path]
"""A process and its log."""


@dataclass(frozen=True)
class Release:
    """A release that is installed here: its name and its interpreter."""

    name: str
    python: str

    def run(self, *arguments: str | Path) -> str:
        """What `lutetia ARGUMENTS` prints. Raises CalledProcessError."""
        done = subprocess.run(self._command(arguments), capture_output=True, text=True, env=_environment())
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            done.check_returncode()
        return done.stdout

    def start(self, log: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start `lutetia ARGUMENTS`; it ends with this process."""
        environment = {**_environment(), "LUTETIA_PARENT": str(os.getpid()), "LUTETIA_STOP_WITHIN": "0"}
        with log.open("wb") as output:
            return subprocess.Popen(
                self._command(arguments), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )

    def _command(self, arguments: Sequence[str | Path]) -> list[str]:
        return [self.python, "-P", "-m", "lutetia.cli", *map(str, arguments)]


@dataclass(frozen=True)
class Outcome:
    """What a run of `server` with a node of each release came to."""

    server: str
    accepted: dict[str, int]
    refused: dict[str, int]
    audits: dict[str, int]
    fetched: dict[str, str]
    replayed: int
    seconds: float

    def line(self) -> str:
        nodes = "; ".join(f"{name}: {self.accepted[name]} accepted, {self.refused[name]} refused" for name in self.accepted)
        audits = ", ".join(f"{count} {verdict}" for verdict, count in sorted(self.audits.items())) or "none"
        same = "equal" if len({*self.fetched.values()}) == 1 else "DIFFERENT"
        return f"| {self.server} | {nodes} | {audits} | {same} | {self.replayed} of {EPOCHS} | {self.seconds:.0f} |"


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LUTETIA_", "PYTHONPATH"))}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks releases", description=__doc__)
    parser.add_argument("--old", required=True, help="interpreter of an environment with the other release")
    parser.add_argument("--name", default="the other", help="what to call the other release, such as its commit")
    parser.add_argument("--minutes", type=float, default=30.0, help="longest time for each of the two runs (default: 30)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"page to write (default: {RESULTS})")
    options = parser.parse_args(arguments)
    releases = [Release("this", sys.executable), Release(options.name, str(Path(options.old).absolute()))]
    lines, good = list[str](), 0
    for server in releases:
        try:
            outcome = _one_run(server, releases, options.minutes * 60)
        except (RuntimeError, TimeoutError, subprocess.CalledProcessError) as error:
            lines.append(f"| {server.name} | FAILED: {error} | | | | |")
        else:
            lines.append(outcome.line())
            good += _is_good(outcome)
        options.out.write_text(_report(lines, options.name))
    print(options.out.read_text())
    sys.exit(0 if good == len(releases) else 1)


def _is_good(outcome: Outcome) -> bool:
    is_equal = len({*outcome.fetched.values()}) == 1
    return is_equal and outcome.replayed == EPOCHS and all(outcome.accepted.values()) and not any(outcome.refused.values())


def _one_run(server: Release, releases: Sequence[Release], seconds: float) -> Outcome:
    """Make a run by the last release, serve it by `server`, and train it with a node of each. Raises TimeoutError."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        ticket = _made(releases[-1], folder)
        serve = ("coordinator", "serve", folder / "run", "--no-gallery")
        processes = [stack.enter_context(_running(server, folder / "serve.log", *serve))]
        deadline = began + seconds
        _until(lambda: (folder / "run/status.json").exists(), processes, deadline)
        for each in releases:
            state = folder / f"node of {each.name}"
            join = ("join", ticket, "--state-folder", state, "--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1")
            processes.append(stack.enter_context(_running(each, folder / f"{state.name}.log", *join)))
        _until(lambda: _is_done(folder / "run/status.json"), processes, deadline)
        nodes = {
            each.name: json.loads(each.run("status", "--json", "--state-folder", folder / f"node of {each.name}"))
            for each in releases
        }
        fetched = {}
        for each in releases:
            each.run("swarm", "fetch", ticket, "--out", folder / f"mixture of {each.name}")
            fetched[each.name] = _digest(folder / f"mixture of {each.name}")
        stack.close()  # ends the nodes, then the coordinator
        events = releases[0].run("coordinator", "replay", folder / "run")
        return Outcome(
            server.name,
            {name: document["accepted"] for name, document in nodes.items()},
            {name: document["refused"] for name, document in nodes.items()},
            Counter(re.findall(r" audit\b.* in [\d.]+ s: (\w+)", events)),
            fetched,
            len(re.findall(r" accepted, held-out loss ", events)),
            time.monotonic() - began,
        )


def _made(maker: Release, folder: Path) -> str:
    """Draw clips, and make data and run by `maker`. Returns the ticket."""
    make_clips(folder / "clips", CLIPS, 0, 8, 32)
    (folder / "data.toml").write_text(f'{DATA}cache = "{folder / "cache"}"\n')
    (folder / "run.toml").write_text(RUN)
    maker.run("data", "build", folder / "clips", folder / "data", "--config", folder / "data.toml")
    place = ("--preset", "tiny", "--config", folder / "run.toml", "--address", f"127.0.0.1:{free_port()}")
    maker.run("run", "create", folder / "data", folder / "run", *place)
    return (folder / "run/ticket.txt").read_text().strip()


@contextlib.contextmanager
def _running(release: Release, log: Path, *arguments: str | Path) -> Iterator[Running]:
    process = release.start(log, *arguments)
    try:
        yield process, log
    except BaseException:
        print(f"{log.name}:\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait()


def _until(condition: Callable[[], bool], processes: Sequence[Running], deadline: float) -> None:
    """Wait until `condition` holds. Raises TimeoutError, or RuntimeError if a process ends before."""
    while not condition():
        for process, log in processes:
            if process.poll() is not None:
                raise RuntimeError(f"{log.stem} ended: {log.read_text(errors='replace').strip().splitlines()[-1]}")
        if time.monotonic() > deadline:
            raise TimeoutError("the run was not done in time")
        time.sleep(1.0)  # the older release tells of its progress by a file alone


def _is_done(path: Path) -> bool:
    """Whether all budgets are done and the mixture of all last epochs is made."""
    status = json.loads(path.read_text())
    accepted = sum(shard["epoch"] for shard in status["shards"])
    print(f"{accepted} of {EPOCHS} epochs accepted", file=sys.stderr)
    return accepted == EPOCHS == sum(status["mixture_epochs"])


def _digest(folder: Path) -> str:
    """SHA-256 (hex) of the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _report(lines: Sequence[str], name: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return "\n".join(
        (
            "# Two releases in one swarm", "",
            f"`python -m benchmarks releases --old PYTHON --name '{name}'`, on {Machine.this()}: data and run by the release "
            f"before, a coordinator of one release and a node of each on loopback, {EPOCHS // 2} epochs of two "
            f"shards. *this* is commit {commit}.", "",
            "| coordinator | nodes | audits | mixture as fetched by both | acceptances, read by *this* | seconds |",
            "|---|---|---|---|---|---|",
            *lines, "",
        )
    )  # fmt: skip
