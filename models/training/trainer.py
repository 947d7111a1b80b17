"""Training of one expert in isolation, so that killing, moving or auditing it changes nothing.

A step is a function of (manifest, shard data, place in the run, weights, moments, EMA). The place fixes data order, noise,
times and learning rate; the rest is in the state file. So a trainer that is killed at any step and restored from its last local
state ends with bit-equal weights on a CPU (with as many threads), and the parent's state lets anyone replay a stranger's losses.

An *epoch* is `checkpoint_samples` samples, the stretch between two accepted checkpoints; epoch e builds on accepted checkpoint e.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from lutetia.models.data.shards import ShardData
from lutetia.models.experts.families import build_expert, call_expert, check_fits
from lutetia.models.experts.objectives import row_losses
from lutetia.models.randomness import seed_of
from lutetia.models.training.batches import Batch, Batches
from lutetia.models.training.checkpoint_checks import CheckpointMisfit
from lutetia.models.training.checkpoint_io import Precision, Snapshot, read_state, read_weights, write_state, write_weights
from lutetia.models.training.optimisers import Ema, Optimiser, ema_decay, learning_rate
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import ConfigError, DataError, IntegrityError, LutetiaError

__all__ = ["ExpertTrainer", "Snapshot", "TrainingDiverged", "initial_seed", "write_state", "write_weights"]

log = logging.getLogger(__name__)


class TrainingDiverged(LutetiaError):
    """The loss is not a number any more."""

    name = "diverged"


class ExpertTrainer:
    """Trains shard `shard` of `manifest` on `data`, from its seeded initial weights until `restore` says otherwise.

    `micro_batch` splits a batch to fit the memory; the result is the same up to floating-point error. `precision` is the dtype of
    the forward pass; weights and moments are float32. `gradient_checkpointing` trades time for memory, not results.
    Raises ConfigError (the expert does not fit the run's latents) or DataError (fewer clips than a batch).
    """

    def __init__(
        self,
        manifest: Manifest,
        shard: int,
        data: ShardData,
        *,
        device: str | torch.device = "cpu",
        micro_batch: int | None = None,
        precision: Precision = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        self.manifest, self.shard, self.data = manifest, shard, data
        self.spec = manifest.expert_of(shard)
        self.device = torch.device(device)
        self.micro_batch = micro_batch or manifest.optimisation.batch
        self.precision: Precision = precision
        self.epoch, self.step_in_epoch = 0, 0
        self.trace: list[float] = []
        self._trained_on = self.device.type
        check_fits(self.spec, manifest.latent)
        if len(data) < manifest.optimisation.batch:
            batch = manifest.optimisation.batch
            raise DataError(f"shard {shard} has {len(data)} clips, fewer than a batch of {batch}; use fewer experts")
        self.model = build_expert(self.spec, initial_seed(manifest, shard)).to(self.device).train()
        if gradient_checkpointing:
            cast(ModelMixin, self.model).enable_gradient_checkpointing()
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimiser = Optimiser(self.model, manifest.optimisation)
        self._ema = Ema(self.model)
        self._batches = _Ahead(Batches(manifest, shard, data), manifest.steps_per_epoch, self.device)

    @property
    def at_epoch_end(self) -> bool:
        """Whether the epoch's last step is done; the next `step` begins the next epoch."""
        return self.step_in_epoch == self.manifest.steps_per_epoch

    @property
    def steps(self) -> int:
        """Steps of the shard's budget done so far, by whomever."""
        return self.epoch * self.manifest.steps_per_epoch + self.step_in_epoch

    @property
    def samples(self) -> int:
        """Samples of the shard's budget seen so far, by whomever."""
        return self.steps * self.manifest.optimisation.batch

    def step(self) -> float:
        """One update on the next batch. Returns its loss; raises TrainingDiverged when that is not finite."""
        if self.at_epoch_end:
            self._place(self.epoch + 1, 0, [])
        optimisation, done = self.manifest.optimisation, self.steps
        total = self.manifest.epochs * self.manifest.steps_per_epoch
        loss = self._accumulate(self._batches.take(self.epoch, self.step_in_epoch))
        nn.utils.clip_grad_norm_(self._parameters, optimisation.gradient_clip)
        self._optimiser.step(learning_rate(optimisation, done, total))
        self._ema.update(ema_decay(optimisation, done))
        self.step_in_epoch += 1
        value = loss.item()
        self.trace.append(value)
        if not math.isfinite(value):
            raise TrainingDiverged(f"shard {self.shard} diverged at step {done} (loss {value}); restore the accepted checkpoint")
        return value

    def _accumulate(self, batch: Batch) -> Tensor:
        """Gradients of the batch's mean loss, micro-batch by micro-batch. Returns that loss, on the device."""
        total = torch.zeros((), device=self.device)
        for first in range(0, len(batch), self.micro_batch):
            rows = batch.rows(first, first + self.micro_batch).to(self.device)
            with self._autocast():
                losses = row_losses(self.spec, self._answers(rows), rows.latents, rows.noise, rows.time)
            loss = losses.sum() / len(batch)
            loss.backward()
            total += loss.detach()
        return total

    def _answers(self, rows: Batch):
        return lambda z, s: call_expert(self.model, z, s, rows.tokens, rows.pooled)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def snapshot(self) -> Snapshot:
        """A copy of everything, in main memory; takes as long as copying four times the weights."""
        return Snapshot(
            run=self.manifest.run_id,
            shard=self.shard,
            epoch=self.epoch + 1 if self.at_epoch_end else self.epoch,
            step=0 if self.at_epoch_end else self.step_in_epoch,
            samples=self.samples,
            micro_batch=self.micro_batch,
            precision=self.precision,
            device=self._trained_on,
            parameters=_copies(dict(self.model.named_parameters())),
            ema=_copies(self._ema.weights),
            buffers=_copies({k: v for k, v in self.model.state_dict().items() if k not in self._ema.weights}),
            moments=_copies(dict(self._optimiser.state())),
            trace=list(self.trace),
        )

    def restore(self, epoch: int, weights: Path | None = None, state: Path | None = None, local: Path | None = None) -> str:
        """Go to where `epoch` starts, or to the place in it that `local` remembers. Returns what was done, in words.

        `local`: this box's last state file, used when it is whole and of this epoch. `state`, with `weights` where the state has
        no EMA: the accepted checkpoint. `weights` alone: a warm start (`ExpertSpec.init`) with new moments. Nothing, at epoch 0:
        the seeded initial weights. The caller sees to it that `local` descends from the accepted checkpoint.
        Raises CheckpointRefused or IntegrityError for files that do not fit, ConfigError when `epoch` has no source.
        """
        if local is not None and local.exists():
            try:
                self._go_on(self._state_of(local, epoch), None)
                return f"resumed shard {self.shard} from the local state at epoch {epoch}, step {self.step_in_epoch}"
            except IntegrityError as error:
                log.warning("the local state %s is not used: %s", local, error)
        if state is not None:
            self._go_on(self._state_of(state, epoch, step=0), weights)
            return f"continued shard {self.shard} from accepted epoch {epoch}"
        if weights is not None:
            self._start(read_weights(weights, self.manifest, self.shard), epoch)
            return f"started shard {self.shard} from given weights at epoch {epoch}"
        if epoch == 0:
            self._start(build_expert(self.spec, initial_seed(self.manifest, self.shard)).state_dict(), epoch)
            return f"started shard {self.shard} from its seeded initial weights"
        raise ConfigError(f"epoch {epoch} of shard {self.shard} has no accepted state to continue from; fetch it first")

    def _state_of(self, path: Path, epoch: int, step: int | None = None) -> Snapshot:
        state = read_state(path, self.manifest, self.shard)
        if state.epoch != epoch or step not in (None, state.step):
            raise IntegrityError(f"the state {path.name} is of epoch {state.epoch}, step {state.step}, not of epoch {epoch}")
        return state

    def _go_on(self, state: Snapshot, weights: Path | None) -> None:
        ema = read_weights(weights, self.manifest, self.shard) if weights is not None else state.ema
        if not self._ema.weights.keys() <= ema.keys():
            text = f"the state of shard {self.shard} has no EMA and came without its weights; fetch them too"
            raise CheckpointMisfit("missing", text)
        self._start(state.parameters, state.epoch)
        self._ema.load(ema)
        self._place(state.epoch, state.step, state.trace if state.step else [])
        self._optimiser.load(state.moments, self.steps)
        if state.step:  # in the middle of an epoch the same split must go on, or the sums differ in their last bits
            self.micro_batch, self.precision = state.micro_batch, state.precision
            if state.device not in ("", self.device.type):
                self._trained_on = "other"  # no one kind of device can replay it

    def _start(self, weights: Mapping[str, Tensor], epoch: int) -> None:
        """Parameters and EMA from `weights`; moments and trace forgotten."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if name in weights:
                    tensor.copy_(weights[name])
        self._ema.load(weights)
        self._optimiser.load({}, 0)
        self._place(epoch, 0, [])

    def _place(self, epoch: int, step: int, trace: list[float]) -> None:
        self.epoch, self.step_in_epoch, self.trace, self._trained_on = epoch, step, trace, self.device.type


class _Ahead:
    """Makes batches; for an accelerator one ahead in a thread, so that the device never waits for random numbers."""

    def __init__(self, batches: Batches, steps: int, device: torch.device) -> None:
        self._batches, self._steps = batches, steps
        self._pool = ThreadPoolExecutor(1, "batches") if device.type != "cpu" else None
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def take(self, epoch: int, step: int) -> Batch:
        if self._pool is None:
            return self._batches.at(epoch, step)
        ahead, self._ahead = self._ahead, None
        batch = ahead[1].result() if ahead and ahead[0] == (epoch, step) else self._batches.at(epoch, step)
        following = (epoch, step + 1) if step + 1 < self._steps else (epoch + 1, 0)
        self._ahead = following, self._pool.submit(self._batches.at, *following)
        return batch


def initial_seed(manifest: Manifest, shard: int) -> int:
    """The seed of a shard's first weights."""
    return seed_of(manifest.run_id, shard, "initial weights")


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
