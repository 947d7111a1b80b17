"""The checks of `lutetia doctor`. Each gives a verdict, what was found, and what to do about a problem."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lutetia.cli.formatting import size
from lutetia.system.errors import ConfigError, DiskError, HardwareError, IdentityError, UnreachableError, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

LOW_DISK, LOW_MEMORY = 2 << 30, 2 << 30
PACKAGES = ("torch", "diffusers", "safetensors", "hivemind", "libp2p", "uvloop", "pydantic", "av")
_STYLE = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class DoctorFinding:
    """The result of one check. `code` is the exit code of its failure."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    seen: str
    advice: str = ""
    code: int = 0


def run_checks(state_folder: Path) -> list[DoctorFinding]:
    """Run all checks of this machine, cheap ones first. None of them opens a connection to another machine."""
    checks: tuple[Callable[[], DoctorFinding], ...] = (
        check_python, check_packages, check_p2pd, check_ports,
        lambda: check_disk(state_folder), lambda: check_identity(state_folder), check_memory, check_temperature, check_device,
    )  # fmt: skip
    return [check() for check in checks]


def check_python() -> DoctorFinding:
    return DoctorFinding("python", "ok", f"{sys.version.split()[0]} in {sys.prefix}")


def check_packages() -> DoctorFinding:
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return DoctorFinding(
                "packages", "fail", f"{name} is missing", "install lutetia again with its constraints.txt", ConfigError.code
            )
    return DoctorFinding("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def check_p2pd() -> DoctorFinding:
    """Check that hivemind's libp2p daemon is installed and starts."""
    spec = importlib.util.find_spec("hivemind")
    places = list(spec.submodule_search_locations or []) if spec else []
    binary = Path(places[0]) / "hivemind_cli" / "p2pd" if places else None
    if binary is None or not os.access(binary, os.X_OK):
        return DoctorFinding(
            "p2pd", "fail", "hivemind's libp2p daemon is missing", "install the hivemind wheel for this system", 70
        )
    try:
        subprocess.run([binary, "-help"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return DoctorFinding(
            "p2pd", "fail", f"{binary} does not start: {error}", "install the hivemind wheel for this processor", 70
        )
    return DoctorFinding("p2pd", "ok", str(binary))


def check_ports() -> DoctorFinding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return DoctorFinding("ports", "ok", f"can listen on TCP (tried {server.getsockname()[1]} on loopback)")
    except OSError as error:
        return DoctorFinding(
            "ports", "fail", f"cannot listen on TCP: {error}", "allow this user to open sockets", UnreachableError.code
        )


def check_disk(folder: Path) -> DoctorFinding:
    place = folder.absolute()
    home = next(parent for parent in (place, *place.parents) if _there(parent))
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        problem = "cannot be written" if home.is_dir() else "is a file"
        return DoctorFinding("disk", "fail", f"{home} {problem}", "choose another --state-folder", DiskError.code)
    free = shutil.disk_usage(home).free
    seen = f"{size(free)} free for {folder}"
    if free < LOW_DISK:
        return DoctorFinding("disk", "warn", seen, f"checkpoints and shards need at least {size(LOW_DISK)}")
    return DoctorFinding("disk", "ok", seen)


def _there(path: Path) -> bool:
    """Whether `path` exists, as far as this user may see it."""
    with contextlib.suppress(PermissionError):
        return path.exists()
    return False


def check_identity(folder: Path) -> DoctorFinding:
    from lutetia.cli.arguments import key_path
    from lutetia.protocol.schema.identity import Identity

    path = key_path(folder)
    try:
        if not path.exists():
            return DoctorFinding("identity", "ok", f"none yet; `lutetia join` will make {path}")
        identity = Identity.load(path)
    except PermissionError:
        return DoctorFinding(
            "identity", "fail", f"this user may not read {path}", "choose another --state-folder", IdentityError.code
        )
    except IdentityError as error:
        return DoctorFinding("identity", "fail", str(error), "restore it with lutetia identity import", IdentityError.code)
    return DoctorFinding("identity", "ok", f"{identity.public_key[:16]}… in {path}; back it up with lutetia identity export")


def check_memory() -> DoctorFinding:
    import psutil

    available = psutil.virtual_memory().available
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seen = f"{size(available)} free, {cores} cores"
    if available < LOW_MEMORY:
        return DoctorFinding("memory", "warn", seen, "close other programs; small runs may still fit")
    return DoctorFinding("memory", "ok", seen)


def check_temperature() -> DoctorFinding:
    from lutetia.node.services.thermal import hottest, read_sensors

    reading = hottest(read_sensors(("auto",)))
    if reading is None:
        return DoctorFinding("temperature", "ok", "no sensor can be read, so --max-temp does not work here; use --duty")
    return DoctorFinding("temperature", "ok", f"{reading.celsius:.0f} °C ({reading.sensor})")


def check_device() -> DoctorFinding:
    """Ask torch for its devices in a child process, because a broken driver may hang."""
    code = "import torch; print(', '.join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or 'cpu')"
    try:
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return DoctorFinding(
            "device", "fail", "the driver did not answer within 60 s", "restart the machine or its driver", HardwareError.code
        )
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no error text"])[-1]
        return DoctorFinding(
            "device", "fail", f"torch does not start: {last}", "install torch for this system", HardwareError.code
        )
    return DoctorFinding("device", "ok", answer.stdout.strip())


def render_findings(findings: list[DoctorFinding]) -> RenderableType:
    """The findings as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3))
    for finding in findings:
        seen = plain(f"{finding.seen}; {finding.advice}" if finding.advice else finding.seen)
        table.add_row(Text(finding.verdict, style=_STYLE[finding.verdict]), plain(finding.check), Text(seen, overflow="fold"))
    return table
