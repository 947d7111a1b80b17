"""The messages of a service to systemd."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from lutetia.cli.run_service import run_service
from lutetia.system.notify import notify, watchdog_seconds


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.bind(str(tmp_path / "notify"))
        link.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield link


def test_a_service_reports_its_life(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")

    async def main() -> None:
        notify("READY=1")
        await asyncio.sleep(0.05)

    run_service(main())
    heard = []
    while not heard or heard[-1] != "STOPPING=1":
        heard.append(manager.recv(256).decode())
    assert heard[0] == "READY=1"
    assert heard.count("WATCHDOG=1") >= 2


def test_without_a_service_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert not notify("READY=1")
    assert watchdog_seconds() is None
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert watchdog_seconds() is None
