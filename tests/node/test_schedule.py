"""Windows of local time in which a node may train, and what happens at their ends."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.node.machine import messages as m
from lutetia.node.schedule import DAYS, WeeklyHours, follow_schedule
from lutetia.node.settings import load_settings
from lutetia.system.errors import ConfigError
from tests.node.machine.machine_driver import MachineDriver, T

PARIS = ZoneInfo("Europe/Paris")
LATER = T + 3600


def at(day: str, clock: str) -> float:
    """Unix seconds of a day in the week of Monday, 2 March 2026, in Paris."""
    hour, minute = map(int, clock.split(":"))
    return datetime(2026, 3, 2 + DAYS.index(day), hour, minute, tzinfo=PARIS).timestamp()


@pytest.mark.parametrize(
    ("hours", "now", "opening"),
    [
        ("22:00-07:00", ("mon", "23:00"), None),
        ("22:00-07:00", ("mon", "06:59"), None),
        ("22:00-07:00", ("mon", "07:00"), ("mon", "22:00")),
        ("mon-fri 18:30-08:00, sat-sun", ("fri", "12:00"), ("fri", "18:30")),
        ("mon-fri 18:30-08:00, sat-sun", ("sat", "12:00"), None),
        ("mon-fri 18:30-08:00, sat-sun", ("mon", "00:00"), ("mon", "18:30")),
        ("sun 22:00-06:00", ("mon", "05:00"), None),
        ("fri-mon 9:00-17:00", ("tue", "10:00"), ("fri", "09:00")),
        ("tue", ("mon", "12:00"), ("tue", "00:00")),
        ("00:00-24:00", ("wed", "12:00"), None),
        ("SAT 1:00 - 2:00", ("sat", "00:30"), ("sat", "01:00")),
    ],
)
def test_closed_until_for_written_hours(hours: str, now: tuple[str, str], opening: tuple[str, str] | None):
    assert WeeklyHours.parse(hours).closed_until(at(*now), PARIS) == (at(*opening) if opening else None)


@pytest.mark.parametrize(
    "hours", ["", "always", "22-7", "22:00-22:00", "25:00-07:00", "07:00-24:30", "24:00-07:00", "mon-", "22:00-07:00,"]
)
def test_unreadable_hours_are_refused_in_one_sentence(hours: str):
    with pytest.raises(ConfigError, match="22:00-07:00") as refused:
        load_settings({"ticket": "x", "hours": hours})
    assert "hours" in str(refused.value)
    assert "\n" not in str(refused.value)


window = st.tuples(st.sampled_from(DAYS), st.sampled_from(DAYS), st.integers(0, 1439), st.integers(0, 1440)).filter(
    lambda drawn: drawn[2] != drawn[3]
)


def written(drawn: tuple[str, str, int, int]) -> str:
    first, last, begin, end = drawn
    return f"{first}-{last} {begin // 60}:{begin % 60:02}-{end // 60}:{end % 60:02}"


@given(st.lists(window, min_size=1, max_size=4), st.integers(0, 7 * 24 * 60 - 1))
def test_closed_until_is_the_first_open_minute(windows: list[tuple[str, str, int, int]], minute: int):
    hours = WeeklyHours.parse(",".join(map(written, windows)))
    now = at("mon", "00:00") + 60 * minute
    opening = hours.closed_until(now, PARIS)
    if opening is not None:
        assert now < opening <= now + 7 * 86_400
        assert hours.closed_until(opening, PARIS) is None
        assert hours.closed_until((now + opening) // 2, PARIS) == opening
        assert hours.closed_until(opening - 60, PARIS) == opening


def test_daylight_saving_change_moves_the_opening():
    """On 29 March 2026 Paris skips the hour after 02:00."""
    evening = datetime(2026, 3, 28, 23, 0, tzinfo=PARIS)
    opening = WeeklyHours.parse("07:00-08:00").closed_until(evening.timestamp(), PARIS)
    assert opening is not None
    assert opening == (evening + timedelta(hours=8)).timestamp()
    assert opening - evening.timestamp() == 7 * 3600


# --- the machine ----------------------------------------------------------------------------------------------------------


def test_window_end_releases_the_shard_until_the_next():
    machine = MachineDriver().training()
    machine.feed(m.HoursChanged(machine.now, LATER))
    assert (machine.state.phase, machine.state.why) == ("paused", "outside its hours")
    assert machine.actions_of(m.StopTrainer) == [m.StopTrainer(save=True)]
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in machine.actions
    machine.feed(m.HoursChanged(LATER, None))
    assert machine.state.phase == "idle"
    assert machine.actions_of(m.LookAtShards)


def test_start_outside_the_hours_is_paused():
    machine = MachineDriver()
    machine.feed(m.Joined(T))
    machine.feed(m.HoursChanged(T, LATER))
    machine.feed(m.Probed(T, {0: 1.0}))
    assert machine.state.phase == "paused"
    assert not machine.actions_of(m.LookAtShards)


def test_resume_outside_the_hours_lasts_until_a_window_ends():
    machine = MachineDriver().training()
    machine.feed(m.HoursChanged(machine.now, LATER))
    machine.feed(m.UserVerb(machine.now, "resume"))
    assert machine.state.phase == "idle"
    machine.feed(m.HoursChanged(LATER, None))
    assert machine.state.phase == "idle"
    machine.feed(m.HoursChanged(LATER + 60, LATER + 120))
    assert machine.state.phase == "paused"


def test_pause_continues_when_a_window_opens():
    machine = MachineDriver().training()
    machine.feed(m.UserVerb(machine.now, "pause"))
    machine.feed(m.HoursChanged(machine.now, LATER))
    machine.feed(m.HoursChanged(LATER, None))
    assert (machine.state.phase, machine.state.why) == ("paused", "paused by the volunteer")


def test_pause_that_ends_outside_the_hours_continues():
    machine = MachineDriver().training()
    machine.feed(m.UserVerb(machine.now, "pause", until=T + 600))
    machine.feed(m.HoursChanged(T + 300, LATER))
    machine.feed(m.ClockTick(T + 601))
    assert (machine.state.phase, machine.state.why) == ("paused", "outside its hours")
    machine.feed(m.HoursChanged(LATER, None))
    assert machine.state.phase == "idle"


def test_finish_is_not_stopped_by_the_schedule():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.feed(m.UserVerb(machine.now, "finish"))
    machine.feed(m.HoursChanged(machine.now, LATER))
    assert machine.state.phase == "draining"


async def test_follow_schedule_reports_a_closed_start_only():
    """The second schedule is closed now: its window is one minute, twelve hours from now."""
    events: list[m.HoursChanged] = []
    begin = datetime.now() + timedelta(hours=12)
    end = begin + timedelta(minutes=1)
    for text in ("00:00-24:00", f"{begin:%H:%M}-{end:%H:%M}"):
        task = asyncio.create_task(follow_schedule(WeeklyHours.parse(text), events.append))
        await asyncio.sleep(0)  # until it waits for the next minute
        task.cancel()
    (event,) = events
    assert event.closed_until is not None
    assert 11 * 3600 < event.closed_until - event.now <= 12 * 3600
