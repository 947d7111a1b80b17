"""What a user's folder of clips holds: one caption per clip, from `metadata.jsonl`, `metadata.csv` or same-named `.txt` files.

A row has `file_name` (relative to the folder) and `caption` or `text`; optionally `kind` (the user's own label) and `split`
(`train`, or `test` for clips that training and clustering must never see; `validation` counts as `test`).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from ...system.errors import DataError

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif", ".webp"})
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION = 2000
MAX_KIND = 64
MAX_ROW_BYTES = 1 << 20

Split = Literal["train", "test"]
_SPLITS: dict[str, Split] = {"": "train", "train": "train", "test": "test", "validation": "test", "val": "test"}


@dataclass(frozen=True)
class ClipSource:
    """One clip of the folder. `name` is its path relative to the folder, with forward slashes."""

    name: str
    path: Path
    caption: str
    kind: str = ""
    split: Split = "train"


@dataclass(frozen=True)
class BadClip:
    """A clip or row that cannot be used. `reason` is one sentence: what is wrong and what to do."""

    name: str
    reason: str


@dataclass
class Listing:
    """The usable clips, sorted by name, and what had to be left out."""

    clips: list[ClipSource] = field(default_factory=list)
    bad: list[BadClip] = field(default_factory=list)


def read_listing(folder: Path) -> Listing:
    """All clips below `folder` (hidden files apart) with their captions. Nothing is decoded yet.

    Raises DataError when the folder, or its metadata file as a whole, is unusable; faults of single clips are in `bad`.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of clips; name a folder with videos and their captions")
    videos = _videos(folder)
    tables = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder} holds both metadata.jsonl and metadata.csv; remove one, so that each clip has one caption")
    listing = Listing()
    seen = _read_table(folder, tables[0], listing) if tables else set[str]()
    for name in sorted(videos.keys() - seen):
        _add_from_text_file(name, videos[name], tables, listing)
    if not listing.clips and not listing.bad:
        raise DataError(f"{folder} holds no clips ({', '.join(sorted(s[1:] for s in VIDEO_SUFFIXES))}); name another folder")
    listing.clips.sort(key=lambda clip: clip.name)
    return listing


def _videos(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.suffix.lower() in VIDEO_SUFFIXES and not any(part.startswith(".") for part in relative.parts):
            found[relative.as_posix()] = path
    return found


def _read_table(folder: Path, table: Path, listing: Listing) -> set[str]:
    """Fill `listing` from the metadata file; returns every file name that it speaks of."""
    rows = list(_rows(table))
    if not rows:
        raise DataError(f"{table} has no rows; write one per clip with file_name and caption")
    counts = Counter(str(row.get("file_name") or "") for _, row in rows)
    root = folder.resolve()
    reported: set[str] = set()
    for number, row in rows:
        name = str(row.get("file_name") or "")
        where = f"{table.name} line {number}"
        if counts[name] > 1 and name:
            if name not in reported:
                reason = f"{where}: {name} is listed {counts[name]} times; keep one row per file"
                listing.bad.append(BadClip(name, reason))
                reported.add(name)
            continue
        clip = _clip_of_row(root, folder, name, row, where)
        (listing.bad if isinstance(clip, BadClip) else listing.clips).append(cast(Any, clip))
    return set(counts)


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row). Raises DataError naming the line that cannot be read."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {table}: {error}; save it as UTF-8") from error
    if table.suffix == ".csv":
        yield from _csv_rows(table, text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{table} line {number} is not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{table} line {number} is not an object; write {{'file_name': …, 'caption': …}} with double quotes")
        yield number, row


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
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


def _clip_of_row(root: Path, folder: Path, name: str, row: dict[str, Any], where: str) -> ClipSource | BadClip:
    """The clip that a metadata row describes, or why it cannot be used."""
    if not name:
        return BadClip(where, f"{where} names no file; give it a file_name")
    problem = _path_problem(root, folder, name)
    caption = row.get("caption") or row.get("text") or ""
    kind, split = row.get("kind") or "", str(row.get("split") or "").strip().lower()
    if problem is None and (not isinstance(caption, str) or not isinstance(kind, str)):
        problem = "has a caption or kind that is not text; write both as strings"
    if problem is None:
        problem = _caption_problem(caption) or (f"has a kind longer than {MAX_KIND} characters" if len(kind) > MAX_KIND else None)
    if problem is None and split not in _SPLITS:
        problem = f"has the split {split[:20]!r}; write train, validation or test"
    if problem:
        return BadClip(name, f"{where}: {name} {problem}")
    return ClipSource(PurePosixPath(name).as_posix(), folder / name, _tidy(caption), _tidy(kind), _SPLITS[split])


def _path_problem(root: Path, folder: Path, name: str) -> str | None:
    """Why `name` must not be opened: metadata may come from strangers and must not reach outside their folder."""
    if "\0" in name or "\\" in name or len(name) > 1024:
        return "is not a plain relative path; use forward slashes"
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        return "lies outside the folder; use a path relative to the folder"
    if pure.suffix.lower() not in VIDEO_SUFFIXES:
        return f"is no video that can be read here; use {', '.join(sorted(VIDEO_SUFFIXES))}"
    path = folder / name
    if not path.is_file():
        return "does not exist; remove the row or add the file"
    if not path.resolve().is_relative_to(root):
        return "is a link that leads outside the folder; copy the file into it"
    return None


def _caption_problem(caption: str) -> str | None:
    if not caption.strip():
        return "has no caption; write one in its row or in a .txt file of the same name"
    if len(caption) > MAX_CAPTION:
        return f"has a caption of {len(caption)} characters, more than {MAX_CAPTION}; shorten it"
    return None


def _add_from_text_file(name: str, path: Path, tables: list[Path], listing: Listing) -> None:
    """A clip that no metadata row speaks of: its caption is the same-named `.txt` file."""
    text_file = path.with_suffix(".txt")
    root = next(parent for parent in path.parents if path.relative_to(parent).as_posix() == name).resolve()
    if not path.resolve().is_relative_to(root) or (text_file.exists() and not text_file.resolve().is_relative_to(root)):
        listing.bad.append(BadClip(name, f"{name} is a link that leads outside the folder; copy the file into it"))
        return
    try:
        caption = text_file.read_text(encoding="utf-8-sig") if text_file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        listing.bad.append(BadClip(name, f"the caption {text_file.name} of {name} cannot be read ({error}); save it as UTF-8"))
        return
    if not caption.strip():
        rows = f"a row in {tables[0].name}" if tables else "a row in metadata.jsonl"
        listing.bad.append(BadClip(name, f"{name} has no caption; add {rows} or a file {text_file.name} beside it"))
        return
    problem = _caption_problem(caption)
    if problem:
        listing.bad.append(BadClip(name, f"{name} {problem}"))
    else:
        listing.clips.append(ClipSource(name, path, _tidy(caption)))


def _tidy(text: str) -> str:
    return " ".join(text.split())
