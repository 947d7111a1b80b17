"""Decoder processes: limits of memory and time, and work in threads. What a file does to its decoder ends no build."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from lutetia.models.data.decode.clip import decode_clip
from lutetia.models.data.decode.cut import ClipRefused
from lutetia.models.data.decode.pool import DecoderPool, in_pool, memory_of_a_clip
from lutetia.models.data.decode.shape import ClipShape
from tests.models.data.clip_files import look, numbered, write_video

SHAPE = ClipShape(height=32, width=32)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_video(tmp_path / "sound.mp4", look("ball", 1))


def test_pool_gives_what_decoding_here_gives(sound: Path) -> None:
    with DecoderPool() as pool:
        frames = [pool.decode(sound, SHAPE), pool.decode(sound, SHAPE)]
    assert all((each == decode_clip(sound, SHAPE)).all() for each in frames)


def test_small_file_with_an_enormous_picture_meets_the_memory_limit(tmp_path: Path, sound: Path) -> None:
    """A few hundred bytes, whose picture takes 130 MB to decode. The same pool goes on to the next clip."""
    greedy = write_video(tmp_path / "greedy.gif", numbered(8))
    data = bytearray(greedy.read_bytes())
    data[6:10] = (5700).to_bytes(2, "little") * 2
    greedy.write_bytes(data)
    with DecoderPool(memory=96) as pool:
        with pytest.raises(ClipRefused, match=r"^greedy.gif cannot be decoded .*; remove it or encode it again"):
            pool.decode(greedy, SHAPE)
        assert pool.decode(sound, SHAPE).shape == (8, 32, 32, 3)


def test_workers_share_half_of_the_memory() -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    for workers in (1, 2, 16, 256):
        each = memory_of_a_clip(workers)
        assert 256 <= each <= 2048
        assert each == 256 or each * workers <= machine / 2


def test_file_that_never_ends_meets_the_deadline(tmp_path: Path, sound: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it waits for a writer
    with DecoderPool(seconds=1.5) as pool:
        with pytest.raises(ClipRefused, match=r"^pipe.mp4 takes longer than 1.5 s to decode; remove it or raise clip_seconds"):
            pool.decode(tmp_path / "pipe.mp4", SHAPE)
        assert pool.decode(sound, SHAPE).shape == (8, 32, 32, 3)


def test_closing_ends_running_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    pool, ended = DecoderPool(seconds=60), threading.Event()

    def work() -> None:
        with pytest.raises(ClipRefused):
            pool.decode(tmp_path / "pipe.mp4", SHAPE)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    with open(tmp_path / "pipe.mp4", "wb"):  # returns once the decoder has opened the other end
        pool.close()
        assert ended.wait(30)
    thread.join()
    with pytest.raises(ClipRefused, match="interrupted"):
        pool.decode(tmp_path / "pipe.mp4", SHAPE)


def test_threads_keep_order_and_pass_on_refusals() -> None:
    def work(number: int) -> int:
        if number % 7 == 3:
            raise ClipRefused(f"{number} is bad")
        return number * number

    outcomes = list(in_pool(range(40), work, 3))
    assert [item for item, _ in outcomes] == list(range(40))
    assert all(isinstance(o, ClipRefused) if i % 7 == 3 else o == i * i for i, o in outcomes)


def test_stopping_early_stops_running_work() -> None:
    stop = threading.Event()
    outcomes = in_pool(range(100), lambda number: number if number == 0 else stop.wait(60), 2, stop.set)
    assert next(outcomes) == (0, 0)
    outcomes.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert stop.is_set()


def test_frames_can_be_read_from_an_archive_member(tmp_path: Path, sound: Path) -> None:
    from lutetia.models.data.ingest.webdataset import TarMember

    archive = tmp_path / "a.tar"
    archive.write_bytes(b"x" * 100 + sound.read_bytes() + b"y" * 100)
    member = TarMember(archive, "in/sound.mp4", 100, sound.stat().st_size)
    with DecoderPool() as pool:
        assert np.array_equal(pool.decode(member, SHAPE), decode_clip(sound, SHAPE))
