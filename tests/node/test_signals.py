"""Signals to the daemon: each that ends a service lets it finish first."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from lutetia.node.daemon import NodeDaemon
from lutetia.node.settings import NodeSettings
from lutetia.protocol.schema.identity import Identity
from lutetia.system.notify import ending_signals


def daemon_in(folder: Path) -> NodeDaemon:
    return NodeDaemon(NodeSettings(ticket="x", state_folder=folder), Identity.derived("signalled"))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_daemon_finish(number: signal.Signals, tmp_path: Path) -> None:
    daemon = daemon_in(tmp_path)
    with daemon.signals():
        os.kill(os.getpid(), number)
        async with asyncio.timeout(20):
            await daemon.ending.wait()


async def test_a_closed_terminal_is_heard_once(tmp_path: Path) -> None:
    daemon, verbs = daemon_in(tmp_path), []
    daemon.apply_verb = lambda event: verbs.append(event.verb)  # type: ignore[method-assign]
    heard = asyncio.Event()
    with daemon.signals():
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        async with asyncio.timeout(20):
            await heard.wait()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR1)
    assert verbs == ["finish", "leave"]


def test_nohup_is_respected() -> None:
    assert signal.SIGHUP in ending_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in ending_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
