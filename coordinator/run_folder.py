"""The files of a run on its coordinator's disk, and the lock that keeps a second coordinator out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from lutetia.models.experts.adapters.base_sources import BASE_FILE
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import SignedManifest, first_problem, open_manifest
from lutetia.system.errors import ConfigError, IdentityError
from lutetia.system.files import disk_errors


class Endpoint(Frozen):
    """`coordinator.json`: the coordinator's addresses, as fixed when the run was created."""

    listen: str = Field(description="Multiaddress to listen on")
    announce: tuple[str, ...] = Field(default=(), max_length=8, description="Further multiaddresses to announce to peers")


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    def version(self, number: int) -> Path:
        """An earlier version of the manifest."""
        return self.root / "manifests" / f"{number:04d}.json"

    @property
    def ticket(self) -> Path:
        return self.root / "ticket.txt"

    @property
    def endpoint(self) -> Path:
        return self.root / "coordinator.json"

    @property
    def owner_key(self) -> Path:
        return self.root / "owner.key"

    @property
    def coordinator_key(self) -> Path:
        return self.root / "coordinator.key"

    @property
    def next_key(self) -> Path:
        """The coordinator's next key, while a rotation is under way."""
        return self.root / "coordinator.key.next"

    @property
    def blobs(self) -> Path:
        """All that is served to peers: training clips, the blobs of accepted checkpoints, the router and the mixture."""
        return self.root / "blobs"

    @property
    def holdouts(self) -> Path:
        """The held-out clips, which nobody but the coordinator reads."""
        return self.root / "holdouts"

    @property
    def reserve(self) -> Path:
        """Which files of held-out clips may be given to strangers, one for each check."""
        return self.root / "reserve.json"

    @property
    def sizes(self) -> Path:
        """How large the files of a checkpoint may be, for a coordinator that starts no worker process."""
        return self.root / "sizes.json"

    @property
    def parts(self) -> Path:
        """The parts of a mixture that need no weights, for a coordinator that starts no worker process."""
        return self.root / "parts"

    @property
    def parts_of(self) -> Path:
        """Digest of the manifest for which `sizes` and `parts` were made."""
        return self.root / "parts.manifest"

    @property
    def holdouts_served(self) -> Path:
        """A marker: an earlier version served the held-out clips to peers."""
        return self.root / "holdouts.served"

    @property
    def incoming(self) -> Path:
        """Blobs of results that are not decided yet."""
        return self.root / "incoming"

    @property
    def merging(self) -> Path:
        """The epoch that is being merged from its lanes."""
        return self.root / "merging"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.sqlite"

    @property
    def head(self) -> Path:
        """The signed head of the ledger: its number of events and the last hash."""
        return self.root / "head.json"

    @property
    def snapshot(self) -> Path:
        """What the first events of the ledger add up to, signed: a start reads the later ones only."""
        return self.root / "snapshot"

    @property
    def restored(self) -> Path:
        """A marker: the run was restored, and the coordinator has not yet recovered what the backup lacks."""
        return self.root / "restored"

    @property
    def base(self) -> Path:
        """Where the files of the adapters' base are on this machine."""
        return self.root / BASE_FILE

    @property
    def mixture(self) -> Path:
        return self.root / "mixture"

    @property
    def mixtures(self) -> Path:
        """The signed descriptions of all mixtures that were made, by digest."""
        return self.root / "mixtures"

    @property
    def next_mixture(self) -> Path:
        """A mixture that was just made, until it is decided whether it becomes current."""
        return self.root / "mixture.next"

    @property
    def gallery(self) -> Path:
        return self.root / "gallery"

    @property
    def galleries(self) -> Path:
        """The galleries of this and earlier mixtures, by digest, and training clips that fit the prompts."""
        return self.root / "galleries"

    @property
    def sheets(self) -> Path:
        """Contact sheets of the shards' training clips, `NNN.png`; older runs have none."""
        return self.root / "sheets"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def names(self) -> Path:
        """What peers with accepted work are called."""
        return self.root / "names.json"

    @property
    def alerts(self) -> Path:
        """What the owner was told of."""
        return self.root / "alerts.json"

    @property
    def network(self) -> Path:
        """State of the network library."""
        return self.root / "network"

    @property
    def peers(self) -> Path:
        """Addresses of known peers, to join through after a restart."""
        return self.root / "peers.json"

    def read_manifest(self, now: float) -> SignedManifest:
        """Raises ConfigError (no run here, expired, malformed) or AuthorisationError."""
        try:
            data = self.manifest.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.root} holds no run ({error.strerror}: {self.manifest.name}); create one first") from error
        return open_manifest(data, now=now)

    def read_endpoint(self) -> Endpoint:
        try:
            return Endpoint.model_validate_json(self.endpoint.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {self.endpoint}: {error.strerror}; restore it from a backup") from error
        except ValidationError as error:
            raise ConfigError(f"{self.endpoint} is malformed: {first_problem(error)}; restore it from a backup") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of this folder; the kernel releases it when the process ends. Raises IdentityError when it is taken."""
        import fcntl  # Windows has none, and may read a folder

        path = self.root / "coordinator.lock"
        with disk_errors(path):
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                raise IdentityError(
                    f"another coordinator (process {holder}) serves {self.root} already; stop it first"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)
