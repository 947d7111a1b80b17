"""`lutetia join`, and the commands that control the running daemon: `status pause resume finish leave`."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lutetia.cli.arguments import StateFolder, TicketArgument, documented_by, given, read_ticket, setting
from lutetia.cli.output import JsonFlag, emit, say, show
from lutetia.system.errors import UsageError, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def register(app: typer.Typer) -> None:
    """Add the commands to the top level."""
    app.command(cls=documented_by("lutetia.node.settings:NodeSettings"))(join)
    for command in (status, pause, resume, finish, leave):
        app.command()(command)


def duration(text: str) -> float:
    """Parse `90s`, `30m`, `2h` or `1d` into seconds. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?", text.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"cannot read the duration {text!r}; write it like 90s, 30m, 2h or 1d")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def join(
    ticket: TicketArgument,
    state_folder: StateFolder = None,
    config: Annotated[Path | None, setting("JOIN_CONFIG", "TOML file with settings; options override it.")] = None,
    listen: Annotated[str | None, setting("LISTEN")] = None,
    announce: Annotated[list[str] | None, setting("ANNOUNCE")] = None,
    name: Annotated[str | None, setting("NAME")] = None,
    device: Annotated[str | None, setting("DEVICE")] = None,
    threads: Annotated[str | None, setting("THREADS")] = None,
    memory_limit: Annotated[str | None, setting("MEMORY_LIMIT")] = None,
    duty: Annotated[float | None, setting("DUTY", min=0.01, max=1.0)] = None,
    hours: Annotated[str | None, setting("HOURS")] = None,
    max_temp: Annotated[float | None, setting("MAX_TEMP", min=30, max=110)] = None,
    losses: Annotated[str | None, setting("LOSSES")] = None,
    clips_every: Annotated[int | None, setting("CLIPS_EVERY", min=0)] = None,
    base: Annotated[Path | None, setting("BASE")] = None,
    disk_limit: Annotated[str | None, setting("DISK_LIMIT")] = None,
    upload_rate: Annotated[str | None, setting("UPLOAD_RATE")] = None,
    bytes_per_day: Annotated[str | None, setting("BYTES_PER_DAY")] = None,
    bytes_per_month: Annotated[str | None, setting("BYTES_PER_MONTH")] = None,
) -> None:
    """Train a run's experts on this machine.

    The node runs until `lutetia finish`, `lutetia leave` or Ctrl-C. When all work is done it keeps serving its checkpoints.
    A --config file can set more than these options: see docs/reference/settings.md.
    """
    checked = read_ticket(ticket).encode()  # before the slow imports, so that a bad ticket is reported at once
    import logging

    from lutetia.cli.progress import TrainingProgress
    from lutetia.cli.run_service import run_service
    from lutetia.node.daemon import run_node
    from lutetia.node.settings import load_settings
    from lutetia.system.log_format import StatusLineHandler

    flags = given(
        state_folder=state_folder, listen=listen, announce=announce, name=name, device=device, threads=threads,
        memory_limit=memory_limit, duty=duty, hours=hours, max_temp=max_temp, losses=losses, clips_every=clips_every, base=base,
        disk_limit=disk_limit, upload_rate=upload_rate,
        bytes_per_day=bytes_per_day, bytes_per_month=bytes_per_month,
    )  # fmt: skip
    settings, _ = load_settings({**flags, "ticket": checked}, config)
    line = StatusLineHandler(sys.stderr) if sys.stderr and sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else None
    shown = TrainingProgress(line, logging.getLogger("lutetia.progress").info)
    run_service(run_node(settings, lambda status: shown(status.model_dump())), line)


def _ask(state_folder: Path | None, verb: str, **arguments: Any) -> dict[str, Any]:
    import asyncio

    from lutetia.node.control import ask
    from lutetia.system.paths import default_state_folder

    return asyncio.run(ask(state_folder or default_state_folder(), verb, **arguments))


def status(
    state_folder: StateFolder = None,
    as_json: JsonFlag = False,
    web: Annotated[
        bool, setting("STATUS_WEB", "Show it as a page on this machine, until Ctrl-C, and print its address.")
    ] = False,
    port: Annotated[int, setting("STATUS_PORT", "Port of that page; 0: a free one.", min=0, max=65535)] = 0,
) -> None:
    """Show what this node is doing and how much of its work was accepted.

    With --web: a page with progress, speed, loss curve, verdicts and the log. Only who knows its address can open it.
    """
    if web:
        from lutetia.cli.local.node_page import serve_node_page
        from lutetia.cli.run_service import run_service
        from lutetia.system.paths import default_state_folder

        run_service(serve_node_page(state_folder or default_state_folder(), port, lambda address: show(f"Node page: {address}")))
        return
    document = _ask(state_folder, "status")
    emit(document, as_json, lambda: render_local(document, time.time()))


OneDevice = Annotated[
    str | None, setting("ONE_DEVICE", "Only this device of the node, by its name or number, like cuda:1 or 1.", "--device")
]


def pause(
    period: Annotated[
        str | None, setting("PAUSE_FOR", "How long, like 30m or 2h. Default: until `lutetia resume`.", "--for")
    ] = None,
    device: OneDevice = None,
    state_folder: StateFolder = None,
    as_json: JsonFlag = False,
) -> None:
    """Stop training and release the shard; the daemon keeps running."""
    seconds = duration(period) if period else None
    answer = _ask(state_folder, "pause", **given(seconds=seconds, device=device))
    what = f"device {device} paused" if device else "paused"
    emit(answer, as_json, lambda: say(f"{what}{f' for {period}' if period else ''}; `lutetia resume` continues"))


def resume(device: OneDevice = None, state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Continue after a pause."""
    answer = _ask(state_folder, "resume", **given(device=device))
    emit(answer, as_json, lambda: say(f"device {device} resumed" if device else "resumed"))


def finish(state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Finish the current checkpoint, then leave."""
    answer = _ask(state_folder, "finish")
    emit(answer, as_json, lambda: say("finishing the current checkpoint, then leaving"))


def leave(state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Leave now. Work since the last checkpoint is lost."""
    answer = _ask(state_folder, "leave")
    emit(answer, as_json, lambda: say("leaving"))


def _work(document: dict[str, Any]) -> str:
    """The shard that a device or node works on, and how far it is."""
    from lutetia.cli.formatting import number, rate
    from lutetia.cli.progress import current_epoch, expert_of

    if document["shard"] is None:
        return "-"
    epoch = current_epoch(document) if document["epochs"] and document["epoch"] is not None else "?"
    done = f"epoch {epoch} of {document['epochs'] or '?'}, step {document['step'] or 0} of {document['steps'] or '?'}"
    speed = f"{rate(document['samples_per_second'] or 0.0)} samples/s"
    loss = f"training loss {number(document['loss'])}"
    return f"{expert_of(document)}, {done}, {loss}, {speed}"


def _waiting(device: dict[str, Any], now: float) -> str:
    """Which part of the data training stands still for, and for how long; empty if it does not."""
    from lutetia.cli.formatting import ago

    if device.get("waits_since") is None:
        return ""
    return f"waits for data: part {device['waits_for_part']}, for {ago(now - device['waits_since'])}"


def _device_line(device: dict[str, Any], now: float) -> str:
    """What one of several devices does."""
    from lutetia.cli.formatting import ago

    text = f"{device['state']} for {ago(now - device['since'])}: "
    text += _work(device) if device["step"] is not None else device["reason"]
    text += f"; {waiting}" if (waiting := _waiting(device, now)) else ""
    text += f"; {left_out}" if (left_out := device.get("left_out")) else ""
    if device["due"]:
        text += f", due in {ago(device['due'] - now)}"
    text += f", for another {ago(device['paused_until'] - now)}" if device["paused_until"] else ""
    heat = device.get("celsius")
    return text + (f"; {device.get('slowed') or f'{heat:.0f} °C'}" if heat is not None else "")


def _meanwhile(document: dict[str, Any]) -> str:
    """What a node that stands by is good for, with today's counts; empty for others."""
    if document["state"] != "idle" or not document["reason"].endswith("standing by"):
        return ""
    done = f"{document.get('audits_today', 0)} audits and {document.get('checks_today', 0)} checks for the coordinator today"
    return f"{done}, {document.get('copies', 0)} copies of others' checkpoints; it takes over as soon as a holder fails"


def _bytes(traffic: dict[str, Any] | None) -> str:
    """Bytes of today, and what the caps leave."""
    from lutetia.cli.formatting import decimal_size

    if not traffic:  # of a daemon of an earlier version, or one that still joins
        return ""
    today = traffic["sent_today"] + traffic["received_today"]
    text = f"{decimal_size(traffic['sent_today'])} sent and {decimal_size(traffic['received_today'])} received today"
    if traffic["bytes_per_day"]:
        text += f", {today / traffic['bytes_per_day']:.0%} of {decimal_size(traffic['bytes_per_day'])} a day"
    if traffic["bytes_per_month"]:
        text += f"; {decimal_size(traffic['this_month'])} of {decimal_size(traffic['bytes_per_month'])} this month"
    return text + (f"; {traffic['held_back']}" if traffic["held_back"] else "")


def render_local(document: dict[str, Any], now: float) -> RenderableType:
    """The daemon's status document as a table.

    Args:
        document: what the daemon answered to `status`.
        now: Unix seconds, for ages and times left.
    """
    from rich.table import Table

    from lutetia.cli.formatting import ago, short, short_peer

    def since(moment: float | None) -> str:
        return f"{ago(now - moment)} ago" if moment else "-"

    counts = f"{document['accepted']} accepted ({document['accepted_today']} today), {document['refused']} refused"
    device = document["device"] or "a device not yet probed"
    devices = document.get("devices") or []
    several = {str(one["device"]): _device_line(one, now) for one in devices} if len(devices) > 1 else {}
    rows = {
        "you": f"{short_peer(document['peer_id'])}   {short(document['owner'], 16)}   on {device}",
        "state": "" if several else f"{document['state']} for {ago(now - document['since'])}: {document['reason']}",
        "run": f"{document['name'] or '-'}   {short(document['run'], 12)}   {'online' if document['online'] else 'offline'}",
        **several,
        "work": "" if several else _work(document),
        "waits": "" if several else _waiting(document, now),
        "counts": f"{counts}, last {since(document['last_accepted'])}, {document['pending']} waiting for a verdict",
        "due": f"in {ago(document['due'] - now)}" if document["due"] and not several else "",
        "paused": f"for another {ago(document['paused_until'] - now)}" if document["paused_until"] and not several else "",
        "bytes": _bytes(document.get("traffic")),
        "slowed": document.get("slowed") or "",
        "left out": "" if several else document.get("left_out") or "",
        "meanwhile": (meanwhile := _meanwhile(document)),
        "keeps": f"copies of other peers' accepted checkpoints: {document['copies']}"
        if document.get("copies") and not meanwhile
        else "",
        "problem": document["problem"] or "",
    }
    table = Table.grid(padding=(0, 3))
    for key, value in rows.items():
        if value:
            table.add_row(key, plain(value))
    return table
