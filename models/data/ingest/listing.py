"""List a folder of clips, with one caption per clip from `metadata.jsonl`, `metadata.csv` or `.txt` files of the same name.

WebDataset archives (`.tar`) in it are read like folders.

Each folder may have one metadata file. A row has `file_name` (relative to the folder of that file) and `caption` or `text`, and
optionally `kind` (the user's own label) and `split` (`train`, or `test` for clips that are not used for training and clustering;
`validation` counts as `test`).
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
    """One clip of the folder.

    Attributes:
        name: path relative to the folder, with forward slashes; in an archive, below the path of the archive.
        path: the file, or the member of an archive.
        caption: its text, with single spaces.
        kind: the user's label; "" without one.
        split: train or test.
    """

    name: str
    path: Path | TarMember
    caption: str
    kind: str = ""
    split: Split = "train"


@dataclass(frozen=True)
class BadClip:
    """A clip or row that cannot be used. `reason` says what is wrong and what to do."""

    name: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", plain(self.name))
        object.__setattr__(self, "reason", plain(self.reason))


@dataclass
class Listing:
    """The usable clips, sorted by name, and those that cannot be used."""

    clips: list[ClipSource] = field(default_factory=list)
    bad: list[BadClip] = field(default_factory=list)

    def add(self, clip: ClipSource | BadClip) -> None:
        if isinstance(clip, BadClip):
            self.bad.append(clip)
        else:
            self.clips.append(clip)


def read_listing(folder: Path) -> Listing:
    """List all clips below `folder`, except hidden files, with their captions. Nothing is decoded.

    Raises DataError if the folder, or a metadata file as a whole, cannot be used; faults of single clips are in `bad`.
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
        raise DataError(f"{folder} holds no clips ({suffixes}, or tar archives of them); name another folder")
    listing.clips.sort(key=lambda clip: clip.name)
    return listing


@dataclass(frozen=True)
class _Row:
    """A row of a metadata file.

    Attributes:
        name: path of the clip relative to the folder of clips.
        given: the path as written, relative to `base`.
        base: folder of the metadata file.
        where: metadata file and line, for error texts.
        values: columns of the row.
    """

    name: str
    given: str
    base: Path
    where: str
    values: dict[str, Any]


def _visible(folder: Path, wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """The `wanted` files below `folder` by relative name, except hidden files and folders."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if wanted(path)}
    return {name.as_posix(): path for name, path in paths.items() if not any(part.startswith(".") for part in name.parts)}


def _tables(folder: Path) -> list[Path]:
    """The metadata files. Raises DataError if a folder has two."""
    tables = _visible(folder, lambda path: path.name in METADATA_NAMES and path.is_file())
    parents = Counter(path.parent for path in tables.values())
    for parent, count in parents.items():
        if count > 1:
            raise DataError(f"{parent} holds both metadata.jsonl and metadata.csv; remove one, so that each clip has one caption")
    return [tables[name] for name in sorted(tables)]


def _rows_of(folder: Path, table: Path) -> list[_Row]:
    """The rows of a metadata file. Raises DataError if it has none or cannot be read."""
    prefix, rows = table.parent.relative_to(folder), []
    for number, values in _parse(table):
        given = str(values.get("file_name") or "")
        name = (prefix / PurePosixPath(given)).as_posix() if given else ""
        rows.append(_Row(name, given, table.parent, f"{(prefix / table.name).as_posix()} line {number}", values))
    if not rows:
        raise DataError(f"{table} has no rows; write one per clip with file_name and caption")
    return rows


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
    """Yield (line number, row). Raises DataError that names the line that cannot be read."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {table}: {error}; save it as UTF-8") from error
    if table.suffix == ".csv":
        yield from _parse_csv(table, text)
        return
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # not splitlines: it also splits at U+2028 and similar characters in a caption
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
            raise DataError(
                f"{table} has no column file_name; its first line must be the names of the columns, with file_name and caption"
            )
        for row in reader:
            if None in row:
                raise DataError(
                    f"{table} line {reader.line_num} has more values than columns; put captions with commas in quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{table} line {reader.line_num} is not CSV ({error}); put captions with commas in quotes") from error


def _clip_of_row(root: Path, row: _Row) -> ClipSource | BadClip:
    """The clip of a metadata row, or a BadClip with the reason."""
    if not row.given:
        return BadClip(row.where, f"{row.where} has no file_name; add one")
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
        listing.bad.append(BadClip(name, f"{name} is compressed; decompress it to a plain .tar"))
    root = folder.resolve()
    for name, path in sorted(_visible(folder, lambda path: path.suffix.lower() == ".tar").items()):
        if not path.resolve().is_relative_to(root):
            listing.bad.append(BadClip(name, f"{name} is a link that leads outside the folder; copy the file into it"))
            continue
        for sample in read_samples(path, VIDEO_SUFFIXES):
            listing.add(_clip_of_sample(f"{name}/{sample.key}", sample))


def _clip_of_sample(key: str, sample: Sample) -> ClipSource | BadClip:
    """The clip of a sample in an archive, or a BadClip with the reason."""
    video, *more = sample.videos
    name = key + video.suffix
    if more:
        return BadClip(name, f"{key} holds {len(sample.videos)} videos; keep one")
    if not _is_text(name) or len(name) > MAX_NAME:
        return BadClip(name, f"{name[:200]} has a name that is too long or not text; pack it under another name")
    try:
        values = read_values(sample)
    except (ValueError, OSError) as error:
        return BadClip(name, f"the caption of {name} cannot be read ({error}); write a .txt or .json in UTF-8")
    return _described(name, video, values, name)


def _path_problem(root: Path, row: _Row) -> str | None:
    """Why the file must not be opened; None if it may. Metadata from strangers must not lead outside their folder."""
    if "\0" in row.given or "\\" in row.given or len(row.given) > MAX_NAME:
        return "is not a plain relative path; use forward slashes"
    pure = PurePosixPath(row.given)
    if pure.is_absolute() or ".." in pure.parts:
        return "lies outside the folder; use a path relative to the folder"
    if pure.suffix.lower() not in VIDEO_SUFFIXES:
        return f"is not a supported video; use {', '.join(sorted(VIDEO_SUFFIXES))}"
    path = row.base / row.given
    try:
        if not path.is_file():
            return "does not exist; remove the row or add the file"
    except OSError as error:
        return f"cannot be accessed ({error.strerror}); shorten its name, or allow reading its folder"
    if not path.resolve().is_relative_to(root):
        return "is a link that leads outside the folder; copy the file into it"
    return None


def _is_text(value: object) -> bool:
    """Whether `value` is a string that can be encoded: JSON may contain half of a surrogate pair, which cannot."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _caption_problem(caption: str) -> str | None:
    if not caption.strip():
        return "has no caption; write one in its row or in a .txt file of the same name"
    if len(caption) > MAX_CAPTION:
        return f"has a caption of {len(caption)} characters, more than {MAX_CAPTION}; shorten it"
    return None


def _add_from_text_file(folder: Path, name: str, listing: Listing) -> None:
    """Add a clip without a metadata row: its caption is in the `.txt` file of the same name."""
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
