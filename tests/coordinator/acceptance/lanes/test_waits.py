"""How long a merge waits, and for whom."""

import pytest

from lutetia.coordinator.acceptance.messages import StartMerge
from tests.coordinator.acceptance.lanes.lanes_driver import DEADLINE, LanesDriver, lanes_of


def test_merge_waits_for_lanes_at_work_until_the_deadline_only() -> None:
    driver = LanesDriver()
    driver.result(0)
    driver.tick(DEADLINE / 2, at_work={0, 1})
    assert not driver.merges()
    driver.tick(at_work={0})  # the other node has gone
    assert len(driver.merges()) == 1
    slow = LanesDriver()
    slow.result(0)
    slow.tick(DEADLINE - 1, at_work={0, 1})
    assert not slow.merges()
    slow.tick(1, at_work={0, 1})
    assert len(slow.merges()) == 1


def test_quorum_waits_a_little_for_lanes_that_were_in_the_last_merge_alone() -> None:
    driver = LanesDriver(lanes=4)
    for lane in range(3):
        driver.result(lane)
    driver.merged()  # of the lanes 0, 1 and 2
    driver.tick(80.0, at_work={0, 1, 2, 3})
    for lane in (0, 1):
        driver.result(lane)
    driver.result(3)  # the quorum, after 80 s
    driver.tick(9.9, at_work={0, 1, 2, 3})
    assert len(driver.merges()) == 1
    driver.result(2)
    assert lanes_of(driver.merges()[-1]) == [0, 1, 2, 3]
    driver.merged()
    driver.tick(80.0, at_work={0, 1, 2, 3})
    for lane in range(3):
        driver.result(lane)
    driver.tick(9.9, at_work={0, 1, 2, 3})
    assert len(driver.merges()) == 2
    driver.tick(0.2, at_work={0, 1, 2, 3})
    assert lanes_of(driver.merges()[-1]) == [0, 1, 2], "an eighth of 80 s, and no longer"
    driver.merged()


def test_quorum_waits_for_no_lane_that_missed_the_last_merge_but_in_one_epoch_of_four() -> None:
    driver = LanesDriver(lanes=4)
    waits = []
    for _ in range(4):
        driver.tick(80.0, at_work={0, 1, 2, 3})
        for lane in range(3):
            driver.result(lane)
        began, before = driver.judge.now, len(driver.judge.actions)
        while not any(isinstance(action, StartMerge) for action in driver.judge.actions[before - 1 :]):
            driver.tick(1.0, at_work={0, 1, 2, 3})
        waits.append(driver.judge.now - began)
        driver.merged()
    assert waits == [0.0, 0.0, 0.0, pytest.approx(10.0, abs=1.0)]
