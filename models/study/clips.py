"""Split the clips of a study into the folders `train`, `tune` and `test`, which share no file and no prompt.

- `train`: for clusters, experts, router and probes.
- `tune`: for the choice of a recipe. A hash of the prompt decides which training clips go there.
- `test`: the clips that the source holds out, without those whose prompts occur elsewhere.
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

from pydantic import Field

from lutetia.models.data.decode.clip import hash_file
from lutetia.models.data.ingest.listing import ClipSource, read_listing
from lutetia.models.data.ingest.synthetic import make_clips
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
    """How many clips each role has, and how many were left out."""

    roles: dict[str, dict[str, int]] = Field(description="role (train, tune, test) to kind to number of clips")
    known_prompts: int = Field(description="test clips left out because their prompt is in train or tune")
    copies: int = Field(description="clips left out because a copy of the file has another role")


def split_clips(
    source: FolderClips | MadeClips | DrawnClips, folder: Path, tune_share: float, raw: Path, on_progress: Progress
) -> ClipCounts:
    """Fill `folder` with `train/`, `tune/` and `test/`, each with its metadata. A second call only reads the counts.

    Args:
        source: where the clips come from.
        folder: the result; it appears whole or not at all.
        tune_share: share of the training prompts that go to `tune`.
        raw: folder for clips that are made or drawn first.
        on_progress: called with stage, done and total.

    Raises DataError if a role gets no clip, a clip has a fault, or `make_clips.py` is missing or fails.
    """
    summary = folder / SUMMARY
    if summary.is_file():
        return ClipCounts.model_validate_json(summary.read_bytes())
    listing = read_listing(_source(source, raw, on_progress))
    if listing.bad:
        raise DataError(
            f"{listing.bad[0].reason} ({len(listing.bad)} clips have faults); a study does not skip clips: mend or remove them"
        )
    digests = [hash_file(clip.path) for clip in listing.clips]
    roles, counts = assign(listing.clips, digests, tune_share)
    with disk_errors(folder):
        part = _part(folder, folder.parent)
        try:
            for role in ROLES:
                chosen = [
                    (clip, digest)
                    for clip, digest, assigned in zip(listing.clips, digests, roles, strict=True)
                    if assigned == role
                ]
                _write_role(part / role, role, chosen)
                on_progress("clips", ROLES.index(role) + 1, len(ROLES))
            write_atomic(part / SUMMARY, counts.model_dump_json(indent=1).encode())
            part.chmod(0o755)
            replace_folder(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return counts


def assign(clips: Sequence[ClipSource], digests: Sequence[str], tune_share: float) -> tuple[list[Role | None], ClipCounts]:
    """The role of each clip, None for those left out. Raises DataError if a role gets no clip."""
    first_roles: list[Role] = [
        "test" if clip.split == "test" else "tune" if _rank(clip.caption) < tune_share else "train" for clip in clips
    ]
    trained_prompts = {_prompt(clip.caption) for clip, role in zip(clips, first_roles, strict=True) if role != "test"}
    test_digests = {
        digest
        for clip, digest, role in zip(clips, digests, first_roles, strict=True)
        if role == "test" and _prompt(clip.caption) not in trained_prompts
    }
    tune_digests = {digest for digest, role in zip(digests, first_roles, strict=True) if role == "tune"} - test_digests
    roles: list[Role | None] = []
    prompts = copies = 0
    for clip, digest, role in zip(clips, digests, first_roles, strict=True):
        known = role == "test" and _prompt(clip.caption) in trained_prompts
        copy = (role != "test" and digest in test_digests) or (role == "train" and digest in tune_digests)
        prompts, copies = prompts + known, copies + copy
        roles.append(None if known or copy else role)
    tally = {role: dict[str, int]() for role in ROLES}
    for clip, role in zip(clips, roles, strict=True):
        if role:
            tally[role][clip.kind] = tally[role].get(clip.kind, 0) + 1
    empty = next((role for role in ROLES if not tally[role]), None)
    if empty:
        raise DataError(f"no clip is left for {empty} of {len(clips)}; hold out more clips, or add clips")
    return roles, ClipCounts(roles=tally, known_prompts=prompts, copies=copies)


def _prompt(caption: str) -> str:
    return " ".join(caption.casefold().split())


def _rank(caption: str) -> float:
    """A fixed number from 0 to 1 for each prompt."""
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
        with contextlib.suppress(OSError):  # another file system, or one without hard links
            os.link(source.resolve(), target)
            return
    with source.open("rb") as file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy)


def _source(source: FolderClips | MadeClips | DrawnClips, raw: Path, on_progress: Progress) -> Path:
    """The folder with the clips of the source. Makes or draws them first if needed."""
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
    """Make one set; `folder` appears whole or not at all."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = _part(folder, folder.parent.parent)  # not beside it, where it would be read as a set
    try:
        options = ["--n", count, "--seed", source.seed, "--frames", source.frames, "--size", source.size]
        run = subprocess.run([sys.executable, maker, kind, part, *map(str, options)], capture_output=True, text=True, check=False)
        if run.returncode:
            reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit code {run.returncode}"
            raise DataError(f"{maker} could not make the set {kind}: {reason}")
        part.chmod(0o755)
        replace_folder(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part(target: Path, parent: Path) -> Path:
    """A new folder in `parent` that will become `target`. Removes those that killed calls left."""
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f".{target.name}.*.part"):
        shutil.rmtree(leftover)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=parent))


def _hold_out(metadata: Path, every: int) -> None:
    """Put one in `every` prompts into the split test, chosen by its hash."""
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for row in rows:
        chosen = int(hashlib.sha256(f"lutetia-drawn|{row['caption']}".encode()).hexdigest(), 16) % every == 0
        row["split"] = "test" if chosen else "train"
    write_atomic(metadata, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
