"""The status document as a table: accepted work per shard first, then the peers who do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol.status import NodeStatus, ShardStatus, SwarmStatus
from .words import ago, bar, number, short, short_peer, thousands

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_STATE_STYLE = {"training": "green", "done": "cyan", "claimed": "yellow", "unclaimed": "red", "overdue": "red"}
_HEALTH_STYLE = {
    "working": "green", "starting": "yellow", "standby": "cyan", "paused": "yellow", "overdue": "red", "quarantined": "red",
}  # fmt: skip
STALE_AFTER = 60.0  # seconds after which a status document says nothing about now


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in {"SAMPLES", "LOSS", "COPIES", "LEASE", "AGE", "SPEED", "SEEN", "ACCEPTED", "REJECTED"}
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    return table


def headline(status: SwarmStatus, now: float) -> str:
    """One line: run, coverage of the shards, peers at work, how old the coordinator's word is."""
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
        coordinator,
    ]
    return "   ".join(parts)


def render_status(status: SwarmStatus, now: float) -> RenderableType:
    """The table of `lutetia swarm status`."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(headline(status, now), style="bold"), Text(), shard_table(status, now)]
    if status.nodes:
        parts.append(node_table(status, now))
    parts.append(Text(tail(status, now)))
    return Group(*parts)


def shard_table(status: SwarmStatus, now: float) -> Table:
    from rich.text import Text

    table = _table("EXPERT", "CLUSTER", "NODE", "EPOCH", "SAMPLES", "LOSS", "CKPT", "COPIES", "AGE", "LEASE", "STATE")
    peers = {node.owner: node for node in status.nodes}
    for shard in status.shards:
        table.add_row(*_shard_cells(shard, peers, now), Text(shard.state, style=_STATE_STYLE[shard.state]))
    return table


def _shard_cells(shard: ShardStatus, peers: dict[str, NodeStatus], now: float) -> list[str]:
    owner = peers.get(shard.owner or "")
    return [
        f"{shard.shard:03d}",
        shard.name,
        short_peer(owner.peer_id) if owner else short(shard.owner),
        f"{bar(shard.epoch / shard.epochs, 8)} {shard.epoch}/{shard.epochs}",
        f"{thousands(shard.samples)}/{thousands(shard.samples_budget)}",
        number(shard.holdout_loss),
        short(shard.checkpoint),
        "-" if shard.copies is None else str(shard.copies),
        ago(now - shard.last_accepted) if shard.last_accepted else "-",
        ago(shard.claim_expires - now) if shard.claim_expires else "-",
    ]


def node_table(status: SwarmStatus, now: float) -> Table:
    from rich.text import Text

    table = _table("NODE", "EXPERT", "DOING", "DEVICE", "SPEED", "ACCEPTED", "REJECTED", "SEEN", "LINK", "HEALTH")
    for node in status.nodes:
        table.add_row(
            short_peer(node.peer_id),
            "-" if node.shard is None else f"{node.shard:03d}",
            node.state,
            node.device,
            f"{node.samples_per_second:.1f}/s",
            str(node.accepted),
            str(node.rejected),
            f"{ago(now - node.last_seen)} ago",
            "relayed" if node.relayed else "direct",
            Text(node.health, style=_HEALTH_STYLE[node.health]),
        )
    return table


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
