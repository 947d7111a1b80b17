"""`lutetia coordinator serve|replay|backup|restore|export|pardon|rollback`: serve a run and maintain its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lutetia.cli.arguments import RunFolder, documented_by, given, read_config, setting, settings_of
from lutetia.cli.output import JsonFlag, emit, show
from lutetia.system.errors import UsageError, plain

if TYPE_CHECKING:
    from lutetia.coordinator.serve import ServedRun
    from lutetia.protocol.schema.status import SwarmStatus

app = typer.Typer(help="Serve a run: bootstrap peer, blob origin, judge and stitcher.", no_args_is_help=True)


@app.command("serve", cls=documented_by("lutetia.coordinator.settings:ServeSettings"))
def serve(
    run: RunFolder,
    config: Annotated[Path | None, setting("COORDINATOR_CONFIG", "TOML file with settings; options override it.")] = None,
    listen: Annotated[str | None, setting("COORDINATOR_LISTEN")] = None,
    http: Annotated[str | None, setting("HTTP")] = None,
    about: Annotated[str | None, setting("ABOUT")] = None,
    stitch: Annotated[str | None, setting("STITCH")] = None,
    threads: Annotated[int | None, setting("COORDINATOR_THREADS", min=1)] = None,
    device: Annotated[str | None, setting("COORDINATOR_DEVICE")] = None,
    lend_checks: Annotated[bool, setting("LEND_CHECKS")] = False,
    checkers: Annotated[list[str] | None, setting("CHECKERS", "", "--checker")] = None,
    gallery: Annotated[bool | None, setting("GALLERY", "", "--gallery/--no-gallery")] = None,
    exit_when_done: Annotated[bool, setting("EXIT_WHEN_DONE")] = False,
    keep_all_weights: Annotated[bool, setting("KEEP_ALL_WEIGHTS")] = False,
    recover: Annotated[bool, setting("RECOVER")] = False,
) -> None:
    """Run the coordinator until Ctrl-C.

    Started again, it continues from its ledger.
    """
    from lutetia.coordinator.settings import ServeSettings

    flags = given(
        listen=listen, http=http, about=about, stitch=stitch, threads=threads, device=device, gallery=gallery,
        lend_checks=lend_checks or None, checkers=tuple(checkers) if checkers else None,
        exit_when_done=exit_when_done or None, keep_all_weights=keep_all_weights or None, recover=recover or None,
    )  # fmt: skip
    settings = settings_of(ServeSettings, str(config or "options"), {**read_config(config, "serve"), **flags})
    from lutetia.cli.run_service import run_service
    from lutetia.coordinator.serve import serve_run

    run_service(serve_run(run, settings, on_serving=lambda served: show(served_text(served))))


def served_text(run: ServedRun) -> str:
    """What to give to volunteers, and where to look."""
    from lutetia.coordinator.addresses import reach_of_ticket

    lines = [f"Run {plain(run.name)} is served."]
    if run.ticket:
        lines[0] += " Volunteers join with:"
        lines += ["", f"  lutetia join {run.ticket}", "", "Its status: lutetia swarm status, with the same ticket"]
    if run.page:
        lines.append(f"Status page: {run.page}")
    if run.ticket and reach_of_ticket(run.ticket) == "machine":
        lines.append("Only this machine can join: the ticket names no address that others reach.")
    return "\n".join(lines)


@app.command("reserve")
def reserve(
    run: RunFolder,
    clips: Annotated[int, setting("RESERVE_CLIPS", "Held-out clips that a check uses up.", min=1)] = 2,
) -> None:
    """Draw the reserve of held-out clips that checks by strangers use up, once, for `serve --lend-checks` without checkers."""
    from lutetia.coordinator.admin.reserve import draw_reserve

    drawn = draw_reserve(run, clips)
    counts = sorted({len(files) for files in drawn.shards})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    show(f"The reserve is drawn: {many} checks of each shard, {clips} held-out clips each.")


@app.command("replay")
def replay(
    run: RunFolder,
    at: Annotated[str | None, setting("REPLAY_AT", "ISO time or Unix seconds. Default: the end of the ledger.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print the events up to a moment, and the status at that moment."""
    from rich.console import Group

    from lutetia.cli.output import as_values
    from lutetia.cli.status_table import render_status
    from lutetia.coordinator.ledger.describe import read_events, tell

    moment = moment_of(at) if at else None
    status, digest = replayed(run, moment)
    events = [as_values(event) for event in read_events(run) if event.time <= status.time] if as_json else []
    for line in () if as_json else tell(run, moment):
        show(plain(line))
    document = {"events": events, "status": as_values(status), "digest": digest}
    emit(document, as_json, lambda: Group("", render_status(status, status.time, live=False), "", f"state {digest}"))


@app.command("backup")
def backup(
    run: RunFolder,
    out: Annotated[
        Path, typer.Argument(help="Folder of the backup. If it holds one already, only new files are copied.", metavar="OUT")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Copy a run, also while it is served: ledger, keys, manifest and every blob it needs.

    Keep the copy as safe as the run itself: it contains the run's keys.
    """
    from lutetia.cli.formatting import size
    from lutetia.cli.progress import progress
    from lutetia.coordinator.admin.backup import backup_run

    with progress("backing up") as report:
        done = backup_run(run, out, report)
    index = done.index
    document = {
        "folder": str(out), "run": index.run, "events": index.events, "accepted": index.accepted, "blobs": len(index.blobs),
        "bytes": index.bytes, "copied": done.copied,
    }  # fmt: skip
    text = f"{out} holds run {index.name} up to event {index.events}: {size(index.bytes)}, {size(done.copied)} of it new."
    emit(document, as_json, lambda: text)


@app.command("restore")
def restore(
    backup: Annotated[Path, typer.Argument(help="Folder made by `lutetia coordinator backup`.", metavar="BACKUP")],
    run: Annotated[Path, typer.Argument(help="Folder to create. An existing folder is never overwritten.", metavar="RUN")],
    as_json: JsonFlag = False,
) -> None:
    """Create a run's folder from a backup, after verifying every hash and signature in it.

    Its coordinator then continues from the backup, and restores from peers what was accepted later.
    """
    from lutetia.cli.progress import progress
    from lutetia.coordinator.admin.restore import restore_run

    with progress("restoring") as report:
        index = restore_run(backup, run, report)
    document = {"folder": str(run), "run": index.run, "events": index.events, "accepted": index.accepted}
    text = f"Run {index.name} is in {run}, as it was at event {index.events}. Continue it with: lutetia coordinator serve {run}"
    emit(document, as_json, lambda: text)


@app.command("export")
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="Folder of the page. An earlier export in it is replaced.", metavar="OUT")],
    gallery_bytes: Annotated[
        int,
        setting("EXPORT_GALLERY_BYTES", "Most bytes of the galleries of earlier mixtures; the newest is always written.", min=0),
    ] = 100_000_000,
    as_json: JsonFlag = False,
) -> None:
    """Write the run's page as files, with its history up to now, for any static host or to open from the disk.

    It shows what the page shows, the ticket included, needs no server and asks no other host. The run may be served meanwhile.
    """
    import dataclasses
    import time

    from lutetia.cli.formatting import size
    from lutetia.coordinator.web.export import export_page

    done = export_page(run, out, time.time(), gallery_bytes)
    document = {"folder": str(out), **dataclasses.asdict(done)}
    many = f"{done.events} events, the galleries of {done.stitches} mixtures, {size(done.bytes)} in {done.files} files"
    emit(document, as_json, lambda: f"{out / 'index.html'} is the run's page: {many}.")


@app.command("pardon")
def pardon(
    run: RunFolder,
    peer: Annotated[str, typer.Argument(metavar="PEER", help="Public key, its first eight or more digits, or peer id.")],
    as_json: JsonFlag = False,
) -> None:
    """Lift the quarantine of a peer whose work an audit found invalid.

    Its results are checked again, and every one is audited until enough were valid. What was rolled back stays rolled back.
    """
    from lutetia.coordinator.admin.pardon import pardon as lift

    owner, done = lift(run, peer)
    text = "is pardoned" if done else "will be pardoned within seconds by the coordinator that is serving the run"
    emit({"owner": owner, "done": done}, as_json, lambda: f"{owner} {text}")


@app.command("rollback")
def rollback(
    run: RunFolder,
    shard: Annotated[int, typer.Argument(metavar="SHARD", help="Index of the shard.")],
    epoch: Annotated[int, typer.Argument(metavar="EPOCH", help="Accepted epoch to go back to; 0 is the initial model.")],
    as_json: JsonFlag = False,
) -> None:
    """Take a shard back to an earlier accepted epoch.

    Later epochs of the shard are void, and its peers go on from that one. Nobody is quarantined. A coordinator that is serving
    the run does it within seconds, a stopped one when it starts.
    """
    from lutetia.coordinator.admin.rollback import roll_back

    dropped, done = roll_back(run, shard, epoch)
    void = f"{dropped} accepted {'epoch is' if dropped == 1 else 'epochs are'} void"
    when = "goes back" if done else "will go back within seconds, by the coordinator that is serving the run,"
    document = {"shard": shard, "epoch": epoch, "dropped": dropped, "done": done}
    emit(document, as_json, lambda: f"Shard {shard} {when} to epoch {epoch}; {void}.")


def moment_of(text: str) -> float:
    """Parse an ISO time (local where it names no zone) or a number into Unix seconds. Raises UsageError."""
    from datetime import datetime

    try:
        return float(text) if text.replace(".", "", 1).isdigit() else datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise UsageError(f"cannot read the time {text!r}; write it like 2026-11-20T19:00 or as Unix seconds") from error


def replayed(run: Path, moment: float | None) -> tuple[SwarmStatus, str]:
    """Rebuild the status from the ledger's events up to `moment` (Unix seconds; None: the end).

    Returns the status, without claims and nodes, and the digest of the state. Raises UsageError for a moment before the run.
    """
    from datetime import UTC, datetime

    from lutetia.coordinator.ledger.digest import state_digest
    from lutetia.coordinator.ledger.log import Ledger
    from lutetia.coordinator.ledger.status_builder import LiveView, status
    from lutetia.coordinator.run_folder import RunFolder as Folder

    folder = Folder(run)
    signed = folder.read_manifest(now=0.0)  # an expired run can still be replayed
    ledger = Ledger.open(folder.ledger, signed.manifest.run_id, to_read=True)
    try:
        times = [row.time for row in ledger.rows()]
        now = max(times) if moment is None else moment
        if now < times[0]:
            began = datetime.fromtimestamp(times[0], UTC).isoformat(timespec="seconds")
            raise UsageError(f"the run began at {began}; name a later time")
        state = ledger.replay(now)
        return status(state, signed.manifest, LiveView(), now, software="replay"), state_digest(state)
    finally:
        ledger.close()
