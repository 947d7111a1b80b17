"""Reads a trace without torch: one row of float32 losses in a safetensors file."""

from __future__ import annotations

import json
import math
import sys
from array import array
from pathlib import Path

from lutetia.system.errors import IntegrityError

_MAX_HEADER = 1 << 20
_MAX_TRACE = 1 << 24


def read_trace_file(path: Path) -> tuple[float, ...]:
    """The losses. Raises IntegrityError unless the file holds one row of finite float32 numbers called `trace`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _MAX_HEADER else b""
        data = file.read(_MAX_TRACE + 1)
    try:
        tensors = json.loads(header)
        tensor = tensors["trace"]
        only = set(tensors) <= {"trace", "__metadata__"}
        dtype, shape, (start, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        fits = only and dtype == "F32" and len(shape) == 1 and (start, end) == (0, 4 * shape[0]) and len(data) == end
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"the trace {path.name} is not a safetensors file with one trace ({type(error).__name__})"
        ) from error
    if not fits:
        raise IntegrityError(f"the trace {path.name} is not one row of float32 losses")
    losses = array("f", data)
    if sys.byteorder == "big":
        losses.byteswap()
    if not all(map(math.isfinite, losses)):
        raise IntegrityError(f"the trace {path.name} holds NaN or infinity")
    return tuple(losses)
