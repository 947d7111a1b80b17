"""One thread per test process: bits are equal only for equal shapes and equally many threads on one processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lutetia.models.networks.assets import assets_folder
from tests.models.emulated_device import emulated_device

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def asset_or_skip() -> Callable[[str], Path]:
    """The path of an asset; the test is skipped if it is absent."""

    def find(name: str) -> Path:
        path = assets_folder() / name
        if not path.exists():
            pytest.skip(f"needs {path} (set LUTETIA_ASSETS)")
        return path

    return find


@pytest.fixture(scope="module", params=["cpu", "emulated"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU, then a device whose tensors do not mix with the CPU's. A test that takes it runs on both."""
    if request.param == "cpu":
        yield "cpu"
        return
    with emulated_device() as name:
        yield name
