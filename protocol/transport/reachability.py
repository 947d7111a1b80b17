"""Why an address cannot be reached: a plain TCP connect tells a wrong name, a closed port, silence and a wrong peer apart."""

from __future__ import annotations

import asyncio
import re
import socket

PROBE_TIMEOUT = 3.0
_NO_ANSWER = (OSError, ValueError, OverflowError)
"""What asyncio raises for hosts and ports that do not answer or are impossible (UnicodeError, for names, is a ValueError)."""
_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)(?:/p2p/(\w+))?")
_WRONG_PEER = re.compile(r"peer id mismatch|remote key matches (\w+)|but remote key|PeerIDMismatch")


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


async def why_unreachable(address: str, reported: str) -> str:
    """The reason in a few words. `reported` is the error of the library that dialled; a plain TCP connect finds out the rest."""
    match = _ADDRESS.match(address)
    if match is None:
        return "not an address of the form /ip4/HOST/tcp/PORT/p2p/ID"
    family = {"ip4": socket.AF_INET, "dns4": socket.AF_INET, "ip6": socket.AF_INET6, "dns6": socket.AF_INET6}.get(match[1], 0)
    wrong = _WRONG_PEER.search(reported)
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            _, writer = await asyncio.open_connection(match[2], int(match[3]), family=family)
    except TimeoutError:
        return f"no answer within {PROBE_TIMEOUT:.0f} s (host down, or a firewall drops packets)"
    except socket.gaierror:
        return f"the name {match[2]} does not resolve (DNS)"
    except ConnectionRefusedError:
        return "connection refused (nothing listens there)"
    except (UnicodeError, OverflowError):
        return "no host can have that name or port"
    except _NO_ANSWER as error:
        return (getattr(error, "strerror", None) or str(error)).lower()
    writer.close()
    if wrong:
        return f"wrong peer id: another peer answers there{f' ({wrong[1]})' if wrong[1] else ''}"
    return f"something answers there that is not a Lutetia peer ({reported[:120].strip() or 'no libp2p'})"


def bootstrap_failure(refused: dict[str, str]) -> str:
    """The text of the BootstrapError for what `Transport.dial_each` returned."""
    each = "; ".join(f"{address}: {reason}" for address, reason in refused.items())
    return f"none of the {len(refused)} bootstrap addresses answers ({each}); check this machine's network or get a new ticket"
