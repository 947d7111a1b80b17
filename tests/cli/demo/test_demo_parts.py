"""Parts of the demo: status table, choice of the victim, takeover, live view, workspace, local swarm."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from lutetia.cli.demo.live_view import LiveTable, shard_rows
from lutetia.cli.demo.takeover import Takeover, choose_victim
from lutetia.cli.formatting import ago, clock, size, thousands
from lutetia.cli.local.poller import LocalWorker, samples_done
from lutetia.cli.local.processes import LocalSwarm, free_port
from lutetia.cli.status_table import render_status
from lutetia.cli.workspace import check_replaceable, workspace
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import LutetiaError, UsageError
from tests.cli.command_runner import ticket
from tests.cli.sample_documents import NOW, PEERS, shard, status

KEYS = [peer.public_key for peer in PEERS]


def worker(index: int, state: str = "training", speed: float = 10.0, **more: object) -> LocalWorker:
    return LocalWorker(f"worker-{index + 1}", KEYS[index], state, more.pop("shard", index), samples_per_second=speed, **more)  # type: ignore[arg-type]


def printed(renderable: object, width: int = 132) -> str:
    console = Console(width=width, force_terminal=False, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_status_table_shows_accepted_work() -> None:
    text = printed(render_status(status(), NOW))
    assert "2/3 held" in text
    assert "coordinator ok" in text
    assert "4 800/9 600" in text
    assert "unclaimed" in text
    assert "router 95.7 % right" in text
    assert "coordinator" not in printed(render_status(status(), NOW, live=False))


@pytest.mark.parametrize(("offset", "side"), [(86_400, "1.0 d ahead of"), (-7_200, "2.0 h behind")])
def test_ages_follow_the_document_and_a_wrong_clock_is_named(offset: float, side: str) -> None:
    right, wrong = (printed(render_status(status(), now), 200) for now in (status().time, status().time + offset))
    assert wrong.splitlines()[1:] == right.splitlines()[1:]
    assert f"this machine's clock is {side} its clock" in wrong


@pytest.mark.parametrize("width", [132, 100, 80, 60, 45])
def test_narrow_terminal_drops_columns_and_truncates_none(width: int) -> None:
    lines = printed(render_status(status(), NOW), width).splitlines()
    tables = [line for line in lines if line.startswith(" ")]
    assert not any("…" in line.replace(" …", "") for line in tables), "a peer's name begins with …, no cell ends with it"
    assert max(map(len, tables)) <= width
    for column in ("EXPERT", "NODE", "EPOCH", "STATE", "DOING", "ACCEPTED", "HEALTH"):
        assert any(column in line for line in tables)
    assert ("COPIES" in "".join(tables)) == (width >= 132)


def test_numbers_are_formatted() -> None:
    assert [ago(None), ago(3), ago(75), ago(7200), ago(864_000)] == ["-", "3 s", "1.2 min", "2.0 h", "10 d"]
    assert [clock(None), clock(59.6), clock(3700), clock(float("inf"))] == ["-", "1:00", "1:01:40", "-"]
    assert [size(10), size(2048), thousands(1234567)] == ["10 B", "2.0 KiB", "1 234 567"]


SLOWEST_FIRST = ["worker-3", "worker-2", "worker-1"]


def test_slowest_node_is_killed_when_another_is_idle() -> None:
    def victim(swarm: SwarmStatus, *workers: LocalWorker) -> str | None:
        chosen = choose_victim(swarm, {worker.owner: worker for worker in workers}, SLOWEST_FIRST)
        return chosen and chosen.name

    busy = status(*(shard(k, 3, "training", KEYS[k]) for k in range(3)))
    assert victim(busy, worker(0), worker(1), worker(2)) is None
    free = status(shard(0, 6, "done"), shard(1, 4, "training", KEYS[1]), shard(2, 2, "training", KEYS[2]))
    assert victim(free, worker(0, "idle", shard=None), worker(1), worker(2)) == "worker-3"
    assert victim(free, worker(0, "idle", shard=None), worker(1), worker(2, "syncing")) == "worker-2"
    late = status(*(shard(k, 4, "training", KEYS[k]) for k in range(3)))
    assert victim(late, worker(0), worker(1), worker(2)) == "worker-3"  # two thirds are done: the last chance
    submitted = [worker(k, samples=8_100) for k in range(3)]
    assert victim(late, *submitted) is None  # a node in its last epoch may submit it before it is killed
    assert victim(late, submitted[0], worker(1, samples=7_900), submitted[2]) == "worker-2"
    ahead = status(*(shard(k, 1, "training", KEYS[k]) for k in range(3)))
    assert victim(ahead, worker(0), worker(1), worker(2, samples=6_500)) == "worker-3"  # its last epoch but one: the last chance
    early = status(*(shard(k, 0, "training", KEYS[k]) for k in range(3)))
    assert victim(early, worker(0, "idle", shard=None), worker(1), worker(2)) is None  # there is no checkpoint to continue from


def test_takeover_records_each_step() -> None:
    takeover = Takeover("worker-3", KEYS[2], 2, "cameras", 2, killed=100.0, samples_lost=7)
    seen = takeover.observe(101.0, shard(2, 2, "training", KEYS[2]), {})
    assert seen == takeover
    seen = seen.observe(106.0, shard(2, 2, "unclaimed"), {KEYS[0]: worker(0, "idle", shard=None)})
    assert (seen.expired, seen.claimed) == (106.0, None)
    seen = seen.observe(107.0, shard(2, 2, "claimed", KEYS[0]), {KEYS[0]: worker(0, "syncing", shard=2)})
    assert (seen.claimed, seen.successor, seen.training) == (107.0, "worker-1", None)
    seen = seen.observe(109.0, shard(2, 2, "training", KEYS[0]), {KEYS[0]: worker(0, "training", shard=2, step=3)})
    assert seen.training == 109.0
    seen = seen.observe(120.0, shard(2, 3, "training", KEYS[0]), {KEYS[0]: worker(0, shard=2, step=9)})
    assert seen.complete
    assert [at for at, _ in seen.timeline()] == [100.0, 106.0, 107.0, 109.0, 120.0]


def test_checkpoint_submitted_by_victim_is_not_the_successors() -> None:
    takeover = Takeover("worker-3", KEYS[2], 2, "cameras", 2, killed=100.0, samples_lost=1700)
    seen = takeover.observe(107.0, shard(2, 3, "claimed", KEYS[0]), {KEYS[0]: worker(0, "syncing", shard=2)})
    assert (seen.epoch, seen.claimed, seen.training, seen.accepted) == (3, 107.0, None, None)
    assert seen.samples_lost == 100  # an epoch is 1,600 samples here


def test_rows_join_accepted_work_with_node_states() -> None:
    rows = shard_rows(status(), {KEYS[0]: worker(0, samples=5600, loss=0.5, speed=40.0)})
    assert rows[0].share == pytest.approx(5600 / 9600)
    assert rows[0].eta == pytest.approx(100.0)
    assert (rows[1].eta, rows[2].worker) == (None, "-")


def test_current_samples_count_only_for_the_shard_in_training() -> None:
    first, _, third = status().shards
    assert samples_done(first, {}) == first.samples
    assert samples_done(first, {KEYS[0]: worker(0, samples=first.samples + 7)}) == first.samples + 7
    assert samples_done(first, {KEYS[0]: worker(0, samples=3)}) == first.samples  # just started, not reported yet
    assert samples_done(first, {KEYS[0]: worker(0, shard=1, samples=9_000)}) == first.samples
    assert samples_done(third, {KEYS[2]: worker(2, samples=9_000)}) == third.samples  # no node holds it


def test_lines_without_terminal_have_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    view = LiveTable(Console(width=132))
    view.start_phase(0.0, "train")
    view.update(1.0, shard_rows(status(), {}))
    view.update(2.0, shard_rows(status(), {}))
    view.log_event(3.0, "worker-3 was killed [SIGKILL]")
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert text.count("expert 0 digits") == 1
    assert "worker-3 was killed [SIGKILL]" in text


def test_workspace_is_removed_also_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, signal, os\nfrom lutetia.cli.workspace import workspace\n"
        "with workspace(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'big').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "demo"])
    assert len(list(tmp_path.iterdir())) == 1
    with workspace(tmp_path / "demo") as folder:
        assert list(tmp_path.iterdir()) == [folder]
        with workspace(tmp_path / "demo") as other:
            assert folder.exists()
            assert other != folder
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "absent", ("report.md",))
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="other files"):
        check_replaceable(tmp_path, ("report.md",))
    (tmp_path / "report.md").write_text("")
    check_replaceable(tmp_path, ("report.md",))


async def test_local_swarm_ends_processes_and_reports_failures(tmp_path: Path) -> None:
    async with LocalSwarm(tmp_path) as swarm:
        failed = await swarm.start("worker-1", ["join", "no ticket"])
        assert await failed.process.wait() == 10
        with pytest.raises(LutetiaError, match="worker-1 ended with exit code 10.*not a ticket"):
            swarm.check()
    async with LocalSwarm(tmp_path) as swarm:
        member = await swarm.start("sleeper", ["help", "exit-codes"])
        await member.process.wait()
        swarm.check()
    assert free_port() != 0


def test_swarm_processes_die_with_killed_parent(tmp_path: Path) -> None:
    """After a SIGKILL of the parent, a command that waits for an answer ends at once."""
    code = (
        "import asyncio, sys, pathlib\nfrom lutetia.cli.local.processes import LocalSwarm\n"
        "async def main():\n"
        "    async with LocalSwarm(pathlib.Path(sys.argv[1])) as swarm:\n"
        "        member = await swarm.start('waits', ['swarm', 'status', sys.argv[2], '--timeout', '60'])\n"
        "        print(member.process.pid, flush=True)\n        await member.process.wait()\n"
        "asyncio.run(main())"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(120)
        arguments = [sys.executable, "-c", code, tmp_path, ticket(silent.getsockname()[1])]
        parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        connection, _ = silent.accept()  # the child is up and waits
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        _, alive = psutil.wait_procs([child], timeout=60)
        connection.close()
        parent.stdout.close()
    assert not alive
