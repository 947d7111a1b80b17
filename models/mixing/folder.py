"""A mixture folder in use: its parts are compared with `mixture.json`, then read without pickle, code or network."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lutetia.models.mixing.description import FILE, read_mixture
from lutetia.models.mixing.layout import (
    CONFIG,
    INDEX,
    WEIGHTS_INDEX,
    ModelIndex,
    check_sizes,
    check_weights_index,
    expert_files,
    is_known,
    read_index,
)
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.system.errors import ConfigError, IntegrityError, UsageError
from lutetia.system.files import disk_errors, replace_folder

_LOADERS_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError)


class MixtureFolder:
    """A stitched, fetched or copied mixture.

    Attributes:
        path: of the folder, absolute, so that a later change of the working directory does not matter.
        document: its description.
    """

    def __init__(self, path: Path | str) -> None:
        """Read the description. Raises ConfigError if the folder holds no mixture, IntegrityError if it is damaged."""
        self.path = Path(path).expanduser().absolute()
        self.document = read_mixture(self.path).mixture
        self._checked: set[str] = set()

    def index(self) -> ModelIndex:
        """The components of the pipeline. Raises IntegrityError."""
        return read_index(self.check(INDEX).read_bytes())

    def config(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder by its relative path. Raises IntegrityError."""
        with self.reading(name):
            config = json.loads(self.check(name).read_bytes())
            if not isinstance(config, dict):
                raise ValueError("it is not a JSON object")
        return config

    def load(self, loader: Any, part: str, **options: Any) -> Any:
        """The model in the folder `part`, made by `loader`, a class of diffusers. Raises IntegrityError."""
        location = self.check(part)
        with self.reading(part):
            check_sizes(self.config(f"{part}/{CONFIG}"))
            if (location / WEIGHTS_INDEX).is_file():
                check_weights_index((location / WEIGHTS_INDEX).read_bytes())
            return loader.from_pretrained(location, use_safetensors=True, local_files_only=True, **options)

    def holds(self, part: str) -> bool:
        """Whether the description lists files below `part`."""
        return any(name.startswith(f"{part}/") for name in self.document.files)

    def check_experts(self, entries: Any) -> None:
        """Raises IntegrityError unless `entries`, of the transformer's config, agree with the description."""
        described = [expert.entry for expert in self.document.experts]
        if entries != described:
            raise self._damage("transformer", "its experts are not those of the description")
        for entry in described:
            first = expert_files(self.document.network is not None)[0]
            if entry["folder"] and not (self.path / entry["folder"] / first).is_file():
                raise IntegrityError(f"the mixture {self.path} lacks {entry['folder']}; fetch it again")
        if len(described) > 1 and not self.holds("router"):
            raise IntegrityError(f"the mixture {self.path} lacks router; fetch it again")

    @contextlib.contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Turn what a loader raises over `part` into an IntegrityError that names it."""
        try:
            yield
        except _LOADERS_ERRORS as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise self._damage(part, reason) from error

    def check(self, part: str) -> Path:
        """The path of a file or folder, compared with the description at first use and when the mixture was replaced.

        Raises IntegrityError when a file is missing, changed or not listed, or the folder holds another mixture by now.
        """
        if not (self.path / FILE).is_file() or read_mixture(self.path).mixture.digest != self.document.digest:
            raise IntegrityError(f"the mixture {self.path} was replaced by a newer one while in use; load it again")
        if part not in self._checked:
            self._compare(part)
            self._checked.add(part)
        return self.path / part

    def _compare(self, part: str) -> None:
        listed = {name: ref for name, ref in self.document.known_files.items() if name == part or name.startswith(f"{part}/")}
        if not listed or not (self.path / part).exists():
            raise IntegrityError(f"the mixture {self.path} lacks {part}; fetch it again")
        for name, ref in listed.items():
            path = self.path / name
            if not path.is_file():
                raise IntegrityError(f"the mixture {self.path} lacks {name}; fetch it again")
            with self.reading(part):
                if path.stat().st_size != ref.size:
                    raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {ref.size}")
                if ChunkTable.of_file(path).ref != ref:
                    raise ValueError(f"{name} was changed")
        for path in (self.path / part).glob("*"):
            name = f"{part}/{path.name}"
            if is_known(name) and name not in listed:
                raise self._damage(part, f"{name} is not in its description")

    def _damage(self, part: str, reason: str) -> IntegrityError:
        return IntegrityError(
            f"{part} of the mixture {self.path} is damaged: {reason.rstrip('.')[:300]}; fetch the mixture again"
        )

    def copy(self, target: Path) -> None:
        """Copy all files of the description to `target`, whole or not at all; onto itself, nothing is changed.

        Raises UsageError if `target` holds something else or lies within the mixture, IntegrityError, DiskError.
        """
        source, target = self.path.resolve(), target.expanduser().absolute()
        if target.resolve() == source:
            return
        if target.resolve().is_relative_to(source) or source.is_relative_to(target.resolve()):
            raise UsageError(f"{target} and the mixture {self.path} lie within each other; choose another folder")
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target} is a file; choose another folder")
        if target.is_dir() and any(target.iterdir()) and not (target / FILE).is_file():
            raise UsageError(f"{target} holds other files, which would be replaced; choose another folder")
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as work:
                folder = Path(work) / "mixture"
                folder.mkdir()
                shutil.copyfile(self.path / FILE, folder / FILE)
                for name in self.document.known_files:
                    (folder / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(self.check(name), folder / name)
                replace_folder(folder, target)


def refused_options(options: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises ConfigError for an option of a loader that a mixture does not follow, so that none is passed over silently."""
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(f"a mixture is loaded without the options {', '.join(unknown)}; leave them out")
