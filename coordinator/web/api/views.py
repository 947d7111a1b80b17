"""Makes the documents of the web API from state, history and manifest. Pure, but for the files of mixture and gallery."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError

from lutetia.coordinator.addresses import Reach, reach_of_ticket
from lutetia.coordinator.alerts.fault import BootstrapFault
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.log import LedgerRow
from lutetia.coordinator.mixtures.archive import find_description
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.web.api.documents import (
    Arrival,
    CheckpointsPage,
    EventLine,
    LossSeries,
    MixtureAnswer,
    MixtureFile,
    MixturesPage,
    PeerDocument,
    PeerHistoryDocument,
    PeersPage,
    RunDocument,
    SeriesDocument,
    ShardDocument,
    ThroughputBin,
)
from lutetia.coordinator.web.api.histories.recent import Results, newest_before
from lutetia.coordinator.web.api.history import (
    HOUR,
    AuthorHistory,
    History,
    ShardHistory,
    lately,
    samples_per_second,
    seconds_left,
)
from lutetia.coordinator.web.api.people import People
from lutetia.models.mixing.description import SignedMixture
from lutetia.protocol.schema.identity import peer_id_of, public_key_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.status import NodeStatus, ShardStatus, SwarmStatus
from lutetia.system.errors import LutetiaError

_DAY = 24 * HOUR
_PACE_WINDOW = 6 * HOUR
_LAST_MIXTURES = 1000
_LEAST_DISK = 1 << 30


def run_document(
    status: SwarmStatus, manifest: Manifest, history: History, ticket: str, about: str = "", disk_free: int | None = None,
    bootstrap: Sequence[BootstrapFault] = (),
) -> RunDocument:  # fmt: skip
    results = [shard.accepted for shard in history.shards.values()]
    state = (
        "finished"
        if status.finished
        else "paused"
        if status.paused
        else "stitching"
        if status.done
        else "stalled"
        if status.stalled_shards
        else "training"
    )
    return RunDocument(
        run=status.run, name=status.name, owner=manifest.owner, coordinator=status.coordinator, software=status.software,
        manifest_version=status.manifest_version, created=manifest.created, expires=manifest.expires, time=status.time,
        state=state, experts=len(status.shards), samples=sum(shard.samples for shard in status.shards),
        samples_budget=sum(shard.samples_budget for shard in status.shards),
        samples_per_second=samples_per_second(results, status.time, HOUR), arrival=arrival(status, history),
        peers_working=sum(node.health == "working" for node in status.nodes),
        peers_online=len(status.nodes) + status.nodes_not_shown,
        peers_day=sum((author.last_accepted or 0.0) > status.time - _DAY for author in history.authors.values()),
        accepted=status.accepted, rejected=status.rejected, events=status.events, ticket=ticket,
        join=f"lutetia join {ticket}" if ticket else "", memory_bytes=manifest.hardware.memory_bytes,
        disk_bytes=manifest.hardware.disk_bytes, stalls=status.stalls, about=about, bytes_accepted=history.weights_bytes,
        disk_free_bytes=disk_free, disk_needed_bytes=_disk_needed(history), reach=_reach(ticket),
        paused=status.paused, bootstrap=tuple(bootstrap),
    )  # fmt: skip


def _disk_needed(history: History) -> int:
    """Bytes of two more results of every shard: a training state takes about three times as much as the weights."""
    newest = sum(shard.accepted[-1].weights_size for shard in history.shards.values() if shard.accepted)
    return max(_LEAST_DISK, 2 * 4 * newest)


def _reach(ticket: str) -> Reach | None:
    try:
        return reach_of_ticket(ticket)
    except LutetiaError:
        return None


def arrival(status: SwarmStatus, history: History) -> Arrival:
    """When the budgets will be done if every shard goes on as it did lately."""
    remaining = {shard.shard: shard.samples_budget - shard.samples for shard in status.shards}
    if not any(left > 0 for left in remaining.values()):
        return Arrival(seconds=0.0, basis="all budgets are done")
    rates: dict[int, float] = {}
    window = 0.0
    for shard in status.shards:
        recent = [point for point in lately(history.shard(shard.shard).accepted, status.time - _PACE_WINDOW) if not point.void]
        since = min((point.time for point in recent), default=status.time)
        if len(recent) > 1 and status.time > since:
            rates[shard.shard] = sum(point.trained for point in recent[1:]) / (status.time - since)
            window = max(window, status.time - since)
    seconds = seconds_left(remaining, rates)
    if seconds is None:
        behind = [shard for shard, left in remaining.items() if left > 0 and shard not in rates]
        shown = ", ".join(f"{shard:03d}" for shard in behind[:5])
        return Arrival(seconds=None, basis=f"not known: fewer than two results lately for expert {shown}")
    return Arrival(seconds=seconds, basis=f"the slowest expert's accepted samples of the last {window / 60:.0f} minutes")


def shard_document(
    status: ShardStatus, manifest: Manifest, past: ShardHistory, results: Results, sheets: Collection[int] = (),
    flops: Sequence[int] = (),
) -> ShardDocument:  # fmt: skip
    """One shard with `results` of its history. `sheets`: those that have a contact sheet. `flops`: of one sample, by shard."""
    index = status.shard
    spec, (accepted, refused, whole) = manifest.shards[index], results
    return ShardDocument(
        status=status, clips=spec.clips, prior=spec.prior, expert=manifest.expert_of(index).class_name,
        initial_loss=past.initial_loss, accepted=tuple(accepted), refused=tuple(refused), whole=whole,
        sheet=f"/api/v1/shards/{index}/sheet.png" if index in sheets else None,
        flops=flops[index] if index < len(flops) else None,
    )  # fmt: skip


def peers_page(
    status: SwarmStatus, history: History, people: People, *, health: str | None, offset: int, limit: int
) -> PeersPage:
    """Peers that are online or have had a result decided, those with most accepted samples first."""
    nodes = {node.owner: node for node in status.nodes}
    owners = set(nodes) | set(history.authors) | set(people.run.credit)
    if health is not None:
        owners = {owner for owner in owners if owner in nodes and nodes[owner].health == health}
    ranked = sorted(owners, key=lambda owner: (-_past(history, owner).samples, owner))
    shown = tuple(
        PeerDocument(**_peer(status, history, people, owner, nodes.get(owner))) for owner in ranked[offset : offset + limit]
    )
    return PeersPage(total=len(ranked), peers=shown)


def find_owner(status: SwarmStatus, history: History, people: People, wanted: str) -> str | None:
    """The public key of the peer with this public key or peer id."""
    owner = public_key_of(wanted) or wanted
    known = owner in history.authors or owner in people.run.credit or any(node.owner == owner for node in status.nodes)
    return owner if known else None


def peer_history(status: SwarmStatus, history: History, people: People, owner: str) -> PeerHistoryDocument:
    past = _past(history, owner)
    node = next((node for node in status.nodes if node.owner == owner), None)
    return PeerHistoryDocument(
        **_peer(status, history, people, owner, node), points=tuple(past.points), refused=tuple(past.refused),
        superseded=tuple(past.superseded), audits=tuple(past.audits),
    )  # fmt: skip


def _peer(status: SwarmStatus, history: History, people: People, owner: str, node: NodeStatus | None) -> dict[str, Any]:
    past = _past(history, owner)
    return {
        "owner": owner, "peer_id": peer_id_of(owner), "name": node.name if node else people.name(owner),
        "credit": people.credit(owner, status.time), "node": node, "samples": past.samples, "accepted": past.accepted,
        "void": past.void, "invalid": past.invalid, "last_accepted": past.last_accepted, "quarantined": past.quarantined,
        "banned": people.banned(owner),
    }  # fmt: skip


def _past(history: History, owner: str) -> AuthorHistory:
    return history.authors.get(owner) or AuthorHistory()


def checkpoints_page(history: History, *, shard: int | None, before: int | None, limit: int) -> CheckpointsPage:
    shards = history.shards.values() if shard is None else [history.shard(shard)] if shard in history.shards else []
    points = [point for each in shards for point in newest_before(each.accepted, before, limit + 1)]
    points.sort(key=lambda point: -point.event)
    shown = tuple(points[:limit])
    return CheckpointsPage(checkpoints=shown, next=shown[-1].event if len(points) > limit else None)


def event_lines(rows: Sequence[LedgerRow]) -> tuple[EventLine, ...]:
    lines = []
    for row in rows:
        event = row.event()
        lines.append(EventLine(event=row.id, time=row.time, kind=event.kind, text=sentence(event), data=json.loads(row.text)))
    return tuple(lines)


def mixture_answer(folder: RunFolder, name: str | None, history: History) -> MixtureAnswer | None:
    """The mixture with the digest `name`, or these first letters of it; None if there is none, or it cannot be read."""
    data = find_description(folder.mixtures, name) if name else None
    try:
        signed = SignedMixture.model_validate_json(data) if data else None
    except ValidationError:
        return None
    if signed is None:
        return None
    stored = (folder.blobs / ref.digest[:2] / ref.digest for ref in signed.mixture.files.values())
    files = tuple(
        MixtureFile(path=name, digest=ref.digest, size=ref.size, url=f"/blobs/{ref.digest}")
        for name, ref in sorted(signed.mixture.files.items())
    )
    return MixtureAnswer(
        digest=signed.mixture.digest, files=files, document=signed.model_dump(mode="json"),
        kept=all(path.is_file() for path in stored), history=tuple(history.mixtures[-_LAST_MIXTURES:]),
    )  # fmt: skip


def mixtures_page(history: History, current: str | None, *, before: int | None, limit: int) -> MixturesPage:
    points = [point for point in reversed(history.mixtures) if before is None or point.event < before]
    shown = tuple(points[:limit])
    return MixturesPage(mixtures=shown, current=current, next=shown[-1].event if len(points) > limit else None)


def series(history: History, losses: Sequence[LossSeries] = ()) -> SeriesDocument:
    """The run's curves; those of the shards can be left out, for who reads their histories anyway."""
    work = sorted((hour, found) for hour, found in history.hours.items() if found[1])
    throughput = tuple(ThroughputBin(time=hour * HOUR, samples=samples, results=results) for hour, (samples, results) in work)
    return SeriesDocument(losses=tuple(losses), routers=tuple(history.routers), throughput=throughput)
