"""Any bytes are parsed or refused by a typed error of one plain sentence, in bounded time and memory."""

from __future__ import annotations

import json
import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.fuzz.mutator import mutate
from benchmarks.fuzz.targets import LIGHT, NAMES, TENSOR_NAMES, target
from tests.fuzz.strategies import mutations

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
MOST_SECONDS = 5.0  # of processor time: the machine may be busy
EXAMPLES = {
    **dict.fromkeys(LIGHT, 60),
    **dict.fromkeys(TENSOR_NAMES, 25),
    "ledger": 40,
    "results": 15,
    "state": 10,
    "state-header": 15,
}


@pytest.mark.parametrize("name", NAMES)
def test_mutations_are_parsed_or_refused(name: str) -> None:
    parser = target(name)

    @settings(max_examples=EXAMPLES[name], suppress_health_check=SLOW)
    @given(mutations(name))
    def check(data: bytes) -> None:
        begun = time.process_time()
        parser.hold(data)
        assert time.process_time() - begun < MOST_SECONDS

    check()


@pytest.mark.parametrize("name", NAMES)
def test_every_seed_is_real(name: str) -> None:
    assert target(name).hold(target(name).seeds()[0]) in ("taken", "refused")


def test_documents_within_strings_are_mutated_whatever_they_hold() -> None:
    nested = json.dumps({"body": json.dumps({"\ud800": 1}, ensure_ascii=False)}).encode()
    changed = {mutate(nested, Random(seed)) for seed in range(100)}
    assert len(changed) > 20
