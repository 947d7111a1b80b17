"""The run's page in real Chromium: all parts, widths, schemes, keyboard and screen reader, live updates, hostile texts."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from lutetia.coordinator.web.frontend import BUILT
from tests.coordinator.acceptance.judge_driver import PEERS
from tests.coordinator.web.api.recorded_run import HOSTILE, RecordedRun, record_long_run, record_run, serving, write_clips

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
AXE = Path(__file__).parents[4] / "coordinator" / "web" / "frontend" / "node_modules" / "axe-core" / "axe.min.js"
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
    write_clips(run.source.folder.gallery, PROMPTS)
    async with browser() as chromium:
        views: tuple[tuple[int, Scheme], ...] = ((1440, "light"), (768, "dark"), (360, "light"))
        for width, scheme in views:
            async with opened(run, chromium, width, scheme) as (page, wrong):
                for part in ("join", "health", "gallery", "coverage", "curves", "people", "events"):
                    await expect(page.locator(f"#{part}")).to_be_visible()
                assert await page.evaluate("document.documentElement.scrollWidth") <= width
                assert await page.locator(".gallery img").count() == len(PROMPTS)
                assert await page.locator(".coverage tbody tr").count() == 6
                assert await page.locator(".u-over").count() == 1
                for caption in PROMPTS:
                    await expect(page.get_by_text(caption, exact=True).first).to_be_visible()
                assert not wrong


async def test_page_is_small_has_no_problem_for_screen_readers_and_works_by_keyboard(tmp_path: Path) -> None:
    compressed = sum(len(gzip.compress(path.read_bytes(), 9)) for path in BUILT.iterdir())
    assert compressed <= FIRST_LOAD
    run = record_long_run(tmp_path / "run")
    write_clips(run.source.folder.gallery, PROMPTS)
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


async def test_time_machine_sets_coverage_and_events_back(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    async with browser() as chromium, opened(run, chromium) as (page, wrong):
        await expect(page.locator(".coverage tbody tr").first).to_contain_text("2/9")
        slider = page.get_by_role("slider")
        await slider.focus()
        await page.keyboard.press("Home")
        await expect(page.locator(".coverage tbody tr").first).to_contain_text("0/9")
        await expect(page.locator(".events li")).to_have_count(1)
        await page.get_by_role("button", name="now").click()
        await expect(page.locator(".coverage tbody tr").first).to_contain_text("2/9")
        assert not wrong


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
