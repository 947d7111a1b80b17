"""`join`, and what a volunteer says to the running daemon: `status pause resume finish leave`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lutetia.cli.arguments import StateFolder, TicketArgument, given, read_ticket, setting
from lutetia.cli.output import JsonFlag, emit, say
from lutetia.system.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def register(app: typer.Typer) -> None:
    """Add the commands to the top level."""
    for command in (join, status, pause, resume, finish, leave):
        app.command()(command)


def duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or `1d`. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?", text.strip())
    if not found or float(found[1]) <= 0:
        raise UsageError(f"cannot read the duration {text!r}; write it like 90s, 30m, 2h or 1d")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def join(
    ticket: TicketArgument,
    state_folder: StateFolder = None,
    config: Annotated[Path | None, setting("JOIN_CONFIG", "Settings as TOML; flags win.")] = None,
    listen: Annotated[str | None, setting("LISTEN", "Where to listen, for instance /ip4/0.0.0.0/tcp/41000.")] = None,
    announce: Annotated[list[str] | None, setting("ANNOUNCE", "Address to tell others, where it differs.")] = None,
    device: Annotated[str | None, setting("DEVICE", "auto, cpu, cuda or cuda:1.")] = None,
    threads: Annotated[int | None, setting("THREADS", "CPU threads that training may use.", min=1)] = None,
    duty: Annotated[float | None, setting("DUTY", "Share of time that training may use.", min=0.01, max=1.0)] = None,
    hours: Annotated[str | None, setting("HOURS", "When it may train: 22:00-07:00, or mon-fri 18:30-08:00, sat-sun.")] = None,
    max_temp: Annotated[float | None, setting("MAX_TEMP", "Degrees Celsius above which it rests more.", min=30, max=110)] = None,
    disk_limit: Annotated[str | None, setting("DISK_LIMIT", "Most bytes of blobs kept, for instance 50GB.")] = None,
    upload_rate: Annotated[str | None, setting("UPLOAD_RATE", "Most bytes per second sent to others, for instance 2MB.")] = None,
) -> None:
    """Train a run's experts with this box.

    It goes on until `lutetia finish`, `lutetia leave` or Ctrl-C; when all work is done it stays to serve its checkpoints.
    The file of --config can set more: docs/volunteer.md.
    """
    word = read_ticket(ticket).encode()  # before the slow imports: a bad ticket is told at once
    from lutetia.cli.run_service import run_service
    from lutetia.node.daemon import run_node
    from lutetia.node.settings import load_settings

    flags = given(
        state_folder=state_folder, listen=listen, announce=announce, device=device, threads=threads, duty=duty, hours=hours,
        max_temp=max_temp, disk_limit=disk_limit, upload_rate=upload_rate,
    )  # fmt: skip
    settings, _ = load_settings({**flags, "ticket": word}, config)
    run_service(run_node(settings))


def _ask(state_folder: Path | None, verb: str, **arguments: Any) -> dict[str, Any]:
    import asyncio

    from lutetia.node.control import ask
    from lutetia.system.paths import default_state_folder

    return asyncio.run(ask(state_folder or default_state_folder(), verb, **arguments))


def status(state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Show what this box does and whether it counts."""
    document = _ask(state_folder, "status")
    emit(document, as_json, lambda: render_local(document, time.time()))


def pause(
    period: Annotated[str | None, setting("PAUSE_FOR", "How long, like 30m or 2h; until `resume` without.", "--for")] = None,
    state_folder: StateFolder = None,
    as_json: JsonFlag = False,
) -> None:
    """Stop training and give the shard back; the daemon stays."""
    seconds = duration(period) if period else None
    answer = _ask(state_folder, "pause", **given(seconds=seconds))
    emit(answer, as_json, lambda: say(f"paused{f' for {period}' if period else ''}; `lutetia resume` goes on"))


def resume(state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Go on after a pause."""
    answer = _ask(state_folder, "resume")
    emit(answer, as_json, lambda: say("resumed"))


def finish(state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Finish the checkpoint under way, then leave."""
    answer = _ask(state_folder, "finish")
    emit(answer, as_json, lambda: say("finishing the checkpoint under way, then leaving"))


def leave(state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Leave now; work since the last checkpoint is lost."""
    answer = _ask(state_folder, "leave")
    emit(answer, as_json, lambda: say("leaving"))


def render_local(document: dict[str, Any], now: float) -> RenderableType:
    """What the daemon does, in its own words, and whether it counts."""
    from rich.table import Table

    from lutetia.cli.formatting import ago, number, short, short_peer

    def since(moment: float | None) -> str:
        return f"{ago(now - moment)} ago" if moment else "-"

    work = "-"
    if document["shard"] is not None:
        done = f"epoch {document['epoch']} of {document['epochs']}, step {document['step'] or 0} of {document['steps'] or '?'}"
        speed = f"{document['samples_per_second'] or 0.0:.1f} samples/s"
        work = f"expert {document['shard']} {document['shard_name'] or ''}, {done}, loss {number(document['loss'])}, {speed}"
    counting = f"{document['accepted']} accepted ({document['accepted_today']} today), {document['refused']} refused"
    device = document["device"] or "a device not yet probed"
    rows = {
        "you": f"{short_peer(document['peer_id'])}   {short(document['owner'], 16)}   on {device}",
        "state": f"{document['state']} for {ago(now - document['since'])}: {document['reason']}",
        "run": f"{document['name'] or '-'}   {short(document['run'], 12)}   {'online' if document['online'] else 'offline'}",
        "work": work,
        "counts": f"{counting}, last {since(document['last_accepted'])}, {document['pending']} waiting for a verdict",
        "due": f"in {ago(document['due'] - now)}" if document["due"] else "",
        "paused": f"for another {ago(document['paused_until'] - now)}" if document["paused_until"] else "",
        "slowed": document.get("slowed") or "",
        "keeps": f"copies of {document['copies']} accepted checkpoints of others" if document.get("copies") else "",
        "problem": document["problem"] or "",
    }
    table = Table.grid(padding=(0, 3))
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    return table
