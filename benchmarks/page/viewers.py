"""People with the run's page open: each reads everything once, then what its event stream tells of, as the page's script does."""

from __future__ import annotations

import asyncio
import json
import random
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

REFRESH_SECONDS, SETTLE_SECONDS, SPREAD_SECONDS = 10.0, 1.0, 4.0
"""As in coordinator/web/frontend/src/main.tsx."""
_CONNECTIONS = 4
"""Requests at once of one browser, beside its event stream (browsers make six to one server)."""


@dataclass
class Timings:
    """Seconds and bytes of all answers by route, from the request to the last byte of the answer."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    size: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    statuses: dict[int, int] = field(default_factory=lambda: defaultdict(int))


class Browser:
    """Keeps connections from one loopback address open and asks again for what has changed."""

    def __init__(self, port: int, address: str, timings: Timings) -> None:
        self._port, self._address, self._timings = port, address, timings
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._tags: dict[str, str] = {}
        self._places = asyncio.Semaphore(_CONNECTIONS)

    async def get(self, path: str, route: str) -> bytes:
        """The body at `path`, uncompressed; empty if it has not changed. Its time counts for `route`."""
        async with self._places:
            began = time.perf_counter()
            status, headers, body = await self._ask(path)
            self._timings.seconds[route].append(time.perf_counter() - began)
        self._timings.size[route] += len(body)
        self._timings.statuses[status] += 1
        if status not in (200, 304):
            raise RuntimeError(f"{path} was answered with status {status}")
        self._tags[path] = headers.get("etag", "")
        return zlib.decompress(body, 31) if headers.get("content-encoding") == "gzip" else body

    async def _ask(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        while self._idle:
            link = self._idle.pop()
            try:
                return await self._over(link, path)
            except (ConnectionError, asyncio.IncompleteReadError):
                link[1].close()  # the server has closed it meanwhile
        return await self._over(await self.connect(), path)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port, local_addr=(self._address, 0), limit=1 << 20)

    async def _over(
        self, link: tuple[asyncio.StreamReader, asyncio.StreamWriter], path: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        reader, writer = link
        known = f"If-None-Match: {self._tags[path]}\r\n" if self._tags.get(path) else ""
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n{known}\r\n".encode())
        status, headers = await read_head(reader)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self._idle.append(link)
        return status, headers, body


async def read_head(reader: asyncio.StreamReader) -> tuple[int, Mapping[str, str]]:
    """Status and headers of an answer."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    return int(first.split()[1]), headers


class Viewer:
    """One open page."""

    def __init__(self, number: int, port: int, timings: Timings) -> None:
        self._browser = Browser(port, f"127.0.{number + 1}.1", timings)
        self._random = random.Random(number)
        self._more = asyncio.Event()
        self._head = 0

    async def watch(self, arrival: float) -> None:
        """Come within `arrival` seconds and keep the page up to date until cancelled."""
        await asyncio.sleep(self._random.uniform(0, arrival))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            while True:
                await self._read_all()
                try:
                    async with asyncio.timeout(REFRESH_SECONDS):
                        await self._more.wait()
                    await asyncio.sleep(SETTLE_SECONDS + self._random.uniform(0, SPREAD_SECONDS))
                except TimeoutError:
                    pass
                self._more.clear()

    async def _follow(self) -> None:
        reader, writer = await self._browser.connect()
        writer.write(b"GET /api/v1/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await read_head(reader)
        while line := await reader.readline():
            if line.startswith(b"event: ledger"):
                self._more.set()
        raise ConnectionError("the event stream has ended")

    async def _read_all(self) -> None:
        run, *_ = await asyncio.gather(
            self._read_run(), self._get("peers?limit=200", "peers"), self._get("metrics?losses=false", "metrics"),
            self._get("gallery", "gallery"),
        )  # fmt: skip
        if run:
            page = json.loads(run)["events"] // 500 * 500
            await self._get(f"events?after={page}&limit=500", "events")

    async def _read_run(self) -> bytes:
        run = await self._get("run", "run")
        if not self._head:
            self._head = json.loads(await self._get("history", "history"))["events"]
        if shards := await self._get(f"shards?after={self._head}", "shards"):
            self._head = json.loads(shards)["events"]
        return run

    async def _get(self, path: str, route: str) -> bytes:
        return await self._browser.get(f"/api/v1/{path}", route)


async def occasional(port: int, timings: Timings, peers: list[str], shards: int) -> None:
    """Somebody who looks at the routes that the page reads on a click, and at those of scripts, one after the other."""
    browser, generator = Browser(port, "127.1.1.1", timings), random.Random(5)
    while True:
        shard, peer = generator.randrange(shards), generator.choice(peers)
        for path, route in (
            (f"shards/{shard}?last=200", "shards/{index}, last 200"), (f"shards/{shard}", "shards/{index}, whole"),
            (f"peers/{peer}", "peers/{peer}"), (f"peers/{peer}/badge.svg", "peers/{peer}/badge.svg"),
            (f"checkpoints?shard={shard}", "checkpoints of a shard"), ("checkpoints", "checkpoints"), ("status", "status"),
            ("mixtures", "mixtures"), ("metrics", "metrics with losses"), ("shards", "shards, whole"),
        ):  # fmt: skip
            await browser.get(f"/api/v1/{path}", route)
            await asyncio.sleep(0.25)
        await browser.get("/metrics", "/metrics")
