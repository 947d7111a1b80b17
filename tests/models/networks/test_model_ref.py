"""References to models: a folder that is missing is never taken for a repository on a hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from lutetia.models.networks.model_ref import parse_ref
from lutetia.system.errors import ConfigError


def test_missing_folder_beside_existing_ones_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_ref("encoders/clip", "text encoder", ()).folder is None
    (tmp_path / "encoders").mkdir()
    with pytest.raises(ConfigError, match="'encoders/clip' is no folder, but encoders is one here"):
        parse_ref("encoders/clip", "text encoder", ())
    (tmp_path / "encoders" / "clip").mkdir()
    assert parse_ref("encoders/clip", "text encoder", ()).folder == tmp_path / "encoders" / "clip"


def test_folder_that_disappears_is_not_asked_for_at_a_hub(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    model = parse_ref(str(tmp_path / "encoder"), "text encoder", ())
    (tmp_path / "encoder").rmdir()
    assert model.options == {"local_files_only": True}


def test_hub_id_is_read_offline_unless_allowed() -> None:
    options = {"subfolder": "sub", "revision": "v1"}
    assert parse_ref("owner/name/sub@v1", "x", ()).options == {**options, "local_files_only": False}
    assert parse_ref("owner/name/sub@v1", "x", (), hub=False).options == {**options, "local_files_only": True}
