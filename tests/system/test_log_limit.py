"""Log lines that strangers cause are bounded."""

from __future__ import annotations

import logging

import pytest

from lutetia.system.log_limit import MOST_SOURCES, PERIOD, LimitedLog


def test_a_source_gets_one_line_a_minute_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    limited = LimitedLog(logging.getLogger("lutetia.test"), clock=lambda: now)
    with caplog.at_level(logging.INFO, "lutetia.test"):
        for step in range(1200):
            now = step / 10
            limited(logging.INFO, "203.0.113.5", "refused %s", step)
    assert caplog.messages == ["refused 0", "left out 599 more lines like the last one of 203.0.113.5", "refused 600"]


def test_many_sources_share_one_line(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    limited = LimitedLog(logging.getLogger("lutetia.test"), clock=lambda: now)
    with caplog.at_level(logging.INFO, "lutetia.test"):
        for number in range(100_000):
            limited(logging.INFO, f"origin {number}", "refused %d", number)
        assert len(caplog.messages) == MOST_SOURCES + 1
        now = PERIOD
        limited(logging.INFO, "one more", "refused")
    assert f"left out {100_000 - MOST_SOURCES - 1} more lines like the last one of other sources" in caplog.messages
