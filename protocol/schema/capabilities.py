"""Words for what this version can do: announced in the introduction, and needed by manifests that not every version can serve."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lutetia.protocol.schema.fields import OpenWord

MOST_CAPABILITIES = 32
SHARD_PARTS = "shard-parts"
ADAPTERS = "adapters"
PIPELINES = "pipelines"
LOSS_WEIGHTS = "loss-weights"
COMPACT = "compact-checkpoints"
FIRST_FRAME = "first-frame"
LANES = "lanes"
CAPTIONS = "captions"
NOISE_PARTS = "noise-parts"
PICTURES = "pictures"
CAPABILITIES: tuple[str, ...] = (
    "unknown-fields", SHARD_PARTS, ADAPTERS, PIPELINES, LOSS_WEIGHTS, COMPACT, LANES, FIRST_FRAME, CAPTIONS,
    NOISE_PARTS, PICTURES,
)  # fmt: skip
"""`unknown-fields`: carries the fields of later versions instead of refusing them. `shard-parts`: trains on shards in parts.
`adapters`: trains, checks and replays experts that are adapters on a frozen base.
`pipelines`: gives experts texts, inputs and noise as the diffusers pipeline does that they start from.
`loss-weights`: weighs losses as the manifest says. `compact-checkpoints`: writes and reads checkpoints in the compact form.
`lanes`: trains, replays and merges the lanes of an epoch.
`first-frame`: trains experts with the first frame of some samples given.
`captions`: draws one of a clip's captions in each step.
`noise-parts`: trains experts at a part of the noise levels alone.
`pictures`: trains experts on shards that hold the first picture of each clip."""
_WORD = re.compile(r"[a-z][a-z0-9 -]{0,31}")


def _possible_words(words: Any) -> Any:
    """Those that could name a capability, at most 32: what a later version announces must not end the introduction."""
    if not isinstance(words, list | tuple):
        return words
    return [word for word in words if isinstance(word, str) and _WORD.fullmatch(word)][:MOST_CAPABILITIES]


Capabilities = Annotated[tuple[OpenWord, ...], Field(max_length=MOST_CAPABILITIES)]
AnnouncedCapabilities = Annotated[Capabilities, BeforeValidator(_possible_words)]
