"""WebDataset archives: clips in tar files are read like files, byte for byte."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lutetia.models.data.decode.clip import decode_clip, hash_file
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.data.ingest.listing import read_listing
from lutetia.models.data.ingest.webdataset import TarMember
from tests.models.data.clip_files import numbered, write_video

SHAPE = ClipShape(frames=8, fps=8.0, height=32, width=32)


def pack(archive: Path, members: dict[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w", format=form) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return archive


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp", ".mov"])
def test_member_decodes_like_the_file(tmp_path: Path, suffix: str):
    file = write_video(tmp_path / f"a{suffix}", numbered(12))
    pack(tmp_path / "set/0.tar", {"x.txt": "before", f"17{suffix}": file.read_bytes(), "17.txt": "grey"})
    (clip,) = read_listing(tmp_path / "set").clips
    assert isinstance(clip.path, TarMember)
    assert (clip.name, clip.caption) == (f"0.tar/17{suffix}", "grey")
    assert hash_file(clip.path) == hash_file(file)
    assert np.array_equal(decode_clip(clip.path, SHAPE), decode_clip(file, SHAPE))


def test_json_gives_caption_kind_split_and_text_a_caption(tmp_path: Path):
    about = {"caption": "a  cat", "kind": "animal", "split": "test", "width": 640}
    pack(tmp_path / "a.tar", {"./d/1.mp4": b"x", "./d/1.json": json.dumps(about), "./d/1.txt": "not this"})
    pack(tmp_path / "deep/b.tar", {"2.mp4": b"x", "2.json": '{"kind": "k"}', "2.txt": "\ufeffa dog\n"}, tarfile.GNU_FORMAT)
    (tmp_path / "c.mp4").write_bytes(b"x")
    (tmp_path / "c.txt").write_text("a file beside the archives")
    listing = read_listing(tmp_path)
    assert listing.bad == []
    assert [(clip.name, clip.caption, clip.kind, clip.split) for clip in listing.clips] == [
        ("a.tar/d/1.mp4", "a cat", "animal", "test"),
        ("c.mp4", "a file beside the archives", "", "train"),
        ("deep/b.tar/2.mp4", "a dog", "k", "train"),
    ]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"1.mp4": b"x"}, "has no caption"),
        ({"1.mp4": b"x", "1.json": "[1]"}, "1.json is not an object"),
        ({"1.mp4": b"x", "1.json": "{"}, "cannot be read"),
        ({"1.mp4": b"x", "1.json": "[" * 100_000}, "nested too deeply"),
        ({"1.mp4": b"x", "1.txt": b"\xff\xfe\xfa"}, "in UTF-8"),
        ({"1.mp4": b"x", "1.txt": "x" * (1 << 21)}, "too many for a caption"),
        ({"1.mp4": b"x", "1.json": '{"caption": 7}'}, "not text"),
        ({"1.mp4": b"x", "1.json": '{"caption": "a", "split": "dev"}'}, "write train, validation or test"),
        ({"1.mp4": b"x", "1.gif": b"x", "1.txt": "a"}, "holds 2 videos"),
    ],
)
def test_unusable_sample_is_named(tmp_path: Path, members: dict[str, bytes | str], words: str):
    pack(tmp_path / "a.tar", members)
    listing = read_listing(tmp_path)
    assert listing.clips == []
    (bad,) = listing.bad
    assert bad.name.startswith("a.tar/1")
    assert words in bad.reason


def test_links_hidden_files_and_outside_paths_are_not_used(tmp_path: Path):
    outside = tmp_path / "secret.mp4"
    outside.write_bytes(b"secret")
    archive = pack(tmp_path / "set/a.tar", {"1.mp4": b"x", "1.txt": "a", ".2.mp4": b"x", "../3.mp4": b"x", "3.txt": "b"})
    with tarfile.open(archive, "a") as tar:
        for name, kind in (("4.mp4", tarfile.SYMTYPE), ("5.mp4", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(outside)
            tar.addfile(info)
    listing = read_listing(tmp_path / "set")
    assert [clip.name for clip in listing.clips] == ["a.tar/1.mp4"]
    assert listing.bad == []
    assert [each.name for each in listing.unused] == ["a.tar/3.txt", "a.tar/4.mp4", "a.tar/5.mp4"]


def test_archive_linked_outside_the_folder_is_not_read(tmp_path: Path):
    archive = pack(tmp_path / "elsewhere.tar", {"1.mp4": b"x", "1.txt": "a"})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.tar").symlink_to(archive)
    (bad,) = read_listing(tmp_path / "set").bad
    assert "leads outside the folder" in bad.reason


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_archive_is_left_out_as_a_whole(tmp_path: Path, damage: str):
    archive = pack(tmp_path / "a.tar", {"1.mp4": bytes(5000), "1.txt": "a", "2.mp4": bytes(90_000)})
    whole = archive.read_bytes()
    archive.write_bytes({"cut": whole[:20_000], "noise": b"noise" * 500, "empty": b""}[damage])
    (bad,) = read_listing(tmp_path).bad
    assert bad.name == "a.tar"
    assert "it must be a complete plain tar file" in bad.reason


def test_compressed_archive_is_refused(tmp_path: Path):
    pack(tmp_path / "a.tar", {"1.mp4": b"x", "1.txt": "a"})
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "a.tar", "a.tar")
    listing = read_listing(tmp_path)
    assert len(listing.clips) == 1
    (bad,) = listing.bad
    assert "b.tar.gz is compressed" in bad.reason


def test_members_can_be_read_in_parallel(tmp_path: Path):
    """Each reader has its own position and stops at the end of its member."""
    pack(tmp_path / "a.tar", {f"{n}.mp4": bytes([n]) * 3000 for n in range(3)} | {f"{n}.txt": "a" for n in range(3)})
    files = [clip.path.open("rb") for clip in read_listing(tmp_path).clips]
    read = [[file.read(1000) for file in files] for _ in range(4)]
    assert read == [[bytes([n]) * 1000 for n in range(3)]] * 3 + [[b""] * 3]
    assert files[1].seek(-10, io.SEEK_END) == 2990
    assert files[1].read() == bytes([1]) * 10
    for file in files:
        file.close()
