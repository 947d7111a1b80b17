"""Narrow networks with random weights, saved like the real ones: same files, same names of tensors, same layers.

With them a whole report runs through its real extractors in seconds. Random convolutions still distinguish colours and places, so
a report's figures react to the clips; their values mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel

from lutetia.models.networks.assets import EFFICIENTNET_FILE, I3D_FILE, MINILM_FOLDER
from lutetia.models.networks.efficientnet import STAGES

# widths of I3D's inception blocks (Szegedy et al. 2015): 1x1; 1x1 and 3x3; 1x1 and 3x3; pooled 1x1
_INCEPTION = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64), "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64), "Mixed_4d": (128, 128, 256, 24, 64, 64), "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128), "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip
_EFFICIENTNET = (16, 24, 40, 80, 112, 192, 320)  # widths of the stages of EfficientNet-lite0
_KERNELS = (3, 3, 5, 3, 5, 5, 3)


def write_assets(folder: Path, words: Sequence[str], seed: int = 0) -> Path:
    """I3D, EfficientNet-lite0 and MiniLM, a sixteenth as wide, for captions of `words`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    save_file(_i3d(generator), folder / I3D_FILE)
    save_file(_efficientnet(generator), folder / EFFICIENTNET_FILE)
    _minilm(folder / MINILM_FOLDER, words, seed)
    return folder


def _i3d(generator: torch.Generator, share: int = 16, classes: int = 32) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def unit(scope: str, out: int, into: int, kernel: int) -> int:
        out = max(1, out // share)
        tensors[f"{scope}/w"] = _random(generator, out, into, kernel, kernel, kernel)
        for name, value in (("beta", 0.0), ("mean", 0.0), ("var", 1.0)):
            tensors[f"{scope}/{name}"] = torch.full((out,), value)
        return out

    width = unit("Conv3d_1a_7x7", 64, 3, 7)
    width = unit("Conv3d_2b_1x1", 64, width, 1)
    width = unit("Conv3d_2c_3x3", 192, width, 3)
    for name, (a, b, c, d, e, f) in _INCEPTION.items():
        second = "Conv3d_0a_3x3" if name == "Mixed_5b" else "Conv3d_0b_3x3"
        branches = [unit(f"{name}/Branch_0/Conv3d_0a_1x1", a, width, 1)]
        branches.append(unit(f"{name}/Branch_1/Conv3d_0b_3x3", c, unit(f"{name}/Branch_1/Conv3d_0a_1x1", b, width, 1), 3))
        branches.append(unit(f"{name}/Branch_2/{second}", e, unit(f"{name}/Branch_2/Conv3d_0a_1x1", d, width, 1), 3))
        branches.append(unit(f"{name}/Branch_3/Conv3d_0b_1x1", f, width, 1))
        width = sum(branches)
    tensors["Logits/Conv3d_0c_1x1/w"] = _random(generator, classes, width, 1, 1, 1)
    tensors["Logits/Conv3d_0c_1x1/b"] = torch.zeros(classes)
    return tensors


def _efficientnet(generator: torch.Generator, share: int = 16) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def unit(conv: str, norm: str, out: int, into: int, kernel: int) -> None:
        tensors[f"{conv}.weight"] = _random(generator, out, into, kernel, kernel)
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            tensors[f"{norm}.{name}"] = torch.full((out,), value)

    width, number = 32 // share, 0
    unit("_conv_stem", "_bn0", width, 3, 3)
    for (repeats, _), out, kernel in zip(STAGES, _EFFICIENTNET, _KERNELS, strict=True):
        for _ in range(repeats):
            name, inner = f"_blocks.{number}", width if number == 0 else 6 * width
            if number:
                unit(f"{name}._expand_conv", f"{name}._bn0", inner, width, 1)
            unit(f"{name}._depthwise_conv", f"{name}._bn1", inner, 1, kernel)
            width = max(1, out // share)
            unit(f"{name}._project_conv", f"{name}._bn2", width, inner, 1)
            number += 1
    unit("_conv_head", "_bn1", 1280, width, 1)
    tensors["_fc.weight"], tensors["_fc.bias"] = _random(generator, 1000, 1280), torch.zeros(1000)
    return tensors


def _minilm(folder: Path, words: Sequence[str], seed: int) -> None:
    folder.mkdir(exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.3,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    """He's initialisation: outputs have about the size of inputs."""
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(*shape, generator=generator) * (2 / fan_in) ** 0.5
