"""What an owner is told of, and when: each cause once, until it has gone away. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lutetia.coordinator.alerts.fault import BootstrapFault
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.status import StallStatus, SwarmStatus, name_of

GONE_SECONDS = 120.0
"""A cause that looks have not found for so long has gone away."""
GAP_SECONDS = 300.0
"""Seconds from one message to the next. What turns red in between is told in one message: nobody can cause a flood of them."""
MOST_CAUSES = 256
LEAST_DISK = 1 << 30
"""Bytes of free disk below which the owner is told."""
EXPIRES_SOON = 7 * 86_400.0
COPIES_TENURES = 3
"""So many tenures after its acceptance a checkpoint should be held by another peer, too."""


def causes_of(
    status: SwarmStatus, tenure: float, expires: float, disk_free: int, bootstrap: Sequence[BootstrapFault] = ()
) -> dict[str, str]:
    """What does not go on, by a name that stays the same while it lasts, and what to do.

    Args:
        status: the status document.
        tenure: the run's tenure in seconds.
        expires: when the manifest expires, in Unix seconds.
        disk_free: free bytes of the disk that holds the run.
        bootstrap: addresses of the ticket that do not answer.
    """
    found = {_name(stall): f"{name_of(stall)}: {stall.why} {stall.remedy}" for stall in status.stalls if _is_red(stall)}
    for shard in status.shards:
        late = shard.last_accepted is not None and status.time - shard.last_accepted > COPIES_TENURES * tenure
        if shard.copies == 0 and late and not status.paused:
            found[f"copies/{shard.shard}"] = (
                f"expert {shard.shard:03d}: only the coordinator holds its accepted checkpoint. Back the run up with `lutetia "
                "coordinator backup`, and find more volunteers."
            )
    found |= dict(_refused_twice(status))
    for fault in bootstrap:
        found[f"bootstrap/{fault.address}"] = (
            f"bootstrap: {fault.address} of the ticket does not answer: {fault.why}. Try it from another machine: `lutetia "
            "doctor TICKET`."
        )
    if apart := _versions_apart(status):
        found["versions"] = apart
    if disk_free < LEAST_DISK:
        found["disk"] = f"disk: {disk_free / 1e6:.0f} MB are free where the run is kept. Free some, or nothing is accepted soon."
    if 0 < expires - status.time < EXPIRES_SOON:
        days = (expires - status.time) / 86_400
        found["expiry"] = f"manifest: it expires in {days:.1f} days. Prolong it: `lutetia run upgrade RUN --set valid_days=365`."
    return dict(list(found.items())[:MOST_CAUSES])


def _refused_twice(status: SwarmStatus) -> Iterator[tuple[str, str]]:
    """The shards where the same result was found invalid twice and none was accepted since.

    A stranger can do that at will, so it counts for the shard's holder and for peers with accepted work alone.
    """
    known = {node.owner for node in status.nodes if node.accepted}
    seen: Counter[tuple[int, str]] = Counter()
    for refusal in status.refusals:
        if refusal.verdict != "invalid" or refusal.shard >= len(status.shards):
            continue
        shard = status.shards[refusal.shard]
        seen[refusal.shard, refusal.checkpoint] += 1
        late = shard.last_accepted is None or shard.last_accepted < refusal.time
        if seen[refusal.shard, refusal.checkpoint] == 2 and late and (refusal.owner == shard.owner or refusal.owner in known):
            text = f"the same result was refused twice, last at the check {refusal.check}: {refusal.text}."
            yield f"twice/{refusal.shard}", f"expert {refusal.shard:03d}: {text} `lutetia run why RUN {refusal.shard}`."


def _versions_apart(status: SwarmStatus) -> str:
    """Which releases the peers that work run beside the coordinator's; empty: they are of one release."""
    working = [_release(node.software) for node in status.nodes if node.shard is not None or node.accepted]
    own = _release(status.software)
    apart = sorted({found for found in working if found}) if own else []
    others = [".".join(map(str, found)) for found in apart if found != own]
    if not own or not others:
        return ""
    count = sum(found is not None and found != own for found in working)
    return (
        f"versions: {count} of {len(working)} peers that work run Lutetia {', '.join(others)}, the coordinator "
        f"{own[0]}.{own[1]}. A release works with the one before it; upgrade the older side."
    )


def _release(software: str) -> tuple[int, int] | None:
    """The release that a version belongs to; None: it says none."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", software)
    return (int(found[1]), int(found[2])) if found else None


def _is_red(stall: StallStatus) -> bool:
    """A node that is late is its volunteer's matter, and its shard has a line of its own; one that cheated is the owner's."""
    return stall.kind != "node" or "quarantined" in stall.why


def _name(stall: StallStatus) -> str:
    who = peer_id_of(stall.owner) if stall.owner and stall.kind == "node" else ""
    return f"{stall.kind}/{'' if stall.shard is None else stall.shard}/{stall.epoch or ''}/{who}"


@dataclass(frozen=True)
class Told:
    """What the owner knows. Times are Unix seconds."""

    known: Mapping[str, float | None] = field(default_factory=dict)
    """Cause that was seen -> since when looks have not found it; None: the last one did."""
    waiting: Mapping[str, str] = field(default_factory=dict)
    """Causes that are to be told with the next message, with their texts."""
    sent: float = float("-inf")
    """When the last message was made."""


def look(told: Told, causes: Mapping[str, str], now: float) -> tuple[Told, tuple[str, ...]]:
    """What is to be told at `now`: the texts of new causes, or nothing.

    A cause that goes away before it was told is not told. The time in which nobody looked says nothing: a restart tells no cause
    again that was there before and is there after it.
    """
    new = {name: text for name, text in causes.items() if name not in told.known}
    waiting = {name: causes[name] for name in told.waiting if name in causes} | new
    absent = {name: since if since is not None else now for name, since in told.known.items() if name not in causes}
    missed = {name: since for name, since in absent.items() if 0 <= now - since < GONE_SECONDS}
    known = {**dict.fromkeys(causes), **dict(list(missed.items())[:MOST_CAUSES])}
    if waiting and now - told.sent >= GAP_SECONDS:
        return Told(known, {}, now), tuple(waiting.values())
    return replace(told, known=known, waiting=waiting), ()
