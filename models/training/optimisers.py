"""The update of one step: learning-rate schedule, AdamW, Muon and EMA, with their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lutetia.models.device import Precision
from lutetia.models.experts.trained import published_name, trained_parameters
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.models.training.memory.slim_adamw import REST, SlimAdamW
from lutetia.models.training.muon import Muon
from lutetia.models.training.states.compact import FIRST, PARAMETER, pack, unpacked
from lutetia.models.training.states.eight_bit import Packed
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.system.errors import ConfigError

_SETTLING = 3
Make = Callable[[], Tensor]
"""Makes the float32 values of a tensor that is kept in another form."""


class Parted(Protocol):
    """Tensors of which each card of a unit has a part (`units.split.Split`)."""

    def whole(self, name: str, part: Tensor) -> Tensor: ...

    def part(self, whole: Tensor) -> Tensor: ...


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
    """AdamW, or Muon for hidden matrices and AdamW for the others, over the trained parameters of one model.

    With weights or moments in fewer bits, the state in float32 is made where it is read.

    Args:
        model: whose trained parameters.
        optimisation: rates, decays and which optimiser.
        memory: in which forms the state is kept.
        parameters: by name, what is trained in place of the model's own parameters: this card's part of each.
    """

    def __init__(
        self, model: nn.Module, optimisation: Optimisation, memory: MemoryOptions = PLAIN,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:  # fmt: skip
        parameters = trained_parameters(model) if parameters is None else parameters
        matrices = hidden_matrices(model) & parameters.keys() if optimisation.optimizer == "muon" else set()
        decay = optimisation.weight_decay
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._parts: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        others = [p for name, p in parameters.items() if name not in matrices]
        betas = (optimisation.beta1, optimisation.beta2)
        self._slim = None if memory.exact or not others else SlimAdamW(others, betas, decay, packed=memory.moments == "8bit")
        if others:  # of an adapter all may be hidden matrices
            plain = self._slim or torch.optim.AdamW(others, betas=betas, weight_decay=decay, fused=True)
            self._parts["adamw"] = plain, 1.0
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

    def values(self, parameter: Tensor) -> Tensor:
        """The parameter's value in float32; not a copy where it is kept so."""
        return self._slim.values(parameter) if self._slim and parameter.dtype != torch.float32 else parameter.detach()

    def parameters(self) -> Iterator[tuple[str, Tensor, Make | None]]:
        """The parameters by name, like `state`."""
        for parameter, name in self._names.items():
            if parameter.dtype == torch.float32:
                yield name, parameter, None
            else:
                yield name, _placeholder(parameter), lambda parameter=parameter: self.values(parameter)

    def state(self) -> Iterator[tuple[str, Tensor, Make | None]]:
        """The moments by name (`adamw.exp_avg.<parameter>`, …), as live tensors: clone them to keep them.

        One that is kept in another form than float32 is a placeholder without values, with the function that makes them.
        """
        for kind, (part, _) in self._parts.items():
            for parameter, moments in part.state.items():
                for moment, kept in moments.items():
                    name = f"{kind}.{moment}.{self._names[parameter]}"
                    if isinstance(kept, Packed):
                        slim = self._slim
                        assert slim
                        yield name, _placeholder(parameter), lambda p=parameter, m=moment, s=slim: s.moment(p, m)
                    elif moment not in ("step", REST):
                        yield name, kept, None

    def load(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Restore the moments that `state` gave after `steps` updates; each is read once. Missing moments of Adam become zeros.

        Their step count is set to `steps` too: a trainer that continues and one that reloads must correct the bias alike.
        """
        for kind, (part, _) in self._parts.items():
            for parameter in (p for group in part.param_groups for p in group["params"]):
                rest = part.state.pop(parameter, {}).get(REST)
                if rest is not None:
                    part.state[parameter][REST] = rest
                suffix = f".{self._names[parameter]}"
                for name in (f"{kind}.{moment}{suffix}" for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer")):
                    if name in moments:
                        self._keep(part, parameter, name.split(".", 2)[1], moments[name].to(parameter.device, copy=True))
                if kind == "adamw" and steps:
                    state = part.state[parameter]
                    state["step"] = torch.tensor(float(steps), device=parameter.device)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        if moment not in state:
                            self._keep(part, parameter, moment, torch.zeros_like(parameter, dtype=torch.float32))

    def settle(self, averages: Mapping[str, Tensor], split: Parted | None = None) -> None:
        """Round the state, and the averages, to what the compact form of a checkpoint holds (`states.compact`).

        `split`: of an expert that several cards train, since blocks of numbers with one scale lie across their parts.
        """
        if split is not None:
            self._settle_parts(averages, split)
            return
        for parameter, name in self._names.items():
            averages[name].copy_(averages[name].bfloat16())
            average = averages[name].to(parameter.device)
            for _ in range(_SETTLING):
                values = unpacked(PARAMETER, pack(PARAMETER, self.values(parameter), average), average)
                self._set(parameter, values)
                if torch.equal(self.values(parameter), values):
                    break
            else:  # weights in bfloat16 may not reach it: those that do not become the average
                again = unpacked(PARAMETER, pack(PARAMETER, self.values(parameter), average), average)
                self._set(parameter, torch.where(again == self.values(parameter), again, average))
        for kind, (part, _) in self._parts.items():
            for parameter, moments in part.state.items():
                for moment in [moment for moment in moments if moment not in ("step", REST)]:
                    name = f"{kind}.{moment}.{self._names[parameter]}"
                    values = self._slim.moment(parameter, moment) if self._slim and self._slim is part else moments[moment]
                    settled = torch.zeros_like(values) if name.startswith(FIRST) else unpacked(name, pack(name, values))
                    self._keep(part, parameter, moment, settled)

    def _settle_parts(self, averages: Mapping[str, Tensor], split: Parted) -> None:
        """`settle`, tensor by tensor: made whole on every card, rounded, and each takes its part."""
        for parameter, name in self._names.items():
            average = split.whole(name, averages[name]).bfloat16()
            averages[name].copy_(split.part(average))
            values = unpacked(PARAMETER, pack(PARAMETER, split.whole(name, parameter.detach()), average), average)
            self._set(parameter, split.part(values))
        for kind, (part, _) in self._parts.items():
            for parameter, moments in part.state.items():
                for moment in [moment for moment in moments if moment not in ("step", REST)]:
                    name = f"{kind}.{moment}.{self._names[parameter]}"
                    values = self._slim.moment(parameter, moment) if self._slim and self._slim is part else moments[moment]
                    whole = split.whole(self._names[parameter], values)
                    settled = torch.zeros_like(whole) if name.startswith(FIRST) else unpacked(name, pack(name, whole))
                    self._keep(part, parameter, moment, split.part(settled))

    def _set(self, parameter: Tensor, values: Tensor) -> None:
        if self._slim:
            self._slim.set_values(parameter, values)
        else:
            parameter.detach().copy_(values)

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters that are kept in bfloat16, with what rounds off."""
        for parameter, name in self._names.items():
            if self._slim and parameter.dtype != torch.float32 and name in values:
                self._slim.set_values(parameter, values[name].to(parameter.device))

    def _keep(self, part: torch.optim.Optimizer, parameter: Tensor, moment: str, value: Tensor) -> None:
        kept = part.state[parameter].get(moment)
        if self._slim is not None and self._slim is part:
            self._slim.set_moment(parameter, moment, value)
        elif isinstance(kept, Tensor):
            kept.copy_(value)
        else:
            part.state[parameter][moment] = value


class Ema:
    """The exponential moving average of a model's trained parameters: the weights that are published.

    Args:
        model: whose parameters.
        values: gives a parameter's value in float32.
        host: keep the averages in main memory, beside an accelerator.
        parameters: by name, what is averaged in place of the model's own parameters.
    """

    def __init__(
        self, model: nn.Module, values: Callable[[Tensor], Tensor] = Tensor.detach, host: bool = False,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:  # fmt: skip
        parameters = trained_parameters(model) if parameters is None else parameters
        self._live = list(parameters.values())
        self._values = values
        self._plain = not host and all(parameter.dtype == torch.float32 for parameter in self._live)
        self.weights = {
            name: values(parameter).to("cpu" if host else parameter.device, copy=True) for name, parameter in parameters.items()
        }
        self._averaged = list(self.weights.values())

    def update(self, decay: float) -> None:
        """Move the averages towards the parameters by `1 - decay`."""
        if self._plain:
            live = [parameter.detach() for parameter in self._live]
            torch._foreach_lerp_(self._averaged, live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
            return
        for average, parameter in zip(self._averaged, self._live, strict=True):
            average.lerp_(self._values(parameter).to(average.device), 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the averages from `weights`."""
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])


def keep_weights_in_bfloat16(model: nn.Module, precision: Precision, optimisation: Optimisation) -> None:
    """Convert the trained weights of linear layers and convolutions, which autocast would round anyway; the others are small.

    Raises ConfigError where that does not fit how the model is trained.
    """
    if precision != "bfloat16" or optimisation.optimizer != "adamw":
        raise ConfigError("weights in bfloat16 need the precision bfloat16 and the optimizer adamw; choose others")
    for parameter in narrow_weights(model):
        parameter.data = parameter.data.bfloat16()


def narrow_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained weights that may be kept in bfloat16: those of linear layers and convolutions."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and parameter.requires_grad and parameter.ndim > 1:
                yield parameter


def _placeholder(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32, device="meta")
