"""The run's page in real Chromium: all parts, widths, schemes, keyboard and screen reader, live updates, hostile texts."""

from __future__ import annotations

import asyncio
import gzip
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from lutetia.coordinator.ledger.events import LineageRolledBack
from lutetia.coordinator.web.export import export_page
from lutetia.coordinator.web.frontend import BUILT
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import UsageError
from tests.coordinator.acceptance.judge_driver import COORDINATOR, OWNER, PEERS
from tests.coordinator.web.api.recorded_run import HOSTILE, RecordedRun, record_long_run, record_run, serving, write_galleries

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
AXE = Path(__file__).parents[4] / "coordinator" / "web" / "frontend" / "node_modules" / "axe-core" / "axe.min.js"


class SilentFiles(SimpleHTTPRequestHandler):
    """Python's own file server, without its log."""

    def log_message(self, format: str, *args: object) -> None:
        del format, args


Scheme = Literal["light", "dark"]
PROMPTS = ["a red ball bounces", "<script>alert(1)</script>", "مرحبا بالعالم", "🐈 walks", "x" * 400]
FIRST_LOAD = 120_000

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "REQUIRE_CHROMIUM" not in os.environ, reason="Chromium is not installed (Debian: chromium)"
)


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        await started.close()


@asynccontextmanager
async def opened(
    run: RecordedRun, chromium: Browser, width: int = 1440, scheme: Scheme = "light"
) -> AsyncIterator[tuple[Page, list[str]]]:
    """The page of `run`, read to its end, and what goes wrong on it: errors, and requests to other hosts."""
    async with serving(run) as client:
        page = await chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(120_000)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda sent: None if sent.url.startswith(str(client.base_url)) else wrong.append(sent.url))
        await page.goto(str(client.base_url))
        await page.wait_for_selector("#coverage")
        yield page, wrong
        await page.close()


async def test_every_part_is_shown_at_every_width_in_both_schemes(tmp_path: Path) -> None:
    run = record_long_run(tmp_path / "run")
    write_galleries(run, PROMPTS)
    async with browser() as chromium:
        views: tuple[tuple[int, Scheme], ...] = ((1440, "light"), (768, "dark"), (360, "light"))
        for width, scheme in views:
            async with opened(run, chromium, width, scheme) as (page, wrong):
                for part in ("join", "health", "gallery", "coverage", "curves", "people", "events"):
                    await expect(page.locator(f"#{part}")).to_be_visible()
                assert await page.evaluate("document.documentElement.scrollWidth") <= width
                assert await page.locator(".gallery img").count() == 2 * len(PROMPTS), "each with a real clip beside it"
                assert await page.locator(".coverage tbody tr").count() == 6
                assert await page.locator(".u-over").count() == 1
                for caption in PROMPTS:
                    await expect(page.get_by_text(caption, exact=True).first).to_be_visible()
                assert not wrong


async def test_page_is_small_has_no_problem_for_screen_readers_and_works_by_keyboard(tmp_path: Path) -> None:
    compressed = sum(len(gzip.compress(path.read_bytes(), 9)) for path in BUILT.iterdir())
    assert compressed <= FIRST_LOAD
    run = record_long_run(tmp_path / "run")
    write_galleries(run, PROMPTS)
    async with browser() as chromium:
        schemes: tuple[Scheme, ...] = ("light", "dark")
        for scheme in schemes:
            async with opened(run, chromium, 768, scheme) as (page, wrong):
                await page.locator(".row").first.focus()
                await page.keyboard.press("Enter")
                await expect(page.locator(".lineage")).to_be_visible()
                if not AXE.is_file():
                    pytest.skip("axe-core is not installed; run: make page")
                await page.evaluate(AXE.read_text())
                found = await page.evaluate(
                    "axe.run().then(r => r.violations.map(v => v.id + ': ' + v.nodes[0].html.slice(0, 200)))"
                )
                assert found == []
                assert not wrong


async def test_new_events_appear_without_loss_of_place_or_focus(tmp_path: Path) -> None:
    run = record_long_run(tmp_path / "run")
    async with browser() as chromium, opened(run, chromium) as (page, wrong):
        events = run.source.ledger.head[0]
        await page.locator("#people").scroll_into_view_if_needed()
        field = page.get_by_label("words")
        await field.fill("offers")
        await page.evaluate("new Promise(done => { addEventListener('scrollend', done); setTimeout(done, 2000) })")
        place = await page.evaluate("scrollY")
        run.driver.accept(PEERS[4], 5)
        run.write()
        await expect(page.get_by_text(f"of event {events}")).to_have_count(0)
        await expect(page.locator(".events li").first).to_contain_text(PEERS[4].public_key[:8])
        assert await page.evaluate("document.activeElement.tagName + document.activeElement.value") == "INPUToffers"
        assert abs(await page.evaluate("scrollY") - place) < 40
        assert not wrong


async def test_page_goes_on_after_the_coordinator_was_away(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    async with browser() as chromium:
        async with serving(run) as client:
            address = str(client.base_url)
            page = await chromium.new_page()
            page.set_default_timeout(120_000)
            await page.goto(address)
            await page.wait_for_selector("#coverage")
            await expect(page.locator(".link")).to_have_text("live")
        await expect(page.locator(".link")).to_have_text("no connection; trying again", timeout=60_000)
        await expect(page.locator("#coverage")).to_be_visible()  # what was read stays
        run.accept(1)
        run.write()
        async with serving(run, port=int(address.rpartition(":")[2])):
            await expect(page.locator(".link")).to_have_text("live", timeout=60_000)
            await expect(page.get_by_text(f"as of event {run.source.ledger.head[0]}")).to_be_visible(timeout=60_000)
        await page.close()


async def test_time_machine_sets_everything_back(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    place = f"/ip4/127.0.0.1/tcp/4001/p2p/{COORDINATOR.peer_id}"
    ticket = Ticket(run=run.driver.manifest.run_id, owner=OWNER.public_key, addresses=(place,))
    run.source.folder.ticket.write_text(ticket.encode())
    void = run.driver.state.run.shards[0].acceptance
    assert void
    back = LineageRolledBack(time=run.driver.now, shard=0, epoch=1, term=1, dropped=1, checkpoint=void.checkpoint, why="operator")
    run.write(back)
    write_galleries(run, ["a red ball"])
    async with browser() as chromium, opened(run, chromium) as (page, wrong):
        await expect(page.locator(".coverage tbody tr").first).to_contain_text("1/9")
        await expect(page.locator(".health")).to_contain_text("Name a public address")
        slider = page.get_by_label("Time machine")
        await slider.focus()
        await page.keyboard.press("Home")
        await expect(page.locator(".coverage tbody tr").first).to_contain_text("0/9")
        await expect(page.locator(".events li")).to_have_count(1)
        await expect(page.locator("#people ~ .scroll tbody tr")).to_have_count(0)
        await expect(page.get_by_text("0 % of 72 samples")).to_be_visible()
        await expect(page.get_by_text("Nothing stands still at that moment")).to_be_visible()
        await expect(page.get_by_text("No clips yet")).to_be_visible()
        rolled_back = run.source.ledger.head[0] - 3
        await slider.fill(str(rolled_back - 1))
        await expect(page.locator(".coverage tbody tr").first).to_contain_text("2/9")
        await slider.fill(str(rolled_back))
        await expect(page.locator(".coverage tbody tr").first).to_contain_text("1/9")
        await expect(page.locator("#people ~ .scroll tbody tr")).to_have_count(2)
        await page.get_by_role("button", name="now").click()
        await expect(page.locator(".coverage tbody tr").first).to_contain_text("1/9")
        await expect(page.locator(".health")).to_contain_text("Name a public address")
        assert not wrong


async def test_gallery_plays_every_mixture_beside_a_real_clip(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    first, _, last = write_galleries(run, PROMPTS[:2])
    async with browser() as chromium, opened(run, chromium, 360) as (page, wrong):
        card = page.locator(".card").first
        made, real = card.locator("img").first, card.locator("img").last
        assert last in str(await made.get_attribute("src"))
        assert "galleries/real/" in str(await real.get_attribute("src"))
        await expect(card).to_contain_text("real, same caption")
        await expect(page.locator(".card").last).to_contain_text(HOSTILE)
        strip = card.get_by_role("img", name="Steps from noise to clip")
        await expect(strip).to_have_attribute(
            "aria-label", "Steps from noise to clip, by expert: 000 for 2, 001 for 2, 000 for 2, 001 for 2"
        )
        await page.get_by_label("Mixture 3 of 3").focus()
        await page.keyboard.press("Home")
        await expect(card.locator("img").first).to_have_attribute("src", f"api/v1/galleries/{first}/000.gif")
        await expect(page.get_by_text("Mixture 1 of 3")).to_be_visible()
        await expect(page.locator(".film img").first).to_have_js_property("naturalWidth", 48)
        await page.get_by_role("button", name="play the training").click()
        await expect(page.get_by_text("Mixture 2 of 3")).to_be_visible()
        await page.get_by_label("play clips").uncheck()
        await expect(page.locator(".film canvas").first).to_have_js_property("width", 48)
        await page.locator(".row").first.click()
        await expect(page.locator(".sheet").first).to_have_js_property("naturalWidth", 96)
        assert not wrong


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


async def test_a_volunteer_finds_what_counted_and_what_did_not(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    async with browser() as chromium, opened(run, chromium, 360) as (page, wrong):
        await page.get_by_label("Find me").fill(PEERS[2].peer_id)
        await page.get_by_role("button", name="find").click()
        article = page.get_by_role("article")
        await expect(article).to_contain_text("0 accepted samples in 0 results; 0 rolled back, 1 invalid")
        await expect(article).to_contain_text(HOSTILE)
        assert await page.locator("article script").count() == 0
        assert not wrong
        await page.get_by_label("Find me").fill("nobody")
        await page.get_by_role("button", name="find").click()
        await expect(page.get_by_role("alert")).to_contain_text("knows no such peer")


async def test_a_thousand_peers_and_one_are_both_readable(tmp_path: Path) -> None:
    async with browser() as chromium:
        for peers, shown in ((1, 1), (1000, 200)):
            run = record_long_run(tmp_path / str(peers), shards=2, epochs=3, peers=peers)
            async with opened(run, chromium) as (page, wrong):
                await expect(page.locator("#people ~ .scroll tbody tr")).to_have_count(shown)
                assert (await page.get_by_text("800 more peers are not shown").count()) == (peers > 1)
                assert not wrong
