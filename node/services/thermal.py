"""Temperature limit: while a sensor is above the volunteer's limit, training gets a smaller share of the time.

Short rests between steps keep the shard, which a pause would release, and the fan runs evenly.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import psutil

from lutetia.node.settings import MIN_DUTY_CYCLE
from lutetia.system.errors import HardwareError

log = logging.getLogger(__name__)

_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "x86_pkg_temp", "cpu_thermal", "cpu-thermal", "soc_thermal", "acpitz")
_PLAUSIBLE = (1.0, 150.0)
_MARGIN = 3.0  # degrees Celsius below the limit in which the share stays as it is
_READ_SECONDS = 5.0
_NVIDIA_TIMEOUT = 10.0


@dataclass(frozen=True)
class Temperature:
    """A sensor's reading."""

    sensor: str
    celsius: float


def next_duty_cycle(share: float, celsius: float, limit: float) -> float:
    """The share of time for the next seconds, from the current `share`; temperatures in degrees Celsius.

    A fifth less for every started three degrees above the limit, a twentieth more for every three degrees below it, unchanged
    within three degrees below it.
    """
    steps = (limit - celsius) / _MARGIN
    if 0 <= steps <= 1:
        return share
    factor = 1.05 ** int(steps) if steps > 0 else 0.8 ** (1 + int(-steps))
    return min(1.0, max(MIN_DUTY_CYCLE, share * factor))


def hottest(devices: Sequence[str]) -> Temperature | None:
    """The hottest reading of processor and, unless `devices` are of the CPU, visible NVIDIA GPUs; None if there is no sensor."""
    readings = _processor() + ([] if all(device.startswith("cpu") for device in devices) else _nvidia())
    return max(readings, key=lambda reading: reading.celsius, default=None)


def check_sensors(devices: Sequence[str]) -> None:
    """Raises HardwareError if this machine has no temperature sensor, so that no limit can be kept."""
    if hottest(devices) is None:
        raise HardwareError("this machine has no temperature sensor, so max_temp cannot be kept; set a duty instead")


async def limit_temperature(
    limit: float,
    devices: Sequence[str],
    set_share: Callable[[float], Awaitable[None]],
    set_slowed: Callable[[str | None], None],
) -> None:
    """Adjust the share of training time to the temperature until cancelled.

    Args:
        limit: degrees Celsius.
        devices: as in the settings; parts of the CPU alone leave GPUs out.
        set_share: takes the new share of time, 0 to 1.
        set_slowed: takes why the share is below 1; None at full speed.
    """
    share = 1.0
    while True:
        if reading := await asyncio.to_thread(hottest, devices):
            before, share = share, next_duty_cycle(share, reading.celsius, limit)
            shown = f"{reading.sensor} is at {reading.celsius:.0f} °C, limit {limit:g}: training {share:.0%} of the time"
            if (before < 1) != (share < 1):
                log.info(
                    "%s", shown if share < 1 else f"{reading.sensor} is at {reading.celsius:.0f} °C again: training at full speed"
                )
            set_slowed(shown if share < 1 else None)
            await set_share(share)
        await asyncio.sleep(_READ_SECONDS)


def _processor() -> list[Temperature]:
    """Readings of the first kind of sensor in _CPU_SENSORS that this machine has."""
    read = getattr(psutil, "sensors_temperatures", None)  # not on macOS
    shown = read() if read else {}
    for chip in _CPU_SENSORS:
        readings = [
            Temperature(chip, each.current) for each in shown.get(chip, ()) if _PLAUSIBLE[0] <= each.current <= _PLAUSIBLE[1]
        ]
        if readings:
            return readings
    return []


def _nvidia() -> list[Temperature]:
    if not shutil.which("nvidia-smi"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = [f"--id={visible}"] if visible else []
    command = ["nvidia-smi", "--query-gpu=name,temperature.gpu", "--format=csv,noheader,nounits", *only]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia(shown)


def parse_nvidia(shown: str) -> list[Temperature]:
    """Lines of name and degrees, as nvidia-smi prints them; a GPU without a sensor shows [N/A]."""
    lines = [line.rpartition(",") for line in shown.splitlines()]
    return [Temperature(name.strip(), float(celsius)) for name, _, celsius in lines if celsius.strip().isdecimal()]
