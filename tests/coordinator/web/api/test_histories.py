"""Histories in pieces: the same documents as if they were rendered whole, and nothing rendered twice."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.coordinator.ledger.events import LineageRolledBack
from lutetia.coordinator.web.api.documents import SeriesDocument, ShardDocument, ShardsDocument
from lutetia.coordinator.web.api.histories import columns, pieces, whole
from lutetia.coordinator.web.api.histories.columns import HistoryDocument
from lutetia.coordinator.web.api.histories.pieces import gzip_of, piece_of
from tests.coordinator.acceptance.judge_driver import PEERS, make_record
from tests.coordinator.web.api.recorded_run import HOSTILE, RecordedRun, record_long_run, record_run, serving

API = "/api/v1"


@given(st.lists(st.binary(max_size=300), max_size=12))
def test_joined_pieces_are_one_gzip_member(parts: list[bytes]) -> None:
    assert gzip.decompress(gzip_of(piece_of(part) for part in parts)) == b"".join(parts)  # which checks the checksum


def unfold(history: HistoryDocument) -> dict[int, list[dict[str, Any]]]:
    """By shard: its accepted results, as the page makes them of the columns."""
    points: dict[int, dict[str, Any]] = {}
    authors: list[str] = []
    for segment in history.segments:
        authors += segment.authors
        for row in zip(*segment.accepted.model_dump().values(), strict=True):
            point = dict(zip(type(segment.accepted).model_fields, row, strict=True))
            points[point["event"]] = point | {"author": authors[point["author"]], "void": False, "void_event": None}
        for by, event in segment.voids:
            points[event] |= {"void": True, "void_event": by}
    shards: dict[int, list[dict[str, Any]]] = {}
    for point in points.values():
        shards.setdefault(point["shard"], []).append(point)
    return shards


def roll_back(run: RecordedRun, shard: int, epoch: int) -> None:
    accepted = run.driver.state.run.shards[shard].acceptance
    assert accepted is not None
    back = {"epoch": epoch, "term": 1, "dropped": accepted.epoch - epoch, "checkpoint": accepted.checkpoint, "why": "operator"}
    run.write(LineageRolledBack(time=run.driver.now, shard=shard, **back))


async def test_history_unfolds_to_the_results_of_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SEGMENT_EVENTS", 16)
    run = record_long_run(tmp_path / "run", shards=3, epochs=12, peers=9)
    async with serving(run) as client:
        for step in range(3):
            history = HistoryDocument.model_validate_json((await client.get(f"{API}/history")).content)
            document = (await client.get(f"{API}/shards")).json()
            assert history.events == document["events"] == run.source.ledger.head[0]
            assert len(history.segments) > 3
            found = unfold(history)
            for shard in document["shards"]:
                names = found[0][0].keys()
                wanted = [{name: point[name] for name in names} for point in shard["accepted"]]
                assert [
                    {**point, "time": pytest.approx(point["time"], abs=0.1)} for point in found[shard["status"]["shard"]]
                ] == [{**point, "loss": round(point["loss"], 6)} for point in wanted]
            refused = [event for segment in history.segments for event in segment.refused.event]
            assert refused == sorted(point["event"] for shard in document["shards"] for point in shard["refused"])
            if step == 0:
                roll_back(run, 1, 2)
            else:
                state = run.driver.state.run.shards[0]
                run.driver.refuse(make_record(run.driver.manifest, PEERS[3], 0, state.epoch + 1, state.accepted, f"{step}"), "no")
                run.write()


async def test_whole_histories_are_those_that_one_rendering_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "CHUNK", 3)
    monkeypatch.setattr(whole, "_STEP", 2)
    run = record_long_run(tmp_path / "run", shards=2, epochs=12, peers=5)
    async with serving(run) as client:
        for rolled_back in (False, True):
            packed = await client.get(f"{API}/shards")
            plain = await client.get(f"{API}/shards", headers={"Accept-Encoding": "identity"})
            assert plain.json() == packed.json()
            assert ShardsDocument.model_validate(packed.json()).model_dump_json().encode() == packed.content
            curves = SeriesDocument.model_validate_json((await client.get(f"{API}/metrics")).content)
            for shard, curve in zip(packed.json()["shards"], curves.losses, strict=True):
                one = ShardDocument.model_validate_json((await client.get(f"{API}/shards/{curve.shard}")).content)
                assert one == ShardDocument.model_validate(shard)
                kept = [point for point in shard["accepted"] if not point["void"]]
                assert [point["event"] for point in kept] == list(curve.events)
            assert any(point["void"] for point in packed.json()["shards"][0]["accepted"]) == rolled_back
            if not rolled_back:
                roll_back(run, 0, 1)


async def test_one_more_event_renders_no_whole_piece_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SEGMENT_EVENTS", 8)
    monkeypatch.setattr(whole, "CHUNK", 2)
    run, rendered = record_long_run(tmp_path / "run", shards=2, epochs=9, peers=5), 0
    make = pieces.piece_of

    def counted(data: bytes) -> pieces.Piece:
        nonlocal rendered
        rendered += len(data)
        return make(data)

    monkeypatch.setattr(columns, "piece_of", counted)
    monkeypatch.setattr(whole, "piece_of", counted)
    async with serving(run) as client:
        sizes = {}
        for path in ("history", "shards", "metrics"):
            sizes[path] = len((await client.get(f"{API}/{path}")).content)
        assert rendered <= sum(sizes.values())
        run.driver.accept(PEERS[4], 1)
        run.write()
        for path, most in (("history", 0.5), ("shards", 0.5), ("metrics", 0.9)):
            rendered = 0
            await client.get(f"{API}/{path}")
            assert 0 < rendered < most * sizes[path], path


async def test_last_results_of_a_shard_before_an_event(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    async with serving(run) as client:
        every = (await client.get(f"{API}/shards/0")).json()
        assert every["whole"]
        first, second = (point["event"] for point in every["accepted"])
        one = (await client.get(f"{API}/shards/0?last=1")).json()
        assert ([point["event"] for point in one["accepted"]], one["whole"]) == ([second], False)
        assert one["refused"][0]["text"] == HOSTILE
        past = (await client.get(f"{API}/shards/0?before={second}&last=5")).json()
        assert [point["event"] for point in past["accepted"]] == [first]
        assert past["status"]["epoch"] == 2  # its state is that of now
