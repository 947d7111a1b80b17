"""What clients of the web API may cost: memory, processor time and places, counted, whatever they ask for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, cast

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Query, Request, Response

from lutetia.coordinator.web.api import answers, event_stream
from lutetia.coordinator.web.api.answers import REQUESTS_OF_A_SECOND, Answers, RequestLimit
from lutetia.coordinator.web.api.event_stream import EventStreams
from lutetia.coordinator.web.rendered import Rendered
from lutetia.coordinator.web.request_pace import RequestPace
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.canonical import Frozen
from tests.coordinator.web.api.recorded_run import record_run


class _Page(Frozen):
    text: str


class _Site:
    """One route with one parameter, whose document is as long as it says; every rendering takes `seconds`."""

    def __init__(self, length: int, seconds: float = 0.0) -> None:
        self.length, self.seconds, self.spent, self.rendered = length, seconds, 0.0, 0
        self.limit = RequestLimit(lambda: 0.0)
        self.answers, self.app = Answers(self.limit, lambda: self.spent), FastAPI()

        @self.app.get("/page")
        async def page(request: Request, after: Annotated[int, Query(ge=0)] = 0) -> Response:
            return self.answers.answer(request, "tag", lambda: self.render(after))

    def render(self, after: int) -> _Page:
        self.rendered, self.spent = self.rendered + 1, self.spent + self.seconds
        return _Page(text=f"{after}" * self.length)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app, client=("8.8.4.4", 1)), base_url="http://site")


async def test_unknown_parameters_name_no_document_of_their_own() -> None:
    site = _Site(2000)
    async with site.client() as client:
        for number in range(50):
            assert (await client.get(f"/page?x={number}&after=7&after=0")).json()["text"] == "0" * 2000
    assert site.rendered == 1


async def test_kept_documents_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEPT_BYTES", 50_000)
    site = _Site(900)
    async with site.client() as client:
        for number in range(200):
            assert (await client.get(f"/page?after={1000 + number}")).status_code == 200
            assert site.answers.kept_bytes <= 50_000
        assert site.rendered == 200
        await client.get("/page?after=1199")
    assert site.rendered == 200  # the newest is kept


async def test_rendering_is_charged_to_the_origin_that_has_it_done() -> None:
    site = _Site(10, seconds=0.1)
    async with site.client() as client:
        for number in range(9):
            await client.get(f"/page?after={number}")
        assert not site.limit.exhausted("8.8.4.4")
        await client.get("/page?after=9")
        assert site.limit.exhausted("8.8.4.4")
    assert 10 * 0.1 * REQUESTS_OF_A_SECOND == answers.BURST
    assert not site.limit.exhausted("8.8.4.5")


def test_one_prefix_gets_four_times_the_requests_of_one_address() -> None:
    limit = RequestLimit(lambda: 0.0, burst=10)
    taken = sum(limit.take(f"8.8.4.{host}") for host in range(100) for _ in range(10))
    assert taken == 40
    assert limit.take("1.1.1.1")


async def test_documents_that_are_being_sent_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SENT_BYTES", 3000)
    site = _Site(300)

    def ask(after: int) -> AsyncIterator[bytes]:
        scope = {"type": "http", "path": f"/{after}", "query_string": b"", "headers": [], "client": ("8.8.4.4", 1)}
        response = site.answers.answer(Request(scope), "tag", lambda: site.render(after))
        return cast(AsyncIterator[bytes], response.body_iterator)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]

    reading = []
    for number in range(100, 103):  # 911 bytes each
        reading.append(ask(number))
        await anext(reading[-1])
    with pytest.raises(HTTPException) as refused:
        ask(103)
    assert refused.value.status_code == 503
    second = ask(102)  # the same document again takes nothing
    await anext(second)
    for stream in (*reading, second):
        await cast(AsyncIterator[bytes], stream).aclose()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    await anext(ask(103))


async def test_requests_of_all_routes_are_limited_and_pictures_share_the_upload_rate() -> None:
    site, rate = _Site(10), RateLimit(None)
    taken: list[int] = []
    rate.take = lambda count: asyncio.sleep(0, taken.append(count))  # type: ignore[method-assign,assignment]

    @site.app.get("/picture")
    async def picture() -> Response:
        return Response(b"x" * 70, media_type="image/gif")

    paced = RequestPace(site.app, rate, RequestLimit(lambda: 0.0, burst=3), refusal=0.0)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(paced), base_url="http://site") as client:
        codes = [(await client.get(path)).status_code for path in ("/page", "/picture", "/nothing", "/page")]
    assert codes == [200, 200, 404, 429]
    assert taken == [70]


def test_status_is_rendered_once_however_many_ask(tmp_path: Path) -> None:
    status, rendered = record_run(tmp_path / "run").source.status(), []
    texts = Rendered(lambda: status, lambda given: rendered.append(given) or b"x")  # type: ignore[func-returns-value]
    assert [texts.latest() for _ in range(100)] == [b"x"] * 100
    assert len(rendered) == 1


async def test_event_streams_of_one_prefix_leave_places_to_others(tmp_path: Path) -> None:
    streams = EventStreams(record_run(tmp_path / "run").source, RequestLimit(lambda: 0.0))

    async def opened(origin: str) -> AsyncIterator[str]:
        stream = cast(AsyncIterator[str], streams.open(origin, 0).body_iterator)
        await anext(stream)
        return stream

    held = [await opened(f"8.8.4.{number // 8}") for number in range(32)]
    with pytest.raises(HTTPException):
        streams.open("8.8.4.77", 0)
    held += [await opened(f"1.1.{number // 8}.1") for number in range(32)]
    assert len(held) == event_stream.STREAMS
    newcomer = await opened("9.9.9.9")  # the oldest of the most crowded prefix ends
    assert "run-created" in await anext(newcomer)
    assert [text async for text in held[0]] == []
    assert "run-created" in await anext(held[1])


async def test_event_stream_reads_old_events_no_faster_than_its_origin_may(tmp_path: Path) -> None:
    run, now, spent = record_run(tmp_path / "run"), 0.0, iter(range(100))
    limit = RequestLimit(lambda: now)
    streams = EventStreams(run.source, limit, lambda: float(next(spent)))  # each batch takes a second
    async with aclosing(streams._events("8.8.4.4", 0)) as stream:
        await anext(stream)
        await anext(stream)
        run.accept(0, shard=1)
        run.write()
        more = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert not more.done()
        now = 1000.0
        assert "checkpoint-accepted" in await more
