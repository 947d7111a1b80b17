"""The default folders of this machine: XDG folders, which environment variables override."""

from __future__ import annotations

import os
from pathlib import Path

from lutetia.system.errors import ConfigError


def expanded(path: Path) -> Path:
    """`path` with `~` expanded. Raises ConfigError when this machine does not know that home folder."""
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
    """The folder for identity, control socket, local checkpoints and blobs of this machine's daemon."""
    return _home("XDG_STATE_HOME", ".local/state")


def default_cache_folder() -> Path:
    """The folder for files that can be made again, such as latents and embeddings: `LUTETIA_CACHE`, else the user's."""
    if cache := os.environ.get("LUTETIA_CACHE"):
        return expanded(Path(cache))
    if home := os.environ.get("LUTETIA_HOME"):
        return expanded(Path(home)) / "cache"
    from platformdirs import user_cache_path

    return user_cache_path("lutetia")
