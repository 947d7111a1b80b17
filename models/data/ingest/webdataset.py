"""WebDataset archives: tar files in which `17.mp4` and `17.txt` or `17.json` are one clip. Members are read where they lie."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lutetia.system.errors import DataError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class TarMember:
    """A file inside of an archive, to be read like a path."""

    archive: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.member).suffix

    def open(self, mode: Literal["rb"] = "rb") -> io.BufferedReader:
        """Seekable, and with a place of its own: several may be read side by side. Raises OSError."""
        return io.BufferedReader(_Window(self.archive, self.offset, self.size))


class _Window(io.RawIOBase):
    """`size` bytes of a file, from `offset`."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = path.open("rb", buffering=0), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer, /) -> int:
        self._file.seek(self._offset + self._at)
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view[: max(0, self._size - self._at)]) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass
class Sample:
    """What shares one name up to its first dot. `texts` holds the members called `txt` and `json`."""

    key: str
    videos: list[TarMember] = field(default_factory=list)
    texts: dict[str, TarMember] = field(default_factory=dict)


def read_samples(archive: Path, videos: frozenset[str]) -> list[Sample]:
    """The samples of an archive that hold a member with a suffix of `videos`. Raises DataError when it is no whole plain tar."""
    samples: dict[str, Sample] = {}
    for member in _members(archive):
        key, _, ending = member.name.partition(".")
        key = str(PurePosixPath(member.member).parent / key)
        sample = samples.setdefault(key, Sample(key))
        if member.suffix.lower() in videos:
            sample.videos.append(member)
        elif ending in ("txt", "json"):
            sample.texts[ending] = member
    return [sample for sample in samples.values() if sample.videos]


def _members(archive: Path) -> Iterator[TarMember]:
    """Regular files, hidden ones apart; links and devices lead nowhere here."""
    try:
        with tarfile.open(archive, "r:") as tar:
            while info := tar.next():
                tar.members = []  # type: ignore[assignment]  # of millions, none is needed again
                parts = [part for part in PurePosixPath(info.name).parts if part != "/"]
                if info.isreg() and not info.issparse() and not any(part.startswith(".") for part in parts):
                    yield TarMember(archive, "/".join(parts), info.offset_data, info.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(
            f"cannot read {archive} ({error}); it must be a whole, plain tar file: download or unpack it again"
        ) from error


def read_values(sample: Sample) -> dict[str, Any]:
    """What the sample's `json` says, with the caption of its `txt` where it has none.

    Raises ValueError or OSError that say why it cannot be read.
    """
    values: dict[str, Any] = {}
    for ending, member in sorted(sample.texts.items()):
        if member.size > MAX_TEXT_BYTES:
            raise ValueError(f"{member.name} holds {member.size} bytes, too many for a caption")
        with member.open() as file:
            text = file.read().decode("utf-8-sig")
        if ending == "txt":
            values["caption"] = values.get("caption") or values.get("text") or text
            continue
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError(f"{member.name} is nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError(f"{member.name} is not an object")
    return values
