"""Why an address cannot be reached, from what the library that dialled says; and what a run's host names resolve to."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable

from lutetia.protocol.transport.dial_policy import DialPolicy, IPAddress

PROBE_TIMEOUT = 3.0
_NO_ANSWER = (OSError, ValueError, OverflowError)
"""What asyncio raises for hosts and ports that do not answer or are impossible (UnicodeError, for names, is a ValueError)."""
_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)(?:/p2p/(\w+))?")
_WRONG_PEER = re.compile(r"peer id mismatch|remote key matches (\w+)|but remote key|PeerIDMismatch")
_REASONS = (
    ("connection refused", "connection refused (nothing listens there)"),
    ("no route to host", "no route to host"),
    ("network is unreachable", "network is unreachable"),
    ("no answer a moment ago", "no answer a moment ago"),
    ("dial backoff", "no answer a moment ago, and p2pd does not dial again yet"),
    ("negotiate", "something answers there that is not a Lutetia peer"),
    ("timeout", "no answer in time (host down, or a firewall drops packets)"),
    ("deadline", "no answer in time (host down, or a firewall drops packets)"),
    ("did not answer", "no answer in time (host down, or a firewall drops packets)"),
    ("no good addresses", "no host can have that name or port"),
    ("can be dialled", "no host can have that name or port"),
    ("undialable", "no host can have that name or port"),
)
"""Part of what p2pd reports -> the reason, the first that fits."""


async def answers(address: str) -> bool:
    """Whether anything accepts a TCP connection at this multiaddr."""
    match = _ADDRESS.match(address)
    if match is None:
        return False
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            _, writer = await asyncio.open_connection(match[2], int(match[3]))
    except _NO_ANSWER:
        return False
    writer.close()
    return True


def why_unreachable(address: str, reported: str) -> str:
    """The reason in a few words. `reported` is the error of p2pd. Nothing is dialled: that would double every dial."""
    match = _ADDRESS.match(address)
    if match is None:
        return "not an address of the form /ip4/HOST/tcp/PORT/p2p/ID"
    if wrong := re.search(r"remote key matches (\w+)", reported) or _WRONG_PEER.search(reported):
        return f"wrong peer id: another peer answers there{f' ({wrong[1]})' if wrong[1] else ''}"
    if match[1].startswith("dns") and "no good addresses" in reported:
        return f"the name {match[2]} does not resolve (DNS)"
    detail = reported.rpartition("] ")[2].strip() or reported.strip()
    return next((reason for part, reason in _REASONS if part in reported), detail[:120] or "no libp2p peer answers")


def bootstrap_failure(refused: dict[str, str]) -> str:
    """The text of the BootstrapError for what `Transport.dial_each` returned."""
    each = "; ".join(f"{address}: {reason}" for address, reason in refused.items())
    return f"none of the {len(refused)} bootstrap addresses answers ({each}); check this machine's network or get a new ticket"


async def policy_of(addresses: Iterable[str]) -> DialPolicy:
    """The dial policy of a run whose ticket names `addresses`. Host names are looked up, for up to PROBE_TIMEOUT seconds."""
    addresses = list(addresses)
    names = {match[2] for address in addresses if (match := _ADDRESS.match(address)) and match[1].startswith("dns")}
    resolved = await asyncio.gather(*map(_resolve, names))
    return DialPolicy.of(addresses, [host for hosts in resolved for host in hosts])


async def _resolve(name: str) -> list[IPAddress]:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except _NO_ANSWER:
        return []
    hosts = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    # many systems give their own name a loopback address, which says nothing about the run
    return [host for host in hosts if not host.is_loopback or name == "localhost"]
