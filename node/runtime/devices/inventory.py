"""Which devices this machine has, and whether that changed: a cheap look at the system's own files, and torch asked when it has.

A card may be added or lost while the node runs, and a driver may come up after it. Asking torch takes a process and seconds, so
that is done only when the files that the kernel and its drivers show have changed, and twice more within a minute: a driver may
show a card before it can be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from pydantic import Field, ValidationError

from lutetia.node.runtime.devices.trainer_process import TRAINER_MODULE
from lutetia.node.trainer.messages import DevicesListed, ListDevices, parse_report
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.system.errors import DiskError
from lutetia.system.files import write_atomic
from lutetia.system.process import Child

log = logging.getLogger(__name__)

POLL_SECONDS = 15.0
LISTING_SECONDS = 120.0
"""Seconds in which torch must have listed the devices: a driver may hang."""
_AGAIN = (0.0, 20.0, 50.0)
"""Seconds after a change at which torch is asked."""
_FILES = (
    "proc/driver/nvidia/version", "proc/driver/nvidia/gpus/*/information", "sys/module/*/version", "sys/module/*/srcversion",
    "sys/class/kfd/kfd/topology/nodes/*/name", "sys/bus/pci/drivers/*/*/device", "sys/bus/pci/drivers/*/*/subsystem_device",
    "sys/bus/pci/drivers/*/*/mem_info_vram_total",
)  # fmt: skip
_NAMES = ("dev/nvidia*", "dev/kfd", "dev/dri/renderD*", "dev/dxg", "proc/driver/nvidia/capabilities/*/mig/*")
_DRIVERS = ("nvidia", "amdgpu", "i915", "xe")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_UNSTEADY = ("IRQ", "GPU UUID")
"""Lines of NVIDIA's file that differ from one start of the same machine to the next, or until the card is first used."""


def hardware_mark(root: Path = Path("/")) -> str:
    """A digest of this machine's cards, processor and drivers, as the files under `root` show them. Takes milliseconds."""
    lines = [*_file_lines(root), *(f"{name}={os.environ.get(name)}" for name in _VISIBLE)]
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines.append(f"{cores} {psutil.virtual_memory().total}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_lines(root: Path) -> Iterator[str]:
    for pattern in _FILES:
        for each in (pattern.replace("/*/", f"/{driver}/", 1) for driver in _DRIVERS) if _by_driver(pattern) else (pattern,):
            for path in sorted(root.glob(each)):
                with contextlib.suppress(OSError):
                    lines = path.read_bytes()[:4096].decode(errors="replace").splitlines()
                    yield f"{path} {[line for line in lines if not line.startswith(_UNSTEADY)]}"
    for pattern in _NAMES:
        yield from map(str, sorted(root.glob(pattern)))


def _by_driver(pattern: str) -> bool:
    return pattern.startswith(("sys/module/", "sys/bus/pci/drivers/"))


class _Listing(Frozen):
    """The devices that were found last."""

    mark: str = Field(description="Digest of hardware and software for which they were found")
    devices: tuple[str, ...] = Field(min_length=1, description="Their names")


Seen = Callable[[Sequence[str] | None, Child | None], None]
"""Takes the devices (None where the volunteer names them) and a trainer process that may be used, whenever they may differ."""


class Inventory:
    """Watches this machine's hardware. `run` until it is cancelled, then `close`.

    Args:
        path: file with the devices that were found last, so that a restart need not ask torch.
        seen: is told.
        find: whether to list the devices; false: only tell that something changed.
        mark: the cheap look.
        poll: seconds between two looks.
    """

    def __init__(
        self, path: Path, seen: Seen, *, find: bool, mark: Callable[[], str] = hardware_mark, poll: float = POLL_SECONDS
    ) -> None:
        self.path, self._seen, self._find, self._mark, self._poll = path, seen, find, mark, poll
        self._due: list[float] = []
        self._wake = asyncio.Event()
        self._child: Child | None = None

    def look_again(self) -> None:
        """Something suggests that a device is gone or back."""
        if not self._due:
            self._due = [time.monotonic()]
            self._wake.set()

    async def run(self) -> None:
        known = await asyncio.to_thread(self._mark)
        if self._find and not await self._from_file(known):
            await self._list(known)
        while True:
            await self._rest()
            mark, now = await asyncio.to_thread(self._mark), time.monotonic()
            if mark != known:
                known = mark
                log.info("the cards or drivers of this machine have changed")
                self._due = [now + later for later in _AGAIN]
            if self._due and now >= self._due[0]:
                self._due.pop(0)
                if self._find:
                    await self._list(known)
                else:
                    self._seen(None, None)

    async def close(self) -> None:
        if self._child:
            await self._child.kill()

    async def _rest(self) -> None:
        """Until the next look is due, or `look_again`."""
        wait = min(self._poll, max(0.0, self._due[0] - time.monotonic())) if self._due else self._poll
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._wake.wait()

    async def _from_file(self, mark: str) -> bool:
        with contextlib.suppress(OSError, ValidationError):
            listing = _Listing.model_validate_json(await asyncio.to_thread(self.path.read_bytes))
            if listing.mark == _with_software(mark):
                log.info("devices, as found before: %s", ", ".join(listing.devices))
                self._seen(listing.devices, None)
                return True
        return False

    async def _list(self, mark: str) -> None:
        """Ask torch, in a process that may crash or hang. Without an answer the devices stay as they are for the time being."""
        found: tuple[str, ...] = ()
        self._child = child = await Child.start(TRAINER_MODULE)
        try:
            async with asyncio.timeout(LISTING_SECONDS):
                await child.send(ListDevices().to_wire())
                report = parse_report(await anext(child.messages(), {}))
                if isinstance(report, DevicesListed):
                    found = report.devices
                    log.info("devices: %s", "; ".join(report.reasons))
        except (TimeoutError, ConnectionError, ValueError) as error:
            log.warning("cannot list the devices of this machine (%s); check the driver", error or "no answer")
        finally:
            self._child = None
            if not found:
                await child.kill()
        if found:
            with contextlib.suppress(DiskError, OSError):
                await asyncio.to_thread(write_atomic, self.path, canonical(_Listing(mark=_with_software(mark), devices=found)))
            self._seen(found, child)
        elif not self._due:
            self._due = [time.monotonic() + _AGAIN[-1]]


def _with_software(mark: str) -> str:
    return f"{mark} torch {importlib.metadata.version('torch')}"
