"""The exported page in real Chromium, from a plain file server and from the disk."""

from __future__ import annotations

import asyncio
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.async_api import expect

from lutetia.coordinator.web.export import export_page
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.system.errors import UsageError
from tests.coordinator.acceptance.judge_driver import OWNER
from tests.coordinator.web.api.recorded_run import record_long_run, write_galleries
from tests.coordinator.web.frontend.chromium import PROMPTS, browser, needs_chromium

pytestmark = needs_chromium


class SilentFiles(SimpleHTTPRequestHandler):
    """Python's own file server, without its log."""

    def log_message(self, format: str, *args: object) -> None:
        del format, args


async def test_exported_page_needs_no_server(tmp_path: Path) -> None:
    run = record_long_run(tmp_path / "run", shards=3, epochs=6, peers=3)
    first, *_ = write_galleries(run, PROMPTS[:2])
    author = next(iter(run.driver.state.run.shards.values())).acceptance
    assert author
    run.source.folder.manifest.write_bytes(SignedManifest.sign(run.driver.manifest, OWNER).to_bytes())
    out = tmp_path / "out"
    done = export_page(run.source.folder.root, out, run.driver.now, gallery_bytes=1 << 20)
    assert (done.events, done.stitches) == (run.source.ledger.head[0], 3)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SilentFiles, directory=str(out)))
    serving_files = asyncio.create_task(asyncio.to_thread(server.serve_forever, 0.05))
    try:
        async with browser() as chromium:
            for address in (f"http://127.0.0.1:{server.server_address[1]}/", (out / "index.html").as_uri()):
                page = await chromium.new_page(viewport={"width": 768, "height": 900})
                page.set_default_timeout(60_000)
                wrong: list[str] = []
                page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
                page.on("console", lambda said, wrong=wrong: wrong.append(said.text) if said.type != "log" else None)
                page.on("requestfailed", lambda sent, wrong=wrong: wrong.append(sent.url))
                base = address.removesuffix("index.html")
                page.on(
                    "request", lambda sent, wrong=wrong, base=base: None if sent.url.startswith(base) else wrong.append(sent.url)
                )
                await page.goto(address)
                await expect(page.locator(".link")).to_contain_text("exported 20")
                await expect(page.locator(".coverage tbody tr")).to_have_count(3)
                await expect(page.locator(".events li").first).to_contain_text("mixture")
                await expect(page.locator(".film img").first).to_have_js_property("naturalWidth", 48)
                await page.get_by_label("Mixture 3 of 3").fill("0")
                await expect(page.locator(".film img").first).to_have_attribute("src", f"api/v1/galleries/{first}/000.gif")
                await expect(page.locator(".film img").first).to_have_js_property("naturalWidth", 48)
                await page.get_by_label("Find me").fill(peer_id_of(author.author))
                await page.get_by_role("button", name="find").click()
                await expect(page.get_by_role("article")).to_contain_text("accepted samples in")
                await page.get_by_label("Time machine").fill("1")
                await expect(page.locator(".events li")).to_have_count(1)
                assert not wrong
                await page.get_by_label("Find me").fill("../../nobody")
                await page.get_by_role("button", name="find").click()
                await expect(page.get_by_role("alert")).to_contain_text("this export has no such page")
                await page.close()
    finally:
        server.shutdown()
        await serving_files
        server.server_close()
    again = export_page(run.source.folder.root, out, run.driver.now, gallery_bytes=0)
    assert (again.stitches, (out / "data" / "galleries" / f"{first}.js").exists()) == (1, False)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "a file").touch()
    with pytest.raises(UsageError, match="holds something else"):
        export_page(run.source.folder.root, tmp_path / "else", 0.0, 0)
