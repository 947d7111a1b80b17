"""The routes of the web API below /api/v1: read-only, without a key, with entity tags, compressed, and limited per origin."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import StreamingResponse

from lutetia.coordinator.web.api import views
from lutetia.coordinator.web.api.answers import Answers, RequestLimit, origin_of
from lutetia.coordinator.web.api.badges import add_badges
from lutetia.coordinator.web.api.documents import (
    CheckpointsPage,
    EventsPage,
    MixtureAnswer,
    MixturesPage,
    PeerHistoryDocument,
    PeersPage,
    RunDocument,
    SeriesDocument,
    ShardDocument,
    ShardsDocument,
)
from lutetia.coordinator.web.api.event_stream import EventStreams, last_event
from lutetia.coordinator.web.api.histories.columns import HistoryColumns, HistoryDocument
from lutetia.coordinator.web.api.histories.recent import NONE, Results, is_recent, last_results, results_after
from lutetia.coordinator.web.api.histories.whole import WholeHistories
from lutetia.coordinator.web.api.history import History, ShardHistory
from lutetia.coordinator.web.api.pictures import add_pictures, shards_with_sheets
from lutetia.coordinator.web.api.source import RunSource
from lutetia.protocol.schema.status import SwarmStatus

_LARGEST = 2**53
MOST_EVENTS = 1000
WHOLE_SECONDS = 10.0
"""The state of shards in whole histories is taken again after so long, and after each event."""
Cursor = Annotated[int, Query(ge=0, le=_LARGEST)]
Limit = Annotated[int, Query(ge=1, le=MOST_EVENTS)]
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client has it: its If-None-Match is the entity tag"},
    429: {"description": "Too many requests of this address; try again after the seconds of Retry-After"},
}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such thing"}}


def api_router(source: RunSource, limit: RequestLimit | None = None) -> APIRouter:
    """The routes that show `source`; `limit` counts the requests of each origin."""
    requests = limit or RequestLimit(time.monotonic)
    answers, streams = Answers(requests), EventStreams(source, requests)
    columns, whole = HistoryColumns(), WholeHistories()

    async def within_limit(request: Request) -> None:
        if not requests.take(origin_of(request)):
            raise HTTPException(429, "too many requests of this address; slow down", {"Retry-After": "1"})

    router = APIRouter(prefix="/api/v1", dependencies=[Depends(within_limit)], responses=_PROBLEMS)

    def live_tag(status: SwarmStatus) -> str:
        """Changes with the status document, too."""
        return f"{source.tag()}-{int(2 * status.time)}"

    @router.get("/run", response_model=RunDocument)
    async def run(request: Request) -> Response:
        """The run in a few numbers: progress, speed, arrival, peers, how to join, and what does not go on."""
        history, status = await source.up_to_date(), source.status()
        return answers.answer(
            request, live_tag(status),
            lambda: views.run_document(
                status, source.manifest(), history, ticket_of(source), source.about,
                disk_free(source.folder.root), source.bootstrap(),
            ),
        )  # fmt: skip

    @router.get("/status", response_model=SwarmStatus)
    async def whole_status(request: Request) -> Response:
        """The same document as /status.json."""
        status = source.status()
        return answers.answer(request, live_tag(status), lambda: status)

    @router.get("/shards", response_model=ShardsDocument)
    async def shards(request: Request, after: Cursor = 0) -> Response:
        """All shards with their histories; with `after`, only what came after that event of the ledger, if it is recent.

        Whole histories are megabytes in a long run, and up to ten seconds old: read `history` once, then what came after.
        """
        history, status = await source.up_to_date(), source.status()
        if is_recent(after, history):
            return answers.answer(request, live_tag(status), lambda: shards_after(source, status, history, after))
        tag = f"{source.tag()}-{int(status.time / WHOLE_SECONDS)}"
        empty = some_shards(source, status, history, lambda past: NONE)
        return await answers.answer_pieces(request, tag, lambda: whole.shards(empty, history))

    @router.get("/history", response_model=HistoryDocument)
    async def all_results(request: Request) -> Response:
        """All results of all shards in few bytes, as columns, without digests and reasons: for drawing."""
        history = await source.up_to_date()
        return await answers.answer_pieces(request, source.tag(), lambda: columns.document(history))

    @router.get("/shards/{index}", response_model=ShardDocument, responses=_MISSING)
    async def shard(
        request: Request, index: Annotated[int, PathParameter(ge=0, le=_LARGEST)],
        before: Annotated[int | None, Query(ge=0, le=_LARGEST)] = None,
        last: Annotated[int | None, Query(ge=1, le=MOST_EVENTS)] = None,
    ) -> Response:  # fmt: skip
        """One shard with its history; with `before` and `last`, only that many results of each kind before an event."""
        history, status = await source.up_to_date(), source.status()
        if index >= len(status.shards):
            raise HTTPException(404, f"the run has no shard {index}")

        def results(past: ShardHistory) -> Results:
            return last_results(past, before, last)

        return answers.answer(request, live_tag(status), lambda: some_shards(source, status, history, results, index)[0])

    @router.get("/peers", response_model=PeersPage)
    async def peers(
        request: Request, health: Annotated[str | None, Query(max_length=32)] = None, offset: Cursor = 0, limit: Limit = 100
    ) -> Response:
        """Peers that are online or have had a result decided, those with most accepted samples first."""
        history, status = await source.up_to_date(), source.status()
        return answers.answer(
            request, live_tag(status),
            lambda: views.peers_page(status, history, source.people(), health=health, offset=offset, limit=limit),
        )  # fmt: skip

    @router.get("/peers/{peer}", response_model=PeerHistoryDocument, responses=_MISSING)
    async def peer(request: Request, peer: Annotated[str, PathParameter(max_length=128)]) -> Response:
        """One peer, by peer id or public key: what counted, what did not, and why."""
        history, status = await source.up_to_date(), source.status()
        owner = views.find_owner(status, history, source.people(), peer)
        if owner is None:
            raise HTTPException(404, "the run knows no such peer: it is not online and has had no result decided")
        return answers.answer(request, live_tag(status), lambda: views.peer_history(status, history, source.people(), owner))

    add_badges(router, source)

    @router.get("/checkpoints", response_model=CheckpointsPage)
    async def checkpoints(
        request: Request, shard: Annotated[int | None, Query(ge=0, le=_LARGEST)] = None,
        before: Annotated[int | None, Query(ge=0, le=_LARGEST)] = None, limit: Limit = 100,
    ) -> Response:  # fmt: skip
        """Accepted results, newest first; `before` is an event's number."""
        history = await source.up_to_date()
        return answers.answer(
            request, source.tag(), lambda: views.checkpoints_page(history, shard=shard, before=before, limit=limit)
        )

    @router.get("/events", response_model=EventsPage)
    async def events(request: Request, after: Cursor = 0, limit: Limit = 100) -> Response:
        """Events of the ledger after the cursor, oldest first."""

        def page() -> EventsPage:
            lines = views.event_lines(source.rows(after, limit))
            return EventsPage(events=lines, cursor=lines[-1].event if lines else after, head=source.ledger.head[0])

        return answers.answer(request, source.tag(), page)

    @router.get("/events/stream", response_class=StreamingResponse, responses={503: {"description": "Too many streams"}})
    async def stream(
        request: Request, after: Annotated[int | None, Query(ge=0, le=_LARGEST)] = None,
        last_event_id: Annotated[str | None, Header(max_length=32)] = None,
    ) -> StreamingResponse:  # fmt: skip
        """Events as server-sent events from `Last-Event-ID` or `after` on, without either from now on."""
        return streams.open(origin_of(request), last_event(last_event_id, after, source.ledger.head[0]))

    @router.get("/mixture", response_model=MixtureAnswer, responses=_MISSING)
    async def mixture(request: Request, digest: Annotated[str | None, Query(max_length=64)] = None) -> Response:
        """The current mixture, or the one with this digest (or its first 12 letters), with the address of each of its files."""
        history, status = await source.up_to_date(), source.status()
        found = views.mixture_answer(source.folder, digest or status.mixture, history)
        if found is None:
            raise HTTPException(404, "no mixture was stitched yet" if digest is None else "the run made no such mixture")
        return answers.answer(request, f"{source.tag()}-{found.digest[:16]}", lambda: found)

    @router.get("/mixtures", response_model=MixturesPage)
    async def mixtures(
        request: Request, before: Annotated[int | None, Query(ge=0, le=_LARGEST)] = None, limit: Limit = 100
    ) -> Response:
        """All mixtures that were made, newest first, current or not; `before` is an event's number."""
        history, status = await source.up_to_date(), source.status()
        return answers.answer(
            request, live_tag(status), lambda: views.mixtures_page(history, status.mixture, before=before, limit=limit)
        )

    @router.get("/metrics", response_model=SeriesDocument)
    async def metrics(request: Request, losses: bool = True) -> Response:
        """Curves: held-out loss of each shard against samples, router accuracy by time bin, throughput by the hour."""
        history, status = await source.up_to_date(), source.status()
        if not losses:
            return answers.answer(request, source.tag(), lambda: views.series(history))
        return await answers.answer_pieces(request, source.tag(), lambda: whole.curves(status, history, views.series(history)))

    add_pictures(router, source, answers)
    return router


def shards_after(source: RunSource, status: SwarmStatus, history: History, after: int) -> ShardsDocument:
    """All shards with what came after event `after`."""
    shards = some_shards(source, status, history, lambda past: results_after(past, after))
    return ShardsDocument(events=history.events, shards=tuple(shards))


def some_shards(
    source: RunSource, status: SwarmStatus, history: History, results: Callable[[ShardHistory], Results], index: int | None = None
) -> list[ShardDocument]:
    """All shards, or the one with `index`, with those results of each that `results` chooses."""
    manifest, sheets, flops = source.manifest(), shards_with_sheets(source.folder), source.ledger.state.flops
    return [
        views.shard_document(shard, manifest, past := history.shard(shard.shard), results(past), sheets, flops)
        for shard in (status.shards if index is None else status.shards[index : index + 1])
    ]


def ticket_of(source: RunSource) -> str:
    """The ticket of the run; empty without its file."""
    try:
        return source.folder.ticket.read_text().strip()
    except OSError:
        return ""


def disk_free(folder: Path) -> int | None:
    """Free bytes of the disk that `folder` is on; None: not known."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
