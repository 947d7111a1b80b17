"""Every way in which a status document or a ledger is shown, for the fuzzers that go through decisions to what people see."""

from __future__ import annotations

import io

from rich.console import Console

from lutetia.cli.commands.swarm import read_status
from lutetia.cli.output import as_json_text, as_values
from lutetia.cli.status_table import render_status, shard_reason
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import Event
from lutetia.coordinator.web.metrics import metrics_text
from lutetia.coordinator.web.page import render_page
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.status import MAX_STATUS_BYTES, SwarmStatus

MOST_CHARACTERS = 4000


def show_everywhere(status: SwarmStatus) -> None:
    """Table, page, metrics, JSON and reasons of `status`. Raises AssertionError when a reader cannot take it safely."""
    data = canonical(status)
    assert len(data) <= MAX_STATUS_BYTES, f"a status of {len(data)} bytes"
    assert read_status(data) == status
    out = io.StringIO()
    Console(file=out, width=100).print(render_status(status, status.time))
    reasons = [str(shard_reason(status, shard, status.time)["text"]) for shard in range(min(4, len(status.shards)))]
    views = out.getvalue(), render_page(status), metrics_text(status).decode(), as_json_text(as_values(status))
    for text in (*views, *reasons):
        odd = sorted({letter for letter in text if not letter.isprintable() and letter != "\n"})
        assert not odd, f"a view with {odd!r}"


def describe_event(event: Event) -> None:
    """The sentence of `coordinator replay`. Raises AssertionError when it is none."""
    text = sentence(event)
    assert text.isprintable(), f"a sentence with {text!r}"
    assert len(text) <= MOST_CHARACTERS, f"a sentence of {len(text)} characters"
