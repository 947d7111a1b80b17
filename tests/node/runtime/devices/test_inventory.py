"""Cards and drivers that come and go: the cheap look, and a node whose list of devices changes while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from lutetia.node.runtime.devices import inventory as watched
from lutetia.node.runtime.devices.inventory import Inventory, hardware_mark
from lutetia.system.process import Child

pytestmark = pytest.mark.timeout(600)

CARD = "Model: \t\t NVIDIA GeForce RTX 3080\nIRQ:   \t\t {irq}\nGPU UUID: \t {uuid}\nVideo BIOS: \t 94.02.42.80.{bios}\n"


def show_card(root: Path, number: int, irq: int = 130, uuid: str = "GPU-????????", bios: str = "27") -> None:
    path = root / "proc" / "driver" / "nvidia" / "gpus" / f"0000:0{number}:00.0" / "information"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CARD.format(irq=irq, uuid=uuid, bios=bios))


def test_mark_changes_with_cards_and_drivers_and_with_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    marks = [hardware_mark(tmp_path)]
    show_card(tmp_path, 1)
    marks.append(hardware_mark(tmp_path))
    show_card(tmp_path, 1, irq=131, uuid="GPU-5f6a1c2b")  # after a restart, and once the card was used
    assert hardware_mark(tmp_path) == marks[-1]
    show_card(tmp_path, 2)
    marks.append(hardware_mark(tmp_path))
    show_card(tmp_path, 2, bios="99")  # another card of the same name, with more memory
    marks.append(hardware_mark(tmp_path))
    (tmp_path / "proc" / "driver" / "nvidia" / "version").write_text("NVRM version: 570.86")
    marks.append(hardware_mark(tmp_path))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia-uvm").touch()
    marks.append(hardware_mark(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    marks.append(hardware_mark(tmp_path))
    assert len(set(marks)) == len(marks)
    assert watched.POLL_SECONDS + watched._AGAIN[1] < 60, "noticed within a minute, also where the driver was not ready at first"


async def test_devices_are_listed_at_the_start_after_a_change_and_from_the_file(tmp_path: Path):
    """The list itself comes from torch in a real process, which a new device goes on with."""
    mark, lists, heard = ["a"], list[Sequence[str] | None](), asyncio.Event()

    def seen(found: Sequence[str] | None, child: Child | None) -> None:
        lists.append(found)
        children.append(child)
        heard.set()

    async def next_list(inventory: Inventory) -> None:
        heard.clear()
        task = asyncio.create_task(inventory.run())
        await heard.wait()
        if len(lists) == 1:
            heard.clear()
            mark[0] = "b"
            await heard.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await inventory.close()

    children: list[Child | None] = []
    path = tmp_path / "devices.json"
    await next_list(Inventory(path, seen, find=True, mark=lambda: mark[0], poll=0.05))
    assert lists == [("cpu",), ("cpu",)], "this machine has no card"
    assert all(children)
    await next_list(Inventory(path, seen, find=True, mark=lambda: mark[0], poll=0.05))
    assert (lists[-1], children[-1]) == (("cpu",), None), "after a restart torch is not asked"
    for child in children:
        if child:
            await child.kill()
