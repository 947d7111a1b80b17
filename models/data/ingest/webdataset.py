"""WebDataset archives: tar files in which `17.mp4` and `17.txt` or `17.json` are one clip. They are read without unpacking."""

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
    """A file in an archive, which opens like a path.

    Attributes:
        archive: the tar file.
        member: path in the archive.
        offset: of its content in the archive, bytes.
        size: of its content, bytes.
    """

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
        """Open the content: seekable, with its own file position, so several can be read in parallel. Raises OSError."""
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
    """The members that share a name up to its first dot. `texts` holds those that end in `txt` and `json`."""

    key: str
    videos: list[TarMember] = field(default_factory=list)
    texts: dict[str, TarMember] = field(default_factory=dict)


def read_samples(archive: Path, videos: frozenset[str]) -> list[Sample]:
    """The samples with a member whose suffix is in `videos`. Raises DataError if the archive is not a complete plain tar."""
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
    """Yield regular files that are not hidden; links and devices are ignored."""
    try:
        with tarfile.open(archive, "r:") as tar:
            while info := tar.next():
                tar.members = []  # type: ignore[assignment]  # keep no list: there may be millions
                parts = [part for part in PurePosixPath(info.name).parts if part != "/"]
                if info.isreg() and not info.issparse() and not any(part.startswith(".") for part in parts):
                    yield TarMember(archive, "/".join(parts), info.offset_data, info.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(
            f"cannot read {archive} ({error}); it must be a complete plain tar file; download or decompress it again"
        ) from error


def read_values(sample: Sample) -> dict[str, Any]:
    """The values of the `json` of a sample, with the caption of its `txt` if they have none.

    Raises ValueError or OSError with the reason if they cannot be read.
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
