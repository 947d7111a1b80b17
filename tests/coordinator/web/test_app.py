"""The HTTP server with a real client: page, JSON, metrics, blobs with ranges."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lutetia.coordinator.ledger.status_builder import LiveView, Sighting, status
from lutetia.coordinator.web.app import build_app, serve_http
from lutetia.coordinator.web.listener import bind
from lutetia.coordinator.web.page import render_page
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.records import ClaimRecord, Hardware, NodeRecord
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import ConfigError, UnreachableError
from tests.coordinator.acceptance.judge_driver import PEERS, drive_judge, make_record


def document() -> SwarmStatus:
    """A run with an accepted result, an invalid one with a hostile text, and a working peer."""
    driver = drive_judge(epochs=3, name="tiny run")
    result = make_record(driver.manifest, PEERS[0])
    driver.offer(result)
    driver.verdict(result)
    driver.refuse(make_record(driver.manifest, PEERS[1], epoch=2, parent=result.digest), "tensor <script> is not finite")
    run, peer = driver.manifest.run_id, PEERS[0]
    node = NodeRecord(
        run=run, owner=peer.public_key, issued=driver.now, peer_id=peer.peer_id, samples_per_second=3.0, software="0.1",
        state="training", hardware=Hardware(device="<script>alert(1)</script>", memory_bytes=1, cores=2),
    )  # fmt: skip
    claim = ClaimRecord(run=run, owner=peer.public_key, issued=driver.now, shard=0, epoch=1, samples=4, state="training")
    view = LiveView([Sighting(node, driver.now + 9, driver.now)], [Sighting(claim, driver.now + 9, driver.now)])
    return status(driver.state.run, driver.manifest, view, driver.now + 1, software="0.1")


@asynccontextmanager
async def served(blobs: BlobStore) -> AsyncIterator[httpx.AsyncClient]:
    listener = bind("127.0.0.1:0")
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    serving = asyncio.create_task(serve_http(listener, build_app(document, blobs, RateLimit(None))))
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        yield client
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener_address(address), timeout=60)


def listener_address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


async def test_page_status_metrics_and_blobs_are_served(tmp_path: Path):
    blobs = BlobStore(tmp_path / "blobs")
    data = os.urandom((1 << 20) + 12345)
    ref = blobs.add_bytes(data)
    async with served(blobs) as client:
        got = await client.get("/status.json")
        assert SwarmStatus.model_validate_json(got.content) == document()
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        metrics = {family.name: family for family in text_string_to_metric_families((await client.get("/metrics")).text)}
        assert metrics["lutetia_results_accepted"].samples[0].value == 1
        assert metrics["lutetia_results_rejected"].samples[0].value == 1
        assert {s.labels["health"]: s.value for s in metrics["lutetia_peers"].samples}["working"] == 1
        assert {s.labels["shard"]: s.value for s in metrics["lutetia_shard_epochs"].samples} == {"0": 1, "1": 0}
        await check_blobs(client, ref.digest, data)


async def check_blobs(client: httpx.AsyncClient, digest: str, data: bytes) -> None:
    whole = await client.get(f"/blobs/{digest}")
    assert whole.content == data
    part = await client.get(f"/blobs/{digest}", headers={"Range": "bytes=1048570-1048579"})
    assert (part.status_code, part.content) == (206, data[1048570:1048580])
    rest = await client.get(f"/blobs/{digest}", headers={"Range": f"bytes={len(data) - 7}-"})
    assert rest.content == data[-7:]
    assert (await client.get(f"/blobs/{digest}", headers={"Range": f"bytes={len(data)}-"})).status_code == 416
    await check_ranges(client, digest, data)
    for wrong in ("0" * 64, "..%2f..%2fcoordinator.key", digest.upper(), digest[:-1], digest + ".table"):
        assert (await client.get(f"/blobs/{wrong}")).status_code == 404
    assert (await client.post("/status.json")).status_code == 405


async def check_ranges(client: httpx.AsyncClient, digest: str, data: bytes) -> None:
    """Whatever ranges a client asks for, it is sent no more than the blob once, and what frames its parts."""
    last = len(data) - 1
    for ranges in (
        ",".join(f"{start}-{last}" for start in range(60)), ",".join(["0-0"] * 3000), f"0-{last}," * 20 + f"0-{last}",
        ",".join(f"{start}-{start}" for start in range(0, 400, 2)), f"-{10**30}", f"{10**30}-", "-0", "5-2", "a-b", "",
    ):  # fmt: skip
        answer = await client.get(f"/blobs/{digest}", headers={"Range": f"bytes={ranges}"})
        assert answer.status_code in (200, 206, 400, 416), ranges[:40]
        assert len(answer.content) <= len(data) + 40_000, ranges[:40]


def test_the_page_is_self_contained_and_escaped():
    page = render_page(document())
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"?(https?:)?//", page)
    assert "tiny run" in page
    assert "numbers" in page
    assert "<td class=soft>due</td>" in page


def test_a_port_in_use_is_reported_in_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UnreachableError, match=f"cannot serve HTTP on 127.0.0.1:{port}: address already in use"):
            bind(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1:http", "[::1"])
def test_a_malformed_address_is_reported_in_one_sentence(address: str):
    with pytest.raises(ConfigError, match="no port between 0 and 65535"):
        bind(address)
