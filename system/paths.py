"""Where things of this box live: XDG folders, with overrides by environment."""

from __future__ import annotations

import os
from pathlib import Path

from lutetia.system.errors import ConfigError


def expanded(path: Path) -> Path:
    """`path` with `~` as a home folder. Raises ConfigError where this machine does not know whose."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} begins with a home folder that does not exist; name the folder in full") from error


def _home(variable: str, fallback: str) -> Path:
    """`LUTETIA_HOME` first, then the XDG variable, then its default."""
    if home := os.environ.get("LUTETIA_HOME"):
        return expanded(Path(home))
    base = os.environ.get(variable)
    return (Path(base) if base else expanded(Path("~")) / fallback) / "lutetia"


def default_state_folder() -> Path:
    """Identity, control socket, local checkpoints and blobs of this box's daemon."""
    return _home("XDG_STATE_HOME", ".local/state")


def default_cache_folder() -> Path:
    """What can be made again: cached latents, text embeddings and downloads."""
    if home := os.environ.get("LUTETIA_HOME"):
        return expanded(Path(home)) / "cache"
    return _home("XDG_CACHE_HOME", ".cache")
