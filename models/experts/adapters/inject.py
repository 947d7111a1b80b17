"""Adapters put into a network by peft, and their first values."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lutetia.models.experts.trained import ADAPTER, trained_parameters
from lutetia.protocol.schema.model.adapter import AdapterSpec
from lutetia.system.errors import ConfigError
from lutetia.system.process import give_back_free_memory

if TYPE_CHECKING:
    from peft import LoraConfig


def adapter_config(spec: AdapterSpec) -> LoraConfig:
    """The adapter in peft's words."""
    from peft import LoraConfig  # takes a second, which runs without adapters need not wait

    alpha: Any = spec.alpha  # peft takes fractions, too
    return LoraConfig(
        r=spec.rank, lora_alpha=alpha, target_modules=list(spec.targets), use_dora=spec.dora, lora_dropout=0.0, bias="none"
    )


def add_adapter(model: nn.Module, spec: AdapterSpec, empty: bool = False) -> None:
    """Put the adapter into the model, frozen but for it. Its values are not set yet: `reset_adapter` or `load_trained` do that.

    Args:
        model: the base.
        spec: the adapter.
        empty: leave its tensors without memory, for a caller that puts others in their place before the model is asked.

    Raises ConfigError when a target names no layer, or one that is not linear.
    """
    from peft import inject_adapter_in_model

    for target in spec.targets:
        named = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not named or not all(isinstance(module, nn.Linear) for module in named):
            what = "names no layer" if not named else "is not a linear layer"
            raise ConfigError(f"the adapter's target {target!r} {what} of {type(model).__name__}; correct expert.adapter.targets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of the base's own settings
        bare = empty and not spec.dora  # peft computes the lengths of DoRA from the base
        inject_adapter_in_model(adapter_config(spec), model, adapter_name=ADAPTER, low_cpu_mem_usage=bare)
    if empty:
        _empty(model)
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()  # peft gives it the data type of the base
    give_back_free_memory()  # peft looks at the weights of the base, which are unpacked for it


def _empty(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                module._parameters[name] = nn.Parameter(torch.empty(0))


@torch.no_grad()
def reset_adapter(model: nn.Module, seed: int) -> None:
    """First values that change nothing of the base: A uniform in +-1/sqrt(in), B zero, DoRA's lengths those of the base's rows.

    Drawn here and not by peft, so that all versions of peft begin alike.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(trained_parameters(model).items()):
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound)
        elif ".lora_B." in name:
            parameter.zero_()
        else:
            parameter.copy_(_row_lengths(model, name))


def _row_lengths(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name.partition(".lora_")[0])
    return torch.linalg.vector_norm(layer.get_base_layer().weight.float(), dim=1)  # pyright: ignore[reportCallIssue]
