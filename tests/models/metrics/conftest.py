"""Skips tests whose weights are not on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lutetia.models.networks.assets import assets_folder


@pytest.fixture(scope="session")
def asset_or_skip() -> Callable[[str], Path]:
    """The path of an asset; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = assets_folder() / name
        if not path.exists():
            pytest.skip(f"needs {path} (set LUTETIA_ASSETS)")
        return path

    return find
