"""Some steps with each of several kernels, from the same start on the same random clips."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from lutetia.models.data.shards import ShardData
from lutetia.models.device import free_cached_memory
from lutetia.models.training.kernels.choice import Kernels, KernelTrial
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.trainer.devices import use_device
from lutetia.node.trainer.kernels.measuring import KernelOrder
from lutetia.node.trainer.units.trials import probe_data
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.system.errors import LutetiaError

STEPS = 4
"""The first is apart: it compiles. Updates come between them, so the losses of later ones tell of backward passes, too."""


def trials(order: KernelOrder) -> Iterator[KernelTrial]:
    """The trials of an order, as they are done."""
    torch.set_flush_denormal(True)
    use_device(order.device, order.limit)
    if order.threads:
        torch.set_num_threads(order.threads)
    manifest = SignedManifest.model_validate_json(order.manifest.read_bytes()).manifest
    torch.manual_seed(0)  # another process that goes on with the order has the same clips
    data = probe_data(manifest)
    for kernels in order.kernels:
        yield _try(order, manifest, data, kernels)
        free_cached_memory(order.device)


def _try(order: KernelOrder, manifest: Manifest, data: ShardData, kernels: Kernels) -> KernelTrial:
    try:
        torch.manual_seed(0)
        trainer = ExpertTrainer(
            manifest, order.shard, data, base="random", device=order.device, micro_batch=order.micro_batch,
            precision=order.precision, memory=order.memory, kernels=kernels,
        )  # fmt: skip
        trainer.strict_kernels = True
        losses, seconds = [], []
        for _ in range(STEPS):
            began = time.monotonic()
            losses.append(trainer.step())
            seconds.append(time.monotonic() - began)
    except (RuntimeError, MemoryError, ValueError, LutetiaError) as error:
        return KernelTrial(kernels=kernels, problem=" ".join(f"{error}".split())[:120] or type(error).__name__)
    return KernelTrial(
        kernels=kernels, first_seconds=seconds[0], step_seconds=statistics.median(seconds[1:]), losses=tuple(losses)
    )
