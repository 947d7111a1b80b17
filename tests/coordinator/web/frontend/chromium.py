"""Real Chromium for the tests of the pages, and the page of a recorded run in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.coordinator.web.api.recorded_run import RecordedRun, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
AXE = Path(__file__).parents[4] / "coordinator" / "web" / "frontend" / "node_modules" / "axe-core" / "axe.min.js"
Scheme = Literal["light", "dark"]
PROMPTS = ["a red ball bounces", "<script>alert(1)</script>", "مرحبا بالعالم", "🐈 walks", "x" * 400]
FIRST_LOAD = 120_000
expect.set_options(timeout=30_000)  # the machine may be busy

needs_chromium = pytest.mark.skipif(
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
