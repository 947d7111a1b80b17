"""Machines on one machine: network namespaces with a wire between them that can be cut, slowed and made to lose packets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutetia.system import tether

WIRE = Path(__file__).with_name("wire.py")
CLEAN: dict[str, Any] = {"delay": 0.0, "jitter": 0.0, "loss": 0.0, "rate": None, "cut": False, "dials": True}


def why_not() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "network namespaces are made with ip (Debian package iproute2)"
    if not Path("/dev/net/tun").exists():
        return "the wire between network namespaces needs /dev/net/tun"
    probe = f"lt{os.getpid()}"
    if (made := _ip("netns", "add", probe, check=False)).returncode:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@dataclass
class Network:
    """Places that can reach each other at `address(place)`."""

    places: tuple[str, ...]
    wire: asyncio.subprocess.Process

    def space(self, place: str) -> str:
        return f"lt{os.getpid()}-{place}"

    def address(self, place: str) -> str:
        return f"10.77.0.{self.places.index(place) + 1}"

    def prefix(self, place: str) -> Sequence[str]:
        """What makes a command run there."""
        return ("ip", "netns", "exec", self.space(place))

    async def oneway(self, sender: str, receiver: str, **link: Any) -> None:
        """Change one direction (see wire.py)."""
        await self._tell({"link": [self.space(sender), self.space(receiver)], **link})

    async def both(self, one: str, other: str, **link: Any) -> None:
        await self.oneway(one, other, **link)
        await self.oneway(other, one, **link)

    async def around(self, place: str, **link: Any) -> None:
        """Every link of `place`, both ways."""
        for other in self.places:
            if other != place:
                await self.both(place, other, **link)

    async def heal(self) -> None:
        """All links are perfect again."""
        for place in self.places:
            await self.around(place, **CLEAN)

    async def sent(self) -> dict[str, int]:
        """Bytes on the wire by place, IP headers included."""
        counts = await self._tell({"count": True})
        return {place: counts[self.space(place)] for place in self.places}

    async def _tell(self, order: dict[str, Any]) -> dict[str, int]:
        assert self.wire.stdin
        assert self.wire.stdout
        self.wire.stdin.write(json.dumps(order).encode() + b"\n")
        line = await self.wire.stdout.readline()
        assert line, "the wire broke"
        return json.loads(line)


@contextlib.asynccontextmanager
async def network(*places: str, seed: int = 7) -> AsyncIterator[Network]:
    """Make the namespaces and the wire; nothing of them is left."""
    names = {place: f"lt{os.getpid()}-{place}" for place in places}
    wire: asyncio.subprocess.Process | None = None
    try:
        words = []
        for number, name in enumerate(names.values(), 1):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "tuntap", "add", "dev", "wire0", "mode", "tun")
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "wire0")
            _ip("-n", name, "link", "set", "wire0", "up", "mtu", "1400")
            words += [name, f"10.77.0.{number}"]
        wire = await asyncio.create_subprocess_exec(
            *tether.command(sys.executable),
            str(WIRE),
            str(seed),
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert wire.stdout
        assert await wire.stdout.readline(), "the wire did not start"
        yield Network(places, wire)
        for name in names.values():
            left = _ip("netns", "pids", name).stdout.split()
            assert not left, f"processes {left} are left in {name}"
    finally:
        if wire and wire.stdin:
            wire.stdin.close()
            await wire.wait()
        for name in names.values():
            _ip("netns", "del", name, check=False)
