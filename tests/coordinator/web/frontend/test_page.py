"""The run's page in real Chromium: all parts, widths, schemes, keyboard and screen reader, live updates, hostile texts."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from playwright.async_api import expect

from lutetia.coordinator.alerts.fault import BootstrapFault
from lutetia.coordinator.ledger.events import LineageRolledBack, SampleCostMeasured
from lutetia.coordinator.web.frontend import BUILT
from lutetia.protocol.schema.ticket import Ticket
from tests.coordinator.acceptance.judge_driver import COORDINATOR, OWNER, PEERS
from tests.coordinator.web.api.recorded_run import (
    HOSTILE,
    accept_lane,
    record_lane_run,
    record_long_run,
    record_run,
    serving,
    write_galleries,
)
from tests.coordinator.web.frontend.chromium import AXE, FIRST_LOAD, PROMPTS, Scheme, browser, needs_chromium, opened

pytestmark = needs_chromium


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
    run.driver.now += 1e6
    async with browser() as chromium:
        schemes: tuple[Scheme, ...] = ("light", "dark")
        for scheme in schemes:
            async with opened(run, chromium, 768, scheme) as (page, wrong):
                slow = page.locator(".health .red", has_text="for three times")
                await expect(slow).to_have_count(1)  # however many experts are slow
                await expect(slow).to_contain_text(re.compile(r"expert \d+, expert \d+, expert \d+ and \d more"))
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
        run.source.bootstrap = lambda: (BootstrapFault(address=place, since=run.driver.now, why="nothing listens <b>there</b>"),)
        run.write(back.model_copy(update={"epoch": 0, "term": 2}))
        await expect(page.locator(".health .red", has_text="bootstrap")).to_contain_text(
            f"{place} of the ticket does not answer: nothing listens <b>there</b>."
        )
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
        await expect(page.locator(".lineage a[href^='blobs/']")).to_have_count(2)  # read when it is opened
        await page.get_by_text("1 refused results").click()
        await expect(page.locator(".lineage")).to_contain_text(f"epoch 2 of {PEERS[2].public_key[:8]}, invalid at")
        await expect(page.locator(".lineage")).to_contain_text(HOSTILE)
        await expect(page.locator(".sheet").first).to_have_js_property("naturalWidth", 96)
        assert not wrong


async def test_a_volunteer_finds_what_counted_and_what_did_not(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    run.write(SampleCostMeasured(time=run.driver.now, flops=(2_000_000, 1_000_000)))
    async with browser() as chromium, opened(run, chromium, 360) as (page, wrong):
        facts = page.locator(".facts div", has_text="FLOPs of accepted samples")
        await expect(facts.locator("dd")).to_have_text("20.0 M")  # 8 samples of expert 0 and 4 of expert 1
        await expect(page.locator("#people ~ .scroll tbody tr", has_text=PEERS[1].public_key[:8])).to_contain_text("12.0 M")
        await page.get_by_label("Find me").fill(PEERS[2].peer_id)
        await page.get_by_role("button", name="find").click()
        article = page.get_by_role("article")
        await expect(article).to_contain_text("0 accepted samples in 0 results; 0 rolled back, 1 invalid")
        await expect(article).to_contain_text(HOSTILE)
        assert await page.locator("article script").count() == 0
        await page.get_by_label("Find me").fill(PEERS[1].public_key)
        await page.get_by_role("button", name="find").click()
        await expect(article).to_contain_text("Credit: 12.0 M FLOPs")
        await expect(article.locator(".badge")).not_to_have_js_property("naturalWidth", 0)
        assert not wrong
        await page.get_by_label("Find me").fill("nobody")
        await page.get_by_role("button", name="find").click()
        await expect(page.get_by_role("alert")).to_contain_text("knows no such peer")


async def test_a_name_is_shown_until_the_owner_hides_it(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")  # peer 0 has chosen a name
    async with browser() as chromium, opened(run, chromium, 360) as (page, wrong):
        row = page.locator("#people ~ .scroll tbody tr", has_text=PEERS[0].public_key[:8])
        await expect(row.locator("bdi.who")).to_have_text("Adas lab")
        orders = run.driver.manifest.orders.model_copy(update={"hidden_names": (PEERS[0].public_key,)})
        manifest = run.driver.manifest
        run.driver.manifest = manifest.model_copy(update={"orders": orders, "run": manifest.run_id, "version": 2})
        run.accept(0, shard=1)
        run.write()
        await expect(row).to_contain_text("8")  # of the new result: the page has read everything again
        await expect(page.get_by_text("Adas lab")).to_have_count(0)
        assert not wrong


async def test_lanes_show_who_holds_each_what_is_there_and_what_is_late(tmp_path: Path) -> None:
    run = record_lane_run(tmp_path / "run")
    async with browser() as chromium, opened(run, chromium, 360) as (page, wrong):
        row, lanes = page.locator(".coverage tbody tr").first, page.locator(".lineage table.lanes tbody tr")
        await expect(row).to_contain_text("4 lanes: 1 gathered, 2 training, 1 free")
        await page.locator(".row").first.click()
        await expect(page.locator(".lineage")).to_contain_text(
            re.compile("2 of 4 accepted results are enough for the next epoch. 1 is there, and merged in .* at the latest")
        )
        states = ("accepted, waits for the mergemerged", "trainingmerged", "trainingno")
        for lane, state in enumerate(states):
            await expect(lanes.nth(lane)).to_have_text(f"{lane}{PEERS[lane].public_key[:8]}{state}")
        accept_lane(run, 1)  # the quorum, and lane 2 comes after the merge
        run.write()
        await expect(row).to_contain_text("4 lanes: 2 merging, 1 late, 1 free")
        await expect(lanes.nth(2)).to_contain_text("late: the others are merged without it")
        if AXE.is_file():
            await page.evaluate(AXE.read_text())
            assert await page.evaluate("axe.run().then(r => r.violations.map(v => v.id))") == []
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        assert not wrong


async def test_a_thousand_peers_and_one_are_both_readable(tmp_path: Path) -> None:
    async with browser() as chromium:
        for peers, shown in ((1, 1), (1000, 200)):
            run = record_long_run(tmp_path / str(peers), shards=2, epochs=3, peers=peers)
            async with opened(run, chromium) as (page, wrong):
                await expect(page.locator("#people ~ .scroll tbody tr")).to_have_count(shown)
                assert (await page.get_by_text("760 more peers are not shown").count()) == (peers > 1)
                assert not wrong
