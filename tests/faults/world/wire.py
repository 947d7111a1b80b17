"""`python wire.py SEED NAMESPACE ADDRESS …`: carries packets between network namespaces, as well or as badly as it is told.

In each namespace it holds the device `wire0` (TUN). What a namespace sends to another's ADDRESS is delivered there, delayed,
lost, queued or dropped by the settings of that one direction; so links may be asymmetric. It is `tc netem` in user space: the
same on every kernel, also where the module `sch_netem` is missing, and seeded.

It hears JSON lines on stdin: `{"link": [from, to], "delay": s, "jitter": s, "loss": share, "rate": bytes/s or null, "cut": bool,
"dials": bool}` (`dials` false drops the first packet of TCP: `from` cannot open connections to `to`), and `{"count": true}`. It
answers each with a line: the bytes that every namespace has sent so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import random
import struct
import sys
from dataclasses import dataclass

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_MOST_QUEUED = 200  # packets of one direction; more are dropped, as a router does
_SYN, _ACK = 0x02, 0x10


@dataclass
class Link:
    """One direction between two namespaces."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: float | None = None
    cut: bool = False
    dials: bool = True
    free_at: float = 0.0
    queued: int = 0


class Wire:
    def __init__(self, seed: int, places: dict[str, str]) -> None:
        self.chance = random.Random(seed)
        self.devices = {name: _device(name) for name in places}
        self.names = {bytes(map(int, address.split("."))): name for name, address in places.items()}
        self.links = {(a, b): Link() for a in places for b in places if a != b}
        self.sent = dict.fromkeys(places, 0)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for name, device in self.devices.items():
            loop.add_reader(device, self._read, name, device)
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        print(json.dumps(self.sent), flush=True)
        while line := await reader.readline():
            order = json.loads(line)
            if "link" in order:
                link = self.links[tuple(order.pop("link"))]
                for key, value in order.items():
                    setattr(link, key, value)
            print(json.dumps(self.sent), flush=True)

    def _read(self, name: str, device: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                packet = os.read(device, 65536)
                self.sent[name] += len(packet)
                if packet[0] >> 4 == 4 and (to := self.names.get(packet[16:20])) and to != name:
                    self._carry(self.links[name, to], to, packet)

    def _carry(self, link: Link, to: str, packet: bytes) -> None:
        """First come, first served: jitter delays, and never reorders."""
        if link.cut or self.chance.random() < link.loss or link.queued >= _MOST_QUEUED or not (link.dials or not _opens(packet)):
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = now + link.delay + link.jitter * self.chance.uniform(-1, 1)
        if link.rate:
            due = max(due, link.free_at + len(packet) / link.rate)
        link.free_at = max(due, link.free_at, now)
        link.queued += 1
        loop.call_at(link.free_at, self._deliver, link, to, packet)

    def _deliver(self, link: Link, to: str, packet: bytes) -> None:
        link.queued -= 1
        if not link.cut:
            with contextlib.suppress(BlockingIOError):
                os.write(self.devices[to], packet)


def _opens(packet: bytes) -> bool:
    """Whether this is the first packet of a TCP connection."""
    header = 4 * (packet[0] & 15)
    return packet[9] == 6 and packet[header + 13] & (_SYN | _ACK) == _SYN


def _device(namespace: str) -> int:
    """The TUN device of `namespace`, opened from inside it."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    _enter(f"/run/netns/{namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire0", _IFF_TUN | _IFF_NO_PI))
    _enter(f"/proc/self/fd/{home}")
    os.close(home)
    return device


def _enter(space: str) -> None:
    place = os.open(space, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(place, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {space}")
    os.close(place)


if __name__ == "__main__":
    words = sys.argv[2:]
    asyncio.run(Wire(int(sys.argv[1]), dict(zip(words[::2], words[1::2], strict=True))).run())
