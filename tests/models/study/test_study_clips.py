"""The roles train, tune and test share no file and no prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lutetia.models.data.decode.clip import hash_file
from lutetia.models.data.ingest.listing import ClipSource, read_listing
from lutetia.models.networks.assets import assets_folder
from lutetia.models.study.clips import ROLES, assign, split_clips
from lutetia.models.study.config import DrawnClips, FolderClips, MadeClips
from lutetia.system.errors import DataError


def silent(stage: str, done: int, total: int) -> None: ...


def contents(folder: Path) -> dict[str, tuple[set[str], set[str]]]:
    """Digests and prompts of each role, read from disk."""
    by_role = {}
    for role in ROLES:
        clips = read_listing(folder / role).clips
        by_role[role] = {hash_file(clip.path) for clip in clips}, {clip.caption.casefold() for clip in clips}
    return by_role


def disjoint(folder: Path) -> bool:
    by_role = contents(folder)
    pairs = [(a, b) for i, a in enumerate(ROLES) for b in ROLES[i + 1 :]]
    return all(not by_role[a][part] & by_role[b][part] for a, b in pairs for part in (0, 1))


def test_split_roles_share_no_file_and_no_prompt(tmp_path: Path) -> None:
    source = DrawnClips(kind="drawn", clips=160, size=16, frames=4)
    counts = split_clips(source, tmp_path / "clips", 0.1, tmp_path / "raw", silent)
    assert disjoint(tmp_path / "clips")
    sizes = {role: sum(kinds.values()) for role, kinds in counts.roles.items()}
    assert all(sizes.values())
    assert sum(sizes.values()) + counts.known_prompts + counts.copies == 160
    again = split_clips(source, tmp_path / "clips", 0.1, tmp_path / "gone", silent)
    assert again == counts


def test_split_leaves_out_copies_and_known_prompts(tmp_path: Path) -> None:
    def clip(number: int, caption: str, split: str) -> ClipSource:
        return ClipSource(f"{number}.mp4", tmp_path / f"{number}.mp4", caption, "kind", split)  # pyright: ignore

    clips = [clip(n, f"thing {n}", "train") for n in range(40)]
    clips += [clip(40, "thing 1", "test"), clip(41, "thing A", "test"), clip(42, "THING  2", "test"), clip(43, "thing B", "test")]
    digests = [f"{n:064x}" for n in range(44)]
    digests[43] = digests[5]  # a test clip that is also a training file
    roles, counts = assign(clips, digests, 0.2)
    assert roles[40] is roles[42] is roles[5] is None
    assert roles[41] == roles[43] == "test"
    assert (counts.known_prompts, counts.copies) == (2, 1)
    assert 1 <= roles.count("tune") <= 20
    with pytest.raises(DataError, match=r"no clip is left for test"):
        assign(clips[:40], digests[:40], 0.2)


def test_split_keeps_the_splits_of_a_folder(tmp_path: Path) -> None:
    drawn = DrawnClips(kind="drawn", clips=60, size=16, frames=4)
    split_clips(drawn, tmp_path / "first", 0.2, tmp_path / "raw", silent)
    split_clips(FolderClips(kind="folder", folder=tmp_path / "raw"), tmp_path / "second", 0.2, tmp_path / "unused", silent)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_split_of_a_union_of_made_sets(tmp_path: Path) -> None:
    if not (assets_folder() / "make_clips.py").is_file():
        pytest.skip(f"needs {assets_folder() / 'make_clips.py'} (set LUTETIA_ASSETS)")
    source = MadeClips(kind="made", sets={"digits": 40, "emoji": 40}, size=32)
    counts = split_clips(source, tmp_path / "clips", 0.2, tmp_path / "raw", silent)
    assert set(counts.roles["train"]) == {"digits", "emoji"}
    assert disjoint(tmp_path / "clips")
    rows = [json.loads(line) for line in (tmp_path / "raw" / "emoji" / "metadata.jsonl").read_text().splitlines()]
    held = {row["caption"].casefold() for row in rows if row["split"] == "test"}
    assert contents(tmp_path / "clips")["test"][1] & held


def test_split_without_the_maker_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTETIA_ASSETS", str(tmp_path))
    with pytest.raises(DataError, match=r"make_clips.py do not exist; set LUTETIA_ASSETS"):
        split_clips(MadeClips(kind="made", sets={"lpc": 3}), tmp_path / "clips", 0.1, tmp_path / "raw", silent)
