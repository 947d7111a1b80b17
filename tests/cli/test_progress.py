"""A node's own progress on the terminal and in the log, and what a coordinator prints when it serves."""

from __future__ import annotations

import io
import logging
import re
import socket

import pytest

from lutetia.cli.commands.coordinator import served_text
from lutetia.cli.commands.volunteer import render_local
from lutetia.cli.output import console
from lutetia.cli.progress import TrainingProgress, training_line
from lutetia.coordinator.serve import ServedRun
from lutetia.coordinator.web.listener import page_address
from lutetia.node.local_status import LocalStatus
from lutetia.system.log_format import StatusLineHandler, stderr_handler
from tests.cli.command_runner import ticket
from tests.cli.sample_documents import NOW, PEERS

STATUS = LocalStatus(
    state="training", reason="training", since=NOW, owner=PEERS[0].public_key, peer_id=PEERS[0].peer_id, pid=1, software="0.1",
    started=NOW, shard=2, shard_name="night streets", epoch=3, epochs=20, step=100, steps=400, samples=900, loss=0.12345,
    samples_per_second=31.42, due=NOW + 300, pending=1,
).model_dump()  # fmt: skip
LINE = (
    "expert 2 night streets, epoch 5 of 20, step 100 of 400, loss 0.1235, 31.4 samples/s, "
    "checkpoint in 5.0 min, all in 1.8 h"
)  # fmt: skip


def test_a_training_node_is_told_in_one_line() -> None:
    assert training_line(STATUS, NOW) == LINE
    assert training_line({**STATUS, "lane": 1}, NOW) == LINE.replace("streets", "streets, lane 1")
    assert "0.042 samples/s" in training_line({**STATUS, "samples_per_second": 0.0421}, NOW)
    assert training_line({**STATUS, "samples_per_second": None, "due": None}, NOW).endswith("loss 0.1235")
    for idle in ({"state": "syncing"}, {"step": None}, {"steps": None}, {"loss": None}):
        assert training_line({**STATUS, **idle}, NOW) == ""


def test_status_and_log_count_epochs_alike() -> None:
    printer = console()
    with printer.capture() as shown:
        printer.print(render_local(STATUS, NOW))
    assert "expert 2 night streets, epoch 5 of 20, step 100 of 400" in shown.get()


def test_status_tells_which_data_training_waits_for() -> None:
    printer = console()
    with printer.capture() as shown:
        printer.print(render_local({**STATUS, "waits_for_part": 3, "waits_since": NOW - 40, "left_out": "it came too late"}, NOW))
    told = " ".join(shown.get().split())
    assert "waits for data: part 3, for 40 s" in told
    assert "left out it came too late" in told


def test_node_that_stands_by_is_told_what_that_is_good_for() -> None:
    idle = {
        **STATUS,
        "state": "idle",
        "reason": "every lane of every shard has a holder; standing by",
        "shard": None,
        "due": None,
    }
    printer = console()
    with printer.capture() as shown:
        printer.print(render_local({**idle, "audits_today": 2, "checks_today": 3, "copies": 1}, NOW))
    told = " ".join(shown.get().split())
    assert "2 audits and 3 checks for the coordinator today, 1 copies of others' checkpoints; it takes over as soon as" in told


def test_each_of_several_devices_has_its_line() -> None:
    each = [
        {**STATUS, "device": "cuda:0"},
        {**STATUS, "device": "cuda:1", "state": "paused", "reason": "paused by the volunteer"},
    ]
    each[1] |= dict.fromkeys(("shard", "step", "steps", "due"))
    printer = console()
    printer.width = 200
    with printer.capture() as shown:
        printer.print(render_local({**STATUS, "device": "cuda:0, cuda:1", "devices": each}, NOW))
    rows = [" ".join(row.split()) for row in shown.get().splitlines()]
    assert "cuda:0 training for 0 s: expert 2 night streets, epoch 5 of 20, step 100 of 400" in "\n".join(rows)
    assert "cuda:1 paused for 0 s: paused by the volunteer" in "\n".join(rows)
    lines: list[str] = []
    TrainingProgress(None, lines.append, lambda: NOW)({**STATUS, "devices": each})
    assert lines == [f"cuda:0: {LINE}"]


def test_the_log_has_a_line_each_minute_and_for_each_epoch() -> None:
    lines: list[str] = []
    now = [NOW]
    progress = TrainingProgress(None, lines.append, lambda: now[0])
    for second in range(0, 121, 2):
        now[0] = NOW + second
        progress({**STATUS, "epoch": 3 if second < 100 else 4})
    assert len(lines) == 3
    assert "epoch 6 of 20" in lines[-1]


def test_a_terminal_has_one_line_that_changes_below_the_log() -> None:
    terminal = io.StringIO()
    line = StatusLineHandler(terminal)
    progress = TrainingProgress(line, lambda text: None, lambda: NOW)
    progress({**STATUS, "shard_name": "\x1b[2Jnight"})
    line.handle(logging.LogRecord("lutetia", logging.INFO, "", 0, "joined\nforged", (), None))
    progress({**STATUS, "state": "idle"})
    shown = terminal.getvalue()
    assert "\x1b[2J" not in shown
    assert "█████░" in shown
    before, _, after = shown.partition("joined forged\n")
    assert before.endswith("lutetia: ")
    assert re.search(r"expert 2", after)
    assert shown.endswith("\r\x1b[2K\r")


def shown_rows(text: str) -> list[str]:
    """What a terminal shows after this output, of which `\\r`, `\\n` and the erasure of a line are obeyed."""
    rows, column = [""], 0
    for part in re.findall(r"\x1b\[2K|.|\n", text.replace("\r\n", "\n"), re.DOTALL):
        match part:
            case "\x1b[2K":
                rows[-1] = " " * column
            case "\r":
                column = 0
            case "\n":
                rows, column = [*rows, ""], 0
            case _:
                rows[-1] = rows[-1][:column].ljust(column) + part + rows[-1][column + 1 :]
                column += 1
    return [row.rstrip() for row in rows]


def test_no_line_keeps_a_tail_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    line = StatusLineHandler(terminal)
    line.set_status("a long bar of a node that trains")
    of_child = stderr_handler()
    of_child.handle(logging.LogRecord("child", logging.WARNING, "", 0, "hot", (), None))
    line.set_status("a long bar of a node that trains")
    line.close()
    print("lutetia: no disk", file=terminal)
    assert [re.sub(r"^[\d:]+ ", "", row) for row in shown_rows(terminal.getvalue())] == ["W child: hot", "lutetia: no disk", ""]


def test_a_coordinator_prints_ticket_command_and_page() -> None:
    text = served_text(ServedRun("paris\x1b[2J by night", ticket(), "http://127.0.0.1:8080"))
    assert f"  lutetia join {ticket()}\n" in text
    assert "Status page: http://127.0.0.1:8080" in text
    assert "Only this machine can join" in text
    assert "\x1b" not in text
    assert "join" not in served_text(ServedRun("lost", "", None))


@pytest.mark.parametrize(("host", "address"), [("0.0.0.0", "http://127.0.0.1:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_the_page_has_an_address_that_a_browser_opens(host: str, address: str) -> None:
    with socket.create_server((host, 0)) as listener:
        assert page_address(listener).startswith(address)
