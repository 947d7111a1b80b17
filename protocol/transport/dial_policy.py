"""Which of the addresses that other peers name are dialled, and when. Pure.

A record may name any address, so whoever dials it would scan networks and flood third parties on behalf of its author. A peer
therefore dials only where its run lives: public addresses if the ticket names one, else the ticket's own private ranges, else
loopback. What does not answer is left alone for a while, twice as long each time.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lutetia.system.retry import backoff

Value = TypeVar("Value")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

ADDRESSES_DIALLED = 4
"""Of one record, at most this many addresses are dialled."""
DIALS_PER_HOST = 4
"""Addresses of one host that are dialled at once."""
FAILING_PER_HOST = 4
"""Addresses of one host that may fail before new ones of it have to wait."""
NEW_ADDRESS_PAUSE = 60.0
"""Seconds between two new addresses of a host with FAILING_PER_HOST addresses that do not answer."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 3600.0
"""Seconds for which an address is left alone after its first failure, and at most."""
LONGEST_TRUSTED_PAUSE = 300.0
"""The same for addresses of the ticket, over which a peer returns to its swarm."""
_MOST_ENTRIES = 4096

_PLACE = re.compile(r"/(ip4|ip6)/([^/]+)/tcp/(\d+)")
_LOOPBACK = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128")))
_PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "fc00::/7", "fe80::/10"),
    )
)
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "fec0::/10", "192.88.99.0/24"),
    )
)
"""Ranges that Python counts as global. NAT64, 6to4, Teredo and IPv4-compatible IPv6 addresses lead to an IPv4 address, which may
be private; fec0::/10 is private itself; 192.88.99.0/24 is whatever relay of 6to4 is nearest."""


def place_of(address: str) -> str:
    """The address without the peer id."""
    return address.partition("/p2p/")[0]


def host_of(address: str, *, listens: bool = False) -> IPAddress | None:
    """The IP address of a multiaddr of the form /ip4/HOST/tcp/PORT; None for host names, relays and what is malformed.

    Port 0 is malformed, except where a peer `listens`.
    """
    match = _PLACE.fullmatch(place_of(address))
    if match is None or "/p2p-circuit" in address or not (0 if listens else 1) <= int(match[3]) < 1 << 16:
        return None
    try:
        host = ipaddress.ip_address(match[2])
    except ValueError:
        return None
    return host.ipv4_mapped or host if isinstance(host, ipaddress.IPv6Address) else host


@dataclass(frozen=True)
class DialPolicy:
    """Where this peer dials.

    `trusted` holds the addresses of the ticket and of this peer's own settings. Their `places` are dialled whatever they are,
    under any peer id, because a coordinator's key can change. `ranges` are the private or loopback networks of the run; without
    any, the run is public.
    """

    trusted: frozenset[str] = frozenset()
    places: frozenset[str] = frozenset()
    ranges: tuple[IPNetwork, ...] = ()

    @classmethod
    def of(cls, trusted: Iterable[str], resolved: Iterable[IPAddress] = ()) -> DialPolicy:
        """The policy of a run.

        Args:
            trusted: The addresses of its ticket, or the one at which this peer listens.
            resolved: What host names among them resolve to.
        """
        trusted = frozenset(trusted)
        places = frozenset(map(place_of, trusted))
        named = [host for place in places if (host := host_of(place, listens=True)) is not None]
        hosts = [host for host in (*named, *resolved) if not host.is_unspecified]
        private, loopback = _ranges_with(_PRIVATE, hosts), _ranges_with(_LOOPBACK, hosts)
        if any(_is_public(host) for host in hosts):
            return cls(trusted, places)
        return cls(trusted, places, private or loopback)

    def allows(self, address: str) -> bool:
        """Whether an address that another peer named may be dialled. Host names are not: whoever owns one chooses its answer."""
        if place_of(address) in self.places:
            return True
        host = host_of(address)
        if host is None:
            return False
        return any(host in network for network in self.ranges) if self.ranges else _is_public(host)


def _ranges_with(ranges: Sequence[IPNetwork], hosts: Iterable[IPAddress]) -> tuple[IPNetwork, ...]:
    hosts = list(hosts)
    return tuple(network for network in ranges if any(host in network for host in hosts))


def _is_public(host: IPAddress) -> bool:
    return host.is_global and not host.is_multicast and not any(host in network for network in _NOT_PUBLIC)


@dataclass
class DialBackoff:
    """Remembers addresses that answered and those that did not. Times are seconds of any clock.

    Addresses count with their peer ids: a liar that names an honest peer's place under another id must not keep others from it.
    """

    _failures: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)
    """Address -> how often it has failed in a row, and until when it is left alone."""
    _failing: Counter[str] = field(default_factory=Counter)
    """Host -> how many of its addresses are among the failures."""
    _answered: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _newest: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """Host -> when an address of it failed for the first time, the last one."""

    def allows(self, address: str, now: float) -> bool:
        """Whether to dial an address now."""
        if address in self._failures:
            return now >= self._failures[address][1]
        if address in self._answered:
            return True
        host = _host_name(address)
        return self._failing[host] < FAILING_PER_HOST or now >= self._newest.get(host, -NEW_ADDRESS_PAUSE) + NEW_ADDRESS_PAUSE

    def failed(self, addresses: Iterable[str], now: float, longest: float = LONGEST_PAUSE) -> None:
        """Note that a dial of all these addresses failed. Each is left alone for at most `longest` seconds."""
        for address in addresses:
            times, _ = self._failures.get(address, (0, 0.0))
            if not times and address not in self._answered:
                _put(self._newest, _host_name(address), now)
            wait = backoff(times + 1, first=FIRST_PAUSE, longest=longest)
            self._forget(address)
            self._failing[_host_name(address)] += 1
            if (dropped := _put(self._failures, address, (times + 1, now + wait))) is not None:
                self._count_down(dropped)

    def answered(self, address: str) -> None:
        """Note that its peer answered at this address."""
        self._forget(address)
        _put(self._answered, address, None)

    def _forget(self, address: str) -> None:
        if self._failures.pop(address, None):
            self._count_down(address)

    def _count_down(self, address: str) -> None:
        host = _host_name(address)
        self._failing[host] -= 1
        if not self._failing[host]:
            del self._failing[host]


def _put(entries: OrderedDict[str, Value], name: str, value: Value) -> str | None:
    """Put an entry last. Beyond _MOST_ENTRIES drop the first and return its name."""
    entries.pop(name, None)
    entries[name] = value
    return entries.popitem(last=False)[0] if len(entries) > _MOST_ENTRIES else None


def _host_name(address: str) -> str:
    return "/".join(address.split("/")[1:3])
