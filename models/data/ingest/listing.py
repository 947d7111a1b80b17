"""What a user's folder of clips holds: one caption per clip, from `metadata.jsonl`, `metadata.csv` or same-named `.txt` files.

WebDataset archives in it (`tars`) are read as if they were folders.

Each folder may have one metadata file. A row has `file_name` (relative to that file's folder) and `caption` or `text`; optionally
`kind` (the user's own label) and `split` (`train`, or `test` for clips that training and clustering must never see; `validation`
counts as `test`).
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lutetia.models.data.ingest.webdataset import COMPRESSED, Sample, TarMember, read_samples, read_values
from lutetia.system.errors import DataError, plain

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif", ".webp"})
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION = 2000
MAX_KIND = 64
MAX_NAME = 1024

Split = Literal["train", "test"]
_SPLITS: dict[str, Split] = {"": "train", "train": "train", "test": "test", "validation": "test", "val": "test"}


@dataclass(frozen=True)
class ClipSource:
    """One clip of the folder. `name` is its path relative to the folder, with forward slashes; in an archive, below its name."""

    name: str
    path: Path | TarMember
    caption: str
    kind: str = ""
    split: Split = "train"


@dataclass(frozen=True)
class BadClip:
    """A clip or row that cannot be used. `reason` is one sentence: what is wrong and what to do."""

    name: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", plain(self.name))
        object.__setattr__(self, "reason", plain(self.reason))


@dataclass
class Listing:
    """The usable clips, sorted by name, and what had to be left out."""

    clips: list[ClipSource] = field(default_factory=list)
    bad: list[BadClip] = field(default_factory=list)

    def add(self, clip: ClipSource | BadClip) -> None:
        if isinstance(clip, BadClip):
            self.bad.append(clip)
        else:
            self.clips.append(clip)


def read_listing(folder: Path) -> Listing:
    """All clips below `folder` (hidden files apart) with their captions. Nothing is decoded yet.

    Raises DataError when the folder, or a metadata file as a whole, is unusable; faults of single clips are in `bad`.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of clips; name a folder with videos and their captions")
    listing = Listing()
    rows = [row for table in _tables(folder) for row in _rows_of(folder, table)]
    _read_rows(folder, rows, listing)
    videos = _visible(folder, lambda path: path.suffix.lower() in VIDEO_SUFFIXES)
    for name in sorted(videos.keys() - {row.name for row in rows}):
        _add_from_text_file(folder, name, listing)
    _read_archives(folder, listing)
    if not listing.clips and not listing.bad:
        suffixes = ", ".join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES))
        raise DataError(f"{folder} holds no clips ({suffixes}, or tar with such); name another folder")
    listing.clips.sort(key=lambda clip: clip.name)
    return listing


@dataclass(frozen=True)
class _Row:
    """A row of a metadata file. `name` is relative to the folder of clips, `given` as it was written, relative to `base`."""

    name: str
    given: str
    base: Path
    where: str
    values: dict[str, Any]


def _visible(folder: Path, wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """Files below `folder` by relative name, without those that are hidden or in hidden folders."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if wanted(path)}
    return {name.as_posix(): path for name, path in found.items() if not any(part.startswith(".") for part in name.parts)}


def _tables(folder: Path) -> list[Path]:
    """The metadata files: one at most in each folder, whose rows are relative to that folder."""
    found = _visible(folder, lambda path: path.name in METADATA_NAMES and path.is_file())
    parents = Counter(path.parent for path in found.values())
    for parent, count in parents.items():
        if count > 1:
            raise DataError(f"{parent} holds both metadata.jsonl and metadata.csv; remove one, so that each clip has one caption")
    return [found[name] for name in sorted(found)]


def _rows_of(folder: Path, table: Path) -> list[_Row]:
    """Raises DataError when the file has no rows or cannot be read."""
    prefix, found = table.parent.relative_to(folder), []
    for number, values in _parse(table):
        given = str(values.get("file_name") or "")
        name = (prefix / PurePosixPath(given)).as_posix() if given else ""
        found.append(_Row(name, given, table.parent, f"{(prefix / table.name).as_posix()} line {number}", values))
    if not found:
        raise DataError(f"{table} has no rows; write one per clip with file_name and caption")
    return found


def _read_rows(folder: Path, rows: list[_Row], listing: Listing) -> None:
    counts = Counter(row.name for row in rows)
    root, reported = folder.resolve(), set[str]()
    for row in rows:
        if row.name and counts[row.name] > 1:
            if row.name not in reported:
                reason = f"{row.where}: {row.given} is listed {counts[row.name]} times; keep one row per file"
                listing.bad.append(BadClip(row.name, reason))
                reported.add(row.name)
            continue
        listing.add(_clip_of_row(root, row))


def _parse(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row). Raises DataError naming the line that cannot be read."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {table}: {error}; save it as UTF-8") from error
    if table.suffix == ".csv":
        yield from _parse_csv(table, text)
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a caption may hold U+2028 and its kin
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{table} line {number} is not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{table} line {number} is not an object; write {{'file_name': …, 'caption': …}} with double quotes")
        yield number, row


def _parse_csv(table: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise DataError(f"{table} has no column file_name; its first line must name the columns file_name and caption")
        for row in reader:
            if None in row:
                raise DataError(
                    f"{table} line {reader.line_num} has more values than columns; put captions with commas in quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{table} line {reader.line_num} is not CSV ({error}); put captions with commas in quotes") from error


def _clip_of_row(root: Path, row: _Row) -> ClipSource | BadClip:
    """The clip that a metadata row describes, or why it cannot be used."""
    if not row.given:
        return BadClip(row.where, f"{row.where} names no file; give it a file_name")
    where = f"{row.where}: {row.given[:200]}"
    if problem := _path_problem(root, row):
        return BadClip(row.name, f"{where} {problem}")
    return _described(row.name, row.base / row.given, row.values, where)


def _described(name: str, path: Path | TarMember, values: dict[str, Any], where: str) -> ClipSource | BadClip:
    problem = None
    caption = values.get("caption") or values.get("text") or ""
    kind, split = values.get("kind") or "", str(values.get("split") or "").strip().lower()
    if not (_is_text(caption) and _is_text(kind)):
        problem = "has a caption or kind that is not text; write both as strings"
    if problem is None:
        problem = _caption_problem(caption) or (f"has a kind longer than {MAX_KIND} characters" if len(kind) > MAX_KIND else None)
    if problem is None and split not in _SPLITS:
        problem = f"has the split {split[:20]!r}; write train, validation or test"
    if problem:
        return BadClip(name, f"{where} {problem}")
    return ClipSource(name, path, _tidy(caption), _tidy(kind), _SPLITS[split])


def _read_archives(folder: Path, listing: Listing) -> None:
    for name in sorted(_visible(folder, lambda path: path.name.lower().endswith(COMPRESSED))):
        listing.bad.append(
            BadClip(name, f"{name} is compressed; unpack it to a plain .tar, in which clips can be read where they lie")
        )
    root = folder.resolve()
    for name, path in sorted(_visible(folder, lambda path: path.suffix.lower() == ".tar").items()):
        if not path.resolve().is_relative_to(root):
            listing.bad.append(BadClip(name, f"{name} is a link that leads outside the folder; copy the file into it"))
            continue
        for sample in read_samples(path, VIDEO_SUFFIXES):
            listing.add(_clip_of_sample(f"{name}/{sample.key}", sample))


def _clip_of_sample(key: str, sample: Sample) -> ClipSource | BadClip:
    """The clip that an archive's sample holds, or why it cannot be used."""
    video, *more = sample.videos
    name = key + video.suffix
    if more:
        return BadClip(name, f"{key} holds {len(sample.videos)} videos; keep one")
    if not _is_text(name) or len(name) > MAX_NAME:
        return BadClip(name, f"{name[:200]} has a name that is too long or no text; pack it under another")
    try:
        values = read_values(sample)
    except (ValueError, OSError) as error:
        return BadClip(name, f"the caption of {name} cannot be read ({error}); write a .txt or .json in UTF-8")
    return _described(name, video, values, name)


def _path_problem(root: Path, row: _Row) -> str | None:
    """Why the file must not be opened: metadata may come from strangers and must not reach outside their folder."""
    if "\0" in row.given or "\\" in row.given or len(row.given) > MAX_NAME:
        return "is not a plain relative path; use forward slashes"
    pure = PurePosixPath(row.given)
    if pure.is_absolute() or ".." in pure.parts:
        return "lies outside the folder; use a path relative to the folder"
    if pure.suffix.lower() not in VIDEO_SUFFIXES:
        return f"is no video that can be read here; use {', '.join(sorted(VIDEO_SUFFIXES))}"
    path = row.base / row.given
    try:
        if not path.is_file():
            return "does not exist; remove the row or add the file"
    except OSError as error:
        return f"cannot be looked at ({error.strerror}); shorten its name, or allow its folder to be read"
    if not path.resolve().is_relative_to(root):
        return "is a link that leads outside the folder; copy the file into it"
    return None


def _is_text(value: object) -> bool:
    """Half of a surrogate pair, which JSON can hold, is no text: it cannot be written down again."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _caption_problem(caption: str) -> str | None:
    if not caption.strip():
        return "has no caption; write one in its row or in a .txt file of the same name"
    if len(caption) > MAX_CAPTION:
        return f"has a caption of {len(caption)} characters, more than {MAX_CAPTION}; shorten it"
    return None


def _add_from_text_file(folder: Path, name: str, listing: Listing) -> None:
    """A clip that no metadata row speaks of: its caption is the same-named `.txt` file."""
    path, root = folder / name, folder.resolve()
    text_file = path.with_suffix(".txt")
    if not all(each.resolve().is_relative_to(root) for each in (path, text_file)):
        listing.bad.append(BadClip(name, f"{name} is a link that leads outside the folder; copy the file into it"))
        return
    try:
        caption = text_file.read_text(encoding="utf-8-sig") if text_file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        listing.bad.append(BadClip(name, f"the caption {text_file.name} of {name} cannot be read ({error}); save it as UTF-8"))
        return
    if not caption.strip():
        reason = f"{name} has no caption; add a row in metadata.jsonl or metadata.csv, or a file {text_file.name} beside it"
        listing.bad.append(BadClip(name, reason))
    elif problem := _caption_problem(caption):
        listing.bad.append(BadClip(name, f"{name} {problem}"))
    else:
        listing.clips.append(ClipSource(name, path, _tidy(caption)))


def _tidy(text: str) -> str:
    return " ".join(text.split())
