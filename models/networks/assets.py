"""Find weights that are not part of the package: at a user's path, or in the folder that `LUTETIA_ASSETS` names."""

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
    """The folder of assets: `LUTETIA_ASSETS`, or `shared/assets` beside the repository. It may not exist."""
    named = os.environ.get("LUTETIA_ASSETS")
    return Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "assets"


def asset(name: str, path: Path | None = None) -> Path:
    """The path of the asset `name`, or `path` instead of it. Raises DataError if the file does not exist."""
    location = path or assets_folder() / name
    if not location.exists():
        how = "give another path" if path else "set LUTETIA_ASSETS to the folder that holds it, or give its path"
        raise DataError(f"the weights {location} do not exist; {how}")
    return location


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU. Raises IntegrityError if the file is not complete."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise IntegrityError(f"{path} is not a complete safetensors file ({error}); fetch it again") from error


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of the bytes of the file: a part of the keys of the feature cache, so that other weights get other keys."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
