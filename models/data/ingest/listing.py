"""List a folder of clips, with one caption per clip from `metadata.jsonl`, `metadata.csv` or `.txt` files of the same name.

WebDataset archives (`.tar`) in it are read like folders. A still picture with a caption is a clip of one frame; beside a video of
the same name it is the video's thumbnail, and without a caption it is passed over.

Each folder may have one metadata file. A row has `file_name` (relative to the folder of that file) and `caption` or `text`, and
optionally `captions` (a list of further ones), `kind` (the user's own label) and `split` (`train`, or `test` for clips that are
not used for training and clustering; `validation` counts as `test`). Whatever else lies in the folder is named, so that nothing
is passed over without a word.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lutetia.models.data.ingest.folder import FAULTS, Folder, read_folder, readable, suffix_of
from lutetia.models.data.ingest.metadata import METADATA_NAMES, Description, Row, Split, described, read_rows
from lutetia.models.data.ingest.webdataset import COMPRESSED, Sample, TarMember, read_archive, read_values
from lutetia.system.errors import DataError, plain

VIDEO_SUFFIXES = frozenset({
    ".3g2", ".3gp", ".apng", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".ivf", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".webp",
    ".wmv", ".y4m",
})  # fmt: skip
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
"""Still pictures, which are clips of one frame. WebP and GIF may be either."""
CLIP_SUFFIXES = VIDEO_SUFFIXES | PICTURE_SUFFIXES
MAX_NAME = 1024
_PACKED = (".zip", ".rar", ".7z", ".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class ClipSource:
    """One clip of the folder.

    Attributes:
        name: path relative to the folder, with forward slashes; in an archive, below the path of the archive.
        path: the file, or the member of an archive.
        caption: its text, composed (NFC) and with single spaces.
        kind: the user's label; "" without one.
        split: train or test.
        more: further captions; training draws one of all.
    """

    name: str
    path: Path | TarMember
    caption: str
    kind: str = ""
    split: Split = "train"
    more: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, the first of which stands for the clip in clusters and reports."""
        return (self.caption, *self.more)


@dataclass(frozen=True)
class BadClip:
    """A clip or row that cannot be used. `reason` says what is wrong and what to do."""

    name: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", plain(readable(self.name)))
        object.__setattr__(self, "reason", plain(readable(self.reason)))


@dataclass
class Listing:
    """The usable clips, sorted by name, those that cannot be used, and other files with the reason why they are not used."""

    clips: list[ClipSource] = field(default_factory=list)
    bad: list[BadClip] = field(default_factory=list)
    unused: list[BadClip] = field(default_factory=list)

    def add(self, clip: ClipSource | BadClip) -> None:
        if isinstance(clip, BadClip):
            self.bad.append(clip)
        else:
            self.clips.append(clip)

    def unused_in_short(self) -> str:
        """How many files of which suffix were not used, as part of a sentence; "" if there are none."""
        counts = Counter(suffix_of(each.name) or "without suffix" for each in self.unused)
        return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(8))


def read_listing(root: Path) -> Listing:
    """List all clips below `root`, except hidden files, with their captions. Nothing is decoded.

    Raises DataError if the folder, or a metadata file as a whole, cannot be used; faults of single clips are in `bad`.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder of clips; name a folder with videos and their captions")
    listing, folder = Listing(), read_folder(root)
    rows = read_rows(folder)
    used = {name for name in folder.files if PurePosixPath(name).name in METADATA_NAMES}
    _read_rows(folder, rows, listing)
    used.update(row.name for row in rows)
    for name in folder.chosen(lambda name: suffix_of(name) in VIDEO_SUFFIXES and name not in used):
        text_name = folder.find(str(PurePosixPath(name).with_suffix(".txt")))
        _add_from_text_file(folder, name, text_name, listing)
        used.update((name, text_name))
    used.update(_add_pictures(folder, used, listing))
    used.update(_read_archives(folder, listing))
    listing.unused += [BadClip(name, _why_unused(name)) for name in folder.chosen(lambda name: name not in used)]
    listing.unused += [BadClip(name, reason) for name, reason in sorted(folder.not_entered.items())]
    if not listing.clips and not listing.bad:
        held = f"; it holds {short}" if (short := listing.unused_in_short()) else ""
        suffixes = ", ".join(sorted(suffix[1:] for suffix in CLIP_SUFFIXES))
        raise DataError(f"{root} holds no clips ({suffixes}, or tar archives of them){held}; name another folder")
    listing.clips.sort(key=lambda clip: clip.name)
    return listing


def _why_unused(name: str) -> str:
    if suffix_of(name) == ".txt":
        return "no video or picture has this name"
    if suffix_of(name) in PICTURE_SUFFIXES:
        return "a picture without a caption of its own, or of the name of a video; with a caption it is a clip of one frame"
    if suffix_of(name) in _PACKED:
        return "an archive that is not read; unpack it, or pack it as a plain .tar"
    return "not a video by its suffix; convert it, or rename it if it is one"


def _read_rows(folder: Folder, rows: list[Row], listing: Listing) -> None:
    counts, reported = Counter(row.name for row in rows), set[str]()
    for row in rows:
        if row.name and counts[row.name] > 1:
            if row.name not in reported:
                reason = f"{row.where}: {row.given} is listed {counts[row.name]} times; keep one row per file"
                listing.bad.append(BadClip(row.name, reason))
                reported.add(row.name)
            continue
        listing.add(_clip_of_row(folder, row))


def _clip_of_row(folder: Folder, row: Row) -> ClipSource | BadClip:
    """The clip of a metadata row, or a BadClip with the reason."""
    if not row.given:
        return BadClip(row.where, f"{row.where} has no file_name; add one")
    where = f"{row.where}: {row.given[:200]}"
    if problem := _path_problem(folder, row):
        return BadClip(row.name, f"{where} {problem}")
    return _clip(row.name, folder.files[row.name], described(row.values), where)


def _clip(name: str, path: Path | TarMember, description: Description | str, where: str) -> ClipSource | BadClip:
    if isinstance(description, str):
        return BadClip(name, f"{where} {description}")
    return ClipSource(readable(name), path, description.caption, description.kind, description.split, description.more)


def _path_problem(folder: Folder, row: Row) -> str | None:
    """Why the file must not be opened; None if it may. Metadata from strangers must not lead outside their folder."""
    if "\0" in row.given or "\\" in row.given or len(row.given) > MAX_NAME:
        return "is not a plain relative path; use forward slashes"
    pure = PurePosixPath(row.given)
    if pure.is_absolute() or ".." in pure.parts:
        return "lies outside the folder; use a path relative to the folder"
    if suffix_of(row.given) not in CLIP_SUFFIXES:
        return f"is not a supported video or picture; use {', '.join(sorted(CLIP_SUFFIXES))}"
    if fault := folder.faults.get(row.name):
        return FAULTS[fault]
    if row.name not in folder.files:
        return "does not exist; remove the row or add the file"
    return None


def _add_from_text_file(folder: Folder, name: str, text_name: str, listing: Listing) -> None:
    """Add a clip without a metadata row: its caption is in the `.txt` file of the same name."""
    for each in (name, text_name):
        if fault := folder.faults.get(each):
            listing.bad.append(BadClip(name, f"{each} {FAULTS[fault]}"))
            return
    short = PurePosixPath(text_name).name
    try:
        caption = folder.files[text_name].read_text(encoding="utf-8-sig") if text_name in folder.files else ""
    except (OSError, UnicodeDecodeError) as error:
        listing.bad.append(BadClip(name, f"the caption {short} of {name} cannot be read ({error}); save it as UTF-8"))
        return
    if not caption.strip():
        reason = f"{name} has no caption; add a row in metadata.jsonl or metadata.csv, or a file {short} beside it"
        listing.bad.append(BadClip(name, reason))
        return
    listing.add(_clip(name, folder.files[name], described({"caption": caption}), name))


def _add_pictures(folder: Folder, used: set[str], listing: Listing) -> set[str]:
    """Add still pictures that have a caption in a `.txt` file which no video took. Returns the names that were used."""
    added: set[str] = set()
    for name in folder.chosen(lambda name: suffix_of(name) in PICTURE_SUFFIXES and name not in used):
        text_name = folder.find(str(PurePosixPath(name).with_suffix(".txt")))
        if text_name in folder.files and text_name not in used | added:
            _add_from_text_file(folder, name, text_name, listing)
            added.update((name, text_name))
    return added


def _read_archives(folder: Folder, listing: Listing) -> set[str]:
    """Add the clips in archives. Returns the names of the archives."""
    compressed = list(folder.chosen(lambda name: name.lower().endswith(COMPRESSED)))
    listing.bad += [BadClip(name, f"{name} is compressed; decompress it to a plain .tar") for name in compressed]
    archives = list(folder.chosen(lambda name: suffix_of(name) == ".tar"))
    for name in archives:
        if fault := folder.faults.get(name):
            listing.bad.append(BadClip(name, f"{name} {FAULTS[fault]}"))
            continue
        try:
            content = read_archive(folder.files[name], VIDEO_SUFFIXES, PICTURE_SUFFIXES)
        except DataError as error:
            listing.bad.append(BadClip(name, str(error)))
            continue
        for sample in content.samples:
            listing.add(_clip_of_sample(f"{name}/{sample.key}", sample))
        listing.unused += [BadClip(f"{name}/{member}", "not used of this archive") for member in content.unused]
    return {*compressed, *archives}


def _clip_of_sample(key: str, sample: Sample) -> ClipSource | BadClip:
    """The clip of a sample in an archive, or a BadClip with the reason."""
    video, *more = sample.videos
    name = key + video.suffix
    if more:
        return BadClip(name, f"{key} holds {len(sample.videos)} videos; keep one")
    if len(name) > MAX_NAME:
        return BadClip(name, f"{name[:200]} has a name that is too long; pack it under another name")
    try:
        values = read_values(sample)
    except (ValueError, OSError) as error:
        return BadClip(name, f"the caption of {name} cannot be read ({error}); write a .txt or .json in UTF-8")
    return _clip(name, video, described(values), name)
