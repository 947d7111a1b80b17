"""How long lent checks take when some of those that borrow them never report, report late, or say at once that they failed.

The coordinator's own lending (`coordinator.lending.loans`) in virtual time, one second a step; reports are made up.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from lutetia.coordinator.lending.loans import Asker, LendingDesk, LentCheck, end_check_loans, lend_check, take_report
from lutetia.protocol.rpc.check_request import CheckReport
from lutetia.protocol.schema.identity import Identity

POOL, CHECKS, LIMIT = 12, 10, 6 * 3600.0
"""Peers, checks one after another, and seconds after which a check counts as never decided."""
_ASK, _RENEW, _WORK, _LEASE = 15.0, 120.0, 40.0, 90.0
_LATE = 601.0
"""Seconds after which a late borrower reports: a second after its loan is not counted on any more."""
MODES = ("never report", "report when their loan is over", "say at once that they failed")
FRESH = "never report, each time under a new key"
_HONEST, _HOSTILE = "203.0.{}.5", "198.51.{}.7"
"""Addresses, each in a prefix of its own."""


@dataclass
class _Peer:
    """A peer, when it next does something, and when it got the check that it has. `due`: seconds until it reports."""

    owner: str
    due: float
    failing: bool
    known: bool
    next: float
    source: str = ""
    fresh: bool = False
    loan: str = ""
    began: float = 0.0
    checks: int = field(default=0)


def waits(draw: random.Random, mode: str, bad: int, known: int, addresses: int) -> list[float]:
    """Seconds that each of CHECKS checks took, infinite for one that was not decided.

    Args:
        draw: randomness.
        mode: what the bad borrowers do, one of MODES or FRESH.
        bad: how many of the pool.
        known: how many of the others have accepted work.
        addresses: of the bad borrowers, each in a prefix of its own.
    """
    dues = {MODES[0]: float("inf"), MODES[1]: _LATE, MODES[2]: 0.0, FRESH: float("inf")}
    peers = [
        _Peer(
            Identity.derived(f"checker {number}").public_key, dues[mode] if number < bad else _WORK,
            number < bad and mode == MODES[2], bad <= number < bad + known, draw.uniform(0, _ASK),
            (_HOSTILE if number < bad else _HONEST).format(number % addresses if number < bad else number),
            number < bad and mode == FRESH,
        )
        for number in range(POOL)
    ]  # fmt: skip
    trusted = frozenset(peer.owner for peer in peers if peer.known)
    desk, now, taken = LendingDesk(), 0.0, list[float]()
    for number in range(CHECKS):
        began, name = now, f"check {number}"
        desk = desk.with_check(LentCheck(name, "result", 0, now))
        while name in desk.checks and now - began < LIMIT:
            now += 1.0
            desk = end_check_loans(desk, None, now, _LEASE)
            for peer in peers:
                desk = _turn(desk, peer, now, draw, trusted)
        taken.append(now - began if name not in desk.checks else float("inf"))
        desk = desk.without(name)
    return taken


def _turn(desk: LendingDesk, peer: _Peer, now: float, draw: random.Random, trusted: frozenset[str]) -> LendingDesk:
    """What the peer does at `now`."""
    held = desk.held_by(peer.owner)
    if held and now - peer.began >= peer.due:
        outcome = "failed" if peer.failing else "done"
        report = CheckReport(
            run="0" * 64, owner=peer.owner, id=held.loans[peer.owner].id, outcome=outcome, seconds=1.0,
            parent=(0.5,), averages=(0.5,), raw=(0.5,),
        )  # fmt: skip
        desk, _, _ = take_report(desk, report, now)
        peer.next = now
    elif now >= peer.next:
        if peer.fresh and held:
            peer.owner = Identity.derived(f"checker {draw.getrandbits(64)}").public_key
        asker = Asker(
            peer.owner, frozenset({"result"}), frozenset({0}), frozenset(), peer.known, origin=peer.source, source=peer.source
        )  # fmt: skip
        desk, check = lend_check(desk, asker, f"{draw.getrandbits(256):064x}", now, trusted)
        loan = check.loans[peer.owner].id if check else ""
        if loan != peer.loan:
            peer.loan, peer.began = loan, now
        peer.next = now + (_RENEW if check and not peer.fresh else _ASK)
    return desk


def table(tries: int) -> str:
    """Seconds until a check is decided: the median and the longest of all, and how many never were."""
    heads = (
        "borrowers that",
        "of 12",
        "at addresses",
        "with accepted work",
        "s a check: median",
        "longest",
        "not decided in 6 h",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for mode, bad, addresses, known in _rows():
        draw = random.Random(f"{mode} {bad} {known}")
        found = [wait for _ in range(tries) for wait in waits(draw, mode, bad, known, addresses)]
        decided = [wait for wait in found if wait < float("inf")]
        cells = (
            mode if bad else "none", bad, addresses, known, f"{statistics.median(found):.0f}", f"{max(decided, default=0):.0f}",
            f"{len(found) - len(decided)}/{len(found)}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _rows() -> Sequence[tuple[str, int, int, int]]:
    """Mode, bad borrowers, their addresses, others with accepted work."""
    ways = [(MODES[0], 0, 0), *((mode, bad, bad) for mode in MODES for bad in (4, 8)), *((FRESH, 4, n) for n in (1, 4))]
    return [(mode, bad, addresses, known) for mode, bad, addresses in ways for known in ((0, 3) if bad else (0,))]
