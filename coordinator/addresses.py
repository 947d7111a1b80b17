"""Addresses as an owner writes them: `host:port`, checked before a ticket names them to everybody."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Literal

from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import ConfigError

_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_EXAMPLES = "203.0.113.5:41000, training.example.org:41000 or [2001:db8::1]:41000"

Reach = Literal["machine", "network", "anyone"]


def host_port(text: str) -> str:
    """`text` itself if it is `host:port`. Raises ValueError that says what is wrong with it."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or (":" in host and not host.startswith("[")):
        raise ValueError(f"{text!r} is not host:port; write it like {_EXAMPLES}")
    if int(port) > 65535:
        raise ValueError(f"{text!r} has no port between 0 and 65535")
    if host.startswith("[") or re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError as error:
            raise ValueError(f"{host} is no IP address; write host:port like {_EXAMPLES}") from error
    elif not _NAME.fullmatch(host) or len(host) > 253:
        raise ValueError(f"{host!r} is no host name (letters, digits, hyphens and dots); write host:port like {_EXAMPLES}")
    return text


def dialled_address(text: str) -> str:
    """`text` itself if it is a `host:port` that others can dial. Raises ValueError that says why it is not."""
    host = _address(host_port(text))
    if text.endswith((":0", ":00", ":000", ":0000", ":00000")):
        raise ValueError(f"{text!r} has port 0, which nobody can dial; give the port that the coordinator is to listen on")
    if host and (host.is_unspecified or host.is_multicast or host == ipaddress.IPv4Address("255.255.255.255")):
        raise ValueError(
            f"{host} is where a machine listens, not where others reach it; give this machine's own name or address, "
            "as nodes see it"
        )
    return text


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address in `host:port`; None for a name."""
    try:
        return ipaddress.ip_address(text.rpartition(":")[0].strip("[]"))
    except ValueError:
        return None


def reach(addresses: Sequence[str]) -> Reach:
    """Who can dial at least one of `addresses`: this machine alone, machines of its network, or anyone."""
    found: set[Reach] = set()
    for text in addresses:
        host = _address(text)
        if host is None:
            found.add("machine" if text.rpartition(":")[0].rstrip(".").lower() == "localhost" else "anyone")
        else:
            found.add("machine" if host.is_loopback else "anyone" if host.is_global else "network")
    return "anyone" if "anyone" in found else "network" if "network" in found else "machine"


def reach_of_ticket(ticket: str) -> Reach:
    """Who can dial at least one of a ticket's addresses. Raises ConfigError when it is malformed."""
    hosts = [(kind, host, port) for _, kind, host, _, port, *_ in (place.split("/") for place in Ticket.decode(ticket).addresses)]
    return reach([f"[{host}]:{port}" if kind == "ip6" else f"{host}:{port}" for kind, host, port in hosts])


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port of `host:port`. Raises ConfigError if there is no such port."""
    host, _, port = address.rpartition(":")
    if not 1 <= int(port) <= 65535:
        raise ConfigError(f"the address {address} has no port between 1 and 65535; write it as host:port")
    return host.strip("[]"), int(port)


def multiaddr(address: str) -> str:
    """`host:port` as libp2p writes it. Raises ConfigError as `split_address`."""
    host, port = split_address(address)
    try:
        return f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}"
    except ValueError:
        return f"/dns/{host}/tcp/{port}"
