"""Listings: three sources of captions, and every fault of a folder by name."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from lutetia.models.data.ingest.listing import read_listing
from lutetia.system.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files with the names of clips; nothing is decoded here."""
    (tmp_path / "deep").mkdir()
    for name in ("a.mp4", "deep/b.gif"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def rows(folder: Path, *lines: object) -> Path:
    (folder / "metadata.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


A = {"file_name": "a.mp4", "caption": "a  dog\nruns"}
B = {"file_name": "deep/b.gif", "text": "a cat", "kind": "animal", "split": "validation"}


def test_a_list_of_captions_follows_the_first(folder: Path) -> None:
    several = {"file_name": "a.mp4", "captions": ["a dog  runs", "a dog runs", "", "it barks"]}
    clip, other = read_listing(rows(folder, several, {**B, "captions": ["a cat", "it purrs"]})).clips
    assert clip.captions == ("a dog runs", "it barks"), "tidy, each once"
    assert other.captions == ("a cat", "it purrs")
    for captions, says in (([7], "caption or kind that is not text"), ([f"dog {n}" for n in range(17)], "has 18 captions, more")):
        (bad,) = read_listing(rows(folder, {**A, "captions": captions}, B)).bad
        assert says in bad.reason


def test_metadata_jsonl_gives_captions_kinds_and_splits(folder: Path) -> None:
    listing = read_listing(rows(folder, A, "", B))
    assert [(clip.name, clip.caption, clip.kind, clip.split) for clip in listing.clips] == [
        ("a.mp4", "a dog runs", "", "train"),
        ("deep/b.gif", "a cat", "animal", "test"),
    ]
    assert listing.bad == []


def test_metadata_csv_gives_the_same(folder: Path) -> None:
    (folder / "metadata.csv").write_text('\ufefffile_name,text,split\na.mp4,"a dog, running",train\ndeep/b.gif,a cat,test\n')
    listing = read_listing(folder)
    assert [(clip.name, clip.caption, clip.split) for clip in listing.clips] == [
        ("a.mp4", "a dog, running", "train"),
        ("deep/b.gif", "a cat", "test"),
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b"])
def test_only_line_breaks_end_a_row(folder: Path, separator: str) -> None:
    caption = f"a dog{separator}runs"
    table = folder / "metadata.jsonl"
    row = json.dumps({"file_name": "a.mp4", "caption": f"a dog{separator}runs"}, ensure_ascii=False)
    table.write_text(row + "\r\n", newline="")
    assert [clip.caption for clip in read_listing(folder).clips] == ["a dog runs"]
    table.unlink()
    (folder / "metadata.csv").write_text(f'file_name,caption\r\na.mp4,{caption}\r\ndeep/b.gif,"a\ncat"\r\n', newline="")
    assert [clip.caption for clip in read_listing(folder).clips] == ["a dog runs", "a cat"]


def test_text_file_of_the_same_name_is_the_caption(folder: Path) -> None:
    (folder / "a.txt").write_text("a dog\n")
    (folder / "deep/b.txt").write_text("a cat")
    assert [clip.caption for clip in read_listing(folder).clips] == ["a dog", "a cat"]


def test_clip_without_a_row_may_have_a_text_file(folder: Path) -> None:
    (folder / "deep/b.txt").write_text("a cat")
    assert [clip.caption for clip in read_listing(rows(folder, A)).clips] == ["a dog runs", "a cat"]


def test_each_folder_may_have_its_own_metadata(folder: Path) -> None:
    (folder / "deep/metadata.csv").write_text("file_name,caption\nb.gif,a cat\n")
    listing = read_listing(rows(folder, A))
    assert [(clip.name, clip.caption, clip.path) for clip in listing.clips][1] == ("deep/b.gif", "a cat", folder / "deep/b.gif")
    (bad,) = read_listing(rows(folder, A, B)).bad
    assert bad.reason == "deep/metadata.csv line 2: b.gif is listed 2 times; keep one row per file"
    (folder / "deep/metadata.csv").write_text("file_name,caption\n../a.mp4,a cat\n")
    assert any("lies outside the folder" in bad.reason for bad in read_listing(folder).bad)


def test_hidden_files_are_ignored(folder: Path) -> None:
    (folder / ".hidden.mp4").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache/c.mp4").write_bytes(b"x")
    assert read_listing(rows(folder, A, B)).bad == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": "deep/b.gif"}, "has no caption; write one"),
        ({"file_name": "deep/b.gif", "caption": "  "}, "has no caption; write one"),
        ({"file_name": "deep/b.gif", "caption": 7}, "not text"),
        ({"file_name": "deep/b.gif", "caption": "x" * 3000}, "more than 2000"),
        ({"file_name": "deep/b.gif", "caption": "x", "split": "exam"}, "has the split 'exam'; write train, validation or test"),
        ({"file_name": "deep/b.gif", "caption": "x", "kind": "k" * 80}, "kind longer than 64"),
        ({"caption": "x"}, "has no file_name"),
        ({"file_name": "gone.mp4", "caption": "x"}, "gone.mp4 does not exist; remove the row or add the file"),
        ({"file_name": "/etc/passwd.mp4", "caption": "x"}, "lies outside the folder"),
        ({"file_name": "../a.mp4", "caption": "x"}, "lies outside the folder"),
        ({"file_name": "deep/../../a.mp4", "caption": "x"}, "lies outside the folder"),
        ({"file_name": "deep\\b.gif", "caption": "x"}, "not a plain relative path"),
        ({"file_name": "a\0.mp4", "caption": "x"}, "not a plain relative path"),
        ({"file_name": "metadata.jsonl", "caption": "x"}, "is not a supported video"),
    ],
)
def test_faulty_row_is_named_with_its_line_and_a_remedy(folder: Path, row: dict[str, object], words: str) -> None:
    bad = read_listing(rows(folder, A, row)).bad
    assert any(words in clip.reason and "metadata.jsonl line 2" in clip.reason for clip in bad)


def test_clip_without_caption_is_named(folder: Path) -> None:
    (bad,) = read_listing(rows(folder, A)).bad
    assert bad.reason == "deep/b.gif has no caption; add a row in metadata.jsonl or metadata.csv, or a file b.txt beside it"


def test_file_listed_twice_is_named_once_and_not_used(folder: Path) -> None:
    listing = read_listing(rows(folder, A, B, A))
    assert [clip.name for clip in listing.clips] == ["deep/b.gif"]
    assert [bad.reason for bad in listing.bad] == ["metadata.jsonl line 1: a.mp4 is listed 2 times; keep one row per file"]


def test_links_outside_the_folder_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.mp4"
    outside.write_bytes(b"x")
    (folder / "link.mp4").symlink_to(outside)
    (folder / "link.txt").write_text("a link")
    for prepare in (lambda: rows(folder, A, B), lambda: rows(folder, A, B, {"file_name": "link.mp4", "caption": "x"})):
        prepare()
        assert ["leads outside" in bad.reason for bad in read_listing(folder).bad] == [True]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", '{"file_name": "a.mp4"', "line 1 is not JSON"),
        ("metadata.jsonl", '["a.mp4"]', "line 1 is not an object"),
        ("metadata.jsonl", "\n", "has no rows"),
        ("metadata.csv", "name,caption\na.mp4,x\n", "no column file_name"),
        ("metadata.csv", "file_name;caption\na.mp4;x\n", "separates its columns with semicolons or tabs; save it with commas"),
        ("metadata.csv", "file_name,caption\na.mp4,one,two\n", "line 2 has more values than columns"),
    ],
)
def test_unreadable_metadata_is_refused(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_listing(folder)


def test_metadata_in_another_encoding_is_refused(folder: Path) -> None:
    (folder / "metadata.jsonl").write_bytes('{"file_name": "a.mp4", "caption": "café"}'.encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        read_listing(folder)


def test_two_metadata_files_are_refused(folder: Path) -> None:
    (rows(folder, A) / "metadata.csv").write_text("file_name,caption\n")
    with pytest.raises(DataError, match="both metadata.jsonl and metadata.csv"):
        read_listing(folder)


def test_absent_or_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder of clips"):
        read_listing(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no clips"):
        read_listing(tmp_path)


def test_every_suffix_of_video_is_listed(tmp_path: Path) -> None:
    for suffix in ["avi", "ts", "mts", "mpg", "ogv", "wmv", "flv", "3gp", "y4m", "apng", "AVI", "Mov"]:
        (tmp_path / f"{suffix}.{suffix}").write_bytes(b"x")
        (tmp_path / f"{suffix}.txt").write_text("a dog")
    assert (len(read_listing(tmp_path).clips), read_listing(tmp_path).unused) == (12, [])


def test_whatever_is_not_used_is_named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("notes.doc", "deep/a.jpg", "b.jpg", "more.zip", "gone.txt"):
        (folder / name).write_bytes(b"x")
    outside = tmp_path_factory.mktemp("linked")
    (outside / "c.mp4").write_bytes(b"x")
    (folder / "linked").symlink_to(outside)
    listing = read_listing(rows(folder, A, B))
    assert {each.name: each.reason.split(";")[0] for each in listing.unused} == {
        "b.jpg": "a picture without a caption of its own, or of the name of a video",
        "deep/a.jpg": "a picture without a caption of its own, or of the name of a video",
        "notes.doc": "not a video by its suffix",
        "more.zip": "an archive that is not read",
        "gone.txt": "no video or picture has this name",
        "linked": "a linked folder is not entered",
    }
    assert listing.unused_in_short().startswith("2 .jpg, 1 .")
    assert (len(listing.clips), listing.bad) == (2, [])


def test_folder_without_clips_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "b.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="; it holds 2 .jpg; name another folder"):
        read_listing(tmp_path)


@pytest.mark.parametrize("by_row", [False, True])
def test_links_in_a_loop_and_pipes_are_named(folder: Path, by_row: bool) -> None:
    (folder / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "loop.txt").write_text("a loop")
    (folder / "pipe.txt").write_text("a pipe")
    more = [{"file_name": name, "caption": "x"} for name in ("loop.mp4", "pipe.mp4")] if by_row else []
    bad = read_listing(rows(folder, A, B, *more)).bad
    where = {"loop.mp4": "metadata.jsonl line 3: loop.mp4", "pipe.mp4": "metadata.jsonl line 4: pipe.mp4"} if by_row else {}
    assert [each.reason for each in bad] == [
        f"{where.get('loop.mp4', 'loop.mp4')} is a link that leads nowhere; remove it",
        f"{where.get('pipe.mp4', 'pipe.mp4')} is no regular file; remove it",
    ]


def test_name_that_is_not_utf8_is_read_and_can_be_printed(tmp_path: Path) -> None:
    for name, text in ((b"caf\xe9.mp4", b"x"), (b"caf\xe9.txt", b"a dog"), (b"\xff.mp4", b"x"), (b"\xfe.dat", b"x")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(text)
    listing = read_listing(tmp_path)
    assert [(clip.name, clip.caption) for clip in listing.clips] == [("caf\\xe9.mp4", "a dog")]
    assert [bad.name for bad in listing.bad] == ["\\xff.mp4"]
    assert [each.name for each in listing.unused] == ["\\xfe.dat"]
    assert all(each.name.encode() for each in (*listing.clips, *listing.bad, *listing.unused))
    assert listing.clips[0].path.open("rb").read() == b"x"


def test_names_and_captions_are_equal_in_every_normal_form(tmp_path: Path) -> None:
    composed, parts = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    (tmp_path / f"{parts}.mp4").write_bytes(b"x")
    (tmp_path / "b.mp4").write_bytes(b"x")
    rows(tmp_path, {"file_name": f"{composed}.mp4", "caption": f"a {parts}"}, {"file_name": "b.mp4", "caption": f"a {composed}"})
    listing = read_listing(tmp_path)
    assert [clip.caption for clip in listing.clips] == [f"a {composed}"] * 2
    assert listing.bad == []
