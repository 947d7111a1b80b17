"""References to models: a folder, or a hub id `owner/name[/subfolder][@revision]`, read by the libraries' own loaders.

Only safetensors weights are loaded, and no code from a repository is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lutetia.system.errors import ConfigError

_HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<sub>[\w./-]+))?(?:@(?P<rev>[\w./-]+))?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class ModelRef:
    """Where the files of a model are. Load it by `from_pretrained(location, **options)`."""

    text: str
    location: str
    subfolder: str = ""
    revision: str | None = None
    offline: bool = False
    """Use of a hub id only what was downloaded before."""

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.location)
        return path if path.is_dir() else None

    def part(self, name: str) -> ModelRef:
        """The part of a pipeline that lies in its folder `name`."""
        if self.folder is not None or Path(self.location).is_absolute():
            return replace(self, text=f"{self.text}/{name}", location=str(Path(self.location) / name))
        text, _, revision = self.text.partition("@")
        subfolder = f"{self.subfolder}/{name}".lstrip("/")
        return replace(self, text=f"{text}/{name}" + (f"@{revision}" if revision else ""), subfolder=subfolder)

    @property
    def options(self) -> dict[str, Any]:
        """Of `from_pretrained`. A folder that disappears never becomes the id of a repository on the hub."""
        if self.folder is not None or Path(self.location).is_absolute():
            return {"local_files_only": True}
        return {"subfolder": self.subfolder, "revision": self.revision, "local_files_only": self.offline}


def parse_ref(text: str, what: str, builtins: tuple[str, ...], hub: bool = True) -> ModelRef:
    """Parse a reference to a model.

    Args:
        text: a folder, or a hub id.
        what: what it refers to, for the error text.
        builtins: the names that the caller handles itself, for the error text.
        hub: whether a hub id may be downloaded; False where nobody was asked.

    Raises ConfigError if it is neither a folder nor a hub id, or names a folder that is missing from one that exists.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return ModelRef(text, str(path.resolve()))
    match = _HUB_ID.match(text)
    if match is None or text.startswith((".", "/", "~")) or ".." in text:
        known = ", ".join((*builtins, "a folder"))
        raise ConfigError(f"{what} {text!r} is neither a folder nor a hub id; use {known} or owner/name")
    if Path(match["repo"].partition("/")[0]).is_dir():
        raise ConfigError(
            f"{what} {text!r} is no folder, but {match['repo'].partition('/')[0]} is one here, so it is not taken for a hub id; "
            "name an existing folder, or start in another folder to mean the hub"
        )
    ref = ModelRef(text, match["repo"], match["sub"] or "", match["rev"], offline=not hub)
    return replace(ref, offline=True) if hub and _is_cached(ref) else ref


def _is_cached(ref: ModelRef) -> bool:
    """Whether the whole model is in the hub's cache under the commit that `ref` names: then nobody has to ask the hub."""
    if not _COMMIT.fullmatch(ref.revision or ""):
        return False
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(ref.location, f"{ref.subfolder}/config.json".lstrip("/"), revision=ref.revision)
    return isinstance(config, str) and _has_weights(Path(config).parent)


def _has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors weights, and all files of them."""
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    index = next((folder / name for name in files if name.endswith(".safetensors.index.json")), None)
    if index is None:
        return any(name.endswith(".safetensors") for name in files)
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) <= files


def refuse_pickled(what: str, folder: Path) -> None:
    """Raises ConfigError where the folder of the model `what` has pickled weights and no others."""
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"{what} has pickled weights only ({pickled[0]}), which are never read; save it with safe_serialization=True"
        )


def anchored(text: str) -> str:
    """The same reference for any working directory: folders become absolute paths, also in a pair `a+b`."""
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path.resolve())
    first, plus, second = text.partition("+")
    return f"{anchored(first)}+{anchored(second)}" if plus else text


@contextlib.contextmanager
def hub_errors(what: str, ref: ModelRef) -> Iterator[None]:
    """Turn an exception of a loader into a ConfigError that names the reference."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
        remedy = "check the folder" if ref.folder else "check the id and the connection to the hub, or give a folder"
        if ref.offline and ref.folder is None:
            reason, remedy = "it is on the hub and was not downloaded before", "allow that: --hub, in Python hub=True"
        raise ConfigError(f"cannot load {what} {ref.text!r}: {reason[:300]}; {remedy}") from error


def read_config(what: str, ref: ModelRef, name: str = "config.json") -> dict[str, Any]:
    """Read the configuration of the model, a JSON file `name`. Raises ConfigError."""
    with hub_errors(what, ref):
        path = ref.folder / name if ref.folder else _hub_config(ref)
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ConfigError(f"{name} of {what} {ref.text!r} is not an object; check the folder")
    return config


def snapshot(what: str, ref: ModelRef, weights: Sequence[str]) -> tuple[Path, ModelRef]:
    """The files of a pipeline on the hub without most weights, and the reference with the commit that they are of.

    What was downloaded before is used where the hub cannot be reached, and under a commit without asking it. Raises ConfigError.

    Args:
        what: it is, for the error text.
        ref: the repository.
        weights: parts whose weights are needed.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", *(f"{part}/*.safetensors" for part in weights)]
    with hub_errors(what, ref):
        if _COMMIT.fullmatch(ref.revision or ""):
            with contextlib.suppress(OSError):
                known = Path(snapshot_download(ref.location, revision=ref.revision, local_files_only=True))
                if all(_has_weights(known / part) for part in weights):
                    return known, ref
        folder = Path(
            snapshot_download(
                ref.location, revision=ref.revision, allow_patterns=patterns, local_files_only=ref.offline
            )
        )  # fmt: skip
    commit = folder.name
    name = ref.text.partition("@")[0]
    return folder, replace(ref, text=f"{name}@{commit}", revision=commit)


def _hub_config(ref: ModelRef) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not ref.offline:
        return Path(hf_hub_download(ref.location, "config.json", subfolder=ref.subfolder or None, revision=ref.revision))
    cached = try_to_load_from_cache(ref.location, f"{ref.subfolder}/config.json".lstrip("/"), revision=ref.revision)
    if not isinstance(cached, str):
        raise FileNotFoundError("not in the hub's cache on this machine")
    return Path(cached)


def fingerprint(ref: ModelRef) -> str:
    """A hash that changes with the model: of a folder, over file names, sizes and samples of bytes; of a hub id, over the id."""
    digest = hashlib.sha256(f"{ref.subfolder}@{ref.revision}".encode())
    if ref.folder is None:
        digest.update(ref.location.encode())
        return digest.hexdigest()
    for path in sorted(ref.folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size};".encode())
            with path.open("rb") as file:
                for part in range(9):  # the whole of small files, nine samples of large ones
                    file.seek(max(0, (size - _SAMPLE) * part // 8) if size > 9 * _SAMPLE else part * _SAMPLE)
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
