"""Which idle connections a peer closes. Pure.

A connection costs memory and a file, and whoever opens one need not use it. So of each prefix only a few idle ones stay. Peers
whose connection was closed dial again when they need it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from lutetia.protocol.transport.network_origin import origin_of, prefix_of

IDLE_PER_PREFIX = 64
"""Idle connections of one prefix that stay open."""


def idle_to_close(connections: Mapping[str, str], used: Collection[str], most: int) -> list[str]:
    """The peers whose connections are to be closed, by peer id.

    Args:
        connections: The address of each connected peer, by peer id.
        used: Peers whose connections are in use or wanted: they stay, and do not count.
        most: How many idle connections of a prefix stay.
    """
    idle = Counter[str]()
    closing: list[str] = []
    for peer_id, address in connections.items():
        if peer_id in used:
            continue
        prefix = prefix_of(origin_of(address))
        idle[prefix] += 1
        if idle[prefix] > most:
            closing.append(peer_id)
    return closing
