"""The status document as one page without scripts, for readers that run none: self-contained, all texts escaped."""

from __future__ import annotations

import html
from collections import Counter

from lutetia.protocol.schema.status import NodeStatus, ShardStatus, SwarmStatus, name_of
from lutetia.system.errors import plain

_STYLE = """
:root { color-scheme: light dark; --soft: color-mix(in srgb, currentColor 55%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p, .soft { color: var(--soft); } table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; } th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #8883; }
td.n { font-variant-numeric: tabular-nums; } code { font-size: .9em; }
.bar { background: #8883; border-radius: 3px; height: .6rem; min-width: 7rem; } .bar i { display: block; height: 100%;
border-radius: 3px; background: #3a86c8; } .overdue, .stalled, .invalid { color: #c2410c; } .working, .done { color: #15803d; }
"""


def render_page(status: SwarmStatus, refresh_seconds: int = 5) -> str:
    """HTML for `status`; the browser reloads it every `refresh_seconds`."""
    working = sum(node.health == "working" for node in status.nodes)
    state = "finished" if status.finished else "stitching the final mixture" if status.done else "training"
    router = f"router accuracy {100 * status.router.accuracy:.1f} %" if status.router else "no router yet"
    mixture = f"mixture <code>{_text(status.mixture[:12])}</code>" if status.mixture else "no mixture yet"
    facts = (
        f"{state} · {len(status.shards)} experts · {len(status.nodes) + status.nodes_not_shown} peers, {working} working · "
        f"{status.accepted} results accepted, {status.rejected} invalid · {router} · {mixture}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="refresh" content="{refresh_seconds}"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(status.name)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(status.name)}</h1><p>{facts}</p>"
        f"{_shards(status)}{_stalls(status)}{_nodes(status)}{_refusals(status)}"
        f"<p>Run <code>{_text(status.run)}</code>, manifest version {status.manifest_version}. Also as "
        '<a href="status.json">JSON</a> and <a href="metrics">metrics</a>.</p></body></html>'
    )


def _table(title: str, heads: str, rows: list[str]) -> str:
    cells = "".join(f"<th>{head}</th>" for head in heads.split("|"))
    return f"<h2>{title}</h2><table><tr>{cells}</tr>{''.join(rows)}</table>" if rows else ""


def _shards(status: SwarmStatus) -> str:
    stalled = frozenset(status.stalled_shards)
    rows = [_shard(shard, status.time, shard.shard in stalled) for shard in status.shards]
    return _table("Experts", "#|cluster|epochs||held-out loss|last accepted|copies|audit|state", rows)


def _shard(shard: ShardStatus, now: float, stalled: bool) -> str:
    share = 100 * shard.epoch / shard.epochs
    state = "stalled" if stalled else shard.state
    lanes = f" · {lanes_text(shard)}" if shard.lanes else ""
    loss = "–" if shard.holdout_loss is None else f"{shard.holdout_loss:.4f}"
    return (
        f"<tr><td>{shard.shard:03d}</td><td>{_text(shard.name)}</td><td class=n>{shard.epoch}/{shard.epochs}</td>"
        f'<td><div class=bar><i style="width:{share:.0f}%"></i></div></td><td class=n>{loss}</td>'
        f"<td class=n>{_ago(shard.last_accepted, now)}</td>"
        f"<td class=n>{'–' if shard.copies is None else shard.copies}</td><td class=soft>{_text(shard.audit or '–')}</td>"
        f"<td class={state}>{_text(state)}{lanes}</td></tr>"
    )


def lanes_text(shard: ShardStatus) -> str:
    """How many lanes are worked at and how many results wait for the merge."""
    count = Counter(lane.state for lane in shard.lanes)
    late = f", {count['late']} late" if count["late"] else ""
    return f"{len(shard.lanes)} lanes, {count['gathered']} gathered, {count['merging']} merging{late}"


def _stalls(status: SwarmStatus) -> str:
    rows = [
        f"<tr><td class=stalled>{_text(name_of(stall))}</td><td class=n>{_ago(stall.since, status.time)}</td>"
        f"<td>{_text(stall.why)} {_text(stall.remedy)}</td></tr>"
        for stall in status.stalls
    ]
    return _table("Stalled or suspected", "what|since|why, and what to do", rows)


def _nodes(status: SwarmStatus) -> str:
    heads = "peer|device|expert|accepted|invalid|last accepted|health|reported state"
    hidden = f"<p>{status.nodes_not_shown} more are online, without a shard or accepted work.</p>"
    table = _table("Peers", heads, [_node(node, status.time) for node in status.nodes])
    return table + (hidden if status.nodes_not_shown else "")


def _node(node: NodeStatus, now: float) -> str:
    return (
        f"<tr><td><code>…{_text(node.peer_id[-8:])}</code></td><td>{_text(node.device)}</td>"
        f"<td>{', '.join(f'{shard:03d}' for shard in node.shards or (node.shard,) if shard is not None) or '–'}</td>"
        f"<td class=n>{node.accepted}</td><td class=n>{node.rejected}</td>"
        f"<td class=n>{_ago(node.last_accepted, now)}</td><td class={node.health}>{node.health}</td>"
        f"<td class=soft>{_text(node.state)}</td></tr>"
    )


def _refusals(status: SwarmStatus) -> str:
    rows = [
        f"<tr><td class=n>{_ago(refusal.time, status.time)}</td><td>{refusal.shard:03d}</td><td class=n>{refusal.epoch}</td>"
        f"<td class={refusal.verdict}>{refusal.verdict}</td><td>{refusal.check}</td><td>{_text(refusal.text)}</td></tr>"
        for refusal in reversed(status.refusals)
    ]
    return _table("Refused results", "when|expert|epoch|verdict|check|reason", rows)


def _text(text: str) -> str:
    """A text of somebody else as HTML on one line: no markup, and no letter that turns the direction of what follows."""
    return html.escape(plain(text))


def _ago(moment: float | None, now: float) -> str:
    if moment is None:
        return "–"
    seconds = max(0.0, now - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
