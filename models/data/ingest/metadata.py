"""Captions of a folder of clips: rows of `metadata.jsonl` and `metadata.csv`, and the rules that a caption must keep."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lutetia.models.data.ingest.folder import Folder
from lutetia.models.data.parts.index import MOST_TEXTS
from lutetia.system.errors import DataError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION = 2000
MAX_KIND = 64

Split = Literal["train", "test"]
_SPLITS: dict[str, Split] = {"": "train", "train": "train", "test": "test", "validation": "test", "val": "test"}


@dataclass(frozen=True)
class Row:
    """A row of a metadata file.

    Attributes:
        name: path of the clip relative to the folder of clips.
        given: the path as written, relative to the folder of the metadata file.
        where: metadata file and line, for error texts.
        values: columns of the row.
    """

    name: str
    given: str
    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """What a row, a text file or a member of an archive says of a clip: caption, kind ("" without one), split, more captions."""

    caption: str
    kind: str
    split: Split
    more: tuple[str, ...] = ()


def read_rows(folder: Folder) -> list[Row]:
    """The rows of all metadata files. Raises DataError if a folder has two, or one has no rows or cannot be read."""
    tables = [name for name in sorted(folder.files) if PurePosixPath(name).name in METADATA_NAMES]
    parents = Counter(PurePosixPath(name).parent for name in tables)
    for parent, count in parents.items():
        if count > 1:
            raise DataError(
                f"{folder.root / parent} holds both metadata.jsonl and metadata.csv; remove one, so that a clip has one caption"
            )
    return [row for name in tables for row in _rows_of(folder, name)]


def _rows_of(folder: Folder, table: str) -> list[Row]:
    prefix, rows = PurePosixPath(table).parent, []
    for number, values in _parse(folder.files[table]):
        given = str(values.get("file_name") or "")
        name = folder.find((prefix / PurePosixPath(given)).as_posix()) if given else ""
        rows.append(Row(name, given, f"{table} line {number}", values))
    if not rows:
        raise DataError(f"{folder.files[table]} has no rows; write one per clip with file_name and caption")
    return rows


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
        names = reader.fieldnames or []
        if len(names) == 1 and re.search(r"[;\t]", names[0]):
            raise DataError(f"{table} separates its columns with semicolons or tabs; save it with commas")
        if "file_name" not in names:
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


def described(values: dict[str, Any]) -> Description | str:
    """What `values` say of a clip, or why they cannot be used, as the end of a sentence."""
    captions = _captions(values)
    kind, split = values.get("kind") or "", str(values.get("split") or "").strip().lower()
    if not (all(is_text(caption) for caption in captions) and is_text(kind)):
        return "has a caption or kind that is not text; write both as strings"
    captions = [*dict.fromkeys(filter(None, map(_tidy, captions)))]
    if not captions:
        return "has no caption; write one in its row or in a .txt file of the same name"
    if len(captions) > MOST_TEXTS:
        return f"has {len(captions)} captions, more than {MOST_TEXTS}; keep the best of them"
    if (longest := max(map(len, captions))) > MAX_CAPTION:
        return f"has a caption of {longest} characters, more than {MAX_CAPTION}; shorten it"
    if len(kind) > MAX_KIND:
        return f"has a kind longer than {MAX_KIND} characters"
    if split not in _SPLITS:
        return f"has the split {split[:20]!r}; write train, validation or test"
    return Description(captions[0], _tidy(kind), _SPLITS[split], tuple(captions[1:]))


def _captions(values: dict[str, Any]) -> list[Any]:
    """The caption, and those of a list `captions`."""
    first, more = values.get("caption") or values.get("text") or "", values.get("captions")
    return [first, *more] if isinstance(more, list) else [first]


def is_text(value: object) -> bool:
    """Whether `value` is a string that can be encoded: JSON may contain half of a surrogate pair, which cannot."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _tidy(text: str) -> str:
    """One form for equal texts: composed letters (NFC) and single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())
