"""What one training step keeps for its backward pass, counted without computing anything.

The expert is run on fake tensors, which have shapes and no values, and PyTorch's hooks for saved tensors say what autograd keeps.
So the count follows the expert's own code, the precision and the checkpointing, for every class alike.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from contextlib import nullcontext
from typing import Any, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from lutetia.models.device import Precision
from lutetia.models.experts.families import build_meta, call_expert, family_of
from lutetia.models.experts.pictures import empty_pictures
from lutetia.models.experts.trained import trained_parameters
from lutetia.models.training.kernels.use import repeated_blocks
from lutetia.models.training.memory.plan import ExpertFacts, KeptBytes
from lutetia.models.training.optimisers import hidden_matrices, narrow_weights
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec

_BITS: dict[str, float] = {"float32": 32, "bfloat16": 16, "fp8": 8.25, "nf4": 4.5}
"""Of a number of an adapter's base, with its scales."""


def expert_facts(manifest: Manifest, shard: int) -> ExpertFacts:
    """What the memory of a shard's expert depends on. Raises ConfigError where the expert cannot be built."""
    spec = manifest.expert_of(shard)
    model = build_meta(spec)
    trained = trained_parameters(model)
    matrices = hidden_matrices(model) & trained.keys() if manifest.optimisation.optimizer == "muon" else set()
    by_shape: dict[tuple[int, ...], int] = {}
    for name in matrices:
        shape = tuple(trained[name].shape)
        by_shape[shape] = by_shape.get(shape, 0) + trained[name].numel()
    bits = _BITS[spec.adapter.base.dtype] if spec.adapter else 32
    frozen = sum(tensor.numel() for tensor in model.parameters()) - sum(tensor.numel() for tensor in trained.values())
    return ExpertFacts(
        trained=sum(tensor.numel() for tensor in trained.values()), matrices=sum(by_shape.values()),
        narrow=sum(tensor.numel() for tensor in narrow_weights(model)),
        largest=max([*by_shape.values(), *(tensor.numel() for tensor in trained.values())]),
        frozen_bytes=int(frozen * bits / 8) + sum(buffer.nbytes for buffer in model.buffers()),
        kept=lambda precision, checkpointing: activations(spec, manifest.latent, precision, checkpointing),
    )  # fmt: skip


def activations(spec: ExpertSpec, latent: LatentSpec, precision: Precision, checkpointing: bool) -> KeptBytes:
    """Count them. Takes seconds for an expert with many blocks; counted once for each argument."""
    return _activations(canonical(spec), canonical(latent), precision, checkpointing)


@functools.lru_cache(maxsize=64)
def _activations(spec: bytes, latent: bytes, precision: Precision, checkpointing: bool) -> KeptBytes:
    expert, shape = ExpertSpec.model_validate_json(spec), LatentSpec.model_validate_json(latent)
    first_frame = expert.first_frame is not None
    _forget_cached_tensors()
    try:
        with FakeTensorMode():
            model = _fake(build_meta(expert)).train()
            one, block = _kept(model, shape, 1, precision, checkpointing, first_frame)
            two, _ = _kept(model, shape, 2, precision, checkpointing, first_frame)
    except DynamicOutputShapeException:
        return _by_formula(expert, shape, precision, checkpointing)
    finally:
        _forget_cached_tensors()
    per_row = two - one
    return KeptBytes(max(0, one - per_row), per_row, block)


def _forget_cached_tensors() -> None:
    """Empty the caches of expert classes: real tensors from them do not mix with fake ones, and no fake one may stay in them."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("lutetia.models.experts", "diffusers.models."))]
    for module in modules:
        for value in list(vars(module).values()):
            for each in (value, *(vars(value).values() if isinstance(value, type) else ())):
                if isinstance(each, functools._lru_cache_wrapper):
                    each.cache_clear()


def _by_formula(spec: ExpertSpec, latent: LatentSpec, precision: Precision, checkpointing: bool) -> KeptBytes:
    """For a class whose shapes depend on values, which fake tensors do not have (Mochi drops padded text tokens).

    34 bytes per token, block and channel in 16 bits (Korthikanti et al., arXiv 2205.05198, equation 1, without the attention
    matrix, which is never kept); with checkpointing the block's input, 2 bytes. Both doubled in float32.
    """
    model = build_meta(spec)
    config: Any = model.config
    patch = family_of(spec.class_name).patch(config)
    tokens = latent.text_tokens + math.prod(-(-size // step) for size, step in zip(latent.shape[1:], patch, strict=True))
    width = config["num_attention_heads"] * config["attention_head_dim"] * (2 if precision == "float32" else 1)
    count = len(repeated_blocks(model))
    return KeptBytes(0, (2 if checkpointing else 34) * tokens * width * count, 34 * tokens * width)


def _fake(model: nn.Module) -> nn.Module:
    """The model with fake tensors of the CPU in place of those without a device, so that autocast works on it."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
    return model


def _kept(
    model: nn.Module, latent: LatentSpec, rows: int, precision: Precision, checkpointing: bool, first_frame: bool
) -> tuple[int, int]:
    """(bytes that a forward pass of `rows` rows keeps, the most that one block keeps)."""
    if checkpointing:
        cast(ModelMixin, model).enable_gradient_checkpointing()
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is counted under the number of one that is gone
    blocks: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in own and key not in kept:
            kept[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    handles = [hook for block in repeated_blocks(model) for hook in _measure(block, kept, blocks)]
    autocast = nullcontext() if precision == "float32" else torch.autocast("cpu", dtype=torch.bfloat16)
    x = torch.empty(rows, *latent.shape)
    text, pooled = torch.empty(rows, latent.text_tokens, latent.text_width), torch.empty(rows, latent.pooled_width)
    given = torch.zeros(rows, dtype=torch.bool) if first_frame else None
    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # about speed; nothing is computed here
        call_expert(model, x, torch.empty(rows), text, pooled, given=given, pictures=empty_pictures(latent, rows))
    for handle in handles:
        handle.remove()
    if checkpointing:
        cast(ModelMixin, model).disable_gradient_checkpointing()
    return sum(kept.values()), max(blocks, default=0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _measure(block: nn.Module, kept: dict[int, int], found: list[int]) -> list[torch.utils.hooks.RemovableHandle]:
    before: list[int] = []

    def enter(*_: object) -> None:
        before.append(sum(kept.values()))

    def leave(*_: object) -> None:
        found.append(sum(kept.values()) - before.pop())

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
