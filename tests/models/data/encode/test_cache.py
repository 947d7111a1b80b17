"""The cache by content: it persists, detects damaged packs and writes atomically."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lutetia.models.data.encode.cache import ArrayCache, array_cache, cache_key
from lutetia.system.paths import default_cache_folder
from tests.unprivileged import shared_folder, unprivileged

ARRAYS = {"latents": np.arange(12, dtype=np.float32).reshape(3, 4), "features": np.ones(5, np.float32)}


def test_cache_is_read_by_a_later_run(tmp_path: Path) -> None:
    ArrayCache(tmp_path).put({"one": ARRAYS, "two": {"latents": ARRAYS["latents"] + 1}})
    cache = ArrayCache(tmp_path)
    assert "one" in cache
    assert "three" not in cache
    first, second = cache.get("one"), cache.get("two")
    assert first is not None
    assert second is not None
    assert all((first[name] == ARRAYS[name]).all() for name in ARRAYS)
    assert (second["latents"] == ARRAYS["latents"] + 1).all()
    assert cache.get("three") is None


def test_known_keys_are_not_written_again(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    cache.put({"one": ARRAYS})
    cache.put({"one": ARRAYS})
    ArrayCache(tmp_path).put({"one": ARRAYS})
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_pack_is_deleted_and_written_again(tmp_path: Path) -> None:
    ArrayCache(tmp_path).put({"one": ARRAYS})
    (pack,) = tmp_path.iterdir()
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.write_bytes(data)
    cache = ArrayCache(tmp_path)
    assert cache.get("one") is None
    assert "one" not in cache
    cache.put({"one": ARRAYS})
    assert ArrayCache(tmp_path).get("one") is not None


def test_truncated_pack_is_deleted(tmp_path: Path) -> None:
    ArrayCache(tmp_path).put({"one": ARRAYS})
    (pack,) = tmp_path.iterdir()
    pack.write_bytes(pack.read_bytes()[:40])
    assert "one" not in ArrayCache(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_still_read(caplog: pytest.LogCaptureFixture) -> None:
    with shared_folder() as folder, shared_folder() as out:
        ArrayCache(folder).put({"one": ARRAYS})
        out.chmod(0o777)
        folder.chmod(0o555)
        with unprivileged(), array_cache(folder, out) as cache:
            assert cache.get("one") is not None
            cache.put({"two": ARRAYS})
            assert cache.get("two") is not None
            assert "LUTETIA_CACHE" in caplog.text
        assert not list(out.iterdir())
        assert len(list(folder.iterdir())) == 1


def test_the_cache_follows_lutetia_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTETIA_HOME", str(tmp_path))
    monkeypatch.delenv("LUTETIA_CACHE", raising=False)
    assert default_cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("LUTETIA_CACHE", str(tmp_path / "other"))
    assert default_cache_folder() == tmp_path / "other"


def test_cache_key_depends_on_every_part() -> None:
    key = cache_key(file="ab", shape={"frames": 8, "fps": 8.0}, latents="pixels")
    assert key == cache_key(latents="pixels", shape={"fps": 8.0, "frames": 8}, file="ab")
    assert key != cache_key(file="ab", shape={"frames": 9, "fps": 8.0}, latents="pixels")
