"""Temperature limit: while a device's sensor is above the volunteer's limit, its training gets a smaller share of the time.

Short rests between steps keep the shard, which a pause would release, and the fan runs evenly.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """A sensor's reading. `card`: the id of the card that it is of, as NVIDIA's tool names it; empty: of the processor."""

    sensor: str
    celsius: float
    card: str = ""


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


def read_sensors(devices: Sequence[str]) -> list[Temperature]:
    """Readings of the processor and, unless `devices` are of the CPU, of visible NVIDIA GPUs."""
    return _processor() + ([] if all(device.startswith("cpu") for device in devices) else _nvidia())


def hottest(readings: Iterable[Temperature]) -> Temperature | None:
    return max(readings, key=lambda reading: reading.celsius, default=None)


def temperature_of(device: str, cards: Sequence[str], readings: Sequence[Temperature]) -> Temperature | None:
    """The reading that counts for a device: the hottest of its own cards, or of the processor; None without a sensor.

    A device whose card has no sensor of its own, or is not known yet, goes by the hottest of all.

    Args:
        device: its name.
        cards: ids of its cards, from its probe.
        readings: of this machine's sensors.
    """
    own = [reading for reading in readings if (not reading.card if device.startswith("cpu") else reading.card in cards)]
    return hottest(own or readings)


def check_sensors(devices: Sequence[str]) -> None:
    """Raises HardwareError if this machine has no temperature sensor, so that no limit can be kept."""
    if not read_sensors(devices):
        raise HardwareError("this machine has no temperature sensor, so max_temp cannot be kept; set a duty instead")


class HeatedDevice(Protocol):
    """What the limit needs of a device."""

    @property
    def name(self) -> str: ...

    @property
    def cards(self) -> Sequence[str]:
        """Ids of its cards, as NVIDIA's tool names them."""
        ...

    async def set_heat(self, reading: Temperature, share: float, slowed: str | None) -> None:
        """Its temperature, its new share of time (0 to 1), and why that is below 1; None at full speed."""
        ...


async def limit_temperature(limit: float, devices: Callable[[], Sequence[HeatedDevice]]) -> None:
    """Adjust each device's share of training time to its own temperature, in degrees Celsius, until cancelled."""
    shares: dict[str, float] = {}
    while True:
        heated = devices()
        readings = await asyncio.to_thread(read_sensors, [device.name for device in heated])
        for device in heated:
            if reading := temperature_of(device.name, device.cards, readings):
                before = shares.get(device.name, 1.0)
                share = shares[device.name] = next_duty_cycle(before, reading.celsius, limit)
                shown = f"{reading.sensor} is at {reading.celsius:.0f} °C, limit {limit:g}: training {share:.0%} of the time"
                if (before < 1) != (share < 1):
                    again = f"{reading.sensor} is at {reading.celsius:.0f} °C again: training at full speed"
                    log.info("%s: %s", device.name, shown if share < 1 else again)
                await device.set_heat(reading, share, shown if share < 1 else None)
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
    command = ["nvidia-smi", "--query-gpu=uuid,name,temperature.gpu", "--format=csv,noheader,nounits", *only]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia(shown)


def parse_nvidia(shown: str) -> list[Temperature]:
    """Lines of id, name and degrees, as nvidia-smi prints them; a GPU without a sensor shows [N/A]."""
    lines = [(*line.partition(",")[::2], line.rpartition(",")[2].strip()) for line in shown.splitlines()]
    return [
        Temperature(rest.rpartition(",")[0].strip(), float(celsius), card.strip())
        for card, rest, celsius in lines
        if celsius.isdecimal()
    ]
