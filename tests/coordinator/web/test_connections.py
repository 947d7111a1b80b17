"""Limits on HTTP connections: the decisions, and a server under real idle, slow and greedy clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import uvloop

from lutetia.coordinator.periodic import every
from lutetia.coordinator.web.app import build_app, serve_http
from lutetia.coordinator.web.connections import ConnectionTimes, HttpLimits, crowded_out
from lutetia.coordinator.web.listener import bind
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.system.process import raise_file_limit
from tests.coordinator.web.test_app import document

LIMITS = HttpLimits(connections=6, per_origin=3, request_seconds=10, stall_seconds=30)

IDLE_CLIENT = """
import select, socket, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
links = []
for number in range(count):
    link = socket.socket()
    link.bind((f"127.0.0.{2 + number % 50}", 0))
    try:
        link.connect(("127.0.0.1", port))
        link.sendall(b"GET /status.json HTTP/1.1\\r\\nX-a: ")
    except OSError:
        pass
    links.append(link)
print("opened", flush=True)
ended, poll = set(), select.poll()
for link in links:
    poll.register(link, select.POLLIN)
by_number = {link.fileno(): link for link in links}
while len(ended) < count:
    for number, _ in poll.poll():
        poll.unregister(number)
        ended.add(number)
print("all ended", flush=True)
"""


def times(origin: str, opened: float, answered: bool = False) -> ConnectionTimes:
    return ConnectionTimes(origin, opened, None if answered else opened, moved=opened)


def test_few_connections_all_stay():
    held = [times("a", 1), times("b", 2)]
    assert crowded_out(held, held[-1], LIMITS) is None


def test_a_crowded_origin_loses_its_oldest_waiting_connection():
    held = [times("a", 1, answered=True), times("a", 2), times("b", 0), times("a", 3), times("a", 4)]
    assert crowded_out(held, held[-1], LIMITS) is held[1]


def test_when_full_the_most_crowded_origin_gives_way():
    held = [times("a", 1), *(times("b", 2 + index) for index in range(3)), times("c", 6), times("d", 7), times("e", 8)]
    assert crowded_out(held, held[-1], LIMITS) is held[1]


def test_when_full_the_most_crowded_prefix_gives_way():
    """Two connections of each of three addresses of one /24, and one honest client that was there first."""
    limits = HttpLimits(connections=7, per_origin=3)
    crowd = [times(f"8.8.4.{index % 3}", 2 + index) for index in range(6)]
    held = [times("9.9.9.9", 1), *crowd, times("1.1.1.1", 10)]
    assert crowded_out(held, held[-1], limits) is crowd[0]
    single = [times("9.9.9.9", 1), *(times(f"8.8.4.{index}", 2 + index) for index in range(6)), times("1.1.1.1", 10)]
    assert crowded_out(single, single[-1], limits) is single[1], "one connection of each address"


def test_a_prefix_has_four_times_the_connections_of_an_origin():
    limits = HttpLimits(connections=100, per_origin=2)
    held = [times(f"8.8.4.{index}", index) for index in range(9)]
    assert crowded_out(held[:8], held[7], limits) is None
    assert crowded_out(held, held[-1], limits) is held[0]


def test_a_dripped_request_is_overdue():
    waiting = times("a", 100)
    for now in range(100, 110):
        waiting.observe(0, now)
        assert not waiting.overdue(now, LIMITS)
    assert waiting.overdue(110, LIMITS)


def test_an_answer_is_overdue_once_nothing_of_it_moves():
    sending = times("a", 100, answered=True)
    for now, unsent in ((100, 900), (120, 800), (149, 800)):
        sending.observe(unsent, now)
        assert not sending.overdue(now, LIMITS)
    assert sending.overdue(150, LIMITS)


@contextlib.contextmanager
def few_files(spare: int) -> Iterator[None]:
    """Allow this process `spare` more open files than it has."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare if spare else 3, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


@contextlib.asynccontextmanager
async def served(blobs: BlobStore, limits: HttpLimits, rate: RateLimit) -> AsyncIterator[int]:
    listener = bind("127.0.0.1:0")
    serving = asyncio.create_task(serve_http(listener, build_app(document, blobs, rate), limits))
    yield listener.getsockname()[1]
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


def test_a_thousand_idle_sockets_neither_exhaust_files_nor_keep_others_out(tmp_path: Path):
    limits = HttpLimits(request_seconds=1.0)

    async def main() -> None:
        async with served(BlobStore(tmp_path), limits, RateLimit(None)) as port:
            client = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", "-c", IDLE_CLIENT, str(port), "1000", stdout=subprocess.PIPE
            )
            assert client.stdout
            with few_files(limits.connections + 300):
                assert await client.stdout.readline() == b"opened\n"
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as honest:
                    assert (await honest.get("/status.json")).status_code == 200
                assert await client.stdout.readline() == b"all ended\n"
            assert await client.wait() == 0

    uvloop.run(main())


def test_a_client_that_reads_nothing_is_closed(tmp_path: Path):
    blobs = BlobStore(tmp_path)
    digest = blobs.add_bytes(bytes(24 << 20)).digest

    async def main() -> None:
        async with served(blobs, HttpLimits(stall_seconds=0.5), RateLimit(None)) as port:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
                link.sendall(f"GET /blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                await asyncio.to_thread(link.recv, 1)
                with pytest.raises(ConnectionError):  # what the server has not read makes its end a reset, which is seen here
                    await asyncio.to_thread(link.sendall, bytes(64 << 20))

    uvloop.run(main())


def test_blobs_over_http_keep_the_upload_limit(tmp_path: Path):
    blobs = BlobStore(tmp_path)
    digest = blobs.add_bytes(bytes(1 << 20)).digest

    async def main() -> float:
        async with (
            served(blobs, HttpLimits(), RateLimit(2 << 20)) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        ):
            start = time.monotonic()
            assert len((await client.get(f"/blobs/{digest}")).content) == 1 << 20
            return time.monotonic() - start

    assert uvloop.run(main()) >= 0.4


def test_the_limit_of_open_files_is_raised_to_what_the_user_may():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert raise_file_limit(800) == 800
        assert raise_file_limit(600) == 800
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_periodic_task_waits_for_a_free_file():
    tries, done = 0, asyncio.Event()

    async def action() -> None:
        nonlocal tries
        tries += 1
        with few_files(0 if tries == 1 else 8):
            os.close(os.open(os.devnull, os.O_RDONLY))
            done.set()

    periodic = asyncio.create_task(every(lambda: 0.0, action))
    async with asyncio.timeout(20):
        await done.wait()
    periodic.cancel()
    await asyncio.gather(periodic, return_exceptions=True)
    assert tries >= 2
