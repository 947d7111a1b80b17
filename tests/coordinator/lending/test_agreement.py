"""When reports on one check say the same, and who is found to have lied."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest

from lutetia.coordinator.lending.agreement import MOST_REPORTS, ROWS_APART, agree, settle
from lutetia.coordinator.lending.reports import well_formed
from lutetia.protocol.rpc.audit_request import AuditJob
from lutetia.protocol.rpc.check_request import (
    CheckJob,
    CheckReport,
    GalleryCheck,
    LentMixture,
    MixtureCheck,
    ReplayCheck,
    ResultCheck,
)
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import TrainedWith

ROWS = tuple(0.5 + row / 20 for row in range(8))
REF = BlobRef(digest="a" * 64, size=1)


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def report(owner: str, factor: float = 1.0, **fields: Any) -> CheckReport:
    rows = tuple(row * factor for row in ROWS)
    values = {"parent": ROWS, "averages": rows, "raw": ROWS, **fields}
    return CheckReport(run="0" * 64, owner=key(owner), id="1" * 64, outcome=values.pop("outcome", "done"), seconds=1.0, **values)


def replayed(owner: str, loss: float = 1.0, drift: float | None = 1e-6, **made: Any) -> CheckReport:
    empty: dict[str, Any] = {"parent": (), "averages": (), "raw": ()}
    return report(owner, losses=(loss,) * 16, drift=drift, made=TrainedWith(**made), **empty)


def test_two_honest_reports_settle_and_nobody_lied():
    settled = settle([report("ann"), report("ben", 1 + ROWS_APART / 2)])
    assert settled is not None
    assert settled.report == report("ann")
    assert not settled.liars


@pytest.mark.parametrize("lie", [0.9, 1.0 + 3 * ROWS_APART, 1.5])
def test_a_third_tells_who_lied(lie: float):
    """A liar may make a bad result look good, or a good one bad."""
    reports = [report("liar", lie), report("ann")]
    assert settle(reports) is None
    settled = settle([*reports, report("ben")])
    assert settled is not None
    assert settled.report is not None
    assert settled.report.owner == key("ann")
    assert settled.liars == {key("liar")}


def test_newcomers_alone_outvote_no_peer_with_accepted_work():
    known = frozenset({key("ann")})
    reports = [report("liar", 2.0), report("ann"), report("sybil", 2.0)]
    assert settle(reports, known=known) is None
    settled = settle([*reports, report("ben")], known=known)
    assert settled is not None
    assert settled.report is not None
    assert settled.report.owner == key("ann")
    assert settled.liars == {key("liar"), key("sybil")}
    unknown = settle(reports)
    assert unknown is not None
    assert unknown.liars == {key("ann")}, "among newcomers the majority decides"


def test_reports_that_never_agree_are_given_up():
    reports = [report(str(number), 1 + number / 5) for number in range(MOST_REPORTS)]
    assert settle(reports[:-1]) is None
    settled = settle(reports)
    assert settled is not None
    assert (settled.report, settled.liars) == (None, frozenset())


def test_rows_are_compared_as_far_as_both_go_and_no_nearer():
    more = tuple(row / 10 + 0.5 for row in range(12))
    assert agree(
        report("ann", parent=more, averages=more, raw=more), report("ben", parent=more[:8], averages=more[:8], raw=more[:8])
    )
    assert not agree(report("ann", parent=ROWS[:4]), report("ben"), fewest=8), "too few to tell"
    assert not agree(report("ann", raw=(*ROWS[:-1], None)), report("ben")), "one says that it is not a number"
    assert agree(report("ann", raw=(*ROWS[:-1], None)), report("ben", raw=(*ROWS[:-1], None)))


def test_rows_that_nobody_confirmed_do_not_count():
    """A quick liar scores more rows than the others, and lies on those."""
    settled = settle([report("liar", averages=(*ROWS, *[0.1] * 8)), report("ann")])
    assert settled is not None
    assert settled.report is not None
    assert settled.report.owner == key("liar"), "it agrees where both have scored"
    assert settled.report.averages == ROWS


def test_mixtures_agree_on_the_way_of_routing_and_on_the_rows():
    of_mixture: dict[str, Any] = {"mode": "top2", "temperature": 1.0, "raw": ()}
    first = {**of_mixture, "parent": ()}
    assert agree(report("ann", **of_mixture), report("ben", 1 + ROWS_APART / 2, **of_mixture), fewest=8)
    assert agree(report("ann", **first), report("ben", **first), fewest=8), "the first one is compared with none"
    assert not agree(report("ann", **of_mixture), report("ben", **{**of_mixture, "mode": "top1"}), fewest=8)
    assert not agree(report("ann", **of_mixture), report("ben", **{**of_mixture, "temperature": 2.0}), fewest=8)
    assert not agree(report("ann", **of_mixture), report("ben", 1.1, **of_mixture), fewest=8)
    assert not agree(report("ann", **of_mixture), report("ben", **first), fewest=8)


def test_refusals_agree_by_their_check():
    refused = [
        report(name, outcome="refused", check=check) for name, check in (("a", "format"), ("b", "format"), ("c", "numbers"))
    ]
    assert agree(refused[0], refused[1])
    assert not agree(refused[0], refused[2])
    assert not agree(refused[0], report("d"))


def test_replays_agree_within_what_devices_differ_by():
    assert agree(replayed("ann"), replayed("ben", 1 + 5e-5))
    assert agree(replayed("ann", precision="bfloat16"), replayed("ben", 1.01, drift=0.01, precision="bfloat16"))
    assert not agree(replayed("ann"), replayed("ben", 1.1))
    assert not agree(replayed("ann"), replayed("ben", drift=1.0)), "one end was trained, one was not"
    assert not agree(replayed("ann"), replayed("ben", drift=None))
    assert agree(replayed("ann", drift=1.0), replayed("ben", drift=1.02)), "both say that it was not trained"


def test_routers_agree_on_the_same_file_only():
    same: dict[str, Any] = {"router": REF, "accuracy": 0.8}
    assert agree(report("ann", **same), report("ben", **{**same, "accuracy": 0.81}))
    assert not agree(report("ann", **same), report("ben", **{**same, "accuracy": 0.6}))
    other = BlobRef(digest="b" * 64, size=1)
    assert not agree(report("ann", **same), report("ben", **{**same, "router": other}))


RESULT = ResultCheck(weights=REF, state=REF, trace=REF, holdout=REF, draw="d" * 64, rows=16, fewest=8, seconds=1.0)
AUDIT = AuditJob(checkpoint="c" * 64, shard=0, epoch=1, epochs=2, steps=16, precision="float32", end_state=REF, until=0.0)
MIXTURE = MixtureCheck(
    new=LentMixture(weights={0: REF}), current=LentMixture(weights={0: REF}), holdout=(REF,), draw="d" * 64, seconds=1.0,
    choose=True,
)  # fmt: skip
REPLAY = ReplayCheck(audit=AUDIT, near=1e-3, far=0.2, coarse=False)


@pytest.mark.parametrize(
    ("job", "answer", "right"),
    [
        ({"kind": "result", "result": RESULT}, report("ann"), True),
        ({"kind": "result", "result": RESULT}, report("ann", raw=ROWS[:7]), False),
        ({"kind": "result", "result": RESULT}, report("ann", raw=ROWS * 3), False),
        ({"kind": "result", "result": RESULT}, report("ann", outcome="refused", check="format"), True),
        ({"kind": "result", "result": RESULT}, report("ann", outcome="refused"), False),
        ({"kind": "replay", "replay": REPLAY}, replayed("ann"), True),
        ({"kind": "replay", "replay": REPLAY}, replayed("ann", drift=None), False),
        ({"kind": "replay", "replay": REPLAY}, report("ann"), False),
        ({"kind": "mixture", "mixture": MIXTURE}, report("ann", mode="top1", temperature=1.0), True),
        ({"kind": "mixture", "mixture": MIXTURE}, report("ann", mode="top1", temperature=1.0, parent=()), False),
        ({"kind": "mixture", "mixture": MIXTURE}, report("ann", mode="top1", temperature=1.0, averages=ROWS[:7]), False),
        ({"kind": "mixture", "mixture": MIXTURE}, report("ann", temperature=1.0), False),
        ({"kind": "gallery", "gallery": GalleryCheck(mixture=REF)}, report("ann", pictures=REF), True),
        ({"kind": "gallery", "gallery": GalleryCheck(mixture=REF)}, report("ann"), False),
        ({"kind": "router"}, report("ann", router=REF, accuracy=0.5), True),
        ({"kind": "router"}, report("ann", accuracy=0.5), False),
        ({"kind": "router-report", "router": REF}, report("ann", router=BlobRef(digest="b" * 64, size=1), accuracy=0.5), False),
    ],
)
def test_a_report_must_answer_what_was_asked(job: dict[str, Any], answer: CheckReport, right: bool):
    assert (well_formed(CheckJob(id="1" * 64, shard=0, until=0.0, **job), answer, 8) == "") == right


def test_independent_liars_are_always_found_and_never_decide():
    draw, found, wrong, tries = random.Random(1), 0, 0, 300
    for _ in range(tries):
        reports, honest = list[CheckReport](), 0
        while (settled := settle(reports)) is None:
            lies = draw.random() < 0.3
            honest += not lies
            name = f"{'liar' if lies else 'honest'} {len(reports)}"
            reports.append(report(name, draw.uniform(1.05, 2.0) if lies else 1 + draw.gauss(0, 1e-4)))
        if settled.report:
            wrong += abs((settled.report.averages[0] or 0) - ROWS[0]) > 0.01 * ROWS[0]
            found += settled.liars == {one.owner for one in reports if abs((one.averages[0] or 0) - ROWS[0]) > 0.01 * ROWS[0]}
    assert wrong <= tries / 100, "two liars who happen to say the same"
    assert found >= 0.95 * tries
