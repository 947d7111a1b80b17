"""Networks for the tests: the same few peers over either backend, all on this machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.transport.base import RecordCheck, Transport
from tests.memory_transport.network import MemoryNetwork
from tests.protocol.example_documents import manifest

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def manifest_of_now(count: int = 4) -> Manifest:
    """A manifest that is valid by this machine's clock."""
    now = time.time()
    return manifest(count, created=now - 60, expires=now + 3600)


class Anything:
    """The record check of a liar: it accepts everything. `key` is its answer where only a hash is known."""

    def __init__(self) -> None:
        self.key = ""

    def __call__(self, key: str | None, subkey: str, value: bytes, expires: float) -> str:
        return key or self.key


class Network(Protocol):
    """Starts peers that know each other."""

    async def peer(self, name: str, check: RecordCheck) -> Transport: ...

    async def alone(self, name: str, check: RecordCheck) -> Transport: ...


class Memory:
    """The memory network, in real time."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(seed=1, latency=0.001, timeout=0.3)

    async def peer(self, name: str, check: RecordCheck) -> Transport:
        return self.network.peer(Identity.derived(name), check)

    async def alone(self, name: str, check: RecordCheck) -> Transport:
        return MemoryNetwork().peer(Identity.derived(name), check)


class Hivemind:
    """Real p2pd processes on loopback. The first peer is the bootstrap of the others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bootstrap: list[str] = []

    async def peer(self, name: str, check: RecordCheck) -> Transport:
        transport = await self._start(name, check, self.bootstrap)
        self.bootstrap = self.bootstrap or transport.addresses()
        return transport

    async def alone(self, name: str, check: RecordCheck) -> Transport:
        return await self._start(name, check, [])

    async def _start(self, name: str, check: RecordCheck, bootstrap: list[str]) -> Transport:
        from lutetia.protocol.transport.hivemind.transport import connect_hivemind

        return await connect_hivemind(
            Identity.derived(name), listen=LOOPBACK, bootstrap=bootstrap, check=check, state_folder=self.folder / name
        )


def honest(run: Manifest) -> RecordCheck:
    return record_check(run, time.time)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 200.0, pause: float = 0.05) -> None:
    """Wait until `condition()` holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(pause)
