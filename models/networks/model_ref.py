"""References to models: a folder, or a hub id `owner/name[/subfolder][@revision]`, read by the libraries' own loaders.

Only safetensors weights are loaded, and no code from a repository is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lutetia.system.errors import ConfigError

_HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<sub>[\w./-]+))?(?:@(?P<rev>[\w./-]+))?$")
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class ModelRef:
    """Where the files of a model are. Load it by `from_pretrained(location, **options)`."""

    text: str
    location: str
    subfolder: str = ""
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.location)
        return path if path.is_dir() else None

    @property
    def options(self) -> dict[str, Any]:
        return {"subfolder": self.subfolder, "revision": self.revision} if self.folder is None else {}


def parse_ref(text: str, what: str, builtins: tuple[str, ...]) -> ModelRef:
    """Parse a reference to a model.

    Args:
        text: a folder, or a hub id.
        what: what it refers to, for the error text.
        builtins: the names that the caller handles itself, for the error text.

    Raises ConfigError if it is neither a folder nor a hub id.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return ModelRef(text, str(path.resolve()))
    match = _HUB_ID.match(text)
    if match is None or text.startswith((".", "/", "~")) or ".." in text:
        known = ", ".join((*builtins, "a folder"))
        raise ConfigError(f"{what} {text!r} is neither a folder nor a hub id; use {known} or owner/name")
    return ModelRef(text, match["repo"], match["sub"] or "", match["rev"])


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
        raise ConfigError(f"cannot load {what} {ref.text!r}: {reason[:300]}; {remedy}") from error


def read_config(what: str, ref: ModelRef) -> dict[str, Any]:
    """Read the `config.json` of the model. Raises ConfigError."""
    with hub_errors(what, ref):
        if ref.folder is None:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(ref.location, "config.json", subfolder=ref.subfolder or None, revision=ref.revision))
        else:
            path = ref.folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ConfigError(f"config.json of {what} {ref.text!r} is not an object; check the folder")
    return config


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
