"""The run's page as files alone: `index.html`, its assets and pictures, and every document as a script below `data/`.

Any static host can serve it, and a browser opens it from the disk: a page from a file may run scripts beside it, but may not
fetch documents. Each script passes one document to the function `lutetia`, which the page defines before it asks.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from lutetia.coordinator.galleries import REAL, to_drop
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.status_builder import LiveView
from lutetia.coordinator.ledger.status_builder import status as status_of
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.web.api import views
from lutetia.coordinator.web.api.documents import EventsPage
from lutetia.coordinator.web.api.histories.columns import HistoryDocument, segment_of
from lutetia.coordinator.web.api.histories.recent import last_results
from lutetia.coordinator.web.api.history import History
from lutetia.coordinator.web.api.pictures import GalleryDocument, gallery_document
from lutetia.coordinator.web.api.routes import disk_free, shards_after, some_shards, ticket_of
from lutetia.coordinator.web.api.source import RunSource
from lutetia.coordinator.web.frontend import BUILT
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import UsageError
from lutetia.system.files import disk_errors, make_folder, replace_folder

EVENTS_OF_PAGE = 500
EVENT_PAGES = 40
"""The newest events that an export holds, in pages; the curves and the coverage have all."""
PEERS = 1000
"""Peers with a page of their own, those with most accepted samples."""
_MARKS = ("index.html", "data/run.js")
_POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'self'; base-uri 'none'; form-action 'none'\">"


@dataclass
class Exported:
    """What was written."""

    events: int
    stitches: int
    files: int = 0
    bytes: int = 0


@dataclass
class _Writer:
    """Writes documents and pictures below `root`."""

    root: Path
    written: list[Path] = field(default_factory=list)

    def document(self, name: str, document: Frozen, exclude: dict[str, dict[str, set[str]]] | None = None) -> None:
        """One script. JSON is written in ASCII, so that no text depends on how the script is read."""
        text = json.dumps(document.model_dump(mode="json", exclude=exclude), separators=(",", ":"))
        self.file(f"data/{name}.js", f'lutetia("{name}",{text})\n'.encode())

    def file(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.written.append(path)

    def copy(self, source: Path, name: str) -> None:
        if source.is_file():
            self.file(name, source.read_bytes())


def export_page(run: Path, out: Path, now: float, gallery_bytes: int) -> Exported:
    """Write the page of the run in the folder `run`, with its history up to now, into the folder `out`.

    An earlier export in `out` is replaced as a whole. The run may be served meanwhile.

    Args:
        run: the run's folder.
        out: the folder to write.
        now: Unix seconds.
        gallery_bytes: most bytes of the galleries of earlier mixtures; the newest is always written.

    Raises:
        ConfigError: `run` holds no run.
        UsageError: `out` holds something else.
        DiskError: it cannot be written.
    """
    folder = RunFolder(run)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or all((out / mark).is_file() for mark in _MARKS))):
        raise UsageError(f"{out} holds something else than an exported page; name another folder")
    manifest = folder.read_manifest(now=0.0).manifest  # an expired run can still be shown
    ledger = Ledger.open(folder.ledger, manifest.run_id, to_read=True)
    try:
        status = _status(folder, ledger, manifest, now)
        source = RunSource(folder, ledger, lambda: manifest, lambda: status)
        with disk_errors(out):
            make_folder(out.absolute().parent)
            part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.absolute().parent))
            try:
                done = _fill(_Writer(part), source, _history(ledger), status, gallery_bytes)
                part.chmod(0o755)
                replace_folder(part, out)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return done
    finally:
        ledger.close()


def _status(folder: RunFolder, ledger: Ledger, manifest: Manifest, now: float) -> SwarmStatus:
    """What the coordinator last wrote if that is of the newest event, with its live peers; else what the ledger alone says."""
    try:
        found = SwarmStatus.model_validate_json(folder.status.read_bytes())
        if (found.run, found.events) == (manifest.run_id, ledger.head[0]):
            return found
    except (OSError, ValidationError):
        pass
    return status_of(ledger.state, manifest, LiveView(), now)


def _history(ledger: Ledger) -> History:
    history = History()
    for row in ledger.rows():
        history.add(row.id, row.event())
    return history


def _fill(writer: _Writer, source: RunSource, history: History, status: SwarmStatus, gallery_bytes: int) -> Exported:
    _write_assets(writer)
    about = views.run_document(
        status, source.manifest(), history, ticket_of(source), source.about, disk_free(source.folder.root)
    )  # fmt: skip
    writer.document("run", about)
    whole = segment_of(history, 0, history.events, {})
    writer.document("history", HistoryDocument(events=history.events, segments=(whole,)))
    writer.document("shards", shards_after(source, status, history, history.events))
    shards = some_shards(source, status, history, lambda past: last_results(past, None, None))
    for shard in shards:
        writer.document(f"shards/{shard.status.shard}", shard)
    writer.document("metrics", views.series(history))
    peers = views.peers_page(status, history, source.people(), health=None, offset=0, limit=PEERS)
    writer.document("peers", peers)
    for peer in peers.peers:
        writer.document(f"peers/{peer.owner}", views.peer_history(status, history, source.people(), peer.owner))
    _write_events(writer, source)
    for shard in shards:
        if shard.sheet:
            writer.copy(source.folder.sheets / f"{shard.status.shard:03d}.png", shard.sheet.lstrip("/"))
    stitches = _write_galleries(writer, source.folder, history, gallery_bytes)
    size = sum(path.stat().st_size for path in writer.written)
    return Exported(events=source.ledger.head[0], stitches=stitches, files=len(writer.written), bytes=size)


def _write_assets(writer: _Writer) -> None:
    page = (BUILT / "index.html").read_text()
    for old, new in (
        ("<html ", "<html data-export "), ("<title>", f"{_POLICY}\n<title>"),
        ("This page needs JavaScript.", "This page needs JavaScript, which shows the documents in its folder data."),
    ):  # fmt: skip
        assert old in page
        page = page.replace(old, new, 1)
    start = page.index("The same facts without it")
    page = page[:start].rstrip() + page[page.index("</p></noscript>") :]
    writer.file("index.html", page.encode())
    for name in ("app.js", "app.css", "icon.svg"):
        writer.copy(BUILT / name, f"assets/{name}")


def _write_events(writer: _Writer, source: RunSource) -> None:
    head = source.ledger.head[0]
    last = max(0, head - 1) // EVENTS_OF_PAGE
    for number in range(max(0, last - EVENT_PAGES + 1), last + 1):
        after = number * EVENTS_OF_PAGE
        lines = views.event_lines(source.rows(after, min(EVENTS_OF_PAGE, head - after)))
        writer.document(f"events/{number}", EventsPage(events=lines, cursor=after + len(lines), head=head), _WITHOUT_DATA)


_WITHOUT_DATA: dict[str, dict[str, set[str]]] = {"events": {"__all__": {"data"}}}


def _write_galleries(writer: _Writer, folder: RunFolder, history: History, most_bytes: int) -> int:
    """The newest gallery and as many earlier ones as fit, spread evenly; returns how many mixtures have one."""
    newest = gallery_document(folder, history)
    places = [folder.galleries / stitch.mixture for stitch in newest.stitches]
    sizes = [sum(file.stat().st_size for file in place.iterdir()) for place in places]
    dropped = set(to_drop([stitch.time for stitch in newest.stitches], sizes, most_bytes))
    stitches = tuple(stitch for index, stitch in enumerate(newest.stitches) if index not in dropped)
    for stitch in stitches:
        document = gallery_document(folder, history, stitch.mixture).model_copy(update={"stitches": ()})
        writer.document(f"galleries/{stitch.mixture}", document)
        _copy_clips(writer, document, lambda file, place=folder.galleries / stitch.mixture: place / file)
    writer.document("gallery", newest.model_copy(update={"stitches": stitches}))
    _copy_clips(writer, newest, lambda file: folder.gallery / file)
    for path in sorted((folder.galleries / REAL).glob("*.gif")):
        writer.copy(path, f"api/v1/galleries/{REAL}/{path.name}")
    return len(stitches)


def _copy_clips(writer: _Writer, document: GalleryDocument, place: Callable[[str], Path]) -> None:
    for clip in document.clips:
        writer.copy(place(clip.file), clip.url.lstrip("/"))
