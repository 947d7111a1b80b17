"""All mixtures that a run ever made, by digest: signed descriptions in the run's folder, and files that are blobs.

A description is small. Its files are the weights of accepted results, which are blobs anyway, and files that many mixtures share.
`named_blobs` tells the retention of results which weights must stay.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from lutetia.models.mixing.description import FILE, SignedMixture, read_mixture
from lutetia.models.mixing.layout import WEIGHTS
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import LutetiaError
from lutetia.system.files import write_atomic

_log = logging.getLogger(__name__)

DIGEST = re.compile(r"[0-9a-f]{12,64}")
"""A mixture is named by its digest, or by at least the first 12 letters of it, which logs and tables show."""
_NAMED = re.compile(rb'"([0-9a-f]{64})"')


class HeldOutLosses(Frozen):
    """The losses of a mixture on held-out rows, in a fixed order."""

    rows_of: str
    """What fixes the rows: losses with equal words are of equal rows."""
    losses: tuple[float, ...]
    weights: dict[int, BlobRef] = {}
    """The accepted weights that the mixture is made of, by shard."""


def kept_mixtures(stitched: Sequence[str], current: str | None, most: int | None) -> set[str]:
    """Which mixtures keep their files: all, or the newest `most` and the current one. `stitched`: digests, oldest first."""
    kept = set(stitched if most is None else stitched[-most:])
    return kept | {current} if current else kept


@dataclass
class MixtureArchive:
    """The mixtures of one run.

    Args:
        folder: of the descriptions.
        blobs: the store that is served to peers.
        stitched: digests of the mixtures so far, oldest first.
        most: of how many mixtures the files are kept, besides the current one; None: of all.
    """

    folder: Path
    blobs: BlobStore
    stitched: list[str]
    most: int | None = None
    _named: set[str] = field(default_factory=set)

    def open(self, mixture: Path, current: str | None) -> None:
        """Take in what an earlier version left in the folder `mixture`, and drop what is not kept any more."""
        if current and (mixture / FILE).is_file() and not self._path(current).is_file():
            signed = read_mixture(mixture)
            if signed.mixture.digest == current:
                self.add(mixture)
        self.settle(current)

    def add(self, mixture: Path) -> str:
        """Describe the mixture in a folder, and serve its files as blobs. Returns its digest."""
        signed = read_mixture(mixture)
        digest = signed.mixture.digest
        for name, ref in signed.mixture.files.items():
            if not self.blobs.has(ref.digest):  # the experts' weights are served already
                self.blobs.add_file(mixture / name)
        data = canonical(signed)
        write_atomic(self._path(digest), data)
        self._named |= _digests(data)
        if digest not in self.stitched:
            self.stitched.append(digest)
        return digest

    def settle(self, current: str | None) -> None:
        """Drop the files of mixtures that are not kept, except weights of accepted results, which have a rule of their own."""
        if self.most is None and self._named:
            return
        kept, named = kept_mixtures(self.stitched, current, self.most), set[str]()
        for path in self._paths():
            if path.stem in kept:
                named |= _digests(path.read_bytes())
        self._named = named
        for path in self._paths():
            if path.stem not in kept:
                self._drop(path)

    def named_blobs(self) -> Collection[str]:
        """Digests of the blobs that kept mixtures name."""
        return self._named

    def find(self, name: str) -> bytes | None:
        """The signed description of the mixture with this digest, or these first letters of it; None if not exactly one has."""
        return find_description(self.folder, name)

    def write_losses(self, digest: str, losses: HeldOutLosses) -> None:
        write_atomic(self._losses(digest), losses.model_dump_json().encode())

    def read_losses(self, digest: str) -> HeldOutLosses | None:
        """None where none are known."""
        try:
            return HeldOutLosses.model_validate_json(self._losses(digest).read_bytes())
        except (OSError, ValidationError):
            return None

    def _paths(self) -> Iterator[Path]:
        return self.folder.glob("*.json")

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"

    def _losses(self, digest: str) -> Path:
        return self.folder / f"{digest}.losses"

    def _drop(self, path: Path) -> None:
        files = json.loads(path.read_bytes())["mixture"]["files"]
        for name, ref in files.items():
            of_result = name.startswith("expert_") and name.endswith(f"/{WEIGHTS}")
            if not of_result and ref["digest"] not in self._named:
                self.blobs.remove(ref["digest"])


def find_description(folder: Path, name: str) -> bytes | None:
    """As `MixtureArchive.find`, of the descriptions in `folder`."""
    found = list(folder.glob(f"{name}*.json")) if DIGEST.fullmatch(name) else []
    return found[0].read_bytes() if len(found) == 1 else None


def renew_signatures(folder: Path, coordinator: Identity) -> None:
    """Sign all descriptions in `folder` with this key, after an earlier key signed them."""
    for path in folder.glob("*.json"):
        try:
            signed = SignedMixture.model_validate_json(path.read_bytes())
        except (ValidationError, LutetiaError) as error:
            _log.warning("the description %s of a mixture is damaged and keeps its signature: %s", path.name, error)
            continue
        write_atomic(path, canonical(SignedMixture.sign(signed.mixture, coordinator.sign)))


def _digests(data: bytes) -> set[str]:
    """All digests in a description; those of no blob do no harm."""
    return {sys.intern(digest.decode()) for digest in _NAMED.findall(data)}
