"""Keeping a box cool: while a sensor is above the volunteer's limit, training rests a larger share of the time.

Resting between steps rather than pausing keeps the shard, and a fan that turns evenly is heard less than one that comes and goes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil

from lutetia.node.settings import LEAST_SHARE
from lutetia.system.errors import HardwareError

log = logging.getLogger(__name__)

_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "x86_pkg_temp", "cpu_thermal", "cpu-thermal", "soc_thermal", "acpitz")
_PLAUSIBLE = (1.0, 150.0)
_MARGIN = 3.0  # degrees below the limit from which on it may go faster again
_LOOK_SECONDS = 5.0
_ASKED_SECONDS = 10.0


@dataclass(frozen=True)
class Temperature:
    """What a sensor shows, in degrees Celsius."""

    sensor: str
    celsius: float


def next_share(share: float, celsius: float, limit: float) -> float:
    """The share of time for the next seconds: by a fifth less for every three degrees too many, by a twentieth more for every
    three that are left, and as it is within three degrees below the limit."""
    steps = (limit - celsius) / _MARGIN
    if 0 <= steps <= 1:
        return share
    factor = 1.05 ** int(steps) if steps > 0 else 0.8 ** (1 + int(-steps))
    return min(1.0, max(LEAST_SHARE, share * factor))


def hottest(device: str) -> Temperature | None:
    """Of the processor, and unless `device` is cpu of the NVIDIA GPUs that may be used; None where nothing can be read."""
    found = _processor() + ([] if device == "cpu" else _nvidia())
    return max(found, key=lambda reading: reading.celsius, default=None)


def check_sensors(device: str) -> None:
    """Raises HardwareError where a limit could not be kept, because this box shows no temperature."""
    if hottest(device) is None:
        raise HardwareError("this box shows no temperature, so max_temp cannot be kept; leave it out and choose a duty instead")


async def keep_cool(
    limit: float, device: str, pace: Callable[[float], Awaitable[None]], slowed: Callable[[str | None], None]
) -> None:
    """Tell `pace` the share of time that the heat leaves, and `slowed` why it is not all (None: it is)."""
    share = 1.0
    while True:
        if found := await asyncio.to_thread(hottest, device):
            before, share = share, next_share(share, found.celsius, limit)
            shown = f"{found.sensor} shows {found.celsius:.0f} °C, and {limit:g} is the most: trains {share:.0%} of its time"
            if (before < 1) != (share < 1):
                log.info("%s", shown if share < 1 else f"cool again ({found.sensor} shows {found.celsius:.0f} °C): full pace")
            slowed(shown if share < 1 else None)
            await pace(share)
        await asyncio.sleep(_LOOK_SECONDS)


def _processor() -> list[Temperature]:
    """Of the first kind of sensor that there is, in the order of how much they tell."""
    read = getattr(psutil, "sensors_temperatures", None)  # not on macOS
    shown = read() if read else {}
    for chip in _CPU_SENSORS:
        found = [
            Temperature(chip, each.current) for each in shown.get(chip, ()) if _PLAUSIBLE[0] <= each.current <= _PLAUSIBLE[1]
        ]
        if found:
            return found
    return []


def _nvidia() -> list[Temperature]:
    if not shutil.which("nvidia-smi"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = [f"--id={visible}"] if visible else []
    command = ["nvidia-smi", "--query-gpu=name,temperature.gpu", "--format=csv,noheader,nounits", *only]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_ASKED_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia(shown)


def parse_nvidia(shown: str) -> list[Temperature]:
    """Lines of name and degrees, as nvidia-smi prints them; a GPU without a sensor shows [N/A]."""
    lines = [line.rpartition(",") for line in shown.splitlines()]
    return [Temperature(name.strip(), float(celsius)) for name, _, celsius in lines if celsius.strip().isdecimal()]
