"""The status document as tables: accepted work of each shard, then the nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lutetia.cli.formatting import ago, bar, number, rate, short, short_peer, thousands
from lutetia.protocol.schema.status import NodeStatus, ShardStatus, StallStatus, SwarmStatus, name_of
from lutetia.system.errors import UsageError, plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

_STATE_STYLE = {
    "training": "green", "done": "cyan", "claimed": "yellow", "unclaimed": "red", "overdue": "red", "stalled": "bold red",
}  # fmt: skip
_HEALTH_STYLE = {
    "working": "green", "starting": "yellow", "standby": "cyan", "paused": "yellow", "overdue": "red", "quarantined": "red",
}  # fmt: skip
CLOCKS_AGREE = 60.0  # seconds by which the reader's clock may differ from the coordinator's without a word
_STALLS_SHOWN = 3
_BAR = "bar"
_SHARD_COLUMNS_TO_DROP = (_BAR, "COPIES", "CKPT", "SAMPLES", "LEASE", "CLUSTER", "HELD OUT", "AGE")
_NODE_COLUMNS_TO_DROP = ("NAME", "LINK", "DEVICE", "REJECTED", "SEEN", "SPEED", "EXPERT")


@dataclass(frozen=True)
class FittingTable:
    """A table that drops columns on a narrow terminal, where rich would truncate all of them.

    `make` builds the table without the columns that it is given. `order` names the columns to drop, least important first.
    """

    make: Callable[[Collection[str]], Table]
    order: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        from rich.measure import Measurement

        tables = (self.make(self.order[:left_out]) for left_out in range(len(self.order) + 1))
        unbounded = options.update(width=10_000)
        fitting = (table for table in tables if Measurement.get(console, unbounded, table).maximum <= options.max_width)
        yield next(fitting, None) or self.make(self.order)


def _table(rows: Sequence[dict[str, str | Text]], without: Collection[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    columns = [name for name in rows[0] if name not in without] if rows else []
    for name in columns:
        right = name in {"SAMPLES", "HELD OUT", "COPIES", "LEASE", "AGE", "SPEED", "SEEN", "ACCEPTED", "REJECTED"}
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(plain(cell) if isinstance(cell := row[name], str) else cell for name in columns))
    return table


def headline(status: SwarmStatus, now: float, live: bool = True) -> str:
    """One line: run, shards with a holder, nodes at work, and for a `live` run whether its clock and the reader's agree.

    The coordinator makes the document when it is asked, so an old one means that one of the two clocks is wrong.
    """
    held = sum(shard.state in ("claimed", "training", "done") for shard in status.shards)
    coverage = bar(held / len(status.shards), len(status.shards)) + " " if 0 < len(status.shards) <= 24 else ""
    working = sum(node.health == "working" for node in status.nodes)
    age = now - status.time
    coordinator = "coordinator ok"
    if abs(age) >= CLOCKS_AGREE:
        coordinator = (
            f"coordinator answers; this machine's clock is {ago(abs(age))} {'ahead of' if age > 0 else 'behind'} its clock"
        )
    parts = [
        f"swarm {plain(status.name)}",
        f"run {plain(short(status.run, 12))}",
        f"experts {coverage}{held}/{len(status.shards)} held",
        f"nodes {len(status.nodes) + status.nodes_not_shown} ({working} working)",
    ]
    return "   ".join([*parts, coordinator] if live else parts)


def render_status(status: SwarmStatus, now: float, live: bool = True) -> RenderableType:
    """The tables of `lutetia swarm status`. All ages are counted to the document's own time.

    Args:
        status: the document.
        now: the reader's clock, Unix seconds.
        live: False for the status of a past moment.
    """
    from rich.console import Group
    from rich.text import Text

    first, now = headline(status, now, live), status.time
    shards = FittingTable(lambda without: shard_table(status, now, without), _SHARD_COLUMNS_TO_DROP)
    parts: list[RenderableType] = [Text(first, style="bold"), Text(), shards]
    if status.nodes:
        parts.append(FittingTable(lambda without: node_table(status, now, without), _NODE_COLUMNS_TO_DROP))
    if status.nodes_not_shown:
        parts.append(Text(f"{status.nodes_not_shown} more nodes are online, without a shard or accepted work"))
    parts.append(Text(summary(status, now)))
    parts += [Text(plain(line), style="red") for line in stall_lines(status, now)]
    return Group(*parts)


def stall_lines(status: SwarmStatus, now: float) -> list[str]:
    """What does not go on, a line each; of many the first few and their number."""
    first = status.stalls[:_STALLS_SHOWN]
    words = ["suspected" if stall.kind == "lineage" else "stalled" for stall in first]
    lines = [
        f"{name_of(stall)} {word} for {ago(now - stall.since)}: {stall.why} {stall.remedy}"
        for word, stall in zip(words, first, strict=True)
    ]
    if more := max(len(status.stalls), len(status.stalled_shards)) - len(lines):
        lines.append(f"{more} more stalled; `lutetia run why RUN SHARD` explains a shard, --json lists all")
    return lines


def shard_table(status: SwarmStatus, now: float, without: Collection[str] = ()) -> Table:
    """The table of accepted work, a row for each shard."""
    peers = {node.owner: node for node in status.nodes}
    stalled = frozenset(status.stalled_shards)
    rows = [_shard_row(shard, peers, now, _BAR not in without, shard.shard in stalled) for shard in status.shards]
    return _table(rows, without)


def _shard_row(
    shard: ShardStatus, peers: dict[str, NodeStatus], now: float, with_bar: bool, stalled: bool
) -> dict[str, str | Text]:
    from rich.text import Text

    owner, epoch = peers.get(shard.owner or ""), f"{shard.epoch}/{shard.epochs}"
    state = "stalled" if stalled else shard.state
    there = [lane.state for lane in shard.lanes if lane.state in ("gathered", "merging")]
    lanes = f", {len(there)} {'merging' if 'merging' in there else 'gathered'}" if there else ""
    return {
        "EXPERT": f"{shard.shard:03d}",
        "CLUSTER": shard.name,
        "NODE": f"{len(shard.lanes)} lanes" if shard.lanes else short_peer(owner.peer_id) if owner else short(shard.owner),
        "EPOCH": f"{bar(shard.epoch / shard.epochs, 8)} {epoch}" if with_bar else epoch,
        "SAMPLES": f"{thousands(shard.samples)}/{thousands(shard.samples_budget)}",
        "HELD OUT": number(shard.holdout_loss),
        "CKPT": short(shard.checkpoint),
        "COPIES": "-" if shard.copies is None else str(shard.copies),
        "AGE": ago(now - shard.last_accepted) if shard.last_accepted else "-",
        "LEASE": ago(shard.claim_expires - now) if shard.claim_expires else "-",
        "STATE": Text(state + lanes, style=_STATE_STYLE.get(state, "")),
    }


def node_table(status: SwarmStatus, now: float, without: Collection[str] = ()) -> Table:
    """The table of nodes and what they do."""
    from rich.text import Text

    named = {"NAME"} if any(node.name for node in status.nodes) else set()
    rows: list[dict[str, str | Text]] = [
        {
            "NODE": short_peer(node.peer_id),
            "NAME": node.name or "-",
            "EXPERT": ",".join(f"{shard:03d}" for shard in node.shards or (node.shard,) if shard is not None) or "-",
            "DOING": node.state,
            "DEVICE": node.device,
            "SPEED": f"{rate(node.samples_per_second)}/s",
            "ACCEPTED": str(node.accepted),
            "REJECTED": str(node.rejected),
            "SEEN": f"{ago(now - node.last_seen)} ago",
            "LINK": node.link or "-",
            "HEALTH": Text(node.health, style=_HEALTH_STYLE.get(node.health, "")),
        }
        for node in status.nodes
    ]
    return _table(rows, {*without, *({"NAME"} - named)})


def summary(status: SwarmStatus, now: float) -> str:
    """One line about the run's results: acceptances, router, mixture."""
    parts = [f"accepted {status.accepted}, rejected {status.rejected}"]
    if status.audits_due:
        parts.append(f"{status.audits_due} audit{'s' if status.audits_due > 1 else ''} due")
    if status.quarantined:
        parts.append(f"{len(status.quarantined)} peers quarantined")
    if status.router:
        parts.append(f"router {100 * status.router.accuracy:.1f} % right, trained {ago(now - status.router.trained_at)} ago")
    parts.append(f"mixture {short(status.mixture, 12)}" if status.mixture else "no mixture yet")
    if held := status.held_mixture:
        parts.append(f"newest mixture {short(held.mixture, 12)} is not current: {held.text}")
    if status.done:
        parts.append("all budgets done")
    return "   ".join(parts)


def shard_reason(status: SwarmStatus, shard: int, now: float) -> dict[str, Any]:
    """What holds a shard up, for `lutetia run why`: its state, `since` in Unix seconds, and the sentences. Raises UsageError.

    A refused merge of its lanes holds no shard up; it is told with whatever does, or alone.
    """
    if shard >= len(status.shards):
        raise UsageError(f"run {status.name} has no shard {shard}; its last is {len(status.shards) - 1}")
    entry, stalled = status.shards[shard], shard in status.stalled_shards
    document = {"shard": shard, "state": "stalled" if stalled else entry.state, "since": None, "why": None, "remedy": None}
    document["suspected"] = suspected = _explained(status, "lineage", shard, "why")
    also = f" Suspected: {suspected} {_explained(status, 'lineage', shard, 'remedy')}" if suspected else ""
    stall, merge = _stall(status, "shard", shard), _stall(status, "merge", shard)
    if merge and (stall or stalled):
        also = f" {merge.why} {merge.remedy}{also}"
    if stall:
        text = f"Stalled for {ago(now - stall.since)}: {stall.why} {stall.remedy}{also}"
        return {**document, "since": stall.since, "why": stall.why, "remedy": stall.remedy, "text": text}
    if stalled:
        others = sum(stall.kind == "shard" for stall in status.stalls)
        return {**document, "text": f"Stalled. The {others} shards that stalled first are explained first: see to those.{also}"}
    if merge:
        text = f"{merge.why} {merge.remedy}{also}"
        return {**document, "since": merge.since, "why": merge.why, "remedy": merge.remedy, "text": text}
    last = f", the last {ago(now - entry.last_accepted)} ago" if entry.last_accepted else ""
    goes_on = f"Nothing holds it up: {entry.state}, {entry.epoch} of {entry.epochs} epochs accepted{last}."
    return {**document, "text": goes_on + also}


def _stall(status: SwarmStatus, kind: str, shard: int) -> StallStatus | None:
    return next((stall for stall in status.stalls if (stall.kind, stall.shard) == (kind, shard)), None)


def _explained(status: SwarmStatus, kind: str, shard: int, part: Literal["why", "remedy"]) -> str | None:
    found = _stall(status, kind, shard)
    return found and (found.why if part == "why" else found.remedy)
