"""The status document as a table: accepted work per shard first, then the peers who do it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lutetia.cli.formatting import ago, bar, number, short, short_peer, thousands
from lutetia.protocol.schema.status import NodeStatus, ShardStatus, SwarmStatus

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

_STATE_STYLE = {"training": "green", "done": "cyan", "claimed": "yellow", "unclaimed": "red", "overdue": "red"}
_HEALTH_STYLE = {
    "working": "green", "starting": "yellow", "standby": "cyan", "paused": "yellow", "overdue": "red", "quarantined": "red",
}  # fmt: skip
STALE_AFTER = 60.0  # seconds after which a status document says nothing about now
_BAR = "bar"
_SHARDS_DO_WITHOUT = (_BAR, "COPIES", "CKPT", "SAMPLES", "LEASE", "CLUSTER", "LOSS", "AGE")
_NODES_DO_WITHOUT = ("LINK", "DEVICE", "REJECTED", "SEEN", "SPEED", "EXPERT")


@dataclass(frozen=True)
class FittingTable:
    """A table that leaves out one column after the other on a narrow terminal, where rich would cut all of them short.

    `make` builds it without the columns that it is given; `order` names those it can do without, the least important first.
    """

    make: Callable[[Collection[str]], Table]
    order: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        from rich.measure import Measurement

        tables = (self.make(self.order[:left_out]) for left_out in range(len(self.order) + 1))
        boundless = options.update(width=10_000)
        fitting = (table for table in tables if Measurement.get(console, boundless, table).maximum <= options.max_width)
        yield next(fitting, None) or self.make(self.order)


def _table(rows: Sequence[dict[str, str | Text]], without: Collection[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    columns = [name for name in rows[0] if name not in without] if rows else []
    for name in columns:
        right = name in {"SAMPLES", "LOSS", "COPIES", "LEASE", "AGE", "SPEED", "SEEN", "ACCEPTED", "REJECTED"}
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def headline(status: SwarmStatus, now: float, live: bool = True) -> str:
    """One line: run, coverage of the shards, peers at work, and of a `live` run how old the coordinator's word is."""
    held = sum(shard.state in ("claimed", "training", "done") for shard in status.shards)
    coverage = bar(held / len(status.shards), len(status.shards)) + " " if 0 < len(status.shards) <= 24 else ""
    working = sum(node.health == "working" for node in status.nodes)
    age = now - status.time
    coordinator = f"coordinator ok {ago(age)} ago" if age < STALE_AFTER else f"coordinator silent for {ago(age)}"
    parts = [
        f"swarm {status.name}",
        f"run {short(status.run, 12)}",
        f"experts {coverage}{held}/{len(status.shards)} held",
        f"nodes {len(status.nodes)} ({working} working)",
    ]
    return "   ".join([*parts, coordinator] if live else parts)


def render_status(status: SwarmStatus, now: float, live: bool = True) -> RenderableType:
    """The table of `lutetia swarm status`; without `live`, of a moment that is past."""
    from rich.console import Group
    from rich.text import Text

    shards = FittingTable(lambda without: shard_table(status, now, without), _SHARDS_DO_WITHOUT)
    parts: list[RenderableType] = [Text(headline(status, now, live), style="bold"), Text(), shards]
    if status.nodes:
        parts.append(FittingTable(lambda without: node_table(status, now, without), _NODES_DO_WITHOUT))
    parts.append(Text(tail(status, now)))
    return Group(*parts)


def shard_table(status: SwarmStatus, now: float, without: Collection[str] = ()) -> Table:
    """The accepted work, shard by shard."""
    peers = {node.owner: node for node in status.nodes}
    return _table([_shard_row(shard, peers, now, _BAR not in without) for shard in status.shards], without)


def _shard_row(shard: ShardStatus, peers: dict[str, NodeStatus], now: float, with_bar: bool) -> dict[str, str | Text]:
    from rich.text import Text

    owner, epoch = peers.get(shard.owner or ""), f"{shard.epoch}/{shard.epochs}"
    return {
        "EXPERT": f"{shard.shard:03d}",
        "CLUSTER": shard.name,
        "NODE": short_peer(owner.peer_id) if owner else short(shard.owner),
        "EPOCH": f"{bar(shard.epoch / shard.epochs, 8)} {epoch}" if with_bar else epoch,
        "SAMPLES": f"{thousands(shard.samples)}/{thousands(shard.samples_budget)}",
        "LOSS": number(shard.holdout_loss),
        "CKPT": short(shard.checkpoint),
        "COPIES": "-" if shard.copies is None else str(shard.copies),
        "AGE": ago(now - shard.last_accepted) if shard.last_accepted else "-",
        "LEASE": ago(shard.claim_expires - now) if shard.claim_expires else "-",
        "STATE": Text(shard.state, style=_STATE_STYLE[shard.state]),
    }


def node_table(status: SwarmStatus, now: float, without: Collection[str] = ()) -> Table:
    """The peers and what they do."""
    from rich.text import Text

    rows: list[dict[str, str | Text]] = [
        {
            "NODE": short_peer(node.peer_id),
            "EXPERT": "-" if node.shard is None else f"{node.shard:03d}",
            "DOING": node.state,
            "DEVICE": node.device,
            "SPEED": f"{node.samples_per_second:.1f}/s",
            "ACCEPTED": str(node.accepted),
            "REJECTED": str(node.rejected),
            "SEEN": f"{ago(now - node.last_seen)} ago",
            "LINK": "relayed" if node.relayed else "direct",
            "HEALTH": Text(node.health, style=_HEALTH_STYLE[node.health]),
        }
        for node in status.nodes
    ]
    return _table(rows, without)


def tail(status: SwarmStatus, now: float) -> str:
    """What the run has come to: acceptances, router, mixture."""
    parts = [f"accepted {status.accepted}, rejected {status.rejected}"]
    if status.audits_due:
        parts.append(f"{status.audits_due} audits due")
    if status.quarantined:
        parts.append(f"{len(status.quarantined)} peers quarantined")
    if status.router:
        parts.append(f"router {100 * status.router.accuracy:.1f} % right, trained {ago(now - status.router.trained_at)} ago")
    parts.append(f"mixture {short(status.mixture, 12)}" if status.mixture else "no mixture yet")
    if status.done:
        parts.append("all budgets done")
    return "   ".join(parts)
