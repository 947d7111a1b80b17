"""The control socket and the lock of a state folder."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lutetia.node.control import SOCKET, ControlRequest, ask, serve_control
from lutetia.node.state_lock import PIDFILE, state_lock
from lutetia.system.errors import DiskError, IdentityError, UnreachableError, UsageError


async def echo(request: ControlRequest) -> dict[str, Any]:
    if request.verb == "leave":
        raise DiskError("no room to leave")
    return request.model_dump()


async def test_ask_returns_the_answer(tmp_path: Path):
    async with serve_control(tmp_path, echo):
        assert await ask(tmp_path, "pause", seconds=60) == {"verb": "pause", "seconds": 60.0, "device": None}
        assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600
    assert not (tmp_path / SOCKET).exists()


async def test_socket_in_a_deep_folder_works(tmp_path: Path):
    deep = tmp_path / ("d" * 80) / ("e" * 80)
    deep.mkdir(parents=True)
    async with serve_control(deep, echo):
        assert (await ask(deep, "status"))["verb"] == "status"


async def test_refusals_are_one_sentence(tmp_path: Path):
    async with serve_control(tmp_path, echo):
        with pytest.raises(UsageError, match="verb"):
            await ask(tmp_path, "dance")
        with pytest.raises(UsageError, match="seconds"):
            await ask(tmp_path, "pause", seconds=-1)
        with pytest.raises(UsageError, match="no room"):
            await ask(tmp_path, "leave")


async def test_ask_without_a_daemon_is_unreachable(tmp_path: Path):
    with pytest.raises(UnreachableError, match="no daemon runs"):
        await ask(tmp_path, "status")
    (tmp_path / SOCKET).touch()
    with pytest.raises(UnreachableError, match="no daemon runs"):
        await ask(tmp_path, "status")


async def test_stale_socket_of_a_killed_daemon_is_replaced(tmp_path: Path):
    (tmp_path / SOCKET).touch()
    async with serve_control(tmp_path, echo):
        assert await ask(tmp_path, "status")


async def test_bad_and_silent_clients_do_not_block_others(tmp_path: Path):
    async with serve_control(tmp_path, echo):
        _, silent = await asyncio.open_unix_connection(tmp_path / SOCKET)
        _, noisy = await asyncio.open_unix_connection(tmp_path / SOCKET)
        noisy.write(b"x" * 100_000)
        assert await ask(tmp_path, "status")
        silent.close()
        noisy.close()


def test_second_daemon_error_names_the_first_pid(tmp_path: Path):
    with state_lock(tmp_path), pytest.raises(IdentityError, match=rf"pid {os.getpid()}\b"), state_lock(tmp_path):
        pass
    with state_lock(tmp_path):
        assert (tmp_path / PIDFILE).read_text() == f"{os.getpid()}\n"


def test_lock_of_a_killed_process_is_free(tmp_path: Path):
    script = f"""
        import os, signal
        from pathlib import Path
        from lutetia.node.state_lock import state_lock
        with state_lock(Path({str(tmp_path)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert (tmp_path / PIDFILE).exists()
    with state_lock(tmp_path):
        pass


def test_asking_imports_neither_torch_nor_hivemind():
    script = "import sys, lutetia.node.control; print([m for m in ('torch', 'hivemind', 'diffusers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_pidfile_that_is_another_file_is_refused_and_nothing_is_emptied(kind: str, tmp_path: Path):
    victim, pidfile = tmp_path / "victim", tmp_path / "state" / PIDFILE
    victim.write_text("precious")
    pidfile.parent.mkdir()
    make = {
        "link": lambda: pidfile.symlink_to(victim), "hard link": lambda: pidfile.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(pidfile), "folder": pidfile.mkdir,
    }  # fmt: skip
    make[kind]()
    with pytest.raises(IdentityError, match="daemon.pid is a link or no plain file"), state_lock(pidfile.parent):
        pass
    assert victim.read_text() == "precious"
