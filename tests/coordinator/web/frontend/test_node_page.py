"""`lutetia status --web` in real Chromium: what it shows, and who can read it."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import expect

from lutetia.node.control import ControlRequest, serve_control
from lutetia.node.journal import NodeJournal, NodeVerdict, TrainingLoss
from lutetia.node.local_status import DeviceStatus, LocalStatus
from tests.coordinator.acceptance.judge_driver import PEERS
from tests.coordinator.web.api.recorded_run import HOSTILE
from tests.coordinator.web.frontend.chromium import AXE, Scheme, browser, needs_chromium

pytestmark = needs_chromium

NODE = LocalStatus(
    state="training", reason="training <b>expert</b> 3", since=1.0, owner=PEERS[0].public_key, peer_id=PEERS[0].peer_id,
    name="A run", run="a" * 64, shard=3, shard_name=HOSTILE, epoch=4, epochs=9, step=5, steps=10, samples=80, loss=0.5,
    samples_per_second=12.0,
    devices=tuple(
        DeviceStatus(device=f"cuda:{number}", state="training", reason="training", since=1.0, shard=3, lane=lane, shard_name="a")
        for number, lane in enumerate((2, 0))
    ),
    lane=2, accepted=2, refused=1, problem=HOSTILE, online=True, pid=1, software="0.1", started=1.0,
)  # fmt: skip
JOURNAL = NodeJournal(
    verdicts=(
        NodeVerdict(time=2.0, shard=3, epoch=4, outcome="accepted"),
        NodeVerdict(time=3.0, shard=3, lane=2, epoch=5, outcome="refused", text=HOSTILE),
    ),
    losses=tuple(TrainingLoss(time=float(at), shard=3, samples=8 * at, loss=1 / at) for at in range(1, 9)),
    log=(f"12:00:00 W {HOSTILE}", "x" * 300),
)


async def test_status_web_shows_this_node_alone_to_who_has_the_address(tmp_path: Path) -> None:
    known = {"status": NODE, "journal": JOURNAL}

    async def answer(request: ControlRequest) -> dict[str, Any]:
        return known[request.verb].model_dump(mode="json")

    command = [sys.executable, "-m", "lutetia.cli", "status", "--web", "--state-folder", str(tmp_path)]
    async with serve_control(tmp_path, answer):
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout
        address = (await process.stdout.readline()).decode().removeprefix("Node page: ").strip()
        async with httpx.AsyncClient() as client:
            root = address[: address.index("/", 8)]
            for url in (root, f"{root}/api/v1/node", f"{root}/else/api/v1/node", f"{root}/docs", f"{root}/openapi.json"):
                assert (await client.get(url)).status_code == 404
            assert (await client.get(f"{address}api/v1/node", headers={"Host": "rebound.example"})).status_code == 400
            assert (await client.post(f"{address}api/v1/node")).status_code == 405
        async with browser() as chromium:
            views: tuple[tuple[int, Scheme], ...] = ((360, "light"), (1440, "dark"))
            for width, scheme in views:
                page = await chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                wrong: list[str] = []
                page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
                page.on("console", lambda said, wrong=wrong: wrong.append(said.text))
                page.on("request", lambda sent, wrong=wrong: None if sent.url.startswith(address) else wrong.append(sent.url))
                await page.goto(address)
                await expect(page.get_by_text("step 5 of 10")).to_be_visible()
                await expect(page.locator("#verdicts ~ ul li").first).to_contain_text(
                    f"refused: expert 003, lane 2 epoch 5 {HOSTILE}"
                )
                await expect(page.locator(".eta")).to_contain_text("003 " + HOSTILE + ", lane 2 · newest accepted epoch 4 of 9")
                devices = page.locator("#devices ~ .scroll tbody tr")
                await expect(devices).to_have_text([re.compile("^cuda:0.*, lane 2"), re.compile("^cuda:1.*, lane 0")])
                await expect(page.locator(".log")).to_contain_text(HOSTILE)
                await expect(page.locator(".u-over")).to_have_count(1)
                await expect(page.locator(".health")).to_contain_text(HOSTILE)
                assert await page.evaluate("document.documentElement.scrollWidth") <= width
                if AXE.is_file():
                    await page.evaluate(AXE.read_text())
                    assert await page.evaluate("axe.run().then(r => r.violations.map(v => v.id))") == []
                known["status"] = NODE.model_copy(update={"step": 6})
                await expect(page.get_by_text("step 6 of 10")).to_be_visible()
                known["status"] = NODE
                assert not wrong
                await page.close()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
