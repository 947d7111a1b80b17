"""How the tensors of an expert lie on the cards of a unit: each card has some of the rows, as FSDP2 cuts them.

A unit is several cards of one machine that train one expert together. Each card has a process of its own, its *rank*.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(days=365)
"""How long a rank waits for the others: rank 0 waits for orders as long as its node does. A rank that ends takes all with it."""


@contextlib.contextmanager
def joined(rank: int, ranks: int, meeting: Path, device: str) -> Iterator[Split]:
    """Meet the other ranks of a unit on this machine, over loopback, and part from them at the end.

    Args:
        rank: of this process.
        ranks: of the unit.
        meeting: a file that does not exist yet, by which they find each other.
        device: of this rank.
    """
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[name] = "lo"
    backend = {"cuda": "cuda:nccl,cpu:gloo", "xpu": "xpu:xccl,cpu:gloo"}.get(device.partition(":")[0], "gloo")
    dist.init_process_group(backend, init_method=meeting.absolute().as_uri(), rank=rank, world_size=ranks, timeout=_PATIENCE)
    try:
        yield Split(rank, ranks)
    finally:
        dist.destroy_process_group()


class Split:
    """The rows of each tensor that this rank has: the `rank`-th of `ranks` chunks as `torch.chunk` makes them, or none."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.shapes: dict[str, torch.Size] = {}
        """Of whole tensors, by the name of the parameter."""

    def part(self, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor."""
        rows = self._rows(whole.shape)
        return whole[rows * self.rank : rows * (self.rank + 1)]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor, on every rank; all ranks call it for the same tensors in the same order.

        Args:
            name: of the parameter that has this shape.
            part: this rank's rows of it, or of one of its moments.
        """
        shape = self.shapes[name]
        rows = self._rows(shape)
        own = part.new_zeros((rows, *shape[1:]))
        own[: len(part)] = part
        found = part.new_empty((rows * self.ranks, *shape[1:]))
        dist.all_gather_into_tensor(found, own)
        return found[: shape[0]]

    def _rows(self, shape: torch.Size) -> int:
        return -(-shape[0] // self.ranks)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        dist.all_reduce(value)
        return value

    def tell(self, order: int = 0) -> int:
        """Rank 0 tells the others a number; they wait for it, and get it."""
        told = torch.tensor([order])
        dist.broadcast(told, src=0)
        return int(told.item())


class PartsOf(Mapping[str, Tensor]):
    """This rank's part of tensors that are read one after another. A tensor that no parameter has the shape of stays whole."""

    def __init__(self, tensors: Mapping[str, Tensor], split: Split) -> None:
        self._tensors, self._split = tensors, split

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._split.part(self._tensors[name])
