"""A node above its temperature limit trains less; without a sensor it refuses the limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.node.services.thermal import Temperature, next_duty_cycle, parse_nvidia, read_sensors, temperature_of
from lutetia.node.settings import MIN_DUTY_CYCLE
from tests.node.scripted_coordinator import DaemonProcess, scripted_coordinator
from tests.node.tiny_run import make_run

SHARES, DEGREES = st.floats(MIN_DUTY_CYCLE, 1.0), st.floats(1, 150)


@given(SHARES, DEGREES, st.floats(30, 110))
def test_duty_cycle_follows_the_temperature(share: float, celsius: float, limit: float):
    after = next_duty_cycle(share, celsius, limit)
    assert MIN_DUTY_CYCLE <= after <= 1
    if celsius > limit:
        assert after < share or after == MIN_DUTY_CYCLE
    elif celsius >= limit - 3:
        assert after == share
    else:
        assert after >= share


@given(st.floats(50, 120), st.floats(0.02, 0.5), st.floats(60, 90))
def test_temperature_settles_below_the_limit(full: float, inertia: float, limit: float):
    """A machine at 35 degrees idle and `full` at full load; each reading is closer to that by the share `inertia`."""
    celsius, share, seen = 35.0, 1.0, []
    for _ in range(400):
        celsius += inertia * (35 + share * (full - 35) - celsius)
        share = next_duty_cycle(share, celsius, limit)
        seen.append(celsius)
    assert max(seen[200:]) < limit + 3
    assert min(seen[200:]) > min(full, limit) - 12, "training is not slowed more than needed"


def test_nvidia_smi_output_is_parsed():
    shown = "GPU-1a, NVIDIA GeForce RTX 3060, 71\nGPU-2b, NVIDIA H200, 44\nGPU-3c, Tesla K80, [N/A]\n"
    assert parse_nvidia(shown) == [
        Temperature("NVIDIA GeForce RTX 3060", 71, "GPU-1a"), Temperature("NVIDIA H200", 44, "GPU-2b"),
    ]  # fmt: skip
    assert parse_nvidia("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []


def test_each_device_goes_by_its_own_cards():
    processor, first, second = Temperature("coretemp", 50), Temperature("A", 90, "GPU-1"), Temperature("B", 60, "GPU-2")
    readings = [processor, first, second]
    assert temperature_of("cuda:0", ["GPU-1"], readings) == first
    assert temperature_of("cuda:1", ["GPU-2"], readings) == second, "the other card's heat slows nothing here"
    assert temperature_of("cuda:0+cuda:1", ["GPU-1", "GPU-2"], readings) == first
    assert temperature_of("cpu:1", [], readings) == processor
    assert temperature_of("cuda:2", [], readings) == first, "not probed yet, or without a sensor: the hottest of all"
    assert temperature_of("cuda:0", ["GPU-1"], []) is None


class Sensor:
    """A fake processor temperature in /sys, in its own mount namespace."""

    def __init__(self, folder: Path) -> None:
        thermal, empty = Path("/sys/class/thermal"), folder / "empty"
        if os.geteuid() != 0 or not thermal.is_dir():
            pytest.skip("needs root and /sys/class/thermal, to lay a folder over it")
        self.zone = folder / "thermal" / "thermal_zone0"
        self.zone.mkdir(parents=True)
        empty.mkdir()
        mounts = (
            f"mount --bind {folder / 'thermal'} {thermal}; ! test -d /sys/class/hwmon || mount --bind {empty} /sys/class/hwmon"
        )
        self.prefix = ["unshare", "--mount", "sh", "-ec", f'{mounts}; exec "$@"', "sh"]
        if subprocess.run([*self.prefix, "true"], capture_output=True).returncode:
            pytest.skip("this machine does not let root mount")

    def shows(self, celsius: float) -> None:
        (self.zone / "type").write_text("x86_pkg_temp\n")
        (self.zone / "temp").write_text(f"{1000 * celsius:.0f}\n")


@pytest.fixture
def sensor(tmp_path: Path) -> Sensor:
    return Sensor(tmp_path / "sensor")


@pytest.mark.timeout(600)
async def test_hot_node_trains_less_and_reports_why(sensor: Sensor, tmp_path: Path):
    sensor.shows(74)
    run = make_run(tmp_path / "run", heartbeat=1.0)
    async with scripted_coordinator(run, tmp_path / "coordinator") as coordinator:
        flags = ("--max-temp", "70")
        async with DaemonProcess.running(coordinator, tmp_path / "node", *flags, prefix=sensor.prefix) as daemon:
            status = await daemon.until(slowed=lambda why: why and "64%" in why)
            assert status["slowed"] == "x86_pkg_temp is at 74 °C, limit 70: training 64% of the time"
            assert (status["celsius"], status["devices"][0]["slowed"]) == (74, status["slowed"])
            sensor.shows(40)
            await daemon.until(slowed=None)
            await daemon.until(accepted=lambda count: count)
            assert "x86_pkg_temp is at 40 °C again: training at full speed" in daemon.log_text()


def test_doctor_shows_the_temperature_if_any(sensor: Sensor):
    def doctor() -> str:
        command = [
            *sensor.prefix,
            sys.executable,
            "-c",
            "from lutetia.cli.doctor.checks import check_temperature; print(check_temperature().seen)",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if not read_sensors(("auto",)):
        assert doctor() == "no sensor can be read, so --max-temp does not work here; use --duty"
    sensor.shows(61.4)
    assert doctor() == "61 °C (x86_pkg_temp)"


async def test_limit_without_a_sensor_is_refused_at_start(sensor: Sensor, tmp_path: Path):
    run = make_run(tmp_path / "run", heartbeat=1.0)
    async with scripted_coordinator(run, tmp_path / "coordinator") as coordinator:
        state = tmp_path / "node"
        daemon = await DaemonProcess.start(coordinator, state, "--max-temp", "70", prefix=sensor.prefix)
        assert await daemon.ended() == 20
        assert "lutetia: this machine has no temperature sensor, so max_temp cannot be kept" in daemon.log_text()
        assert not state.exists()
