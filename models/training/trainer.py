"""Trains one expert in isolation. Killing, moving or auditing it does not change its weights.

A step is a function of (manifest, shard data, place in the run, weights, moments, EMA). The place (epoch, step) fixes data order,
noise, times and learning rate; everything else is in the state file. So a trainer that is killed at any step and restored from
its last local state ends with bit-equal weights on the same CPU with as many threads, and any peer can replay another's losses
from the parent's state.

An *epoch* is `checkpoint_samples` samples, the work between two accepted checkpoints (not a pass over the data). Epoch e starts
from accepted checkpoint e.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from lutetia.models.data.shards import ClipReader
from lutetia.models.device import Precision
from lutetia.models.experts.adapters.base_model import Base
from lutetia.models.experts.adapters.build import load_expert, reset_expert
from lutetia.models.experts.families import call_expert, check_fits
from lutetia.models.experts.loss_weights import weighted_losses
from lutetia.models.experts.trained import load_trained, published_tensors, trained_parameters
from lutetia.models.randomness import seed_of
from lutetia.models.tensor_files import TensorFile, under
from lutetia.models.training.batches import Batch, Batches, BatchesAhead
from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_weights
from lutetia.models.training.checkpoint_io import Snapshot, check_resumable, read_weights, write_state, write_weights
from lutetia.models.training.kernels.choice import PLAIN_KERNELS, Kernels
from lutetia.models.training.kernels.use import attention_by, compile_blocks
from lutetia.models.training.loss_scaling import scaled_backward
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.models.training.optimisers import Ema, Optimiser, ema_decay, keep_weights_in_bfloat16, learning_rate
from lutetia.models.training.states.compact import open_state, packed_state
from lutetia.models.training.states.live_snapshot import LiveSnapshot
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import ConfigError, DataError, IntegrityError, LutetiaError

__all__ = ["ExpertTrainer", "Snapshot", "TrainingDiverged", "UpdateInterrupted", "initial_seed", "write_state", "write_weights"]

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Snapshot)


class TrainingDiverged(LutetiaError):
    """The loss is no longer finite."""

    name = "diverged"


class UpdateInterrupted(LutetiaError):
    """A step was given up before its update, which waited for a writer that was not done; the state is that before the step."""

    name = "interrupted"


class ExpertTrainer:
    """Trains the expert of one shard, from its seeded initial weights unless `restore` is called.

    Args:
        manifest: the run.
        shard: the shard's index.
        data: its clips.
        device: where to train.
        micro_batch: rows per forward pass, to fit the memory. None: the whole batch. Changes results by rounding only.
        precision: of the forward pass; weights and moments are float32.
        base: the files of the base that the expert adapts, if it does.
        memory: what to do to need less of it. Moments or weights in fewer bits change results; weights in bfloat16 need the
            precision bfloat16.
        lane: the lane of the shard, in a run with lanes.
        kernels: how attention is computed and whether blocks are compiled. Changes results by rounding only.

    Raises:
        ConfigError: the expert does not fit the run's latents.
        DataError: the shard has fewer clips than a batch.
    """

    def __init__(
        self,
        manifest: Manifest,
        shard: int,
        data: ClipReader,
        *,
        device: str | torch.device = "cpu",
        micro_batch: int | None = None,
        precision: Precision = "float32",
        base: Base | None = None,
        memory: MemoryOptions = PLAIN,
        lane: int = 0,
        kernels: Kernels = PLAIN_KERNELS,
    ) -> None:
        self.manifest, self.shard, self.data, self.lane = manifest, shard, data, lane
        self.base: Base | None = base
        self.spec = manifest.expert_of(shard)
        self.device = torch.device(device)
        self.micro_batch = micro_batch or manifest.optimisation.batch
        self.precision: Precision = precision
        self.memory, self.kernels, self.strict_kernels, self._compiled = memory, kernels, False, False
        self.epoch, self.step_in_epoch = 0, 0
        self.trace: list[float] = []
        self._trained_on = self.device.type
        self._held: list[LiveSnapshot] = []
        for latent in manifest.latent.of_buckets:
            check_fits(self.spec, latent)
        if len(data) < manifest.optimisation.batch:
            batch = manifest.optimisation.batch
            raise DataError(f"shard {shard} has {len(data)} clips, fewer than a batch of {batch}; use fewer experts")
        self.model = self._placed(load_expert(self.spec, initial_seed(manifest, shard), base).train())
        if memory.weights == "bfloat16":
            keep_weights_in_bfloat16(self.model, precision, manifest.optimisation)
        if memory.checkpointing:
            cast(ModelMixin, self.model).enable_gradient_checkpointing()
        trained = self._trained()
        self._parameters = list(trained.values())
        self._optimiser = Optimiser(self.model, manifest.optimisation, memory, trained)
        self._ema = Ema(self.model, self._optimiser.values, memory.average == "host", trained)
        self._batches = BatchesAhead(Batches(manifest, shard, data, lane), manifest.lane_steps(lane), self.device)

    def _placed(self, model: nn.Module) -> nn.Module:
        """The model where it is trained. Memory options of its blocks come later."""
        return model.to(self.device)

    def _trained(self) -> Mapping[str, nn.Parameter]:
        """By name, what is trained here."""
        return trained_parameters(self.model)

    @property
    def at_epoch_end(self) -> bool:
        """Whether the epoch's last step is done; the next `step` starts the next epoch."""
        return self.step_in_epoch == self.manifest.lane_steps(self.lane)

    @property
    def steps(self) -> int:
        """Steps of the shard's budget that are done, by this trainer and those before it. A lane's share counts as the whole."""
        epoch, step = (self.epoch + 1, 0) if self.at_epoch_end else (self.epoch, self.step_in_epoch)
        return epoch * self.manifest.steps_per_epoch + step

    @property
    def samples(self) -> int:
        """Samples of the shard's budget that are done, by this trainer and those before it."""
        return self.steps * self.manifest.optimisation.batch

    def step(self, may_wait: Callable[[], bool] = lambda: True) -> float:
        """Train on the next batch. Returns its loss.

        Args:
            may_wait: whether the update may wait for the reader of a `live_snapshot`; asked several times a second.

        Raises:
            TrainingDiverged: the loss is not finite.
            UpdateInterrupted: `may_wait` said no.
        """
        if self.at_epoch_end:
            self._place(self.epoch + 1, 0, [])
        optimisation, done = self.manifest.optimisation, self.steps
        total = self.manifest.epochs * self.manifest.steps_per_epoch
        batch = self._next_batch()
        if self.precision == "float16":
            loss = scaled_backward(lambda factor: self._accumulate(batch, factor), self._parameters)
        else:
            loss = self._accumulate(batch)
        self._wait_for_readers(may_wait)
        self._clip(optimisation.gradient_clip)
        team = self.manifest.team
        self._optimiser.step(learning_rate(optimisation, done, total) * (team.inner_rate if team else 1.0))
        self._ema.update(ema_decay(optimisation, done))
        self.step_in_epoch += 1
        if self.at_epoch_end and self.manifest.checkpoints == "compact":
            self._settle()
        value = loss.item()
        self.trace.append(value)
        if not math.isfinite(value):
            remedy = "set precision to float32" if self.precision == "float16" else "restore the accepted checkpoint"
            raise TrainingDiverged(f"shard {self.shard} diverged at step {done} (loss {value}); {remedy}")
        return value

    def _next_batch(self) -> Batch:
        return self._batches.take(self.epoch, self.step_in_epoch)

    def _clip(self, most: float) -> None:
        """Scale the gradients so that their norm is at most `most`."""
        nn.utils.clip_grad_norm_(self._parameters, most)

    def _settle(self) -> None:
        """Round the state to what a compact checkpoint holds."""
        self._optimiser.settle(self._ema.weights)

    def _accumulate(self, batch: Batch, factor: float = 1.0) -> Tensor:
        """Compute the gradients of the batch's mean loss times `factor`, micro-batch by micro-batch. Returns the loss."""
        if self.kernels.compiled and not self._compiled:  # only now is it known which kernels an epoch was begun with
            compile_blocks(self.model, graphs=self.kernels.graphs, strict=self.strict_kernels)
            self._compiled = True
        total = torch.zeros((), device=self.device)
        with attention_by(self.kernels, strict=self.strict_kernels):
            for first in range(0, len(batch), self.micro_batch):
                rows = batch.rows(first, first + self.micro_batch).to(self.device)
                if self.kernels.graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                with self._autocast():
                    asked = self._answers(rows), rows.latents, rows.noise, rows.time, rows.given
                    losses = weighted_losses(self.manifest.optimisation, self.spec, *asked)
                loss = losses.sum() / len(batch)
                (loss if factor == 1 else loss * factor).backward()
                total += loss.detach()
        return total

    def _answers(self, rows: Batch):
        return lambda z, s: call_expert(
            self.model, z, s, rows.tokens, rows.pooled, self.spec.inputs, rows.given, rows.pictures
        )  # fmt: skip

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    def _wait_for_readers(self, may_wait: Callable[[], bool]) -> None:
        for held in self._held:
            if not held.before_update(may_wait):
                for parameter in self._parameters:
                    parameter.grad = None
                raise UpdateInterrupted("a checkpoint was not written when the trainer was stopped")
        self._held.clear()

    def parameters(self) -> dict[str, Tensor]:
        """The values of what is trained, in float32; not copies where they are kept so."""
        return {name: self._optimiser.values(parameter) for name, parameter in trained_parameters(self.model).items()}

    def snapshot(self) -> Snapshot:
        """A copy of the training state in main memory: about four times what is trained."""
        live = self._state(Snapshot)
        return replace(
            live, parameters=_copies(live, live.parameters), ema=_copies(live, live.ema), buffers=_copies(live, live.buffers),
            moments=_copies(live, live.moments), packed=_copies(live, live.packed), sources={},
        )  # fmt: skip

    def live_snapshot(self) -> LiveSnapshot:
        """The training state without a copy, for one reader in another thread: the next update waits until it is read."""
        snapshot = self._state(LiveSnapshot)
        snapshot.spare = sum(parameter.numel() for parameter in self._parameters)
        self._held.append(snapshot)
        return snapshot

    def _described(self) -> dict[str, Any]:
        """What a state says beside its tensors."""
        return {
            "run": self.manifest.run_id, "shard": self.shard, "epoch": self.epoch + 1 if self.at_epoch_end else self.epoch,
            "step": 0 if self.at_epoch_end else self.step_in_epoch, "samples": self.samples, "micro_batch": self.micro_batch,
            "precision": self.precision, "device": self._trained_on, "trace": list(self.trace), "memory": self.memory,
            "kernels": self.kernels,
        }  # fmt: skip

    def _state(self, kind: type[S]) -> S:
        parameters, moments = list(self._optimiser.parameters()), list(self._optimiser.state())
        packed, sources = dict[str, Tensor](), {id(tensor): make for _, tensor, make in (*parameters, *moments) if make}
        if self.at_epoch_end and self.manifest.checkpoints == "compact":
            makes = ({name: make or tensor.detach for name, tensor, make in part} for part in (parameters, moments))
            packed, more = packed_state(next(makes), self._ema.weights, next(makes))
            sources |= more
        return kind(
            **self._described(),
            parameters={name: tensor for name, tensor, _ in parameters},
            ema=dict(self._ema.weights),
            buffers={k: v for k, v in published_tensors(self.model).items() if k not in self._ema.weights},
            moments={name: tensor for name, tensor, _ in moments},
            packed=packed,
            sources=sources,
        )

    def restore(self, epoch: int, weights: Path | None = None, state: Path | None = None, local: Path | None = None) -> str:
        """Go to the start of `epoch`, or to the step in it that `local` was written at. Returns a sentence about what was done.

        Args:
            epoch: the epoch to train.
            weights: the accepted weights, needed if `state` has no EMA. Alone: a warm start (`ExpertSpec.init`) with new moments.
            state: the accepted training state. Without it and `weights`, epoch 0 starts from the seeded initial weights.
            local: this node's last state file, used if it is whole and of this epoch. The caller makes sure that it descends
                from the accepted checkpoint.

        Raises:
            CheckpointMisfit, IntegrityError: a file does not fit.
            ConfigError: there is nothing to start `epoch` from.
        """
        if local is not None and local.exists():
            try:
                self._resume(local, self._place_of(local, epoch), None)
                return f"resumed shard {self.shard} from the local state at epoch {epoch}, step {self.step_in_epoch}"
            except IntegrityError as error:
                log.warning("local state %s is not used: %s", local, error)
        if state is not None:
            if weights is not None:
                check_weights(weights, self.spec, self.manifest.checkpoints)
            self._resume(state, self._place_of(state, epoch, 0, weights), weights)
            return f"continued shard {self.shard} from accepted epoch {epoch}"
        if weights is not None:
            self._start(read_weights(weights, self.manifest, self.shard), epoch)
            return f"started shard {self.shard} from given weights at epoch {epoch}"
        if epoch == 0:
            self._start(self._initial(), epoch)
            return f"started shard {self.shard} from its seeded initial weights"
        raise ConfigError(f"epoch {epoch} of shard {self.shard} has no accepted state to continue from; fetch it first")

    def _initial(self) -> Mapping[str, Tensor]:
        """The seeded initial weights."""
        reset_expert(self.model, self.spec, initial_seed(self.manifest, self.shard))
        return published_tensors(self.model)

    def _place_of(self, path: Path, epoch: int, step: int | None = None, weights: Path | None = None) -> dict[str, Any]:
        """`step` None: of a local state, which has the plain form."""
        form = "float32" if step is None or weights is None else self.manifest.checkpoints
        place = check_resumable(path, self.manifest, self.shard, form, weights)
        if place["epoch"] != epoch or step not in (None, place["step"]):
            text = f"the state {path.name} is of epoch {place['epoch']}, step {place['step']}, not of epoch {epoch}"
            raise IntegrityError(text)
        if step is None and place["forms"] != (self.memory.moments, self.memory.weights):
            raise IntegrityError(f"the state {path.name} was trained with moments or weights in another form")
        return place

    def _resume(self, path: Path, place: dict[str, Any], weights: Path | None) -> None:
        """Take over a checked state tensor by tensor, so that no second copy of it is ever in memory."""
        form = "float32" if weights is None else self.manifest.checkpoints
        with ExitStack() as files:
            state = files.enter_context(open_state(path, weights, form))
            ema = files.enter_context(TensorFile(weights)) if weights is not None else under(state, "ema.")
            if not self._ema.weights.keys() <= ema.keys():
                text = f"the state of shard {self.shard} has no EMA and came without its weights; fetch them too"
                raise CheckpointMisfit("missing", text)
            self._start(under(state, "param."), place["epoch"], ema)
            trace = state["trace"].tolist() if "trace" in state and place["step"] else []
            self._place(place["epoch"], place["step"], trace)
            self._optimiser.load(self._part_of(state), self.steps)
        if place["step"]:  # an epoch must be finished with the same split, or sums differ in their last bits
            self.micro_batch, self.precision, self.kernels = place["micro_batch"], place["precision"], place["kernels"]
            if place["device"] not in ("", self.device.type):
                self._trained_on = "other"  # no single kind of device can replay it

    def _start(self, weights: Mapping[str, Tensor], epoch: int, averages: Mapping[str, Tensor] | None = None) -> None:
        """Set parameters to `weights`, and the EMA to `averages` or else the same; drop moments and trace."""
        self._load(weights)
        self._optimiser.load_values(weights)
        self._ema.load(self._part_of(weights if averages is None else averages))
        self._optimiser.load({}, 0)
        self._place(epoch, 0, [])

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        """Set the parameters to `weights`."""
        load_trained(self.model, weights)

    def _part_of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is kept here of these tensors, which are read from a file."""
        return tensors

    def _place(self, epoch: int, step: int, trace: list[float]) -> None:
        self.epoch, self.step_in_epoch, self.trace, self._trained_on = epoch, step, trace, self.device.type


def initial_seed(manifest: Manifest, shard: int) -> int:
    """The seed of a shard's first weights."""
    return seed_of(manifest.run_id, shard, "initial weights")


def _copies(snapshot: Snapshot, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: snapshot.values(tensor).to("cpu", copy=True) for name, tensor in tensors.items()}
