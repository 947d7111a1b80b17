"""Tensor files: the library's bytes, one tensor at a time, and nothing of a file that is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lutetia.models.tensor_files import NotTensors, TensorFile, under, write_tensors

TENSORS = {
    "b.x": torch.randn(3, 5), "a": torch.randn(4).bfloat16(), 'ä"\n': torch.zeros(2, 2, dtype=torch.int64),
    "empty": torch.zeros(0, 3), "number": torch.tensor(1.5), "f8": torch.randn(7).to(torch.float8_e4m3fn),
    "i8": torch.arange(3, dtype=torch.int8), "f16": torch.randn(2).half(), "f64": torch.randn(2).double(),
    "bool": torch.tensor([True]), "u8": torch.tensor([1], dtype=torch.uint8), "turned": torch.randn(3, 2).T,
}  # fmt: skip


@pytest.mark.parametrize("document", [None, {"name": "é\x7f\u2028", "number": 1}])
def test_files_have_the_bytes_of_the_library(tmp_path: Path, document: dict | None):
    write_tensors(tmp_path / "own", TENSORS, document)
    metadata = {"format": "pt"} if document is None else {"lutetia": json.dumps(document, sort_keys=True)}
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "library", metadata=metadata)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


def test_tensors_are_read_back_by_name_and_prefix(tmp_path: Path):
    write_tensors(tmp_path / "file", TENSORS, {"step": 3})
    with TensorFile(tmp_path / "file") as file:
        assert file.document == {"step": 3}
        assert file.keys() == TENSORS.keys()
        assert all(torch.equal(file[name].double(), tensor.double()) for name, tensor in TENSORS.items())
        assert dict(under(file, "b.")).keys() == {"x"}


@pytest.mark.parametrize("damage", ["cut", "gap", "overlap", "beyond", "negative", "no header", "huge header", "not JSON"])
def test_file_that_is_not_whole_is_refused(tmp_path: Path, damage: str):
    write_tensors(tmp_path / "file", {"x": torch.ones(2), "y": torch.ones(3)})
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = {"gap": [4, 12], "overlap": [0, 12], "beyond": [12, 24], "negative": [-4, 8]}
    if damage in changed:
        header["y"]["data_offsets"] = changed[damage]
    text = b"[1, 2" if damage == "not JSON" else json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data[8 + length :]
    spoilt = {"cut": data[:-1], "no header": b"abc", "huge header": (1 << 60).to_bytes(8, "little") + data[8:]}.get(damage, whole)
    (tmp_path / "file").write_bytes(spoilt)
    with pytest.raises(NotTensors, match="file"):
        TensorFile(tmp_path / "file")
