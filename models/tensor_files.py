"""Safetensors files, one tensor in memory at a time: written whole or not at all, with equal bytes for equal content, and one
JSON document in the header.

The library takes all tensors as bytes to write a file, and maps a file whole to read it. A training state is several times as
large as its model, so files are written and read here. The bytes are those that the library writes (safetensors 0.3 and later):
eight bytes with the header's length, the header as JSON, padded with spaces, and the tensors by falling dtype, then by name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lutetia.system.files import atomic_path

MAX_HEADER_BYTES = 16 << 20
_DOCUMENT = "lutetia"
_ALIGNMENT = 8
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_PIECE = 64 << 20
"""Bytes of one call to the system: Linux writes at most 2 GiB at once, and a slow disk must not delay other threads' locks."""
_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64",
)  # fmt: skip
"""The library's order of dtypes; the last is written first."""
DTYPES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_TORCH = {name: dtype for dtype, name in DTYPES.items()}

Reading = Callable[[Tensor], AbstractContextManager[Tensor]]
"""Gives a tensor's values while they are read; see `LiveSnapshot.reading`."""


class NotTensors(ValueError):
    """A file is not a whole safetensors file. The text says why."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any] | None = None,
    reading: Reading = contextlib.nullcontext,
) -> None:
    """Write `tensors` and `document` atomically and durably, from any device, one tensor after another.

    The disk space is reserved before the first tensor is read. The file has one metadata entry.

    Raises DiskError when the disk is full, read-only or forbidden.
    """
    order = sorted(tensors, key=lambda name: (-_ORDER.index(DTYPES[tensors[name].dtype]), name.encode()))
    header = _header([(name, tensors[name]) for name in order], document)
    with atomic_path(path) as temporary, temporary.open("r+b", buffering=0) as file:
        _reserve(file, len(header) + sum(map(_size, tensors.values())))
        _write(file, memoryview(header))
        for name in order:
            with reading(tensors[name]) as tensor:
                _write(file, _bytes_of(tensor))


def _header(tensors: list[tuple[str, Tensor]], document: Mapping[str, Any] | None) -> bytes:
    metadata = {"format": "pt"} if document is None else {_DOCUMENT: json.dumps(document, sort_keys=True)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + _size(tensor)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    try:
        return tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data
    except MemoryError as error:
        raise OSError(errno.ENOMEM, "out of memory") from error


def _reserve(file: FileIO, size: int) -> None:
    """So that a full disk shows before a tensor is read: later the trainer may have changed it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data[:_PIECE]) :]


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file: its tensors by name. Each is read when it is asked for, into memory of its own, on the CPU.

    Nothing is mapped, so that reading a large file leaves no pages behind. Use it in a `with` statement.

    Raises NotTensors for a file that is not whole, and OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self._start, self.document, self._entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:  # the default reads the tensor
        return name in self._entries

    def placeholder(self, name: str) -> Tensor:
        """A tensor of the same shape and dtype without values, on the device "meta"."""
        shape, dtype, _ = self._entries[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype, begin = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            data = tensor.view(-1).view(torch.uint8).numpy().data
            self._file.seek(self._start + begin)
            while data:
                count = self._file.readinto(data[:_PIECE])
                if not count:
                    raise NotTensors(f"{self.path.name} ends within tensor {name}")
                data = data[count:]
        return tensor

    def _read_header(self) -> tuple[int, dict[str, Any], dict[str, tuple[tuple[int, ...], torch.dtype, int]]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise NotTensors(f"{self.path.name} has a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(self._file.read(length))
            metadata = header.pop("__metadata__", None)
            entries = {name: _entry(entry, size - 8 - length) for name, entry in header.items()}
            document = read_document(metadata)
            _check_covers(entries, size - 8 - length)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise NotTensors(f"the header of {self.path.name} does not describe its tensors ({error})") from error
        return 8 + length, document, entries


def _entry(entry: dict[str, Any], room: int) -> tuple[tuple[int, ...], torch.dtype, int]:
    """(shape, dtype, first byte) of one tensor. Raises ValueError, TypeError or KeyError."""
    shape, dtype = tuple(entry["shape"]), _TORCH[entry["dtype"]]
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("a size or offset is no whole number from 0")
    if end > room or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("an offset does not fit its tensor or the file")
    return shape, dtype, begin


def _check_covers(entries: Mapping[str, tuple[tuple[int, ...], torch.dtype, int]], size: int) -> None:
    """Raises ValueError unless the tensors lie one after another and fill the file, as the library demands."""
    end = 0
    for shape, dtype, begin in sorted(entries.values(), key=lambda entry: (entry[2], math.prod(entry[0]))):
        if begin != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = begin + math.prod(shape) * dtype.itemsize
    if end != size:
        raise ValueError("its tensors do not fill the file")


def under(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names; none is read."""
    return _Under(tensors, prefix)


class _Under(Mapping[str, Tensor]):
    def __init__(self, file: Mapping[str, Tensor], prefix: str) -> None:
        self._file, self._prefix = file, prefix

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._file if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._prefix + name in self._file

    def __getitem__(self, name: str) -> Tensor:
        return self._file[self._prefix + name]


def read_document(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The document in a header's metadata, or an empty one. Raises ValueError when it is not a JSON object."""
    try:
        value = json.loads((metadata or {}).get(_DOCUMENT, "{}"))
    except RecursionError as error:
        raise ValueError("its document is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("its document is not a JSON object")
    return value
