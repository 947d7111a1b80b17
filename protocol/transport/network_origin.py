"""The network from which a stream comes, for limits: an IPv4 address, or the /64 that one IPv6 customer gets.

Who rents one address often gets its neighbours as well, so crowding is counted by prefix, too.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

PREFIX_FACTOR = 4
"""All addresses of one prefix together may use so many times the quota of one."""
_HOST = re.compile(r"^/(ip4|ip6)/([^/]+)")


def origin_of(address: str) -> str:
    """The origin of a multiaddr, for instance 203.0.113.5 or 2001:db8::/64. "" for relayed peers and host names."""
    match = _HOST.match(address)
    if match is None or "/p2p-circuit" in address:
        return ""
    try:
        host = ipaddress.ip_address(match[2].partition("%")[0])
    except ValueError:
        return ""
    if isinstance(host, ipaddress.IPv6Address):
        if host.ipv4_mapped:
            return str(host.ipv4_mapped)
        return str(ipaddress.ip_network((host, 64), strict=False))
    return str(host)


@lru_cache(maxsize=1 << 13)
def prefix_of(origin: str) -> str:
    """The /24 or /48 around an origin. Loopback and private addresses stay as they are: one network there is one operator's.

    "" for relayed peers, which share one prefix.
    """
    try:
        network = ipaddress.ip_network(origin)
    except ValueError:
        return origin
    if not network.is_global:
        return origin
    return str(network.supernet(new_prefix=24 if network.version == 4 else 48))


@lru_cache(maxsize=1 << 13)
def quotas_of(origin: str) -> tuple[tuple[str, int], ...]:
    """The names under which an origin is counted, each with the number of address quotas that it may use: itself, its prefix."""
    prefix = prefix_of(origin)
    return ((origin, 1),) if prefix == origin else ((origin, 1), (prefix, PREFIX_FACTOR))
