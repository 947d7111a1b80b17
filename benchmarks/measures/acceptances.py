"""Acceptances per second that the coordinator decides and writes to disk, eight at a time."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.report import Row
from lutetia.coordinator.ledger.events import RunCreated
from lutetia.coordinator.ledger.log import Ledger
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, make_record

SHARDS, EPOCHS, ROUNDS = 8, 200, 200


def _round(driver: JudgeDriver, ledger: Ledger) -> float:
    """Seconds of processor time and disk for one result of every shard."""
    began, before = time.perf_counter(), len(driver.events)
    for index in range(SHARDS):
        shard = driver.state.run.shards[index]
        record = make_record(driver.manifest, PEERS[index % len(PEERS)], index, shard.epoch + 1, shard.accepted)
        driver.offer(record)
        driver.verdict(record)
    ledger.append(driver.events[before:])
    return time.perf_counter() - began


def run() -> list[Row]:
    """The judge and the ledger alone; checks and network are measured elsewhere."""
    driver = drive_judge(shards=SHARDS, epochs=EPOCHS, rules={"offers_per_minute": 1_000_000})
    created = driver.events[0]
    assert isinstance(created, RunCreated)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.create(Path(folder) / "ledger.sqlite", created)
        rates = [SHARDS / _round(driver, ledger) for _ in range(ROUNDS)]
        ledger.close()
    return [Row.of("acceptances decided and written to disk", rates, "/s", "≥ 100 /s", f"{SHARDS} to a transaction, fsync each")]
