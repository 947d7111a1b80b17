"""Where the weights lie that are too large or not ours to ship: a user's path, or the folder that `LUTETIA_ASSETS` names."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lutetia.system.errors import DataError, IntegrityError

I3D_FILE = "i3d_kinetics400_rgb.safetensors"
EFFICIENTNET_FILE = "efficientnet_lite0_imagenet.safetensors"
MINILM_FOLDER = "minilm"


def assets_folder() -> Path:
    """The folder of assets: `LUTETIA_ASSETS`, by default `../shared/assets` beside the repository. It need not exist."""
    named = os.environ.get("LUTETIA_ASSETS")
    return Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "assets"


def asset(name: str, path: Path | None = None) -> Path:
    """The path of the asset `name`, or the user's own `path` in its place. Raises DataError naming a missing file."""
    found = path or assets_folder() / name
    if not found.exists():
        how = "give another path" if path else "set LUTETIA_ASSETS to the folder that holds it, or give its path"
        raise DataError(f"the weights {found} do not exist; {how}")
    return found


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU. Raises IntegrityError when the file is not whole."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise IntegrityError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of the file's bytes: part of a feature cache's keys, so that other weights are never mistaken for these."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
