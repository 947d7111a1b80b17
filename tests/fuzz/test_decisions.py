"""Whatever fits the schemas goes through the decisions: records to the judge, events to the reducer, a status to every view."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from benchmarks.fuzz import decisions, examples
from benchmarks.fuzz.decisions import judge_record, judge_report, restart, show_swarm
from benchmarks.fuzz.targets import target
from benchmarks.fuzz.views import describe_event, show_everywhere
from lutetia.coordinator.acceptance.messages import Write
from lutetia.coordinator.acceptance.state_machine import judge
from lutetia.coordinator.ledger.events import Event, read_event
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.rpc.audit_request import AuditReport
from lutetia.protocol.schema import records as r
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import LutetiaError
from tests.fuzz.strategies import documents

SOME = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
FEW = settings(SOME, max_examples=15)
ODD_WORDS = ("[/x]", "\x1b]0;t\x07", "\u202egnp", "<script>", "é" * 64, "$\\frac{", "a\nb", "😀" * 64, "")


def with_odd_words(record: r.Record, word: str) -> r.Record:
    """The record as a peer of release 0.1 may have written it, whose words could hold anything."""
    document = json.loads(canonical(record))
    for place in (document, document.get("hardware", {}), document.get("made", {})):
        for name in {"software", "device", "name"} & place.keys():
            if place is not document.get("made") or name != "device":
                place[name] = word
    return TypeAdapter(r.Record).validate_json(canonical(document), strict=True)


def extremes(schema: Any, root: Any, high: bool) -> Any:
    """A JSON value with every number at its lowest or highest bound, every text and list as long or short as may be."""
    if "$ref" in schema:
        return extremes(root["$defs"][schema["$ref"].rpartition("/")[2]], root, high)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return extremes(schema[union][0 if high else -1], root, high)
    if "const" in schema or "enum" in schema:
        return schema.get("const", (schema.get("enum") or [None])[-1 if high else 0])
    match schema.get("type"):
        case "integer" | "number":
            low, top = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
            return top if high else (low + 1 if "exclusiveMinimum" in schema else low)
        case "boolean":
            return high
        case "array":
            return []
        case "object":
            return {name: extremes(each, root, high) for name, each in schema["properties"].items()}
    return None


@pytest.mark.parametrize("high", [True, False], ids=["highest", "lowest"])
def test_numbers_at_their_bounds_are_judged(high: bool) -> None:
    """All numbers of a result, and those that replies quote, at what the schema just allows."""
    schema, sound = r.CheckpointRecord.model_json_schema(), json.loads(canonical(examples.checkpoint()))
    widest = {
        name: extremes(each, schema, high)
        for name, each in schema["properties"].items()
        if each.get("type") in ("integer", "number")
    }
    for fields in (widest, {"epoch": widest["epoch"], "samples": widest["samples"]}):
        judge_record(r.CheckpointRecord.model_validate_json(canonical({**sound, **fields}), strict=True))


def test_numbers_beyond_their_bounds_are_refused_where_they_are_read() -> None:
    """A signed result of 3 KB with an epoch or samples of 2,000 digits once ended the coordinator, again at every start."""
    for field in ("epoch", "samples", "shard"):
        record = examples.checkpoint().model_copy(update={field: 10**2000})
        with pytest.raises(r.RecordRefused):
            r.open_record(
                examples.sealed(record), key=None, subkey=record.owner, expires=examples.NOW + 5, now=examples.NOW,
                limits=r.RecordLimits(2.0),
            )  # fmt: skip


@FEW
@given(documents(r.CheckpointRecord), st.sampled_from(ODD_WORDS))
def test_any_result_is_judged(data: bytes, word: str) -> None:
    found = with_odd_words(r.CheckpointRecord.model_validate_json(data), word)
    assert isinstance(found, r.CheckpointRecord)
    judge_record(found)


@SOME
@given(st.lists(documents(r.NodeRecord) | documents(r.ClaimRecord), max_size=4), st.sampled_from(ODD_WORDS))
def test_any_swarm_is_shown(sent: list[bytes], word: str) -> None:
    records = [TypeAdapter(r.Record).validate_json(data) for data in sent]
    show_swarm([with_odd_words(record, word) for record in records])


@SOME
@given(documents(SwarmStatus))
def test_any_status_is_shown(data: bytes) -> None:
    show_everywhere(SwarmStatus.model_validate_json(data))


@SOME
@given(documents(AuditReport))
def test_any_audit_report_is_compared(data: bytes) -> None:
    judge_report(AuditReport.model_validate_json(data))


@SOME
@given(st.lists(documents(TypeAdapter(Event)), max_size=6), st.randoms(use_true_random=False))
def test_any_sequence_of_events_adds_up_or_is_refused(sent: list[bytes], random: Random) -> None:
    """Made-up events among those of a run, in any order; a coordinator starts from what comes out."""
    sequence = [*examples.all_events()[1:], *(read_event(data) for data in sent)]
    random.shuffle(sequence)
    state = apply(RunState(), examples.all_events()[0])
    for event in sequence:
        describe_event(event)
        try:
            state = apply(state, event)
        except LutetiaError:
            continue
    restart(state)


def test_the_judge_is_driven_to_every_kind_of_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Following one sound result reaches acceptances, audits, convictions and rollbacks."""
    reached: Counter[str] = Counter()

    def counted(*arguments: Any) -> Any:
        state, actions = judge(*arguments)
        reached.update(action.event.kind for action in actions if isinstance(action, Write))
        return state, actions

    monkeypatch.setattr(decisions, "judge", counted)
    judge_record(examples.checkpoint())
    assert reached.keys() >= {
        "checkpoint-seen", "checkpoint-refused", "baseline-measured", "checkpoint-accepted", "audit-due", "audit-done",
        "audit-reported", "peer-quarantined", "lineage-rolled-back",
    }  # fmt: skip


def lines(records: Iterator[r.Record]) -> bytes:
    return b"\n".join(map(canonical, records))


@pytest.mark.parametrize("name", ["results", "swarm-records", "audit-request", "events", "status"])
def test_seeds_are_taken(name: str) -> None:
    hold: Callable[[bytes], str] = target(name).hold
    assert {hold(seed) for seed in target(name).seeds()[:1]} == {"taken"}


def test_malformed_lines_are_passed_over() -> None:
    data = b"{}\n" + lines(iter(examples.all_records())) + b"\n[1]"
    assert target("results").hold(data) == target("swarm-records").hold(data) == "taken"
    with pytest.raises(ValidationError):
        r.CheckpointRecord.model_validate_json(b"{}")
