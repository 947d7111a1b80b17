"""How many bytes a run will take of a volunteer's line, before joining and from what the probe found. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from lutetia.models.training.memory.needs import size_text
from lutetia.node.runtime.replication_policy import COPIES_WANTED
from lutetia.protocol.joining import REMEMBER_PERIOD
from lutetia.protocol.schema.records import node_keys
from lutetia.protocol.transport.metered import SEARCH_BYTES

_HOUR = 3600.0
_SEARCHES = 20
"""Searches of a node in a heartbeat: 16 for the records of other nodes, and for its shard, its claim and its own record."""


def waiting_records(heartbeat: float) -> float:
    """Bytes a second, both ways, of the records of a node that only waits: its own, and those by which it remembers peers."""
    return 2 * SEARCH_BYTES * (1 / heartbeat + len(node_keys("")) / REMEMBER_PERIOD)


@dataclass(frozen=True)
class TrafficForecast:
    """Bytes of one device's training.

    Attributes:
        results: results in an hour.
        sent: bytes an hour to the coordinator: results and records.
        copied: bytes an hour besides, at most: to peers that copy the results, and from others that this node copies.
        received: bytes an hour: records.
        once: bytes before training: data, and the checkpoint that it goes on from.
        standby: bytes an hour while it has no shard, at most: audits, each of which takes as long as the epoch that it replays.
    """

    results: float
    sent: float
    copied: float
    received: float
    once: int
    standby: float

    def lines(self) -> list[str]:
        """For people."""
        hour = f"{self.results:.3g} results an hour"
        return [
            f"bytes: about {size_text(self.sent)} an hour sent and {size_text(self.received)} received while it trains ({hour})",
            f"up to {size_text(self.copied)} an hour more for copies of results",
            f"{size_text(self.once)} once for data and the checkpoint to go on from",
            f"up to {size_text(self.standby)} an hour while it stands by and checks others' work",
        ]


def forecast_traffic(
    *, result: int, data: int, rate: float, samples: int, heartbeat: float, copies: bool = True, audits: bool = True
) -> TrafficForecast:
    """What one device takes.

    Args:
        result: bytes of a result.
        data: bytes of the shard's training data.
        rate: samples per second.
        samples: of a result.
        heartbeat: of the run, in seconds.
        copies: whether the node keeps copies for others.
        audits: whether it audits and checks.
    """
    results = rate * _HOUR / samples
    records = _SEARCHES * SEARCH_BYTES * _HOUR / heartbeat
    served = COPIES_WANTED * results * result
    return TrafficForecast(
        results=results, sent=results * result + records, copied=served * (2 if copies else 1), received=records,
        once=data + result, standby=results * (2 * result + data) if audits else 0.0,
    )  # fmt: skip
