"""The snapshot of a run: what its first events add up to, signed by the coordinator, so that a start need not add them up again.

A file `snapshot` beside the ledger: one line of JSON, the signed header, then the parts that it names, each as JSON. The header's
signature covers the digests of the parts. A snapshot is a help and never a source: it is made from a verified ledger alone, a
start without one gives the same state, and whatever does not fit is left unused.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field, TypeAdapter, ValidationError

from lutetia.coordinator.ledger.log import Ledger, LedgerStart
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.web.api.history import History, ShardHistory
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.fields import Count, Digest, Moment, PublicKey, Signature
from lutetia.protocol.schema.identity import Identity, verify
from lutetia.system.files import write_atomic

_log = logging.getLogger(__name__)

_SIGNING_DOMAIN = b"lutetia-snapshot-1\n"
_LONGEST_HEADER = 4096
_RULE_FOLDERS = ("coordinator/ledger", "coordinator/credit", "protocol/schema")
_RULE_FILES = (
    "coordinator/alerts/fault.py",
    "coordinator/web/api/documents.py", "coordinator/web/api/history.py", "coordinator/web/api/people.py",
    "protocol/claims.py",
)  # fmt: skip
_STATE: TypeAdapter[RunState] = TypeAdapter(RunState)
_HISTORY: TypeAdapter[History] = TypeAdapter(History)
_SHARD: TypeAdapter[tuple[int, ShardHistory]] = TypeAdapter(tuple[int, ShardHistory])


class SnapshotUnusable(Exception):
    """Why a snapshot is not used, in words."""


class SnapshotPart(Frozen):
    """One part of the file."""

    name: Literal["state", "history"] = Field(description="The run's state, or the history that the web API shows")
    size: int = Field(ge=0, description="Size in bytes")
    digest: Digest = Field(description="SHA-256 of its bytes (hex)")


class SnapshotHeader(Frozen):
    """What a snapshot holds."""

    format: Literal[1] = Field(default=1, description="Version of this format")
    run: Digest = Field(description="Run id")
    coordinator: PublicKey = Field(description="Public key of the coordinator that keeps the ledger")
    rules: Digest = Field(description="Digest of the code that adds events up (`rules_digest`)")
    events: Count = Field(description="How many events it covers: the sequence of the last")
    chain: Digest = Field(description="The ledger's hash chain over these events (hex)")
    time: Moment = Field(description="When it was made, in Unix seconds")
    parts: tuple[SnapshotPart, SnapshotPart] = Field(description="State and history, in the order of the file")


class SignedSnapshot(Frozen):
    """A header and its signature."""

    header: SnapshotHeader = Field(description="The header")
    signature: Signature = Field(description="The coordinator's Ed25519 signature over the canonical bytes (hex)")

    @classmethod
    def sign(cls, header: SnapshotHeader, coordinator: Identity) -> SignedSnapshot:
        return cls(header=header, signature=coordinator.sign(_SIGNING_DOMAIN + canonical(header)))

    def holds(self) -> bool:
        """Whether the coordinator that it names signed it."""
        return verify(self.header.coordinator, _SIGNING_DOMAIN + canonical(self.header), self.signature)


def rule_sources() -> list[Path]:
    """The source files that say what events mean and how they add up, by name."""
    root = Path(__file__).resolve().parents[2]
    found = {Path(__file__).resolve(), *(root / name for name in _RULE_FILES)}
    found.update(*((root / name).rglob("*.py") for name in _RULE_FOLDERS))
    return sorted(found)


@cache
def rules_digest() -> str:
    """Digest of `rule_sources`, and of the version of the library that reads states back."""
    found = hashlib.sha256(pydantic.VERSION.encode())
    for path in rule_sources():
        data = path.read_bytes()
        found.update(f"\n{path.parent.name}/{path.name} {len(data)}\n".encode() + data)
    return found.hexdigest()


def parts_of(state: RunState, history: History) -> tuple[bytes, bytes]:
    """The bytes of the parts. Equal histories of events give equal bytes.

    The history has a line for each shard, so that who reads them in a thread does not stop the others for long.
    """
    shards = [_SHARD.dump_json(item) for item in history.shards.items()]
    return _STATE.dump_json(state), b"\n".join([_HISTORY.dump_json(replace(history, shards={})), *shards])


def _read_history(data: bytes) -> History:
    first, *lines = data.split(b"\n")
    history = _HISTORY.validate_json(first)
    for line in lines:
        index, shard = _SHARD.validate_json(line)
        history.shards[index] = shard
    return history.restored()


def header_of(run: str, events: int, chain: str, parts: Sequence[bytes], coordinator: str) -> SnapshotHeader:
    """The header of `parts` (state and history)."""
    state, history = (hashlib.sha256(part).hexdigest() for part in parts)
    return SnapshotHeader(
        run=run, coordinator=coordinator, rules=rules_digest(), events=events, chain=chain, time=time.time(),
        parts=(
            SnapshotPart(name="state", size=len(parts[0]), digest=state),
            SnapshotPart(name="history", size=len(parts[1]), digest=history),
        ),
    )  # fmt: skip


def write_snapshot(path: Path, header: SnapshotHeader, parts: Sequence[bytes], coordinator: Identity) -> None:
    """Sign and write it atomically. Raises DiskError."""
    line = canonical(SignedSnapshot.sign(header, coordinator))
    write_atomic(path, b"\n".join([line, b"".join(parts)]), mode=0o600)


@dataclass(frozen=True)
class LedgerSnapshot:
    """A snapshot whose signature and state were verified."""

    path: Path
    header: SnapshotHeader
    state: RunState

    @property
    def start(self) -> LedgerStart:
        """From where the ledger is read."""
        return LedgerStart(self.header.events, self.header.chain, self.state)

    def history(self) -> History | None:
        """The history of its events; None, with a line in the log, if the file has gone or changed. Blocks on the disk."""
        try:
            _, parts = _read(self.path, ("history",), self.header)
            return _read_history(parts[0])
        except (OSError, SnapshotUnusable, ValidationError) as error:
            _log.warning("the history in %s is not used: %s", self.path, error)
            return None


def read_snapshot(path: Path, run: str, coordinator: str) -> LedgerSnapshot | None:
    """The snapshot in `path` of `run` by `coordinator` (public key); None, with a line in the log, if it cannot be used.

    Nothing of the file but a bounded header is parsed before its signature holds.
    """
    try:
        header, parts = _read(path, ("state",))
        if (header.run, header.coordinator) != (run, coordinator):
            raise SnapshotUnusable("it is of another run or another coordinator")
        if header.rules != rules_digest():
            raise SnapshotUnusable("it was made by another version of the software")
        return LedgerSnapshot(path, header, _STATE.validate_json(parts[0]))
    except FileNotFoundError:
        return None
    except (OSError, SnapshotUnusable, ValidationError) as error:
        reason = "its state cannot be read" if isinstance(error, ValidationError) else error
        _log.warning("the snapshot %s is not used, so the whole ledger is read: %s", path, reason)
        return None


def open_with_snapshot(folder: RunFolder, run: str, coordinator: str) -> tuple[Ledger, LedgerSnapshot | None]:
    """The ledger of `run`, and the snapshot from which it was opened; None: it was read and verified whole.

    Raises as `Ledger.open` does.
    """
    snapshot = read_snapshot(folder.snapshot, run, coordinator)
    ledger = Ledger.open(folder.ledger, run, start=snapshot and snapshot.start)
    if snapshot and not ledger.trusted:
        _log.warning("the snapshot %s is not used, so the whole ledger was read: it is not of this ledger", folder.snapshot)
        return ledger, None
    return ledger, snapshot


def _read(path: Path, names: Sequence[str], known: SnapshotHeader | None = None) -> tuple[SnapshotHeader, list[bytes]]:
    """The header (which must be `known`, if given) and the named parts. Raises OSError or SnapshotUnusable."""
    with path.open("rb") as file:
        line = file.readline(_LONGEST_HEADER)
        try:
            signed = SignedSnapshot.model_validate_json(line)
        except ValidationError as error:
            raise SnapshotUnusable("its header cannot be read") from error
        header = signed.header
        if not signed.holds():
            raise SnapshotUnusable("its signature is wrong")
        if known is not None and header != known:
            raise SnapshotUnusable("it was replaced meanwhile")
        if path.stat().st_size != len(line) + sum(part.size for part in header.parts):
            raise SnapshotUnusable("it is cut off or too long")
        parts = []
        for part in header.parts:
            if part.name not in names:
                file.seek(part.size, 1)
                continue
            data = file.read(part.size)
            if hashlib.sha256(data).hexdigest() != part.digest:
                raise SnapshotUnusable(f"its {part.name} was changed")
            parts.append(data)
    return header, parts
