"""Accepted samples of a swarm are counted from its ledger, within the measured time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.teams.swarm.main import table
from benchmarks.teams.swarm.rates import begins, delivery
from lutetia.coordinator.ledger.events import CheckpointAccepted, Event, LaneAccepted, LanesMerged
from tests.models.tiny_experts import tiny_manifest

MANIFEST = tiny_manifest(1)


def given(shard: int, epoch: int, author: str) -> SimpleNamespace:
    return SimpleNamespace(shard=shard, epoch=epoch, author=author)


def lane(at: float, author: str, samples: int, epoch: int = 1) -> Event:
    return LaneAccepted.model_construct(time=at, acceptance=given(0, epoch, author), samples=samples)  # pyright: ignore[reportArgumentType]


def merged(at: float, shard: int, epoch: int) -> Event:
    return LanesMerged.model_construct(time=at, acceptance=given(shard, epoch, "coordinator"))  # pyright: ignore[reportArgumentType]


def test_samples_count_from_the_first_accepted_result_of_every_node_on() -> None:
    events = [
        lane(5.0, "ann", 40), merged(10.0, 0, 1), lane(12.0, "ann", 40, 2), merged(15.0, 1, 1), lane(20.0, "bob", 20),
        lane(25.0, "ann", 40, 2), lane(26.0, "bob", 20, 2), merged(30.0, 0, 2), lane(45.0, "bob", 20, 3),
        merged(50.0, 0, 3), lane(61.0, "bob", 20, 4),
    ]  # fmt: skip
    assert begins(events[:4], MANIFEST, 2) is None, "both shards have an epoch, and bob has delivered nothing"
    assert begins(events, MANIFEST, 2) == 20.0
    assert begins(events, MANIFEST, 1) == 5.0, "as if bob were the slow one"
    assert begins(events, MANIFEST, 3) is None
    found = delivery(events, MANIFEST, 20.0, 60.0)
    assert (found.samples, found.authors, found.epochs) == (80, {"ann": 40, "bob": 40}, (20.0,))
    assert found.rate == pytest.approx(20 / 20.0), "what the whole epoch from 30 to 50 s took in"
    assert delivery(events, MANIFEST, 20.0, 40.0).rate == pytest.approx(60 / 20.0), "no whole epoch: over the measured time"
    whole = CheckpointAccepted.model_construct(time=30.0, acceptance=given(0, 2, "ann"))  # pyright: ignore[reportArgumentType]
    assert delivery([whole], MANIFEST, 20.0, 60.0).samples == MANIFEST.checkpoint_samples


def test_table_compares_with_the_pair() -> None:
    pair = {"swarm": "pair", "samples": 100, "seconds": 10.0, "rate": 10.0, "authors": {"a": 60, "b": 40}, "epochs": [4.0, 5.0]}
    lines = table([pair, {**pair, "swarm": "lanes", "rate": 39.0}]).splitlines()
    assert lines[2] == "| pair | 10.00 | 1.00 | 2 | 5 (4 to 5, N = 2) |"
    assert lines[3].startswith("| lanes | 39.00 | 3.90 |")
