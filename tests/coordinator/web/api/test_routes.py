"""The web API over a real connection: documents, cursors, entity tags, compression, streams, limits, and its own description."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis.core.result import Ok

from lutetia.coordinator.ledger.events import LineageRolledBack, MixtureStitched, SampleCostMeasured
from lutetia.coordinator.mixtures.archive import MixtureArchive
from lutetia.coordinator.web.api.answers import RequestLimit
from lutetia.coordinator.web.api.documents import (
    EventsPage,
    MixturesPage,
    PeerHistoryDocument,
    PeersPage,
    RunDocument,
    SeriesDocument,
)
from lutetia.coordinator.web.app import build_app
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.status import SwarmStatus
from tests.coordinator.acceptance.judge_driver import PEERS, make_record
from tests.coordinator.mixtures.test_archive import mixture
from tests.coordinator.web.api.recorded_run import HOSTILE, STEP, RecordedRun, record_run, serving, write_galleries

API = "/api/v1"


@pytest.fixture
def run(tmp_path: Path) -> RecordedRun:
    return record_run(tmp_path / "run")


async def test_run_tells_progress_arrival_and_how_to_join(run: RecordedRun) -> None:
    async with serving(run) as client:
        document = RunDocument.model_validate_json((await client.get(f"{API}/run")).content)
    assert (document.state, document.samples, document.samples_budget) == ("training", 12, 72)
    assert document.join == "lutetia join lutetia1example"
    assert (document.peers_online, document.peers_day) == (1, 2)
    assert document.samples_per_second == pytest.approx(12 / 3600)
    assert document.arrival.seconds is None
    assert document.arrival.basis == "not known: fewer than two results lately for expert 001"
    run.accept(0, shard=1)
    run.write()
    async with serving(run) as client:
        document = RunDocument.model_validate_json((await client.get(f"{API}/run")).content)
    assert document.arrival.seconds == pytest.approx(28 / 4 * (3 * STEP + 1))  # 28 are left; 4 came since the first result


async def test_peers_say_what_counted_and_what_did_not(run: RecordedRun) -> None:
    async with serving(run) as client:
        page = PeersPage.model_validate_json((await client.get(f"{API}/peers")).content)
        assert [peer.samples for peer in page.peers] == [8, 4, 0]
        assert page.peers[1].node is not None
        one = await client.get(f"{API}/peers/{PEERS[2].peer_id}")
        refused = PeerHistoryDocument.model_validate_json(one.content)
        assert (refused.accepted, refused.invalid, refused.refused[0].text) == (0, 1, HOSTILE)
        assert (await client.get(f"{API}/peers/nobody")).status_code == 404
        none = PeersPage.model_validate_json((await client.get(f"{API}/peers?health=working")).content)
        assert none.total == 0


async def test_peers_have_credit_in_flops_and_the_name_that_they_chose(run: RecordedRun) -> None:
    run.write(SampleCostMeasured(time=run.driver.now, flops=(10, 1000)))
    async with serving(run) as client:
        page = PeersPage.model_validate_json((await client.get(f"{API}/peers")).content)
    assert [peer.credit.total for peer in page.peers] == [4 * 1010, 40, 0]
    assert [peer.name for peer in page.peers] == ["", "Adas lab", ""]
    assert 0 < page.peers[0].credit.recent < page.peers[0].credit.total


async def test_rollback_takes_samples_back(run: RecordedRun) -> None:
    accepted = run.driver.state.run.shards[0].acceptance
    assert accepted is not None
    now, void = run.driver.now, accepted.checkpoint
    run.write(LineageRolledBack(time=now, shard=0, epoch=1, term=1, dropped=1, checkpoint=void, why="operator"))
    async with serving(run) as client:
        peer = PeerHistoryDocument.model_validate_json((await client.get(f"{API}/peers/{PEERS[1].public_key}")).content)
        without = (await client.get(f"{API}/metrics?losses=false")).json()
        assert (without["losses"], len(without["throughput"])) == ([], 1)
        curves = SeriesDocument.model_validate_json((await client.get(f"{API}/metrics")).content)
    assert (peer.samples, peer.accepted, peer.void) == (4, 1, 1)
    assert [point.void for point in peer.points] == [False, True]
    assert [len(each.losses) for each in curves.losses] == [1, 1]
    assert sum(each.samples for each in curves.throughput) == 8


async def test_events_are_read_by_cursor_and_every_one_has_a_sentence(run: RecordedRun) -> None:
    async with serving(run) as client:
        seen, cursor = [], 0
        while True:
            page = EventsPage.model_validate_json((await client.get(f"{API}/events?after={cursor}&limit=3")).content)
            if not page.events:
                break
            seen += page.events
            cursor = page.cursor
    assert [line.event for line in seen] == list(range(1, page.head + 1))
    assert all(line.text for line in seen)
    assert seen[0].kind == "run-created"


async def test_checkpoints_come_newest_first_in_pages(run: RecordedRun) -> None:
    async with serving(run) as client:
        first = (await client.get(f"{API}/checkpoints?limit=2")).json()
        rest = (await client.get(f"{API}/checkpoints?limit=2&before={first['next']}")).json()
        of_shard = (await client.get(f"{API}/checkpoints?shard=1")).json()
    numbers = [each["event"] for each in (*first["checkpoints"], *rest["checkpoints"])]
    assert numbers == sorted(numbers, reverse=True)
    assert (len(numbers), rest["next"], len(of_shard["checkpoints"])) == (3, None, 1)


async def test_unchanged_documents_are_not_sent_again_and_large_ones_are_compressed(run: RecordedRun) -> None:
    async with serving(run) as client:
        page, head = await client.get("/"), await client.head("/")  # as monitors ask
        assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", page.headers["etag"])
        first = await client.get(f"{API}/checkpoints")
        assert first.headers["content-encoding"] == "gzip"
        again = await client.get(f"{API}/checkpoints", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for known in ("*", f'"x", {first.headers["etag"].removeprefix("W/")}'):
            assert (await client.get(f"{API}/checkpoints", headers={"If-None-Match": known})).status_code == 304
        plain = await client.get(f"{API}/checkpoints", headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.json() == first.json()
        run.accept(0, shard=1)
        run.write()
        changed = await client.get(f"{API}/checkpoints", headers={"If-None-Match": first.headers["etag"]})
        assert changed.status_code == 200
        assert len(changed.json()["checkpoints"]) == 4


async def test_gallery_of_every_stitch_with_real_clips_and_experts(run: RecordedRun) -> None:
    digests = write_galleries(run, ["a <b>cat</b>", "a dog"])
    async with serving(run) as client:
        newest = (await client.get(f"{API}/gallery")).json()
        assert newest["mixture"] == digests[-1]
        assert [stitch["mixture"] for stitch in newest["stitches"]] == digests
        assert newest["clips"][0]["experts"][:3] == [[[0, 1.0]], [[0, 1.0]], [[1, 1.0]]]
        assert (newest["clips"][0]["real"]["same"], newest["clips"][1]["real"]["caption"]) == (True, HOSTILE)
        oldest = (await client.get(f"{API}/galleries/{digests[0]}")).json()
        clips = [(await client.get(document["clips"][1]["url"])) for document in (oldest, newest)]
        assert [clip.content[:4] for clip in clips] == [b"GIF8", b"GIF8"]
        assert clips[0].content != clips[1].content
        assert (await client.get(newest["clips"][1]["real"]["url"])).headers["content-type"] == "image/gif"
        assert (await client.get(f"{API}/shards/0/sheet.png")).headers["content-type"] == "image/png"
        for wrong in (
            "shards/1/sheet.png",
            f"galleries/{'0' * 64}",
            f"galleries/{digests[0]}/gallery.json",
            "galleries/real/x.gif",
        ):
            assert (await client.get(f"{API}/{wrong}")).status_code == 404
        assert (await client.get(f"{API}/galleries/real")).status_code == 422


async def test_status_gallery_and_shards(run: RecordedRun) -> None:
    async with serving(run) as client:
        assert SwarmStatus.model_validate_json((await client.get(f"{API}/status")).content) == run.source.status()
        gallery = (await client.get(f"{API}/gallery")).json()
        assert gallery["clips"][0]["prompt"] == "a <b>cat</b>"
        clip = await client.get(gallery["clips"][0]["url"])
        assert (clip.headers["content-type"], clip.content[:6]) == ("image/gif", b"GIF89a")
        for wrong in ("gallery.json", "001.gif", "..%2Fticket.txt", "000.gif%00"):
            assert (await client.get(f"{API}/gallery/{wrong}")).status_code == 404
        shards = (await client.get(f"{API}/shards")).json()["shards"]
        assert [len(each["accepted"]) for each in shards] == [2, 1]
        assert shards[0]["refused"][0]["text"] == HOSTILE
        assert (await client.get(f"{API}/shards/1")).json() == shards[1]
        assert (await client.get(f"{API}/shards/9")).status_code == 404
        assert (await client.get(f"{API}/mixture")).status_code == 404


async def test_every_mixture_is_listed_and_found_by_its_digest(run: RecordedRun, tmp_path: Path) -> None:
    folder, digests = run.source.folder, []
    archive = MixtureArchive(folder.mixtures, BlobStore(folder.blobs), [])
    for number, current in enumerate((True, False)):
        digests.append(mixture(tmp_path / "made", archive.blobs, number))
        archive.add(tmp_path / "made")
        state = run.driver.state.run
        run.write(
            MixtureStitched(
                time=run.driver.now, epochs=state.accepted_epochs, terms=state.terms, mixture=digests[-1], current=current,
                text="" if current else "worse", loss=0.5,
            )
        )  # fmt: skip
    async with serving(run) as client:
        page = MixturesPage.model_validate_json((await client.get(f"{API}/mixtures")).content)
        assert [(each.mixture, each.current, each.text) for each in page.mixtures] == [
            (digests[1], False, "worse"), (digests[0], True, ""),
        ]  # fmt: skip
        assert page.current == digests[0]
        first = (await client.get(f"{API}/mixtures?limit=1")).json()
        assert (await client.get(f"{API}/mixtures?before={first['next']}")).json()["mixtures"][0]["mixture"] == digests[0]
        for query, digest in (
            ("", digests[0]),
            (f"?digest={digests[1]}", digests[1]),
            (f"?digest={digests[1][:12]}", digests[1]),
        ):
            found = (await client.get(f"{API}/mixture{query}")).json()
            assert (found["digest"], found["kept"]) == (digest, True)
            assert (await client.get(found["files"][0]["url"])).status_code == 200
        for wrong in ("0" * 64, "..%2F..%2Fticket", "*"):
            assert (await client.get(f"{API}/mixture?digest={wrong}")).status_code == 404


async def test_shards_after_an_event_add_up_to_the_whole(run: RecordedRun) -> None:
    async with serving(run) as client:
        first = (await client.get(f"{API}/shards")).json()
        known, head = first["shards"], first["events"]
        assert head == run.source.ledger.head[0]
        run.accept(0, shard=1)
        run.driver.refuse(make_record(run.driver.manifest, PEERS[3], 0, 3, run.driver.state.run.shards[0].accepted), HOSTILE)
        run.write()
        new = (await client.get(f"{API}/shards?after={head}")).json()["shards"]
        whole = (await client.get(f"{API}/shards")).json()["shards"]
        assert [(each["whole"], len(each["accepted"]), len(each["refused"])) for each in new] == [(False, 0, 1), (False, 1, 0)]
        for before, more, after in zip(known, new, whole, strict=True):
            added = {name: before[name] + more[name] for name in ("accepted", "refused")}
            assert {**more, **added, "whole": True, "status": after["status"]} == after
        for old in (0, 10**6):
            assert all(each["whole"] for each in (await client.get(f"{API}/shards?after={old}")).json()["shards"])
        head, accepted = run.source.ledger.head[0], run.driver.state.run.shards[0].acceptance
        assert accepted is not None
        back = {"epoch": 1, "term": 1, "dropped": 1, "checkpoint": accepted.checkpoint, "why": "operator"}
        run.write(LineageRolledBack(time=run.driver.now, shard=0, **back))
        first, second = (await client.get(f"{API}/shards?after={head}")).json()["shards"]
    assert (first["whole"], [point["void"] for point in first["accepted"]]) == (True, [False, True])
    assert (second["whole"], second["accepted"]) == (False, [])


async def lines_of(answer: httpx.Response, count: int) -> list[dict[str, str]]:
    """The first `count` server-sent events."""
    found: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            found.append(fields)
            fields = {}
            if len(found) == count:
                break
    return found


async def test_stream_goes_on_after_the_last_event_that_a_client_has(run: RecordedRun) -> None:
    head = run.source.ledger.head[0]
    async with serving(run) as client:
        async with client.stream("GET", f"{API}/events/stream", headers={"Last-Event-ID": str(head - 2)}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            old = await lines_of(answer, 2)
        assert [each["id"] for each in old] == [str(head - 1), str(head)]
        async with client.stream("GET", f"{API}/events/stream") as answer:
            waiting = asyncio.create_task(lines_of(answer, 1))
            run.accept(0, shard=1)
            run.write()
            (new,) = await waiting
    assert new["event"] == "ledger"
    assert int(new["id"]) == head + 1 == json.loads(new["data"])["event"]


async def test_streams_of_one_address_are_limited_and_come_free(run: RecordedRun) -> None:
    async with serving(run) as client:
        answers = [await client.send(client.build_request("GET", f"{API}/events/stream"), stream=True) for _ in range(8)]
        assert {answer.status_code for answer in answers} == {200}
        for answer in answers:
            await anext(answer.aiter_bytes())
        assert (await client.get(f"{API}/events/stream")).status_code == 503
        for answer in answers:
            await answer.aclose()
        async with asyncio.timeout(30):
            while (await client.send(client.build_request("GET", f"{API}/events/stream"), stream=True)).status_code == 503:
                pass  # until the server has noticed


async def test_requests_of_one_address_are_limited(run: RecordedRun) -> None:
    async with serving(run, RequestLimit(lambda: 0.0, burst=5)) as client:
        codes = [(await client.get(f"{API}/gallery/none.gif")).status_code for _ in range(5)]
        refused = await client.get(f"{API}/run")
        assert (await client.get("/status.json")).status_code == 200
    assert codes == [404] * 5
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


def test_request_limit_fills_up_again_and_forgets_old_origins() -> None:
    now = 0.0
    limit = RequestLimit(lambda: now, rate=2.0, burst=3)
    assert [limit.take("a") for _ in range(4)] == [True, True, True, False]
    assert limit.take("b")
    now = 1.0
    assert [limit.take("a") for _ in range(3)] == [True, True, False]


async def test_blobs_answer_head_and_ranges(run: RecordedRun, tmp_path: Path) -> None:
    blobs = BlobStore(run.source.folder.blobs)
    ref = blobs.add_bytes(b"0123456789")
    async with serving(run) as client:
        head = await client.head(f"/blobs/{ref.digest}")
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "10", b"")
        part = await client.get(f"/blobs/{ref.digest}", headers={"Range": "bytes=2-4"})
        assert (part.status_code, part.content) == (206, b"234")
        beyond = await client.get(f"/blobs/{ref.digest}", headers={"Range": "bytes=20-"})
        assert beyond.status_code == 416


def test_every_route_keeps_its_own_description(run: RecordedRun) -> None:
    """Schemathesis calls every documented route with generated and with wrong arguments."""
    unlimited = RequestLimit(lambda: 0.0, burst=10**9)
    app = build_app(run.source.status, BlobStore(run.source.folder.blobs), RateLimit(None), run.source, unlimited)
    schema = schemathesis.openapi.from_asgi(f"{API}/openapi.json", app)
    called = set()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if operation.path.endswith("/stream"):
            continue  # it does not end
        called.add(operation.path)

        @settings(max_examples=12, deadline=None, derandomize=True, database=None)
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate()

        check()
    assert len(called) >= 12
