"""Lets a model compute with chosen kernels."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lutetia.models.training.kernels.choice import Kernels

_TORCH = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}  # fmt: skip
_DIFFUSERS = {"flash-attn": "flash", "xformers": "xformers"}
_MOST_SHAPES = 256
COMPILER = "inductor"


@contextlib.contextmanager
def attention_by(kernels: Kernels, *, strict: bool = False) -> Iterator[None]:
    """Compute attention with the chosen kernel, in the backward pass, too, where blocks are computed again.

    `strict`: fail where the kernel cannot be used, instead of taking another of torch's.
    """
    with contextlib.ExitStack() as stack:
        if wanted := _TORCH.get(kernels.attention):
            other = [] if strict or wanted == SDPBackend.MATH else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            order = list(dict.fromkeys([wanted, *other]))
            stack.enter_context(sdpa_kernel(order, set_priority=True))
        elif wanted := _DIFFUSERS.get(kernels.attention):
            stack.enter_context(attention_backend(wanted))
        yield


def compile_blocks(model: nn.Module, *, graphs: bool = False, strict: bool = False) -> None:
    """Have the model's repeated blocks compiled when they are next called: they are alike, so they are compiled once together.

    Each shape is compiled for itself, so that the code does not depend on which shape came first; a trainer that was restarted
    goes on with the same code. One process compiles, so that none is left behind.

    Args:
        model: the expert.
        graphs: launch them as CUDA graphs. Each forward pass is then begun by `torch.compiler.cudagraph_mark_step_begin`.
        strict: fail where the compiler fails, instead of going on uncompiled.
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    inductor.compile_threads = 1
    inductor.deterministic = True  # choose no code by its speed: two trainers would choose differently
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = _MOST_SHAPES
    dynamo.suppress_errors = not strict
    for block in repeated_blocks(model):
        block.compile(backend=COMPILER, dynamic=False, **({"options": {"triton.cudagraphs": True}} if graphs else {}))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer."""
    return [block for part in model.children() if isinstance(part, nn.ModuleList) for block in part]


@contextlib.contextmanager
def compiled_code_in(folder: Path) -> Iterator[None]:
    """Keep what the compiler writes in `folder`, which is removed at the end; torch's own folder is shared by all processes.

    The compiler makes the folder when it first writes.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Within this, compiled blocks are computed as they were written: for calls of other shapes than those of training."""
    return torch.compiler.set_stance("force_eager")
