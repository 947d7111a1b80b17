"""Every script of examples/ runs on tiny data, as a user would start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.parts.reader import load_shard
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.protocol.schema.manifest import SignedManifest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SECONDS = 300


def run_example(name: str, *arguments: object, cwd: Path) -> str:
    """What the script prints."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips/, data/ and run/, made by the first example."""
    folder = tmp_path_factory.mktemp("examples")
    printed = run_example("build_data.py", "clips", "data", cwd=folder)
    assert printed.count("shard ") == 3
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    create_run(folder / "data", folder / "run", RunSettings(preset="tiny", name="example", addresses=(f"127.0.0.1:{port}",)))
    return folder


@pytest.fixture(scope="module")
def ticket(folder: Path) -> Iterator[Path]:
    """The ticket of the run while it is served."""
    command = [sys.executable, "-m", "lutetia.cli", "coordinator", "serve", str(folder / "run")]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as coordinator:
        assert coordinator.stdout
        assert coordinator.stderr
        assert any("serving run" in line for line in coordinator.stderr), "the coordinator ended before it served"
        printed = [coordinator.stdout.readline().strip() for _ in range(3)]
        word = (folder / "run" / "ticket.txt").read_text().strip()
        assert printed == ["Run example is served. Volunteers join with:", "", f"lutetia join {word}"]
        yield folder / "run" / "ticket.txt"
        coordinator.send_signal(signal.SIGTERM)
        coordinator.communicate(timeout=60)


def test_every_example_has_a_test_and_a_row() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    own, listed = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert all(f'"{name}"' in own and name in listed for name in scripts)


def test_check_data_reports_every_shard(folder: Path) -> None:
    printed = run_example("check_data.py", "data", cwd=folder)
    assert printed.count("mean motion") == 3


def test_sample_mixture_writes_a_video(folder: Path) -> None:
    manifest = SignedManifest.model_validate_json((folder / "run" / "manifest.json").read_bytes()).manifest
    weights = [folder / f"weights-{shard}" for shard in range(len(manifest.shards))]
    for shard, file in enumerate(weights):
        data = load_shard(folder / "data" / "shards" / f"{shard:03d}.train.safetensors", manifest.latent)
        write_weights(ExpertTrainer(manifest, shard, data).snapshot(), file)
    stitch(folder / "mixture", manifest, weights, build_router(manifest))
    printed = run_example("sample_mixture.py", "mixture", "a purple star spins", "star.mp4", cwd=folder)
    assert "wrote star.mp4" in printed
    assert (folder / "star.mp4").stat().st_size > 0


def test_read_status_lists_every_expert(folder: Path, ticket: Path) -> None:
    printed = run_example("read_status.py", ticket, cwd=folder)
    assert printed.startswith("run example: 0 nodes")
    assert printed.count("  expert ") == 3


def test_simulate_swarm_keeps_every_promise(tmp_path: Path) -> None:
    printed = run_example("simulate_swarm.py", "--peers", 50, "--seconds", 300, cwd=tmp_path)
    assert "every promise held" in printed
