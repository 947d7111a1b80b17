"""A folder of computed arrays by content: what was made from equal bytes by equal settings is never made twice.

Arrays are kept in packs, one safetensors file per batch of work, written whole or not at all; a pack's name is the SHA-256 of its
bytes, so a damaged one is noticed and dropped. Several builds may share one folder.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lutetia.protocol.schema.canonical import digest_of
from lutetia.system.files import write_atomic

Arrays = Mapping[str, NDArray[Any]]
_log = logging.getLogger(__name__)


def cache_key(**parts: Any) -> str:
    """The name of what `parts` (JSON values) determine."""
    return digest_of(parts)


class ArrayCache:
    """`get(key)` gives the arrays that `put` filed under `key`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where: dict[str, dict[str, Path]] = {}
        self._sound: set[Path] = set()
        for pack in sorted(folder.glob("*.safetensors")):
            self._index(pack)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def get(self, key: str) -> dict[str, NDArray[Any]] | None:
        """None when there is nothing under `key`, or its pack is damaged."""
        places = self._where.get(key)
        if places is None:
            return None
        for pack in set(places.values()):
            if pack not in self._sound and not self._verify(pack):
                return None
        found: dict[str, NDArray[Any]] = {}
        for name, pack in places.items():
            with safe_open(pack, framework="numpy") as file:
                found[name] = file.get_tensor(f"{key}/{name}")
        return found

    def put(self, entries: Mapping[str, Arrays]) -> None:
        """File several keys at once, in one pack. Raises DiskError."""
        fresh = {key: arrays for key, arrays in entries.items() if key not in self._where}
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
                    self._where.setdefault(key, {})[name] = pack
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
        _log.warning("dropping %s from the cache: %s; its content is computed again", pack.name, reason)
        pack.unlink(missing_ok=True)
        self._where = {key: places for key, places in self._where.items() if pack not in places.values()}
