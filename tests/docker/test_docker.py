"""Images, compose file and systemd unit: their settings, and what their own linters say where these are installed."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"
IMAGES = sorted(DOCKER.glob("Dockerfile.*"))
UNIT = DOCKER / "lutetia-worker.service"


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        assert f"REQUIRE_{name.upper()}" not in os.environ, f"{name} is not installed"
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_image_is_slim_pinned_and_unprivileged(image: Path) -> None:
    text = image.read_text()
    assert re.findall(r"^FROM (\S+)", text, re.M) == ["python:${PYTHON}-slim"] * 2
    assert text.count("--constraint constraints.txt") == 2
    assert re.findall(r"^USER (\S+)", text, re.M) == ["10001"]
    assert "HEALTHCHECK" in text
    assert "--json" in text.split("HEALTHCHECK")[1]


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(image: Path) -> None:
    run = subprocess.run([tool("hadolint"), image], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_compose_has_one_coordinator_and_two_nodes() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert sorted(services) == ["coordinator", "grafana", "prometheus", "worker-1", "worker-2"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]
        if name in ("grafana", "prometheus"):
            continue
        assert (DOCKER.parent / service["build"]["dockerfile"]).is_file()
        assert any(volume.startswith("ticket:/ticket") for volume in service["volumes"]), name
    for name in ("worker-1", "worker-2"):
        assert services[name]["depends_on"]["coordinator"]["condition"] == "service_healthy"
        assert services[name]["command"] == ["join", "/ticket/ticket.txt"]


def test_docker_compose_accepts_the_file() -> None:
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker has no compose plugin")
    command = [docker, "compose", "--file", DOCKER / "compose.yaml", "config", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LUTETIA_DATA": "/data"})
    assert run.returncode == 0, run.stderr


def test_entry_script_passes_shellcheck() -> None:
    script = DOCKER / "serve-run.sh"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["sh", "-n", script]).returncode == 0
    run = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_unit_is_hardened() -> None:
    settings = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#"))
    wanted = {
        "Type": "notify", "KillMode": "mixed", "ProtectSystem": "strict", "NoNewPrivileges": "yes",
        "StateDirectory": "lutetia", "DynamicUser": "yes", "CapabilityBoundingSet": "",
    }  # fmt: skip
    assert wanted.items() <= settings.items()
    assert int(settings["TimeoutStopSec"]) >= 60  # a checkpoint is submitted after SIGTERM


@pytest.mark.parametrize(
    "driver",
    ["nvidia-frontend nvidia-uvm", "nvidia nvidiactl nvidia-uvm nvidia-caps", "drm kfd"],
    ids=["nvidia-old", "nvidia", "amd"],
)
def test_unit_allows_the_device_groups_of_every_driver(driver: str) -> None:
    """The names are those of /proc/devices, which systemd matches like file names."""
    allowed = re.findall(r"^DeviceAllow=char-(\S+) rw$", UNIT.read_text(), re.MULTILINE)
    for group in driver.split():
        assert any(fnmatch.fnmatch(group, pattern) for pattern in allowed), group


def test_unit_joins_the_groups_that_own_render_nodes() -> None:
    """/dev/kfd and /dev/dri/renderD128 are 0660 root:render; the unit runs as a user of its own."""
    assert "SupplementaryGroups=render video" in UNIT.read_text().splitlines()


@pytest.mark.parametrize("source", [UNIT, DOCKER / "lutetia-coordinator.service"], ids=lambda path: path.stem)
def test_unit_passes_systemd_analyze(source: Path, tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    unit = tmp_path / source.name
    unit.write_text(source.read_text().replace("/opt/lutetia/bin/lutetia", "/bin/true"))  # it is not installed here
    run = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert source.name not in run.stderr
