"""One node's training as a bare loop over the trainer's own modules, from one state to the next, and the held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.teams.merge import State, Tensors
from lutetia.models.data.parts.batch_order import batch_number
from lutetia.models.data.shards import ShardData
from lutetia.models.experts.adapters.build import load_expert
from lutetia.models.experts.families import call_expert
from lutetia.models.experts.loss_weights import weighted_losses
from lutetia.models.experts.trained import load_trained, trained_parameters
from lutetia.models.training.batches import Batches
from lutetia.models.training.holdout_loss import holdout_rows
from lutetia.models.training.optimisers import Ema, Optimiser, ema_decay, learning_rate
from lutetia.protocol.schema.manifest import Manifest

ROWS = 64
"""Held-out rows per forward pass."""


class Node:
    """Trains from a given state. Team mates are trained one after another in the same `Node`.

    Args:
        manifest: names network, batch and the order of the data.
        data: clips to train on.
        rate: learning rate after the warm-up.
        steps: steps of the whole training, one after another.
        seed: of the first weights.
        base: the file under adapters.
        before: steps that the states of this training have behind them at its first step.
        schedule: of the rate after the warm-up.
    """

    def __init__(
        self, manifest: Manifest, data: ShardData, rate: float, steps: int, seed: int, base: Path | None = None,
        *, before: int = 0, schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:  # fmt: skip
        self._spec = manifest.expert_of(0)
        self._optimisation = manifest.optimisation.model_copy(update={"learning_rate": rate, "schedule": schedule})
        self._steps, self._before = steps, before
        self._model = load_expert(self._spec, seed, None if base is None else {base.name: base}).train()
        self._parameters = list(trained_parameters(self._model).values())
        self._optimiser = Optimiser(self._model, self._optimisation)
        self._ema = Ema(self._model)
        self._batches = Batches(manifest, 0, data)

    @property
    def model(self) -> nn.Module:
        return self._model

    def state(self) -> State:
        """A copy of what the next step needs."""
        return State(
            {name: parameter.detach().clone() for name, parameter in trained_parameters(self._model).items()},
            {name: moment.clone() for name, moment, _ in self._optimiser.state()},
            {name: average.clone() for name, average in self._ema.weights.items()},
        )

    def load(self, state: State, steps: int) -> None:
        """Go on from `state`, after `steps` steps. Set the moments to zero where `state` has none."""
        load_trained(self._model, state.parameters)
        self._ema.load(state.averages)
        self._optimiser.load(state.moments, self._before + steps if state.moments else 0)

    def train(self, first: int, count: int, lane: int = 0, lanes: int = 1) -> None:
        """Train steps `first`, …, `first + count - 1` on the batches of `lane`, one of `lanes` that share the data order."""
        for step in range(first, first + count):
            self._step(step, batch_number(step, lane, lanes))

    def _step(self, step: int, batch: int) -> None:
        rows = self._batches.at(0, batch)

        def answer(z: Tensor, s: Tensor) -> Tensor:
            return call_expert(self._model, z, s, rows.tokens, rows.pooled, self._spec.inputs)

        weighted_losses(self._optimisation, self._spec, answer, rows.latents, rows.noise, rows.time).mean().backward()
        nn.utils.clip_grad_norm_(self._parameters, self._optimisation.gradient_clip)
        self._optimiser.step(learning_rate(self._optimisation, step, self._steps))
        self._ema.update(ema_decay(self._optimisation, self._before + step))


@torch.no_grad()
def held_out_losses(
    manifest: Manifest, model: nn.Module, weights: Tensors, data: ShardData, chosen: Tensor | None = None, noises: int = 2
) -> Tensor:
    """The loss of each held-out row with `weights`, float32 [clips x noises].

    Args:
        manifest: names the network.
        model: the network, whose weights are the same afterwards.
        weights: what is trained of it.
        data: the held-out clips; they alone fix noise and times.
        chosen: numbers of the clips that are scored; None: all.
        noises: rows per clip.
    """
    kept = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    load_trained(model, weights)
    spec = manifest.expert_of(0)
    clips, noise, t = holdout_rows(manifest, 0, data, draw="teams", noises=noises)
    scored = torch.arange(len(clips)) if chosen is None else torch.isin(clips, chosen).nonzero().flatten()
    losses = []
    for part in scored.split(ROWS):
        rows = data.take(clips[part])

        def answer(z: Tensor, s: Tensor, rows: ShardData = rows) -> Tensor:
            return call_expert(model, z, s, rows.tokens, rows.pooled, spec.inputs)

        losses.append(weighted_losses(manifest.optimisation, spec, answer, rows.latents, noise.take(part), t[part]))
    load_trained(model, kept)
    return torch.cat(losses)
