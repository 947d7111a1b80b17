"""Trains one expert on several cards of one machine by torch's FSDP2: each card has a part of weights, moments and averages.

Rank 0 is a trainer like any other to whoever calls it. The other ranks follow it (`follow`): before each step and each snapshot
it tells them, and all do it together. A step computes the mean loss of the same batch, with the batch's rows shared among the
cards, so its result differs from that of one card by rounding only. Files have the ordinary form: whole tensors, which rank 0
gets from the others one after another, so any node goes on from them, with one card or several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lutetia.models.experts.adapters.build import load_expert
from lutetia.models.experts.loss_weights import weighted_losses
from lutetia.models.experts.trained import has_adapter, published_name, published_tensors, trained_parameters
from lutetia.models.training.batches import Batch
from lutetia.models.training.checkpoint_io import Snapshot
from lutetia.models.training.states.compact import packed_state
from lutetia.models.training.states.live_snapshot import LiveSnapshot
from lutetia.models.training.trainer import ExpertTrainer, initial_seed
from lutetia.models.training.units.split import PartsOf, Split
from lutetia.system.errors import ConfigError

S = TypeVar("S", bound=Snapshot)
_STEP, _SNAPSHOT, _END = 1, 2, 3


class SplitTrainer(ExpertTrainer):
    """One rank's part of the training of one expert. All ranks are made with equal arguments, except for the device.

    Args:
        split: this rank's place among the ranks.
        arguments: those of ExpertTrainer. `micro_batch` counts rows on each card.

    Raises:
        ConfigError: the run's optimiser, the precision or the memory options do not go with several cards.
    """

    def __init__(self, split: Split, *arguments: Any, **named: Any) -> None:
        self.split = split
        super().__init__(*arguments, **named)
        if self.manifest.optimisation.optimizer != "adamw":
            raise ConfigError("Muon needs whole matrices; an expert that it trains has to fit one card")
        if self.precision == "float16" or self.memory.weights == "bfloat16":
            raise ConfigError("several cards train one expert in float32 or bfloat16, with weights in float32")

    # --- the ranks ----------------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        return self.split.rank == 0

    def follow(self) -> None:
        """Do what rank 0 does, until it ends."""
        while (order := self.split.tell()) != _END:
            if order == _STEP:
                self.step()
            elif order == _SNAPSHOT:
                self.live_snapshot()

    def end(self) -> None:
        """Let the other ranks end. Rank 0 calls it once."""
        self.split.tell(_END)

    def step(self, may_wait: Callable[[], bool] = lambda: True) -> float:
        if self.leads:
            self._coming = self._take()  # it may wait for data; the others must not wait in a step meanwhile
            self.split.tell(_STEP)
        return super().step(may_wait)

    def _take(self) -> Batch:
        place = (self.epoch + 1, 0) if self.at_epoch_end else (self.epoch, self.step_in_epoch)
        return self._batches.take(*place)

    def _next_batch(self) -> Batch:
        return self._coming if self.leads else super()._next_batch()

    # --- model and gradients ------------------------------------------------------------------------------------------------

    def _placed(self, model: nn.Module) -> nn.Module:
        """Cut the model's blocks, one after another, so that no card ever holds all of them."""
        mesh = DeviceMesh(self.device.type, list(range(self.split.ranks)))
        self.split.shapes = {name: parameter.shape for name, parameter in trained_parameters(model).items()}
        for block in list(blocks_of(model)):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # each rank's loss is its share of the mean, so gradients are summed
                module.set_force_sum_reduction_for_comms(True)
        return model

    def _trained(self) -> Mapping[str, nn.Parameter]:
        """This rank's rows of each parameter, which share memory with the model's."""
        self._whole = trained_parameters(self.model)
        return {name: nn.Parameter(_local(parameter), requires_grad=False) for name, parameter in self._whole.items()}

    def _accumulate(self, batch: Batch, factor: float = 1.0) -> Tensor:
        """Gradients of this rank's rows, which FSDP sums over the ranks; returns the loss of the whole batch.

        All ranks take part in every pass. One that has no rows left computes a row that counts nothing.
        """
        total, rows, ranks = torch.zeros((), device=self.device), self.micro_batch, self.split.ranks
        for first in range(0, len(batch), rows * ranks):
            start = first + rows * self.split.rank
            counts = start < len(batch)
            own = batch.rows(start, start + rows) if counts else batch.rows(0, 1)
            own = own.to(self.device)
            with self._autocast():
                given = self._answers(own), own.latents, own.noise, own.time, own.given
                losses = weighted_losses(self.manifest.optimisation, self.spec, *given)
            loss = losses.sum() * (float(counts) / len(batch))
            loss.backward()
            total += loss.detach()
        for part, parameter in zip(self._parameters, self._whole.values(), strict=True):
            part.grad = None if parameter.grad is None else _local(parameter.grad)
            parameter.grad = None
        return self.split.total(total)

    def _clip(self, most: float) -> None:
        gradients = [part.grad for part in self._parameters if part.grad is not None]
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        norm = self.split.total(torch.stack(norms).square().sum()).sqrt()
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]

    # --- files --------------------------------------------------------------------------------------------------------------

    def _initial(self) -> Mapping[str, Tensor]:
        return published_tensors(load_expert(self.spec, initial_seed(self.manifest, self.shard), self.base))

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._whole.items():
            if name in weights:
                _local(parameter).copy_(self.split.part(weights[name]))
        if not has_adapter(self.model):
            for name, buffer in self.model.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])

    def _part_of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return PartsOf(tensors, self.split)

    def _settle(self) -> None:
        self._optimiser.settle(self._ema.weights, self.split)

    def snapshot(self) -> Snapshot:
        return self.live_snapshot()

    def live_snapshot(self) -> LiveSnapshot:
        """A copy in the main memory of rank 0; the update does not wait for who reads it. The other ranks give their parts."""
        began = time.monotonic()
        if self.leads:
            self.split.tell(_SNAPSHOT)
        snapshot = self._state(LiveSnapshot)
        snapshot.waited = time.monotonic() - began
        return snapshot

    def _state(self, kind: type[S]) -> S:
        compact = self.at_epoch_end and self.manifest.checkpoints == "compact"
        parameters = {name: self._copied(name, make() if make else tensor) for name, tensor, make in self._optimiser.parameters()}
        moments = {
            name: self._copied(name.split(".", 2)[2], make() if make else tensor)
            for name, tensor, make in self._optimiser.state()
        }
        averages = {name: self._copied(name, tensor) for name, tensor in self._ema.weights.items()}
        packed, sources = dict[str, Tensor](), {}
        if compact and self.leads:
            makes = ({name: tensor.detach for name, tensor in part.items()} for part in (parameters, moments))
            packed, sources = packed_state(next(makes), averages, next(makes))
        return kind(
            **self._described(),
            parameters=parameters,
            ema=averages,
            buffers=self._buffers(),
            moments=moments,
            packed=packed,
            sources=sources,
        )

    def _copied(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor in the main memory of rank 0; on the other ranks nothing is kept of it."""
        device = self.device if part.device.type == "cpu" else part.device
        whole = self.split.whole(name, part.to(device))
        return whole.to("cpu", copy=True) if self.leads else whole.new_empty(0)

    def _buffers(self) -> dict[str, Tensor]:
        kept = {} if has_adapter(self.model) else self.model.state_dict()
        parameters = {published_name(name) for name, _ in self.model.named_parameters()}
        return {name: tensor.to("cpu") for name, tensor in kept.items() if name not in parameters}


def blocks_of(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """The outermost modules in lists, such as a transformer's blocks: each is gathered whole while it is computed."""
    if listed and not isinstance(module, nn.ModuleList):
        if any(True for _ in module.parameters()):
            yield module
        return
    for child in module.children():
        yield from blocks_of(child, isinstance(module, nn.ModuleList))


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows, in the same memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
