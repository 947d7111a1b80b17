"""A cache of computed arrays on disk, addressed by content and settings, so that nothing is computed twice.

Arrays are stored in packs, one safetensors file per batch of work, written atomically. The name of a pack is the SHA-256 of its
bytes, so a damaged pack is detected and deleted. Several builds may share one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lutetia.protocol.schema.canonical import digest_of
from lutetia.system.files import make_folder, takes_writes, write_atomic

Arrays = Mapping[str, NDArray[Any]]
_log = logging.getLogger(__name__)


def cache_key(**parts: Any) -> str:
    """The key of the arrays that `parts` (JSON values) determine."""
    return digest_of(parts)


class ArrayCache:
    """`get(key)` returns the arrays that `put` stored under `key`.

    Args:
        folder: the packs of earlier builds.
        target: where new packs go, if `folder` cannot be written.
    """

    def __init__(self, folder: Path, target: Path | None = None) -> None:
        self._folder = target or folder
        self._packs: dict[str, dict[str, Path]] = {}
        self._sound: set[Path] = set()
        for pack in sorted(folder.glob("*.safetensors")):
            self._index(pack)

    def __contains__(self, key: str) -> bool:
        return key in self._packs

    def get(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays under `key`; None if there are none, or if their pack is damaged."""
        places = self._packs.get(key)
        if places is None:
            return None
        for pack in set(places.values()):
            if pack not in self._sound and not self._verify(pack):
                return None
        arrays: dict[str, NDArray[Any]] = {}
        for name, pack in places.items():
            with safe_open(pack, framework="numpy") as file:
                arrays[name] = file.get_tensor(f"{key}/{name}")
        return arrays

    def put(self, entries: Mapping[str, Arrays]) -> None:
        """Store several keys at once, in one pack. Raises DiskError."""
        fresh = {key: arrays for key, arrays in entries.items() if key not in self._packs}
        if not fresh:
            return
        tensors = {
            f"{key}/{name}": np.ascontiguousarray(array) for key, arrays in fresh.items() for name, array in arrays.items()
        }
        data = save(tensors)
        pack = self._folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomic(pack, data)
        self._sound.add(pack)
        self._index(pack)

    def _index(self, pack: Path) -> None:
        try:
            with safe_open(pack, framework="numpy") as file:
                for full in file.keys():  # noqa: SIM118 - not a mapping
                    key, _, name = full.partition("/")
                    self._packs.setdefault(key, {})[name] = pack
        except (SafetensorError, OSError) as error:
            self._drop(pack, str(error))

    def _verify(self, pack: Path) -> bool:
        try:
            with pack.open("rb") as file:
                sound = hashlib.file_digest(file, "sha256").hexdigest() == pack.stem
        except FileNotFoundError:
            sound = False
        if sound:
            self._sound.add(pack)
        else:
            self._drop(pack, "its bytes do not match its name")
        return sound

    def _drop(self, pack: Path, reason: str) -> None:
        _log.warning("deleting %s from the cache: %s; its content is computed again", pack.name, reason)
        with contextlib.suppress(OSError):  # the cache cannot be written, or another build has deleted it
            pack.unlink()
        self._packs = {key: places for key, places in self._packs.items() if pack not in places.values()}


@contextlib.contextmanager
def array_cache(folder: Path, instead: Path) -> Iterator[ArrayCache]:
    """The cache in `folder`. If that cannot be written, a warning says so, and new packs go into `instead` for this build."""
    writable = False
    with contextlib.suppress(OSError):
        make_folder(folder)
        writable = takes_writes(folder)
    if writable:
        yield ArrayCache(folder)
        return
    _log.warning(
        "cannot write the cache %s: the next build computes everything again; set LUTETIA_CACHE to another folder", folder
    )
    with tempfile.TemporaryDirectory(prefix=".cache.", suffix=".part", dir=instead) as spare:
        yield ArrayCache(folder, Path(spare))
