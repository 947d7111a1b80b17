"""Files that a person, an attacker or a power loss may have written: settings, run folders, ledgers, listings of clips."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from benchmarks.fuzz import examples
from benchmarks.fuzz.contract import Target, check_sentence
from lutetia.cli.arguments import read_config, read_ticket, settings_of
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import RunSettings, ServeSettings
from lutetia.models.data.description import DATA_FILE, read_data
from lutetia.models.data.ingest.listing import read_listing
from lutetia.models.data.ingest.webdataset import TarMember
from lutetia.node.settings import load_settings
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.system.errors import DataError


@cache
def _folder() -> Path:
    """In memory if possible: a fuzzer writes these files a thousand times a second."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="lutetia-fuzz-", dir=memory if memory.is_dir() else None))


def _written(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def worker_settings(data: bytes) -> None:
    settings, _ = load_settings({"ticket": "x"}, _written("worker.toml", data))
    assert settings.state_folder.is_absolute()


def run_settings(data: bytes) -> None:
    values = read_config(_written("run.toml", data))
    settings_of(RunSettings, "run.toml", values).resolved()


def serve_settings(data: bytes) -> None:
    settings_of(ServeSettings, "serve.toml", read_config(_written("serve.toml", data)))


def run_folder(data: bytes) -> None:
    """The small files of a run folder; the first byte chooses one."""
    folder = RunFolder(_folder() / "run")
    choice, rest = data[:1], data[1:]
    match int.from_bytes(choice, "big") % 5:
        case 0:
            _written("run/coordinator.json", rest)
            folder.read_endpoint()
        case 1:
            _written("run/manifest.json", rest)
            folder.read_manifest(examples.NOW)
        case 2:
            read_ticket(str(_written("run/ticket.txt", rest)))
        case 3:
            path = _written("run/owner.key", rest)
            path.chmod(0o600)
            Identity.load(path)
        case _:
            cache = Peerstore(_written("run/peers.json", rest))
            cache.load()
            cache.remember([examples.ADDRESS])


def data_description(data: bytes) -> None:
    _written(f"data/{DATA_FILE}", data)
    read_data(_folder() / "data")


def ledger(data: bytes) -> None:
    """A damaged SQLite file, opened as the coordinator opens it."""
    path = _written("ledger.sqlite", data)
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
        (_folder() / name).unlink(missing_ok=True)
    with contextlib.closing(Ledger.open(path)) as opened:
        opened.replay()


def _listing(suffix: str) -> Callable[[bytes], None]:
    folder = f"clips-{suffix}"

    def parse(data: bytes) -> None:
        for name in ("a.mp4", "b.mp4"):
            _written(f"{folder}/{name}", b"")
        _written(f"{folder}/metadata.{suffix}", data)
        listing = read_listing(_folder() / folder)
        for clip in listing.clips:
            assert isinstance(clip.path, Path)
            assert clip.path.resolve().is_relative_to(_folder().resolve())
            canonical({"caption": clip.caption, "kind": clip.kind, "name": clip.name})
        for bad in listing.bad:
            check_sentence(bad.reason)

    return parse


def archive(data: bytes) -> None:
    """A WebDataset archive; every member that the listing names is read to its end."""
    _written("clips-tar/a.tar", data)
    listing = read_listing(_folder() / "clips-tar")
    for clip in listing.clips:
        assert isinstance(clip.path, TarMember)
        with clip.path.open() as file:
            assert len(file.read()) <= len(data)
        canonical({"caption": clip.caption, "kind": clip.kind, "name": clip.name})
    for bad in listing.bad:
        check_sentence(bad.reason)


def _archive_file() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in (
            ("1.mp4", b"video"),
            ("1.json", b'{"caption": "a cat", "kind": "k"}'),
            ("2.gif", b""),
            ("2.txt", b"b"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def _ledger_file() -> bytes:
    path = _folder() / "seed.sqlite"
    path.unlink(missing_ok=True)
    first, *rest = examples.all_events()
    made = Ledger.create(path, first)  # pyright: ignore[reportArgumentType]
    made.append(rest)
    made.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    return path.read_bytes()


def _run_files() -> Sequence[bytes]:
    key = Identity.derived("a key").seed.hex().encode()
    endpoint = b'{"listen":"/ip4/127.0.0.1/tcp/4000","announce":[]}'
    ticket, peers = examples.ticket().encode().encode(), canonical({"a": [examples.ADDRESS]})[5:-1]
    return [b"\0" + endpoint, b"\1" + examples.signed_manifest(), b"\2" + ticket, b"\3" + key, b"\4" + peers]


FILES = (
    Target(
        "worker-settings",
        worker_settings,
        lambda: [b'duty = 0.5\ndisk_limit = "50 GB"\nannounce = "/ip4/1.2.3.4/tcp/1"\nthreads = 2\n', b"[a]\nb = [1, {c = 2}]\n"],
    ),
    Target(
        "run-settings",
        run_settings,
        lambda: [
            b'preset = "tiny"\nname = "x"\n[timing]\nheartbeat = 2.0\n[expert]\nconfig = {a = [1]}\n',
            b"samples_per_shard = 8\n",
        ],
    ),
    Target("serve-settings", serve_settings, lambda: [b'http = "127.0.0.1:80"\nthreads = 2\nstitch = "end"\n']),
    Target("run-folder", run_folder, _run_files),
    Target("data-description", data_description, lambda: [b'{"format":"lutetia-data-1","shards":[]}']),
    Target("ledger", ledger, lambda: [_ledger_file()], most_bytes=1 << 20),
    Target(
        "listing-jsonl",
        _listing("jsonl"),
        lambda: [b'{"file_name": "a.mp4", "caption": "a cat", "kind": "k", "split": "test"}\n{"file_name":"b.mp4","text":"b"}\n'],
        (DataError,),
    ),
    Target(
        "listing-csv",
        _listing("csv"),
        lambda: [b'file_name,caption,split\na.mp4,"a, b",train\nb.mp4,c,val\n'],
        (DataError,),
    ),
    Target("listing-tar", archive, lambda: [_archive_file()], (DataError,)),
)
