"""What training changes of an expert: the tensors that are optimised, published, checked, audited and stitched.

Of an expert that is trained whole these are all of its parameters, and the buffers of its weights file are published beside them.
Of one with an adapter they are the adapter's tensors alone; its base is the same for everybody and crosses no wire with a result.
Nothing outside this file may assume that all parameters of a model are trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ADAPTER = "default"
"""The name that peft gives the one adapter of an expert; it is left out of the names of tensors."""


def has_adapter(model: nn.Module) -> bool:
    """Whether only an adapter of the model is trained."""
    return hasattr(model, "peft_config")


def published_name(name: str) -> str:
    """The name of a parameter in checkpoints: its own, without the name of the adapter."""
    return name.replace(f".{ADAPTER}.", ".")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by their published names."""
    return {published_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def published_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a weights file holds, by name: the live trained parameters and, of a whole model, its buffers."""
    return dict(trained_parameters(model)) if has_adapter(model) else model.state_dict()


@torch.no_grad()
def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what is published into the model. Tensors that `tensors` lacks keep their values."""
    for name, tensor in published_tensors(model).items():
        if name in tensors:
            tensor.copy_(tensors[name])
