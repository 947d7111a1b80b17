"""The plan of a transfer: every chunk is fetched whatever the workers do, and no slow worker holds up the others."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.blobs.scheduler import MAX_SPAN, DownloadPlan, Span


@given(st.sets(st.integers(min_value=0, max_value=300)), st.integers(min_value=1, max_value=4), st.randoms(use_true_random=False))
def test_every_missing_chunk_arrives_and_no_other(missing: set[int], workers: int, chance: random.Random) -> None:
    """Workers read, fail, give back and steal at random."""
    plan, held, arrived, now = DownloadPlan(missing), {}, set(), 0.0
    for _ in range(20_000):
        if plan.done:
            break
        now += chance.random()
        worker = chance.randrange(workers)
        span: Span | None = held.get(worker)
        if span is None:
            span = plan.take(worker, now, workers) or plan.steal(worker, now)
            if span:
                held[worker] = span
        elif span.left and chance.random() < 0.9:
            index = span.next
            plan.advance(span, now)
            if chance.random() < 0.95:  # otherwise the chunk was wrong
                if plan.is_missing(index):
                    plan.arrived(span, index)
                    arrived.add(index)
            else:
                plan.release(held.pop(worker))
        else:
            plan.release(held.pop(worker))
    assert plan.done
    assert arrived == missing


def test_a_span_is_two_seconds_of_work_and_leaves_a_share() -> None:
    plan = DownloadPlan(range(1000))
    first = plan.take(0, 0.0, workers=2)
    assert first
    for second in range(first.left):
        plan.advance(first, (second + 1) * 0.1)
    plan.release(first)
    assert plan.pace(0) == 0.1 or abs((plan.pace(0) or 0) - 0.1) < 1e-9
    following = plan.take(0, 1.0, workers=2)
    assert following
    assert following.left == 20
    alone = DownloadPlan(range(1000)).take(0, 0.0)
    assert alone
    assert alone.left <= MAX_SPAN
    assert (DownloadPlan(range(6)).take(0, 0.0, workers=3) or alone).left == 1


def test_an_idle_worker_steals_the_later_half_of_a_slow_one() -> None:
    plan = DownloadPlan(range(8))
    slow = plan.take(0, 0.0)
    assert slow
    assert plan.take(1, 0.0) is None
    assert plan.steal(1, 0.1) is None  # it has just begun
    stolen = plan.steal(1, 10.0)
    assert stolen
    assert (slow.next, slow.end, stolen.next, stolen.end) == (0, 4, 4, 8)


def test_an_overdue_last_chunk_is_doubled_once() -> None:
    plan = DownloadPlan([7])
    slow = plan.take(0, 0.0)
    assert slow
    double = plan.steal(1, 30.0)
    assert double
    assert double.doubles
    assert plan.steal(2, 60.0) is None
    plan.advance(double, 31.0)
    assert plan.arrived(double, 7) == [0]
    assert plan.done


def test_chunks_of_a_failed_worker_are_pending_again() -> None:
    plan = DownloadPlan(range(8))
    span = plan.take(0, 0.0)
    assert span
    plan.advance(span, 1.0)
    plan.arrived(span, 0)
    plan.advance(span, 2.0)  # chunk 1 was read, but did not verify
    plan.release(span)
    again = plan.take(1, 3.0)
    assert again
    assert (again.next, again.end) == (1, 8)
