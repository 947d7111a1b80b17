"""The settings that say how videos are cut in time and space."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import Count, Positive


class ClipShape(Frozen):
    """How videos are cut in time and space."""

    frames: Count = Field(default=8, description="frames of a clip")
    fps: Positive = Field(default=8.0, description="frames per second of a clip")
    height: Count = Field(default=64, description="height of a clip, px")
    width: Count = Field(default=64, description="width of a clip, px")
    start: Literal["middle", "start", "whole"] = Field(
        default="middle", description="part of a video that becomes the clip; whole: all of it, at another frame rate"
    )
    short: Literal["refuse", "loop"] = Field(
        default="refuse", description="videos that are too short are refused, or repeated from their beginning"
    )
