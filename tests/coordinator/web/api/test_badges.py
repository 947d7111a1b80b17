"""Badges and cards: well-formed SVG with nothing that runs, whatever names are in them, and not sent twice."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from lutetia.coordinator.ledger.events import SampleCostMeasured
from lutetia.coordinator.web.api.badges import badge, card, in_flops
from lutetia.coordinator.web.api.people import CreditDocument
from tests.coordinator.acceptance.judge_driver import PEERS
from tests.coordinator.web.api.recorded_run import record_run, serving

ALLOWED = {"svg", "title", "rect", "g", "text"}
CREDIT = CreditDocument(total=3.25e18, epochs=3e18, audits=2e17, copies=5e16, recent=1.5e15)


def elements(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter())


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", "]]>&amp;\"'", "\u202etxt.exe", "\x00\x1b[31m", "🦊" * 10_000, "Ada", "</text><a href='x'>"],
)
def test_hostile_names_stay_text(name: str) -> None:
    for svg in (badge(name, CREDIT), card(name, name, PEERS[0].peer_id, CREDIT, 7)):
        found = elements(svg)
        assert {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in found} <= ALLOWED
        assert not [key for element in found for key in element.attrib if key.startswith("on") or "href" in key or key == "style"]
        assert len(svg) < 4000


def test_flops_have_three_digits_and_a_prefix() -> None:
    assert [in_flops(value) for value in (0, 12.0, 1250.0, 9.999e14, 3.25e18, 4e27)] == [
        "0 FLOP", "12 FLOP", "1.25 kFLOP", "1 PFLOP", "3.25 EFLOP", "4000 YFLOP",
    ]  # fmt: skip


async def test_badge_and_card_show_credit_and_are_not_sent_twice(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    run.write(SampleCostMeasured(time=run.driver.now, flops=(10, 1000)))
    async with serving(run) as client:
        for kind, words in (
            ("badge", ["recorded run", "4.04 kFLOP"]),
            ("card", ["4.04 kFLOP for recorded run", "2 accepted epochs"]),
        ):
            answer = await client.get(f"/api/v1/peers/{PEERS[1].peer_id}/{kind}.svg")
            assert answer.headers["content-type"] == "image/svg+xml"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            texts = [element.text for element in elements(answer.text)]
            assert all(word in texts for word in words)
            again = await client.get(
                f"/api/v1/peers/{PEERS[1].public_key}/{kind}.svg", headers={"If-None-Match": answer.headers["etag"]}
            )
            assert (again.status_code, again.content) == (304, b"")
            assert (await client.get(f"/api/v1/peers/nobody/{kind}.svg")).status_code == 404
        assert "Adas lab" in (await client.get(f"/api/v1/peers/{PEERS[0].peer_id}/card.svg")).text
