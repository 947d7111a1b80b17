"""`lutetia run list`: the runs in folders of this machine, those that are coordinated here and those that are joined."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lutetia.cli.output import JsonFlag, emit
from lutetia.system.errors import LutetiaError, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_FOLDERS = 1000
_STATUS_FRESH = 15.0
"""Seconds. A coordinator writes the run's status every two."""


@dataclass(frozen=True)
class ListedRun:
    """One run. `role`: owner (its folder holds the owner's key), coordinator, or node (it is joined here)."""

    folder: str
    role: str
    run: str
    name: str
    version: int
    state: str
    accepted: int | None
    """Accepted results; None where only the coordinator knows."""


def register(app: typer.Typer) -> None:
    """Add the command to `lutetia run`."""
    app.command("list")(list_runs)


def list_runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of runs or nodes, or folders that hold some. Default: this one, and where nodes keep their state.",
            metavar="[FOLDER]...",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the runs in folders of this machine: those that are coordinated, and those that a node has joined."""
    from lutetia.system.paths import default_state_folder

    found = list(found_runs(folders or [Path(), default_state_folder()], time.time()))
    emit({"runs": [asdict(run) for run in found]}, as_json, lambda: table(found))


def found_runs(folders: Iterable[Path], now: float) -> Iterator[ListedRun]:
    """The runs in these folders and in the folders directly in them, each once. `now`: Unix seconds."""
    seen: set[Path] = set()
    for folder in folders:
        for place in [folder, *_inside(folder)]:
            resolved = place.resolve()
            if resolved not in seen:
                seen.add(resolved)
                yield from _of_coordinator(place, now)
                yield from _of_node(place, now)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(place for place in folder.iterdir() if place.is_dir())[:_MOST_FOLDERS]
    except OSError:
        return []


def _of_coordinator(folder: Path, now: float) -> Iterator[ListedRun]:
    from lutetia.coordinator.run_folder import RunFolder
    from lutetia.protocol.schema.status import SwarmStatus

    place = RunFolder(folder)
    if not place.ledger.is_file():
        return
    try:
        manifest = place.read_manifest(now=0.0).manifest
    except LutetiaError:
        return
    accepted, finished, served = None, False, False
    with contextlib.suppress(OSError, ValueError):  # it was never served
        status = SwarmStatus.model_validate_json(place.status.read_bytes())
        accepted, finished = status.accepted, status.finished
        served = now - place.status.stat().st_mtime < _STATUS_FRESH
    state = "finished" if finished else "expired" if manifest.expires <= now else "served" if served else "stopped"
    state = f"paused, {state}" if manifest.orders.paused and not finished else state
    role = "owner" if place.owner_key.is_file() else "coordinator"
    yield ListedRun(str(folder), role, manifest.run_id, manifest.name, manifest.version, state, accepted)


def _of_node(folder: Path, now: float) -> Iterator[ListedRun]:
    """The runs that the node with this state folder has joined: it keeps the manifest of each."""
    from lutetia.protocol.joining import MANIFEST_FILE
    from lutetia.protocol.schema.manifest import open_manifest

    for place in _inside(folder / "runs"):
        try:
            manifest = open_manifest((place / MANIFEST_FILE).read_bytes(), now=0.0).manifest
        except (OSError, LutetiaError):
            continue
        counts: object = {}
        with contextlib.suppress(OSError, ValueError):  # nothing of it was accepted yet
            counts = json.loads((place / "contributions.json").read_text())
        accepted = counts.get("accepted") if isinstance(counts, dict) else None
        state = "expired" if manifest.expires <= now else "paused" if manifest.orders.paused else "joined"
        own = accepted if isinstance(accepted, int) else 0
        yield ListedRun(str(folder), "node", manifest.run_id, manifest.name, manifest.version, state, own)


def table(runs: list[ListedRun]) -> RenderableType:
    """One row for each run."""
    from rich.table import Table

    if not runs:
        return "No run is in these folders; name others: lutetia run list FOLDER …"
    shown = Table("NAME", "RUN", "VERSION", "ROLE", "STATE", "ACCEPTED", "FOLDER", box=None, pad_edge=False, header_style="bold")
    for run in runs:
        accepted = "-" if run.accepted is None else str(run.accepted)
        shown.add_row(plain(run.name), run.run[:12], str(run.version), run.role, run.state, accepted, plain(run.folder))
    return shown
