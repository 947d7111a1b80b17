"""Children that a template process forks behave as those that are started by an interpreter of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from lutetia.system.forked import TEMPLATE, ForkRequest, ask_to_fork, start_template
from lutetia.system.process import Child

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has abstract sockets and pidfds")
SECONDS = 60
ECHO = "tests.system.echo_child"


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Iterator[psutil.Process]:
    name, process = start_template("json")
    monkeypatch.setenv(TEMPLATE, name)
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


async def echo(child: Child, **message: object) -> dict[str, object]:
    await child.send(message)
    return await anext(child.messages())


async def test_forked_child_has_its_own_environment_and_group(template: psutil.Process):
    child = await Child.start(ECHO, "--flag", environment={"COLOUR": "red"})
    reply = await echo(child, ask="COLOUR")
    assert reply == {"value": "red", "arguments": ["--flag"], "cwd": os.getcwd(), "group": child.process.pid}
    assert psutil.Process(child.process.pid).ppid() == template.pid
    assert psutil.Process(child.process.pid).name() == f"echo_child {os.getpid()}"[:15]
    assert child.process.returncode is None
    assert await child.stop(SECONDS) == 7
    assert child.process.returncode == 7


async def test_killed_forked_child_reports_its_signal(template: psutil.Process):
    child = await Child.start(ECHO)
    await echo(child, ask="")
    os.kill(child.process.pid, signal.SIGKILL)
    assert await child.process.wait() == -signal.SIGKILL
    with pytest.raises(ConnectionError):
        await echo(child, ask="")


def test_forked_child_is_killed_when_its_client_is_gone(template: psutil.Process):
    request = ForkRequest(ECHO, (), os.getcwd(), dict(os.environ), os.getpid())
    stdin, ours = os.pipe()
    with ask_to_fork(os.environ[TEMPLATE], request, (stdin, 1, 2)) as connection:
        child = psutil.Process(int(connection.makefile().readline()))
        child.suspend()  # also one that cannot hear
    _, alive = psutil.wait_procs([child], timeout=SECONDS)
    os.close(stdin)
    os.close(ours)
    assert not alive


async def test_forked_children_die_with_their_template(template: psutil.Process):
    child = await Child.start(ECHO)
    await echo(child, ask="")
    template.kill()
    assert await child.process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs([template], timeout=SECONDS)
    assert not alive
    fresh = await Child.start(ECHO, environment={"COLOUR": "blue"})  # starts an interpreter, since nobody forks
    assert (await echo(fresh, ask="COLOUR"))["value"] == "blue"
    assert await fresh.stop(SECONDS) == 7


async def test_malformed_request_does_not_end_the_template(template: psutil.Process):
    for data in (b"no JSON\n", b"{}\n", b""):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + os.environ[TEMPLATE].removeprefix("@"))
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert await asyncio.to_thread(connection.recv, 1) == b""
    child = await Child.start(ECHO)
    assert await child.stop(SECONDS) == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_template_refuses_another_user(template: psutil.Process):
    request = ForkRequest(ECHO, (), os.getcwd(), {}, os.getpid())

    def ask() -> None:
        ask_to_fork(os.environ[TEMPLATE], request, (0, 1, 2))

    def ask_without_looking() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + os.environ[TEMPLATE].removeprefix("@"))
            socket.send_fds(connection, [request.encode()], [0, 1, 2])
            if not connection.recv(1):
                raise ConnectionResetError

    assert as_nobody(ask) == "PermissionError"
    assert as_nobody(ask_without_looking) in ("ConnectionResetError", "BrokenPipeError")
    assert not template.children()


def as_nobody(action: Callable[[], None]) -> str:
    """The name of the error that `action` raises in a fork without rights."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.setuid(65534)
            action()
        except OSError as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        name = answer.read()
    os.wait()
    return name
