"""The built wheel: what it holds, and that it runs from an empty folder without the source tree."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, listed):  # a copy, so that build leftovers of this tree cannot get in
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_nothing_but_lutetia_lands_in_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lutetia"}
    for room in ("system", "protocol", "models", "models/data", "models/metrics", "node", "coordinator", "simulation", "cli"):
        assert f"lutetia/{room}/__init__.py" in names
    assert not [name for name in names if "tests" in name or "benchmarks" in name]


def test_every_package_data_file_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    weights = [path.relative_to(ROOT) for path in (ROOT / "models/data/weights").rglob("*") if path.is_file()]
    assert weights
    assert {f"lutetia/{path}" for path in weights} <= names


def test_the_wheel_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies of this environment, without its editable installs (.pth files are not followed from a .pth).
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    code = "import sys; from lutetia.cli.main import main; sys.argv[0] = 'lutetia'; main()"
    run = subprocess.run([tmp_path / "venv/bin/python", "-c", code, "--help"], cwd=empty, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "join" in run.stdout
    assert not list(empty.iterdir())
