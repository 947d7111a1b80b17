"""A peer notices that its p2pd is dead, hangs or has lost its sockets, and p2pd ends with its peer."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import claim_key
from lutetia.protocol.transport.hivemind import transport
from tests.protocol.networks import manifest_of_now, until
from tests.protocol.transport.hivemind.p2pd_peer import litter, peer

_PIDFD_GETFD = 438
NOBODY = Identity.derived("nobody").peer_id


async def test_a_peer_whose_p2pd_died_is_not_alive(tmp_path: Path) -> None:
    run = manifest_of_now()
    anna = await peer("anna", tmp_path, run)
    os.kill(anna._daemon.process.pid, signal.SIGKILL)

    async def noticed() -> bool:
        return not anna.alive()

    await until(noticed)
    with pytest.raises(ConnectionError, match="p2pd has ended"):
        await anna.get(claim_key(run.run_id, 0))
    await anna.close()


@pytest.mark.parametrize("fault", ["stopped", "sockets removed"])
async def test_a_peer_whose_p2pd_hangs_is_not_alive(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HEALTH_PERIOD", 0.02)
    monkeypatch.setattr(transport, "HEALTH_TIMEOUT", 1.0)
    monkeypatch.setattr(transport, "_GOODBYE_TIMEOUT", 0.2)
    anna = await peer("anna", tmp_path, manifest_of_now())
    await anna.serve("/test/any", lambda stream: stream.close())
    p2pd = psutil.Process(anna._daemon.process.pid)
    if fault == "stopped":
        p2pd.suspend()
    else:
        for path in (tmp_path / "anna" / "p2pd").glob("*.sock"):
            path.unlink()

    async def noticed() -> bool:
        return not anna.alive()

    await until(noticed)
    with pytest.raises(ConnectionError, match="off the network"):
        await anna.open_stream(NOBODY, "/test/any")
    await anna.close()
    assert not p2pd.is_running(), "the next p2pd needs its port and its folder"


def shut_listener(pid: int, port: int) -> None:
    """Shut the listening socket of another process, as nothing but the kernel does in earnest."""
    libc = ctypes.CDLL(None, use_errno=True)
    for fd in [int(name) for name in os.listdir(f"/proc/{pid}/fd")]:
        own = libc.syscall(_PIDFD_GETFD, process := os.pidfd_open(pid), fd, 0)
        os.close(process)
        if own < 0 and ctypes.get_errno() == errno.EPERM:
            pytest.skip("this machine lets no process look into its child")
        if own < 0:
            continue
        if not stat.S_ISSOCK(os.fstat(own).st_mode):
            os.close(own)
            continue
        with socket.socket(fileno=own) as held:
            tcp = held.family in (socket.AF_INET, socket.AF_INET6)
            if tcp and held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and held.getsockname()[1] == port:
                held.shutdown(socket.SHUT_RDWR)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes another process's socket, which Linux allows")
async def test_a_peer_whose_p2pd_lost_its_listener_is_not_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HEALTH_PERIOD", 0.02)
    anna = await peer("anna", tmp_path, manifest_of_now())
    assert anna._listener.place

    async def checked() -> bool:
        return anna._listener._seen

    await until(checked)
    shut_listener(anna._daemon.process.pid, anna._listener.place[1])

    async def noticed() -> bool:
        return not anna.alive()

    await until(noticed)
    with pytest.raises(ConnectionError, match="no longer listens"):
        await anna.open_stream(NOBODY, "/test/any")
    await anna.close()


def test_p2pd_ends_with_a_killed_parent_and_leaves_nothing(tmp_path: Path) -> None:
    before = litter()
    child = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("transport_process.py"), tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout
    pid, address = child.stdout.readline().split()
    p2pd = psutil.Process(int(pid))
    assert p2pd.name() == "p2pd"
    assert not list(tmp_path.rglob("identity"))
    child.kill()
    child.wait()
    gone, alive = psutil.wait_procs([p2pd], timeout=60)
    assert not alive or alive[0].status() == psutil.STATUS_ZOMBIE
    port = int(address.split("/")[4])
    with socket.create_server(("127.0.0.1", port)):  # its port is free again
        pass
    assert litter() == before

    async def start_again() -> None:
        await (await peer("", tmp_path, manifest_of_now())).close()

    asyncio.run(start_again())
    assert not list(tmp_path.rglob("*.sock"))
