"""Safetensors files of other peers: weights, training states and shards, as the checks and the nodes open them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from benchmarks.fuzz import examples
from benchmarks.fuzz.contract import Target
from benchmarks.fuzz.files import _folder, _written
from lutetia.models.data.parts.index import ShardIndex, part_path, read_index
from lutetia.models.data.parts.part_file import OpenPart
from lutetia.models.data.parts.reader import open_shard
from lutetia.models.data.parts.single_file import SingleFileShard
from lutetia.models.data.parts.writer import write_shard
from lutetia.models.data.shards import ShardData
from lutetia.models.experts.families import weight_schema
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_checks import check_state, check_weights, state_schema
from lutetia.models.training.checkpoint_io import check_resumable


def weights(data: bytes) -> None:
    check_weights(_written("weights.safetensors", data), examples.manifest().expert)


def state(data: bytes) -> None:
    path = _written("state.safetensors", data)
    check_state(path, examples.manifest().expert, examples.manifest().optimisation)
    check_resumable(path, examples.manifest(), 1)


def shard(data: bytes) -> None:
    """The index of a shard, or a shard in one file as release 0.1 wrote it."""
    shard = open_shard(_written("shard.safetensors", data), examples.LATENT)
    if isinstance(shard, SingleFileShard):
        shard.load()


def part(data: bytes) -> None:
    clips = OpenPart(_written("part.safetensors", data), _index().parts[0], examples.LATENT)
    clips.metadata()
    clips.latents(0)
    clips.text(0)


def header(check: Callable[[bytes], None], whole: Callable[[], bytes]) -> Callable[[bytes], None]:
    """The input is the header alone; its length and the tensor bytes are added, so that its content is parsed."""

    def parse(data: bytes) -> None:
        body = whole()
        start = 8 + struct.unpack("<Q", body[:8])[0]
        check(struct.pack("<Q", len(data)) + data + body[start:])

    return parse


@cache
def weights_file() -> bytes:
    torch.set_num_threads(1)
    path = _folder() / "seed.safetensors"
    write_tensors(path, {name: torch.full(shape, 0.5, dtype=kind) for name, (shape, kind) in weight_schema(_spec()).items()})
    return path.read_bytes()


@cache
def state_file() -> bytes:
    path = _folder() / "seed-state.safetensors"
    required, optional = state_schema(_spec(), examples.manifest().optimisation)
    forms = {name: form for name, form in {**required, **optional}.items() if -1 not in form[0]}
    tensors = {name: torch.full(shape, 0.25, dtype=kind) for name, (shape, kind) in forms.items()}
    place = {
        "format": 1, "run": examples.manifest().run_id, "shard": 1, "epoch": 1, "step": 0, "samples": 24, "micro_batch": 4,
        "precision": "float32",
    }  # fmt: skip
    write_tensors(path, {**tensors, "trace": torch.ones(6)}, place)
    return path.read_bytes()


def shard_file() -> bytes:
    return _shard().read_bytes()


def part_file() -> bytes:
    return part_path(_shard(), 0, _index().parts[0].blob).read_bytes()


def _index() -> ShardIndex:
    return read_index(_shard())


@cache
def _shard() -> Path:
    path, latent = _folder() / "seed-shard.safetensors", examples.LATENT
    data = ShardData(
        torch.zeros(1, *latent.shape), torch.zeros(1, latent.text_tokens, latent.text_width),
        torch.zeros(1, latent.pooled_width), ["a cat"], ["cats"],
    )  # fmt: skip
    write_shard(path, data, latent)
    return path


def _spec():
    return examples.manifest().expert


def _header_of(data: bytes) -> bytes:
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]


def _whole(make: Callable[[], bytes]) -> Callable[[], Sequence[bytes]]:
    return lambda: [make(), struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 1 << 40)]


TENSORS = (
    Target("weights", weights, _whole(weights_file), most_bytes=1 << 20),
    Target("state", state, _whole(state_file), most_bytes=1 << 20),
    Target("shard", shard, _whole(shard_file), most_bytes=1 << 20),
    Target("part", part, _whole(part_file), most_bytes=1 << 20),
    Target("weights-header", header(weights, weights_file), lambda: [_header_of(weights_file())]),
    Target("state-header", header(state, state_file), lambda: [_header_of(state_file())]),
    Target("shard-header", header(shard, shard_file), lambda: [_header_of(shard_file())]),
    Target("part-header", header(part, part_file), lambda: [_header_of(part_file())]),
)
