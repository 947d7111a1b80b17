"""Safetensors files: written whole or not at all, with equal bytes for equal content, and one JSON document in the header."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lutetia.system.files import atomic_path

_DOCUMENT = "lutetia"
_OS_ERROR = re.compile(r"os error (\d+)")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any] | None = None) -> None:
    """Write `tensors` and `document` atomically and durably. Raises DiskError when the disk is full, read-only or forbidden.

    The file has one metadata entry, because safetensors writes several in the order of a hash map, which differs per process.
    """
    metadata = {"format": "pt"} if document is None else {_DOCUMENT: json.dumps(document, sort_keys=True)}
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error)) from error  # so that a full disk does not look like a bug
        except MemoryError as error:
            raise OSError(errno.ENOMEM, "out of memory") from error


def read_document(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The document in a header's metadata, or an empty one. Raises ValueError when it is not a JSON object."""
    try:
        value = json.loads((metadata or {}).get(_DOCUMENT, "{}"))
    except RecursionError as error:
        raise ValueError("its document is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("its document is not a JSON object")
    return value
