"""Fixtures of the fault suite. One swarm serves the faults of several files; every test starts from `pair.ready()`."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from .pair import Pair
from .world import world


@pytest_asyncio.fixture(scope="session", loop_scope="session")
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
