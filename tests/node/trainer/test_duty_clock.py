"""The time that the duty cycle counts."""

from __future__ import annotations

import time

import torch

from lutetia.node.trainer.loop import busy_clock


def seconds_of(device: str) -> tuple[float, float]:
    """What the clock of a device counts while this thread waits, and while it computes."""
    clock = busy_clock(device)
    begin = clock()
    time.sleep(0.3)  # the time without the processor that is measured
    waited, matrix = clock() - begin, torch.randn(200, 200)
    begin, until = clock(), time.thread_time() + 0.1
    while time.thread_time() < until:
        torch.mm(matrix, matrix)
    return waited, clock() - begin


def test_on_a_cpu_time_without_the_processor_does_not_count() -> None:
    waited, computed = seconds_of("cpu")
    assert waited < 0.1
    assert computed >= 0.1


def test_on_a_card_all_time_counts() -> None:
    waited, computed = seconds_of("cuda")
    assert waited >= 0.3
    assert computed >= 0.1
