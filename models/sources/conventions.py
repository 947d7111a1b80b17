"""What diffusers' pipelines do beside calling their parts: a table of their classes, read from their code (diffusers 0.42).

A pipeline's files do not say this: it is written in its `__call__` and `encode_prompt`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lutetia.protocol.schema.model.pipeline_spec import TextRecipe

_HUNYUAN_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
"""`DEFAULT_PROMPT_TEMPLATE` of diffusers' HunyuanVideoPipeline."""


@dataclass(frozen=True)
class Convention:
    """How a pipeline class calls its parts, with the defaults of its `__call__`."""

    text: TextRecipe
    tokens: int
    """Tokens of a prompt (`max_sequence_length`)."""
    steps: int
    guidance: float
    fps: float
    """Frames per second of the clips that its model was trained on."""
    masked: bool = False
    """Whether the transformer is told which tokens are padding."""
    grid: Literal["own", "uniform", "linear-quadratic"] = "own"
    embedded_guidance: float | None = None
    first_frame: float | None = None
    """Share of samples that are trained with their first frame given, unless the run says another; None: none."""


_LTX = Convention(TextRecipe(attends_padding=True), 128, 50, 3.0, 25.0, masked=True, grid="uniform")

CONVENTIONS: Mapping[str, Convention] = {
    "WanPipeline": Convention(TextRecipe(cleaned=True), 512, 50, 5.0, 16.0),
    "WanImageToVideoPipeline": Convention(TextRecipe(cleaned=True), 512, 50, 5.0, 24.0, first_frame=0.9),
    "SkyReelsV2Pipeline": Convention(TextRecipe(cleaned=True), 512, 50, 6.0, 24.0),
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": replace(_LTX, first_frame=0.9),
    "CogVideoXPipeline": Convention(TextRecipe(attends_padding=True, keeps_padding=True), 226, 50, 6.0, 8.0),
    "CogVideoXImageToVideoPipeline": Convention(TextRecipe(attends_padding=True, keeps_padding=True), 226, 50, 6.0, 8.0),
    "HunyuanVideoPipeline": Convention(
        TextRecipe(
            template=_HUNYUAN_TEMPLATE, crop=95, layer=2, pooled_encoder="text_encoder_2", pooled_tokenizer="tokenizer_2"
        ),
        256, 50, 1.0, 24.0, masked=True, grid="uniform", embedded_guidance=6.0,
    ),
    "MochiPipeline": Convention(TextRecipe(), 256, 64, 4.5, 30.0, masked=True, grid="linear-quadratic"),
}  # fmt: skip

WAN_WITH_PICTURES = Convention(TextRecipe(cleaned=True), 512, 50, 5.0, 16.0)
"""Of a WanImageToVideoPipeline without `expand_timesteps` (Wan 2.1, Wan 2.2 A14B): the picture has channels of its own."""

OTHER_TASKS: Mapping[str, str] = {
    "WanVideoToVideoPipeline": "its parts are those of WanPipeline; name a pipeline of that class",
    "HunyuanVideoImageToVideoPipeline": "its text encoder reads the picture, too; use the text-to-video pipeline",
    "LTXConditionPipeline": "its parts are those of LTXPipeline; name a pipeline of that class",
}
"""Why pipelines that people may try are refused, and what to do."""
