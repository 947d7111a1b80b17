"""Which galleries of earlier mixtures are kept, and how they reach the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lutetia.coordinator.galleries import keep_gallery, kept_galleries, to_drop
from lutetia.coordinator.run_folder import RunFolder


@given(st.lists(st.integers(0, 1000), unique=True, max_size=30).map(sorted), st.integers(1, 400))
def test_kept_galleries_fit_and_the_newest_stays(times: list[int], most: int) -> None:
    sizes = [10 + time % 7 for time in times]
    dropped = to_drop(times, sizes, most)
    kept = [place for place in range(len(times)) if place not in dropped]
    assert len(kept) == len(times) - len(dropped)
    assert sum(sizes[place] for place in kept) <= most or len(kept) == 1
    assert kept[-1:] == ([len(times) - 1] if times else [])
    assert len(kept) < 2 or kept[0] == 0
    if dropped:  # not one more than needed
        assert sum(sizes[place] for place in [*kept, dropped[-1]]) > most


def test_kept_galleries_are_spread_evenly() -> None:
    assert [time for time in range(17) if time not in to_drop(range(17), [1] * 17, 5)] == [0, 4, 8, 12, 16]
    assert len(to_drop(range(9), [1] * 9, 100, most=4)) == 5


def test_each_mixture_keeps_its_gallery_within_the_bound(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for number in range(4):
        run.gallery.mkdir(exist_ok=True)
        (run.gallery / "000.gif").write_bytes(b"GIF8" * 250)
        (run.gallery / "gallery.json").write_text(json.dumps({"mixture": f"{number:064x}", "clips": []}))
        os.utime(run.gallery / "gallery.json", (1000 + number, 1000 + number))
        keep_gallery(run, 3500)
    assert kept_galleries(run) == {f"{number:064x}": 1000.0 + number for number in (0, 2, 3)}
    assert (run.galleries / f"{3:064x}" / "000.gif").read_bytes() == b"GIF8" * 250
    (run.gallery / "gallery.json").write_text(json.dumps({"mixture": "../../else", "clips": []}))
    keep_gallery(run, 3500)
    assert len(list(run.galleries.iterdir())) == 3
