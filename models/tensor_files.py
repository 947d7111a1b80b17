"""Safetensors files that are whole or absent, have equal bytes for equal content, and carry one JSON document."""

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
    """Write atomically and durably. Raises DiskError when the disk is full, read-only or forbidden.

    There is never more than one metadata entry: safetensors writes several in the order of a hash map, which differs per process.
    """
    metadata = {"format": "pt"} if document is None else {_DOCUMENT: json.dumps(document, sort_keys=True)}
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            found = _OS_ERROR.search(str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), str(error)) from error  # so that a full disk is told from a bug
        except MemoryError as error:
            raise OSError(errno.ENOMEM, "out of memory") from error


def read_document(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The document in a header's metadata; empty where there is none. Raises ValueError when it is no JSON object."""
    try:
        value = json.loads((metadata or {}).get(_DOCUMENT, "{}"))
    except RecursionError as error:
        raise ValueError("its document is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("its document is no JSON object")
    return value
