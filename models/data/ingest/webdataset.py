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
    """The members that share a name up to its first dot. `texts` holds those that end in `txt` and `json`.

    `videos` holds still pictures where there is no video; beside one they are its thumbnails.
    """

    key: str
    videos: list[TarMember] = field(default_factory=list)
    pictures: list[TarMember] = field(default_factory=list)
    texts: dict[str, TarMember] = field(default_factory=dict)


@dataclass
class ArchiveContent:
    """The samples of an archive that hold a video, and the names of all other members."""

    samples: list[Sample]
    unused: list[str]


def read_archive(archive: Path, videos: frozenset[str], pictures: frozenset[str] = frozenset()) -> ArchiveContent:
    """The samples with a member whose suffix is in `videos`, or else in `pictures` and with a text.

    Raises DataError if the archive is not a complete plain tar.
    """
    samples: dict[str, Sample] = {}
    unused: list[str] = []
    for name, member in _members(archive):
        if member is None:
            unused.append(name)
            continue
        key, _, ending = member.name.partition(".")
        key = str(PurePosixPath(member.member).parent / key)
        if member.suffix.lower() in videos:
            samples.setdefault(key, Sample(key)).videos.append(member)
        elif member.suffix.lower() in pictures:
            samples.setdefault(key, Sample(key)).pictures.append(member)
        elif ending in ("txt", "json"):
            samples.setdefault(key, Sample(key)).texts[ending] = member
        else:
            unused.append(name)
    for sample in samples.values():
        if not sample.videos and sample.texts:
            sample.videos, sample.pictures = sample.pictures, []
    unused += [member.member for sample in samples.values() for member in sample.pictures]
    complete = [sample for sample in samples.values() if sample.videos]
    unused += [member.member for sample in samples.values() if not sample.videos for member in sample.texts.values()]
    return ArchiveContent(complete, sorted(unused))


def _members(archive: Path) -> Iterator[tuple[str, TarMember | None]]:
    """Yield name and member of regular files that are not hidden; no member for links, devices and sparse files."""
    try:
        with tarfile.open(archive, "r:") as tar:
            while info := tar.next():
                tar.members = []  # type: ignore[assignment]  # keep no list: there may be millions
                parts = [part for part in PurePosixPath(info.name).parts if part != "/"]
                name = "/".join(parts)
                if info.isdir() or any(part.startswith(".") for part in parts):
                    continue
                is_plain = info.isreg() and not info.issparse()
                yield name, TarMember(archive, name, info.offset_data, info.size) if is_plain else None
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
