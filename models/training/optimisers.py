"""The update of one step: learning-rate schedule, AdamW, Muon and EMA, with their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lutetia.models.experts.trained import published_name, trained_parameters
from lutetia.models.training.muon import Muon
from lutetia.protocol.schema.manifest import Optimisation

LAST_RATE = 0.02  # the cosine ends at this share of the peak
MUON_RATE = 5.0  # Muon's learning rate over AdamW's, so that one setting fits both


def learning_rate(optimisation: Optimisation, step: int, steps: int) -> float:
    """The rate at step `step` (0, 1, …) of a shard's budget of `steps`: linear warm-up, then constant or cosine."""
    warmup = min(1.0, (step + 1) / optimisation.warmup_steps) if optimisation.warmup_steps else 1.0
    if optimisation.schedule == "constant":
        return optimisation.learning_rate * warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return optimisation.learning_rate * warmup * (LAST_RATE + (1 - LAST_RATE) * cosine)


def ema_decay(optimisation: Optimisation, step: int) -> float:
    """The EMA's decay after step `step` of the budget. It grows to the manifest's, so that the initial weights fade early."""
    return min(optimisation.ema_decay, (2 + step) / (11 + step))


def hidden_matrices(model: nn.Module) -> set[str]:
    """The parameters that Muon trains: weights of linear layers in transformer blocks. AdamW trains the others."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks." in name)
    return {published_name(f"{name}.weight") for name in linear}


class Optimiser:
    """AdamW, or Muon for hidden matrices and AdamW for the others, over the trained parameters of one model."""

    def __init__(self, model: nn.Module, optimisation: Optimisation) -> None:
        parameters = trained_parameters(model)
        matrices = hidden_matrices(model) & parameters.keys() if optimisation.optimizer == "muon" else set()
        decay = optimisation.weight_decay
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._parts: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        others = [p for name, p in parameters.items() if name not in matrices]
        betas = (optimisation.beta1, optimisation.beta2)
        if others:  # of an adapter all are hidden matrices
            self._parts["adamw"] = torch.optim.AdamW(others, betas=betas, weight_decay=decay, fused=True), 1.0
        if matrices:
            hidden = [parameters[name] for name in parameters if name in matrices]
            self._parts["muon"] = Muon(hidden, weight_decay=decay), MUON_RATE

    def step(self, rate: float) -> None:
        """Update the parameters from their gradients with learning rate `rate`, then drop the gradients."""
        for part, factor in self._parts.values():
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The moments by name (`adamw.exp_avg.<parameter>`, …). These are the live tensors: clone them to keep them."""
        for kind, (part, _) in self._parts.items():
            for parameter, moments in part.state.items():
                for moment, tensor in moments.items():
                    if moment != "step":
                        yield f"{kind}.{moment}.{self._names[parameter]}", tensor

    def load(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Restore the moments that `state` gave after `steps` updates; each is read once. Missing moments of Adam become zeros.

        Their step count is set to `steps` too: a trainer that continues and one that reloads must correct the bias alike.
        """
        for kind, (part, _) in self._parts.items():
            part.state.clear()
            for parameter in (p for group in part.param_groups for p in group["params"]):
                suffix = f".{self._names[parameter]}"
                for name in (f"{kind}.{moment}{suffix}" for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer")):
                    if name in moments:
                        part.state[parameter][name.split(".", 2)[1]] = moments[name].to(parameter.device, copy=True)
                if kind == "adamw" and steps:
                    state = part.state[parameter]
                    state["step"] = torch.tensor(float(steps), device=parameter.device)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state.setdefault(moment, torch.zeros_like(parameter))


class Ema:
    """The exponential moving average of a model's trained parameters: the weights that are published."""

    def __init__(self, model: nn.Module) -> None:
        parameters = trained_parameters(model)
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}
        self._averaged = list(self.weights.values())
        self._live = [p.detach() for p in parameters.values()]

    def update(self, decay: float) -> None:
        """Move the averages towards the parameters by `1 - decay`."""
        torch._foreach_lerp_(self._averaged, self._live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the averages from `weights`."""
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])
