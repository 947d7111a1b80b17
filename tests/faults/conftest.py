"""Fixtures of the fault suite. One swarm serves the faults of a file; every test starts from `pair.ready()`.

LONG tests run in `make faults` alone (or with LUTETIA_FAULTS=all), so that every commit pays for the others only.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.world.pair import Pair
from tests.faults.world.world import world

LONG = {
    "test_killed_in_the_middle_of_writing_a_checkpoint",
    "test_killed_in_the_middle_of_an_upload",
    "test_its_trainer_hangs",
    "test_half_a_second_of_delay_and_as_much_jitter",
    "test_a_link_that_is_bad_one_way",
    "test_a_box_at_one_kibibyte_a_second",
    "test_ten_seconds_off_and_a_jump_in_the_middle_of_the_work",
    "test_a_box_whose_disk_turns_read_only",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("LUTETIA_FAULTS") != "all":
        skip = pytest.mark.skip(reason="takes long: make faults runs it")
        for item in items:
            if item.path.parent == Path(__file__).parent and item.name in LONG:
                item.add_marker(skip)


@pytest_asyncio.fixture(scope="module", loop_scope="session")  # it trains as long as it lives
async def _pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    folder = tmp_path_factory.mktemp("pair") / "world"
    with disk(folder / "disk"):
        async with world(folder, bulky=True) as place:
            await place.coordinator()
            yield Pair(place)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A disk of its own for the run's folder where root may mount one; an ordinary folder elsewhere."""
    folder.mkdir(parents=True)
    size = ["-t", "tmpfs", "-o", "size=512m", "tmpfs"]
    mounted = os.geteuid() == 0 and not subprocess.run(["mount", *size, folder], capture_output=True).returncode
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest_asyncio.fixture(loop_scope="session")
async def pair(_pair: Pair) -> AsyncIterator[Pair]:
    """A coordinator and two boxes. After the test the invariants are checked, whatever state it left them in."""
    yield _pair
    _pair.world.check()
