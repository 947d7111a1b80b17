"""Red lines reach the owner: once per cause, by command, webhook and mail, and nothing that hangs holds the coordinator."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, TCPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.coordinator.alerts.causes import GAP_SECONDS, GONE_SECONDS, LEAST_DISK, Told, causes_of, look
from lutetia.coordinator.alerts.channels import deliver
from lutetia.coordinator.alerts.service import OwnerAlerts
from lutetia.coordinator.settings import AlertSettings, MailSettings
from lutetia.protocol.schema.status import NodeStatus, PauseStatus, RefusalStatus, StallStatus, SwarmStatus
from tests.cli.sample_documents import NOW, shard, status
from tests.coordinator.acceptance.judge_driver import make_manifest

DISK = 2 * LEAST_DISK
MANIFEST = make_manifest()
STALL = StallStatus(kind="shard", shard=1, since=NOW - 90, why="No node holds it.", remedy="Find more volunteers.")


def red(*stalls: StallStatus, **changes: object) -> SwarmStatus:
    return status(shard(0, 3, "training"), shard(1, 2, "unclaimed")).model_copy(update={"stalls": stalls, **changes})


def test_causes_are_stalls_lonely_checkpoints_disk_and_expiry():
    lonely = red(STALL).shards[0].model_copy(update={"copies": 0, "last_accepted": NOW - 4000})
    late = StallStatus(
        kind="node", shard=0, owner="ab" * 32, since=NOW, why="It holds shard 0, and offers no result.", remedy="Look."
    )
    cheat = late.model_copy(update={"why": "It is quarantined: faked."})
    document = red(STALL, late, cheat, shards=(lonely, red().shards[1]))
    found = causes_of(document, 600.0, document.time + 3 * 86_400, 5_000_000)
    assert [name.split("/")[0] for name in found] == ["shard", "node", "copies", "disk", "expiry"]
    assert found["shard/1//"] == "expert 001: No node holds it. Find more volunteers."
    assert "3.0 days" in found["expiry"]
    paused = document.model_copy(update={"stalls": (), "paused": PauseStatus(since=NOW)})
    assert causes_of(paused, 600.0, document.time + 1e9, DISK) == {}


def test_cause_is_told_once_and_again_after_it_went_away():
    told, lines = look(Told(), {"a": "A"}, 0.0)
    assert lines == ("A",)
    for second in range(30, 600, 30):
        told, lines = look(told, {"a": f"A for {second} s"}, float(second))
        assert lines == ()
    told, lines = look(told, {}, 600.0)
    told, lines = look(told, {"a": "A"}, 600.0 + GONE_SECONDS / 2)
    assert lines == (), "it was gone for a moment only"
    told, _ = look(told, {}, 700.0)
    told, _ = look(told, {}, 700.0 + GONE_SECONDS)
    told, lines = look(told, {"a": "A", "b": "B"}, 1000.0)
    assert lines == ("A", "B")
    told, lines = look(told, {"a": "A", "b": "B", "c": "C"}, 1030.0)
    assert lines == (), "the next message is not due yet"
    told, lines = look(told, {"a": "A", "c": "C"}, 1000.0 + GAP_SECONDS)
    assert lines == ("C",)


def refusal(owner: str, second: float, checkpoint: str = "cd" * 32, verdict: str = "invalid") -> RefusalStatus:
    return RefusalStatus(
        time=NOW - second, check="numbers", shard=0, epoch=4, owner=owner, checkpoint=checkpoint, verdict=verdict, text="tensor x"
    )


async def test_a_result_that_is_refused_twice_is_told_once(tmp_path: Path):
    document, out = red(), tmp_path / "told"
    node = document.nodes[0].model_copy(update={"accepted": 1})
    before = document.shards[0].model_copy(update={"last_accepted": NOW - 500})
    document = document.model_copy(update={"nodes": (node,), "shards": (before, document.shards[1])})

    def causes(*refusals: RefusalStatus) -> dict[str, str]:
        return causes_of(document.model_copy(update={"refusals": refusals}), 600.0, NOW + 1e9, DISK)

    twice = (refusal(node.owner, 90), refusal(node.owner, 60))
    assert causes(*twice)["twice/0"].startswith("expert 000: the same result was refused twice, last at the check numbers")
    assert causes(twice[0], refusal(node.owner, 60, "ef" * 32)) == {}, "two results"
    assert causes(refusal("ef" * 32, 90), refusal("ef" * 32, 60)) == {}, "a stranger's"
    assert causes(refusal(node.owner, 90, verdict="inconclusive"), refusal(node.owner, 60, verdict="inconclusive")) == {}
    assert causes(refusal(node.owner, 900), refusal(node.owner, 600)) == {}, "one was accepted since"
    seen = [document.model_copy(update={"refusals": twice})]
    alerts = OwnerAlerts(AlertSettings(command=f"tee -a {out}"), lambda: seen[0], lambda: MANIFEST, tmp_path / "alerts.json")
    for number in range(3):
        update = {"refusals": (*twice, refusal(node.owner, 50 - number)), "time": NOW + number * GAP_SECONDS}
        seen[0] = document.model_copy(update=update)
        await alerts.look_once(DISK)
    assert out.read_text().count("refused twice") == 1


def test_releases_apart_are_one_cause_and_strangers_are_not_counted():
    document = red(software="0.3.1")
    node = document.nodes[0]
    nodes = tuple(
        node.model_copy(update={"owner": f"{number:064x}", "shard": shard, "accepted": accepted, "software": software})
        for number, (shard, accepted, software) in enumerate(
            [(0, 0, "0.3.0"), (1, 0, "0.1.7"), (None, 3, "0.2.0 dev"), (None, 0, "9.9"), (None, 2, "mine")]
        )
    )

    def causes(*shown: NodeStatus) -> dict[str, str]:
        return causes_of(document.model_copy(update={"nodes": shown}), 600.0, NOW + 1e9, DISK)

    text = causes(*nodes)["versions"]
    assert text.startswith("versions: 2 of 4 peers that work run Lutetia 0.1, 0.2, the coordinator 0.3.")
    assert causes(nodes[0], *nodes[3:]) == {}


@given(st.lists(st.sets(st.sampled_from("abcdefgh")), max_size=60))
def test_whatever_flickers_causes_no_flood(looks):
    told, messages = Told(), 0
    for count, causes in enumerate(looks):
        told, lines = look(told, {name: name for name in causes}, 30.0 * count)
        messages += bool(lines)
        assert len(lines) <= 8
    assert messages <= 1 + 30.0 * len(looks) / GAP_SECONDS


@contextmanager
def serving(server: TCPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Hook(BaseHTTPRequestHandler):
    bodies: list[dict]

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Mailbox(StreamRequestHandler):
    """As much of an SMTP server (RFC 5321) as a mail needs."""

    lines: list[str]

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        in_data = False
        while raw := self.rfile.readline():
            line = raw.decode().rstrip("\r\n")
            self.lines.append(line)
            if in_data and line != ".":
                continue
            word = line[:4].upper()
            in_data = word == "DATA"
            self.wfile.write({"DATA": b"354 go on\r\n", "QUIT": b"221 bye\r\n"}.get(word, b"250 ok\r\n"))
            if word == "QUIT":
                return


class Silent(StreamRequestHandler):
    """Takes the request and says nothing."""

    def handle(self) -> None:
        self.rfile.read(1)
        self.rfile.read()


async def test_webhook_and_mail_get_the_message():
    Hook.bodies, Mailbox.lines = [], []
    lines = ["expert 001: No node holds it. <b>é</b>", "disk: 5 MB are free"]
    with serving(HTTPServer(("127.0.0.1", 0), Hook)) as port:
        assert await deliver("webhook", AlertSettings(webhook=f"http://127.0.0.1:{port}/x"), "tiny", lines) == ""
    assert Hook.bodies[0]["text"] == "Run tiny: 2 things need you.\n" + "\n".join(lines)
    assert (Hook.bodies[0]["causes"], Hook.bodies[0]["run"]) == (lines, "tiny")

    class Server(TCPServer):
        allow_reuse_address = True

    with serving(Server(("127.0.0.1", 0), Mailbox)) as port:
        mail = MailSettings(server=f"127.0.0.1:{port}", sender="run@example.org", to=("owner@example.org",), security="none")
        assert await deliver("mail", AlertSettings(mail=mail), "tiny", lines[1:]) == ""
    assert "Subject: Run tiny: 1 red" in Mailbox.lines
    assert "disk: 5 MB are free" in Mailbox.lines
    assert any("owner@example.org" in line and line.upper().startswith("RCPT") for line in Mailbox.lines)


async def test_command_gets_the_text_and_one_that_hangs_is_ended(tmp_path: Path):
    out = tmp_path / "told"
    script = "import os, sys; open(sys.argv[1], 'w').write(sys.stdin.read() + '|' + os.environ['LUTETIA_ALERT'])"
    settings = AlertSettings(command=f'"{sys.executable}" -c "{script}" "{out}"')
    assert await deliver("command", settings, "tiny", ["a", "b"]) == ""
    assert out.read_text() == "Run tiny: 2 things need you.\na\nb|Run tiny: 2 things need you.\na\nb"
    began = time.monotonic()
    slow = AlertSettings(command=f'"{sys.executable}" -c "import signal; signal.pause()"')
    assert "longer than" in await deliver("command", slow, "tiny", ["a"], seconds=0.3)
    assert "ended with code 1" in await deliver("command", AlertSettings(command="false"), "tiny", ["a"])
    assert "cannot start" in await deliver("command", AlertSettings(command="/nowhere/at-all"), "tiny", ["a"])
    with serving(TCPServer(("127.0.0.1", 0), Silent)) as port:
        silent = AlertSettings(webhook=f"http://127.0.0.1:{port}/")
        assert "longer than" in await deliver("webhook", silent, "tiny", ["a"], seconds=1.0)
    assert time.monotonic() - began < 60


async def test_failing_channel_is_logged_once_and_gets_what_it_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    out, now, stalls = tmp_path / "told", [NOW], [STALL]
    settings = AlertSettings(command=f"tee {out}", webhook="http://127.0.0.1:9/")

    def seen() -> SwarmStatus:
        return red(*stalls).model_copy(update={"time": now[0]})

    def alerts() -> OwnerAlerts:
        return OwnerAlerts(settings, seen, lambda: MANIFEST, tmp_path / "alerts.json")

    first = alerts()
    with caplog.at_level(logging.ERROR):
        await first.look_once(DISK)
        assert "expert 001" in out.read_text()
        stalls.append(STALL.model_copy(update={"shard": 0}))
        now[0] += GAP_SECONDS
        await first.look_once(DISK)
    assert out.read_text().splitlines()[1:] == ["expert 000: No node holds it. Find more volunteers."]
    assert sum("was not told by webhook" in record.message for record in caplog.records) == 1
    Hook.bodies = []
    with serving(HTTPServer(("127.0.0.1", 0), Hook)) as port:
        first.settings = settings.model_copy(update={"webhook": f"http://127.0.0.1:{port}/"})
        stalls.append(STALL.model_copy(update={"kind": "audit", "epoch": 3}))
        now[0] += GAP_SECONDS
        await first.look_once(DISK)
    assert len(Hook.bodies[0]["causes"]) == 3, "two that it missed, and the new one"
    out.unlink()
    await alerts().look_once(DISK)
    assert not out.exists(), "after a restart nothing is told twice"
    await asyncio.sleep(0)
