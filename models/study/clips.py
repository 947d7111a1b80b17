"""The study's clips in three folders, `train`, `tune` and `test`, that share no file and no prompt.

Train is what clusters are found in and experts, router and probes learn from; on `tune` recipes are chosen; `test` is what the
source itself holds out, less the clips whose prompts occur elsewhere. Which prompts go to `tune` is decided by their hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lutetia.models.data.ingest.listing import ClipSource, read_listing
from lutetia.models.data.ingest.synthetic import make_clips
from lutetia.models.data.ingest.video import hash_file
from lutetia.models.data.ingest.webdataset import TarMember
from lutetia.models.networks.assets import asset
from lutetia.models.study.config import DrawnClips, FolderClips, MadeClips
from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import DataError
from lutetia.system.files import disk_errors, replace_folder, write_atomic

Role = Literal["train", "tune", "test"]
ROLES: tuple[Role, ...] = ("train", "tune", "test")
SUMMARY = "clips.json"
Progress = Callable[[str, int, int], None]


class ClipCounts(Frozen):
    """How many clips have which role, by kind, and how many were left out because another role knew file or prompt."""

    roles: dict[str, dict[str, int]]
    known_prompts: int
    copies: int


def split_clips(
    source: FolderClips | MadeClips | DrawnClips, folder: Path, tune_share: float, raw: Path, on_progress: Progress
) -> ClipCounts:
    """Fill `folder` with `train/`, `tune/` and `test/`, each with its metadata; once done, a second call only reads the counts.

    `raw`: where clips that are made here are kept. Raises DataError where nothing is held out or there is no maker.
    """
    done = folder / SUMMARY
    if done.is_file():
        return ClipCounts.model_validate_json(done.read_bytes())
    listing = read_listing(_source(source, raw, on_progress))
    if listing.bad:
        raise DataError(f"{listing.bad[0].reason} ({len(listing.bad)} clips have faults); a study leaves no clip out in silence")
    digests = [hash_file(clip.path) for clip in listing.clips]
    roles, counts = assign(listing.clips, digests, tune_share)
    with disk_errors(folder):
        part = _part(folder, folder.parent)
        try:
            for role in ROLES:
                chosen = [(clip, digest) for clip, digest, own in zip(listing.clips, digests, roles, strict=True) if own == role]
                _write_role(part / role, role, chosen)
                on_progress("clips", ROLES.index(role) + 1, len(ROLES))
            write_atomic(part / SUMMARY, counts.model_dump_json(indent=1).encode())
            part.chmod(0o755)
            replace_folder(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return counts


def assign(clips: Sequence[ClipSource], digests: Sequence[str], tune_share: float) -> tuple[list[Role | None], ClipCounts]:
    """Each clip's role, None for those left out. Raises DataError when a role gets no clip."""
    wanted: list[Role] = [
        "test" if clip.split == "test" else "tune" if _rank(clip.caption) < tune_share else "train" for clip in clips
    ]
    heard = {_prompt(clip.caption) for clip, role in zip(clips, wanted, strict=True) if role != "test"}
    tested = {
        digest
        for clip, digest, role in zip(clips, digests, wanted, strict=True)
        if role == "test" and _prompt(clip.caption) not in heard
    }
    tuned = {digest for digest, role in zip(digests, wanted, strict=True) if role == "tune"} - tested
    roles: list[Role | None] = []
    prompts = copies = 0
    for clip, digest, role in zip(clips, digests, wanted, strict=True):
        known = role == "test" and _prompt(clip.caption) in heard
        copy = (role != "test" and digest in tested) or (role == "train" and digest in tuned)
        prompts, copies = prompts + known, copies + copy
        roles.append(None if known or copy else role)
    tally = {role: dict[str, int]() for role in ROLES}
    for clip, role in zip(clips, roles, strict=True):
        if role:
            tally[role][clip.kind] = tally[role].get(clip.kind, 0) + 1
    empty = next((role for role in ROLES if not tally[role]), None)
    if empty:
        raise DataError(f"no clip is left for {empty}; hold more clips out, or give more of them ({len(clips)} were given)")
    return roles, ClipCounts(roles=tally, known_prompts=prompts, copies=copies)


def _prompt(caption: str) -> str:
    return " ".join(caption.casefold().split())


def _rank(caption: str) -> float:
    """A prompt's fixed place in 0..1."""
    return int.from_bytes(hashlib.sha256(f"lutetia-tune|{_prompt(caption)}".encode()).digest()[:8], "big") / 2**64


def _write_role(folder: Path, role: Role, clips: Sequence[tuple[ClipSource, str]]) -> None:
    folder.mkdir()
    rows = []
    for number, (clip, digest) in enumerate(clips):
        name = f"{number:06d}{clip.path.suffix.lower()}"
        _link(clip.path, folder / name)
        split = "train" if role == "train" else "test"
        rows.append({"file_name": name, "caption": clip.caption, "kind": clip.kind, "split": split, "sha256": digest})
    write_atomic(folder / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _link(source: Path | TarMember, target: Path) -> None:
    if isinstance(source, Path):
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source.resolve(), target)
            return
    with source.open("rb") as file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy)


def _source(source: FolderClips | MadeClips | DrawnClips, raw: Path, on_progress: Progress) -> Path:
    """The folder with the source's clips, made first where they are to be made."""
    match source:
        case FolderClips():
            return source.folder.expanduser()
        case MadeClips():
            maker = asset("make_clips.py", source.maker)
            for place, (kind, count) in enumerate(sorted(source.sets.items())):
                on_progress("making clips", place, len(source.sets))
                _make(maker, source, kind, count, raw / kind)
            return raw
        case DrawnClips():
            if not (raw / "metadata.jsonl").is_file():
                raw.parent.mkdir(parents=True, exist_ok=True)
                make_clips(raw, source.clips, source.seed, source.frames, source.size)
            _hold_out(raw / "metadata.jsonl", source.test_every)
            return raw


def _make(maker: Path, source: MadeClips, kind: str, count: int, folder: Path) -> None:
    """One set by the maker, whole or not at all."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = _part(folder, folder.parent.parent)  # not beside it, where it would be taken for a set
    try:
        options = ["--n", count, "--seed", source.seed, "--frames", source.frames, "--size", source.size]
        run = subprocess.run([sys.executable, maker, kind, part, *map(str, options)], capture_output=True, text=True, check=False)
        if run.returncode:
            words = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "it said nothing"
            raise DataError(f"{maker} could not make the set {kind}: {words}")
        part.chmod(0o755)
        replace_folder(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part(target: Path, parent: Path) -> Path:
    """A new folder in `parent` for what becomes `target`; what a killed call left there is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f".{target.name}.*.part"):
        shutil.rmtree(left)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=parent))


def _hold_out(metadata: Path, every: int) -> None:
    """Prompts by their hash, one in `every`, go to the split test."""
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for row in rows:
        chosen = int(hashlib.sha256(f"lutetia-drawn|{row['caption']}".encode()).hexdigest(), 16) % every == 0
        row["split"] = "test" if chosen else "train"
    write_atomic(metadata, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
