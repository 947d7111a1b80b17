"""What a disk may do: be read-only, or full, while a checkpoint is written, a result taken in, or the ledger appended to."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.world.pair import Pair, owner
from tests.faults.world.processes import until
from tests.faults.world.world import events
from tests.node.small_disk import fill

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """As after the kernel has met an error on the disk: what is open stays open, nothing new can be written."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a folder read-only by a mount")
    # made read-only to one side and then laid over `folder`: done in place, it fails whenever a file is just being written there
    aside = folder.with_name(f"{folder.name} aside")
    aside.mkdir()
    if subprocess.run(["mount", "--bind", folder, aside], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", aside], check=True)
        subprocess.run(["mount", "--bind", aside, folder], check=True)
    finally:
        subprocess.run(["umount", "-l", aside], check=True)
        aside.rmdir()
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


async def test_a_box_whose_disk_turns_read_only(pair: Pair) -> None:
    """F9. One sentence says so; the checkpoint waits in memory; with the disk back, the work goes on where it was."""
    holder, _ = await pair.ready()
    author = await owner(holder)
    with read_only(holder.state):
        status = await holder.until(problem=lambda text: text and "read-only file system" in text)
        assert "\n" not in status["problem"]
        assert str(holder.state) in status["problem"]
    await pair.coordinator.accepts(2, author=author)
    await holder.until(problem=None)


async def test_the_coordinators_disk_is_full(pair: Pair) -> None:
    """F9. It cannot write its ledger, so it ends with one sentence and promises nothing; with space, it goes on from disk."""
    holder, _ = await pair.ready()
    run = pair.coordinator.run
    if not run.parent.is_mount():
        pytest.skip("needs root to give the coordinator a small disk")
    before, mark = events(run), pair.coordinator.mark()
    ballast = fill(run.parent)
    code = await until(lambda: pair.coordinator.process.returncode, "the coordinator to give up")
    assert code == 21, pair.coordinator.words(mark)
    assert pair.coordinator.words(mark).splitlines()[-1].startswith("lutetia: cannot ")
    assert (await holder.status())["state"] == "training"
    ballast.unlink()
    await pair.serve()
    await pair.coordinator.accepts(2, author=await owner(holder))
    assert events(run)[: len(before)] == before
