"""Asks this peer's dial policy about each connection and each datagram that p2pd begins by itself.

p2pd dials what connected peers tell it of their addresses, and has no setting to limit that. Linux can stop such a call until
another process has answered (seccomp_unotify(2)): `system/tether.py` arranges that, and here are the answers. They hold for all
dials, those that Lutetia starts too, which the policy has allowed already. Datagrams leave for multicast, name servers and the
machine's router alone, which is what port mapping needs: nobody listens for QUIC in a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import logging
import os
import platform
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lutetia.system.log_limit import LimitedLog
from lutetia.system.tether import SYSTEM_CALLS

log = logging.getLogger(__name__)

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_GET_DESCRIPTOR = 438
_NAME_SERVICE = 53
_LONGEST_NAME = 128

Allows = Callable[[str], bool]
"""Whether a multiaddr such as /ip4/192.0.2.1/tcp/4001 may be dialled."""


@dataclass(frozen=True)
class Target:
    """Where a call leads. `stream`: by TCP."""

    host: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    stream: bool


def is_allowed(target: Target, allows: Allows, routers: frozenset[str]) -> bool:
    """Whether p2pd may begin this. `routers`: the machine's, which are asked for a port if that is switched on."""
    if target.host.is_unspecified or str(target.host) in routers:
        return True
    if target.stream:
        return allows(f"/ip{target.host.version}/{target.host}/tcp/{target.port}")
    return target.host.is_multicast or target.port == _NAME_SERVICE


def descriptor_of(report: socket.socket) -> int | None:
    """The descriptor that `system/tether.py` has sent, once `report` can be read; None: this machine has no such filter."""
    try:
        _, descriptors, *_ = socket.recv_fds(report, 1, 1)
    except OSError:
        return None
    return descriptors[0] if descriptors else None


class OwnDials:
    """Answers the kernel until p2pd has ended. `listener` is the descriptor at which it asks."""

    def __init__(self, listener: int, process: int, allows: Allows, map_ports: bool) -> None:
        self._listener, self.allows = listener, allows
        self._process = os.pidfd_open(process)
        self._routers = _routers() if map_ports else frozenset[str]()
        self._log_refusal = LimitedLog(log)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener, self._answer)

    def close(self) -> None:
        """Answer no more: what p2pd begins now fails. Idempotent."""
        if self._listener >= 0:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            os.close(self._process)
            self._listener = -1

    def _answer(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        if any(event & select.POLLHUP for _, event in poll.poll(0)):
            self.close()
            return
        question = bytearray(80)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, question)
        except OSError:
            return  # the thread that asked was interrupted
        number, thread, _, call, _, _, *arguments = struct.unpack("=QIIiIQ6Q", question)
        refused = self._refused(thread, call, arguments)
        answer = struct.pack("=QqiI", number, 0, -errno.EACCES if refused else 0, 0 if refused else _CONTINUE)
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            fcntl.ioctl(self._listener, _SEND, bytearray(answer))

    def _refused(self, thread: int, call: int, arguments: list[int]) -> bool:
        try:
            target = self._target(thread, call, arguments)
        except OSError as error:
            self._log_refusal(logging.WARNING, "memory", "what p2pd dials by itself is not limited: %s", error)
            return False
        if target is None or is_allowed(target, self.allows, self._routers):
            return False
        self._log_refusal(logging.INFO, str(target.host), "p2pd may not dial %s port %d by itself", target.host, target.port)
        return True

    def _target(self, thread: int, call: int, arguments: list[int]) -> Target | None:
        """None: an address of another family, or that of a connection which exists."""
        connect, send_to, *_ = SYSTEM_CALLS[platform.machine()][1]
        with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
            if call in (connect, send_to):
                place, length = (arguments[1], arguments[2]) if call == connect else (arguments[4], arguments[5])
            else:  # struct msghdr begins with the name and its length
                memory.seek(arguments[1])
                place, length = struct.unpack("=QI", memory.read(12))
            if not place or not length:
                return None
            memory.seek(place)
            name = memory.read(min(length & 0xFFFFFFFF, _LONGEST_NAME))
        family = int.from_bytes(name[:2], "little")
        if family == socket.AF_INET and len(name) >= 8:
            host: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.IPv4Address(name[4:8])
        elif family == socket.AF_INET6 and len(name) >= 24:
            host = ipaddress.IPv6Address(name[8:24])
            host = host.ipv4_mapped or host
        else:
            return None
        return Target(host, int.from_bytes(name[2:4], "big"), self._is_stream(arguments[0]))

    def _is_stream(self, descriptor: int) -> bool:
        """Raises OSError."""
        copy = ctypes.CDLL(None, use_errno=True).syscall(_GET_DESCRIPTOR, self._process, descriptor, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with socket.socket(fileno=copy) as own:
            return own.type == socket.SOCK_STREAM


def _routers() -> frozenset[str]:
    """The IPv4 addresses of this machine's default routers."""
    found = set()
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == "00000000" and fields[2] != "00000000":
                found.add(str(ipaddress.IPv4Address(bytes.fromhex(fields[2])[::-1])))
    return frozenset(found)
