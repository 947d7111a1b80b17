"""One coordinator and one node, and how they answer or refuse others. Real processes over libp2p."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from lutetia.models.data.ingest.synthetic import make_clips
from lutetia.protocol.schema.ticket import Ticket
from tests.cli.command_runner import failure, fresh_lutetia, lutetia, processor_time  # pyright: ignore[reportMissingImports]
from tests.swarm.leak_check import family, listening, litter
from tests.swarm.processes import command, until

CONFIG = 'frames = 8\nheight = 16\nwidth = 16\nlatents = "pixels"\nsmallest = 4\n'
SLOW = "samples_per_shard = 160000\ncheckpoint_samples = 8000\n"  # nothing is accepted while these tests run
STATUS_SECONDS = 2.0


@dataclass(frozen=True)
class Site:
    """A run that is served, and one node that trains it."""

    folder: Path
    ticket: str
    port: int
    processes: dict[str, subprocess.Popen[str]]

    @property
    def node(self) -> Path:
        return self.folder / "node"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def make_run(folder: Path, port: int, name: str = "run") -> str:
    """Create a run on the clips of `folder`; returns its ticket."""
    arguments = ("--preset", "tiny", "--config", "run.toml", "--address", f"127.0.0.1:{port}", "--json")
    return json.loads(lutetia("run", "create", "data", name, *arguments, cwd=folder).stdout)["ticket"]


def local_status(node: Path) -> dict[str, Any]:
    run = lutetia("status", "--state-folder", node, "--json")
    return json.loads(run.stdout) if run.returncode == 0 else {}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, port, before = tmp_path_factory.mktemp("site"), free_port(), litter()
    make_clips(folder / "clips", 72, 0, 8, 16)
    (folder / "data.toml").write_text(f'{CONFIG}cache = "{folder / "cache"}"\n')
    (folder / "run.toml").write_text(SLOW)
    built = lutetia("data", "build", "clips", "data", "--config", "data.toml", cwd=folder)
    assert built.returncode == 0, built.stderr
    ticket = make_run(folder, port)
    with contextlib.ExitStack() as stack:
        serve = stack.enter_context(command(folder / "coordinator.log", "coordinator", "serve", folder / "run"))
        until(lambda: lutetia("swarm", "status", ticket).returncode == 0)
        listen = ("--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1")
        join = stack.enter_context(command(folder / "node.log", "join", ticket, "--state-folder", folder / "node", *listen))
        until(lambda: local_status(folder / "node").get("step"))
        yield Site(folder, ticket, port, {"serve": serve, "join": join})
    assert (serve.returncode, join.returncode) == (0, 0), (folder / "node.log").read_text()
    assert not family((str(folder),))
    assert not litter() - before
    with socket.create_server(("127.0.0.1", port)):  # the port is free again
        pass


@pytest.mark.timeout(900)
def test_light_client_shows_the_swarm_in_time(site: Site) -> None:
    run, seconds = processor_time(lambda: fresh_lutetia("swarm", "status", site.ticket, "--json"))
    status = json.loads(run.stdout)
    assert [shard["state"] for shard in status["shards"]].count("unclaimed") == 2
    assert status["nodes"][0]["shard"] is not None
    assert seconds < STATUS_SECONDS, f"swarm status takes {seconds:.1f} s"
    assert "expert" in lutetia("swarm", "status", site.ticket).stdout.lower()


def test_light_client_imports_neither_hivemind_nor_torch(site: Site) -> None:
    code = (
        "import sys\nfrom lutetia.cli.commands.swarm import fetch_status\nprint(fetch_status(sys.argv[1], 20).name)\n"
        "print([name for name in ('hivemind', 'torch', 'diffusers', 'grpc') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, site.ticket], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["run", "[]"], run.stderr


def test_manifest_is_shown_for_a_ticket(site: Site) -> None:
    shown = json.loads(lutetia("run", "show", site.ticket, "--json").stdout)
    assert shown["samples_per_shard"] == 160000


def test_fetch_before_the_first_mixture_is_refused(site: Site, tmp_path: Path) -> None:
    error = failure(lutetia("swarm", "fetch", site.ticket, "--out", tmp_path / "mixture", "--json"))
    assert (error["code"], "no mixture yet" in error["message"]) == (31, True)
    assert not list(tmp_path.iterdir())


def test_node_status_counts_accepted_work(site: Site) -> None:
    shown = local_status(site.node)
    assert (shown["state"], shown["accepted"]) == ("training", 0)
    text = lutetia("status", "--state-folder", site.node).stdout
    assert "0 accepted" in text
    assert "samples/s" in text


def test_node_pauses_and_resumes(site: Site) -> None:
    assert lutetia("pause", "--for", "10m", "--state-folder", site.node).returncode == 0
    until(lambda: local_status(site.node)["state"] == "paused")
    assert local_status(site.node)["paused_until"] > time.time()
    until(lambda: "training" not in lutetia("swarm", "status", site.ticket, "--json").stdout)
    assert lutetia("resume", "--state-folder", site.node).returncode == 0
    until(lambda: local_status(site.node)["state"] == "training")


def other_run(ticket: str) -> str:
    return Ticket.decode(ticket).model_copy(update={"run": "d" * 64}).encode()


@pytest.mark.parametrize("verb", [("swarm", "status"), ("run", "show"), ("join",)])
def test_ticket_of_another_run_is_refused(site: Site, verb: tuple[str, ...], tmp_path: Path) -> None:
    where = ("--state-folder", tmp_path / "state", "--listen", "/ip4/127.0.0.1/tcp/0") if verb == ("join",) else ()
    run = lutetia(*verb, other_run(site.ticket), *where)
    assert run.returncode == 10, run.stderr
    assert "run" in run.stderr.splitlines()[-1]


def test_ticket_with_another_owner_is_refused(site: Site) -> None:
    forged = Ticket.decode(site.ticket).model_copy(update={"owner": "e" * 64}).encode()
    assert lutetia("run", "show", forged).returncode == 40


def test_taken_port_is_named(site: Site, tmp_path: Path) -> None:
    make_run(site.folder, site.port, "second")
    run = lutetia("coordinator", "serve", site.folder / "second")
    assert run.returncode == 31, run.stderr
    assert str(site.port) in run.stderr.splitlines()[-1]
    listen = f"/ip4/127.0.0.1/tcp/{site.port}"
    run = lutetia("join", site.ticket, "--state-folder", tmp_path / "state", "--listen", listen)
    assert run.returncode == 31, run.stderr


def test_unknown_settings_are_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text("frobnicate = 1\n")
    run = lutetia("join", site.ticket, "--config", tmp_path / "node.toml", "--state-folder", tmp_path / "state")
    assert (run.returncode, "frobnicate" in run.stderr) == (10, True)
    run = lutetia("coordinator", "serve", site.folder / "run", "--config", tmp_path / "node.toml")
    assert (run.returncode, "frobnicate" in run.stderr) == (10, True)
    assert not (tmp_path / "state").exists()


def test_everything_listens_on_loopback_only(site: Site) -> None:
    for process in site.processes.values():
        assert listening(process.pid)
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            links = [link for link in one.net_connections("tcp") if link.status == psutil.CONN_LISTEN]
            assert all(link.laddr.ip in ("127.0.0.1", "::1") for link in links), one.cmdline()
