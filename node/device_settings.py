"""Which devices of a machine a node uses, and what each may take: how the settings name them. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ONE = r"(mps|(cpu|cuda|xpu)(:\d{1,3})?(\+(cpu|cuda|xpu):\d{1,3}){0,15})"
DEVICES = rf"^(auto|{_ONE}( *, *{_ONE}){{0,31}})$"
"""Pattern of the setting `device`. `cuda:0+cuda:1` is a unit: cards that train one expert together."""
_DEVICE = re.compile(_ONE)

Cap = int | dict[str, int]
"""A limit that holds for each device, or by device."""


@dataclass(frozen=True)
class DeviceChoice:
    """A device that a node uses, and what it may take.

    `name`: as the volunteer names it: cpu, cpu:N, mps, cuda:N or xpu:N. `threads`: CPU threads; None: the default of torch.
    `memory`: bytes; None: all that is free. `local_bytes_per_day`: bytes of local states written in a day.
    """

    name: str
    threads: int | None = None
    memory: int | None = None
    local_bytes_per_day: int = 300 * 10**9

    @property
    def torch_name(self) -> str:
        """The device in torch's words; a unit keeps its own.

        The processors of `cpu:0` and `cpu:1` are the same; only their threads are apart.
        """
        return "cpu" if self.name.startswith("cpu") and not self.is_unit else self.name

    @property
    def is_unit(self) -> bool:
        """Whether several cards train one expert together."""
        return "+" in self.name


def torch_cards(device: str) -> tuple[str, ...]:
    """The devices of a unit in torch's words; of another device it alone."""
    return tuple("cpu" if card.startswith("cpu") else card for card in device.split("+"))


def read_devices(text: str) -> tuple[str, ...]:
    """The names in the setting `device`, which matches DEVICES; `cuda` means `cuda:0`.

    Raises ValueError for a double, and for a unit of unlike devices.
    """
    names = [_plain(part.strip()) for part in text.split(",")]
    cards = [card for name in names for card in name.split("+")]
    numbered = [card if ":" in card else f"{card}:0" for card in cards]
    double = next((card for place, card in enumerate(cards) if numbered[place] in numbered[:place]), None)
    mixed = next((name for name in names if len({card.partition(":")[0] for card in name.split("+")}) > 1), None)
    if mixed is not None:
        raise ValueError(f"the cards of {mixed} differ in kind; a unit has cards of one kind, like cuda:0+cuda:1")
    if double is not None:
        raise ValueError(f"{double} is named twice; give each device once, and parts of the processor as cpu:0,cpu:1")
    return tuple(names)


def _plain(name: str) -> str:
    first, joint, others = name.partition("+")
    whole = f"{first}:0" if first in ("cuda", "xpu") or (joint and first == "cpu") else first
    return f"{whole}{joint}{others}"


def named_device(text: str, names: Sequence[str]) -> str:
    """The device that a volunteer means by its name or its number alone. Raises ValueError with those that there are."""
    text = text.strip()
    found = [name for name in names if _plain(text) == name or any(_means(text, card) for card in name.split("+"))]
    if len(found) == 1:
        return found[0]
    problem = f"{text} may mean {' or '.join(found)}" if found else f"this node has no device {text}"
    raise ValueError(f"{problem}; its devices are {', '.join(names) or 'not known yet'}")


def _means(text: str, card: str) -> bool:
    return text == (card.partition(":")[2] or "0") or _plain(text) == card


def read_cap(value: Any, number: Callable[[Any], Any] = int) -> Any:
    """A limit for each device (`4`), or by device (`cuda:0=4,cuda:1=2`, or a table). `number` reads one; it may raise ValueError.

    Raises ValueError when a name is no device.
    """
    if isinstance(value, str) and "=" in value:
        parts = [part.partition("=") for part in value.split(",")]
        value = {name.strip(): size.strip() for name, _, size in parts}
    if not isinstance(value, Mapping):
        return None if value is None else number(value)
    read: dict[str, Any] = {}
    for name, size in value.items():
        if not _DEVICE.fullmatch(str(name)):
            raise ValueError(f"{name!r} is no device; write it like cuda:0=…,cuda:1=…")
        read[_plain(str(name))] = number(size)
    return read


def unknown_cap(cap: Cap | None, devices: Sequence[str]) -> str | None:
    """A device of `cap` that is not among `devices`; None if there is none, or if those are found by the node itself."""
    if not isinstance(cap, dict) or tuple(devices) == ("auto",):
        return None
    return next((name for name in cap if name not in devices), None)


def _of(cap: Cap | None, device: str) -> int | None:
    return cap.get(device) if isinstance(cap, dict) else cap


def choose(
    devices: Sequence[str], threads: Cap | None, memory: Cap | None, local_bytes_per_day: int, cores: int | None = None
) -> tuple[DeviceChoice, ...]:
    """The devices with what each may take.

    Several devices share the processor: where no threads are set, each takes its part of the cores, because torch would let each
    take all of them. They share the bytes of local states, too, because they write to one disk.

    Args:
        devices: their names.
        threads: CPU threads of each.
        memory: bytes that each may take of its device.
        local_bytes_per_day: bytes of local states that the node may write in a day.
        cores: CPU cores; None: those that this process may use.
    """
    count = max(1, sum(len(name.split("+")) for name in devices))
    share = max(1, (cores or usable_cores()) // count) if count > 1 else None
    return tuple(
        DeviceChoice(name, _of(threads, name) or share, _of(memory, name), max(1, local_bytes_per_day // count))
        for name in devices
    )


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
