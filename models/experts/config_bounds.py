"""Bounds of an expert's configuration, checked before its network is built: looking at a manifest must cost nobody minutes.

The largest video transformers of today have 60 layers and a width of 6,144. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError

MOST_LAYERS = 256
"""Of all kinds of blocks together."""
LARGEST_SIZE = 1 << 16
"""Of one axis, for instance the width of a feed-forward layer or the length of a position table."""
LARGEST_WIDTH = 1 << 15
"""Heads times the width of a head."""
LARGEST_TABLE = 1 << 27
"""Numbers in the table of positions that CogVideoX computes when it is built, unless its positions are rotary."""
_COGVIDEOX = {
    "sample_frames": 49, "sample_height": 60, "sample_width": 90, "patch_size": 2, "temporal_compression_ratio": 4,
    "num_attention_heads": 30, "attention_head_dim": 64,
}  # fmt: skip
"""Defaults of its class."""
MOST_POSITION_CHANNELS = 96


def check_config(spec: ExpertSpec) -> None:
    """Raises ConfigError for a size of zero or less, or one beyond what any network that can be trained has."""
    config, name = spec.config, spec.class_name
    layers = 0
    for key, size in _sizes(config):
        least = 0 if "layers" in key or key.endswith("shift") else 1
        if not least <= size <= LARGEST_SIZE:
            raise _refusal(name, f"{key} of {size}", f"from {least} to {LARGEST_SIZE}")
        layers += size if key.endswith("layers") else 0
    if layers > MOST_LAYERS:
        raise _refusal(name, f"{layers} layers", f"at most {MOST_LAYERS}")
    width = _size(config, "num_attention_heads") * _size(config, "attention_head_dim")
    if width > LARGEST_WIDTH:
        raise _refusal(name, f"num_attention_heads times attention_head_dim of {width}", f"at most {LARGEST_WIDTH}")
    if name.startswith("CogVideoX") and not config.get("use_rotary_positional_embeddings"):
        table = _position_table({**_COGVIDEOX, **config})
        if table > LARGEST_TABLE:
            raise _refusal(name, f"a table of {table} numbers for its positions", f"at most {LARGEST_TABLE}")


def _position_table(config: Mapping[str, Any]) -> int:
    """Numbers in the table of positions: patches times width."""
    patch, frames = _size(config, "patch_size"), _size(config, "sample_frames") // _size(config, "temporal_compression_ratio") + 1
    height, width = (_size(config, key) // patch for key in ("sample_height", "sample_width"))
    return frames * height * width * _size(config, "num_attention_heads") * _size(config, "attention_head_dim")


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of the configuration, in lists too, with its key."""
    for key, value in config.items():
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, int) and not isinstance(each, bool):
                yield key, each


def _size(config: Mapping[str, Any], key: str) -> int:
    """A size, 1 where the class's default holds: those of diffusers are all small."""
    value = config.get(key)
    return value if isinstance(value, int) else 1


def _refusal(name: str, what: str, allowed: str) -> ConfigError:
    return ConfigError(f"the config of expert {name} has {what}; allowed is {allowed}: correct the run's expert config")
