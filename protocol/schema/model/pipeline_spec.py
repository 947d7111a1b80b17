"""What a run takes over from the diffusers pipeline that its experts start from: text, inputs, noise table and scheduler."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field

from lutetia.protocol.schema.canonical import WireDocument, bounded_json
from lutetia.protocol.schema.fields import Positive, Rate, Share, added

_LARGEST_SETTING = 1e9
_ROUNDING = 1e-6
"""Of a flow time in float32: a step that stands at the boundary is one of the high part, as in diffusers' pipeline."""


def _bounded_config(config: dict[str, Any]) -> dict[str, Any]:
    """A network's configuration: few small values. How large the network may be is bounded where it is built."""
    bounded_json(config, deepest=4, most=256)
    for value in (each for entry in config.values() for each in (entry if isinstance(entry, list | tuple) else [entry])):
        if isinstance(value, int | float) and abs(value) > _LARGEST_SETTING:
            raise ValueError(f"a number of the configuration is larger than {_LARGEST_SETTING:g}")
        if isinstance(value, str) and not (len(value) <= 256 and value.isprintable()):
            raise ValueError("a text of the configuration is not one printable line of at most 256 characters")
    return config


Config = Annotated[dict[Annotated[str, Field(max_length=64)], Any], Field(max_length=64), AfterValidator(_bounded_config)]
Side = Literal["high", "low"]
SIDES: tuple[Side, ...] = get_args(Side)
Component = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_]{1,64}$")]
"""The folder of a part of a pipeline."""


class BetaSchedule(WireDocument):
    """A noise path given by a table of betas, one per training timestep, as DDPM and CogVideoX have it."""

    start: float = Field(gt=0, lt=1, description="First beta")
    end: float = Field(gt=0, lt=1, description="Last beta")
    kind: Literal["linear", "scaled_linear"] = Field(
        default="linear", description="Betas between the two: evenly spaced, or their square roots are"
    )
    steps: int = Field(default=1000, ge=2, le=10_000, description="Training timesteps")
    snr_shift: Positive = Field(default=1.0, description="Divides the signal-to-noise ratio; 1: no shift")
    zero_snr: bool = Field(default=False, description="Whether the last timestep is pure noise")


class NoisePart(WireDocument):
    """A part of the noise levels: that of one of the two transformers of Wan 2.2 A14B."""

    side: Side = Field(description="Whether it holds the flow times from `boundary` on, or those below it")
    boundary: float = Field(gt=0, lt=1, description="Flow time between the two parts, 0 (data) to 1 (noise)")

    @property
    def span(self) -> tuple[float, float]:
        """Its lowest and its highest flow time."""
        return (self.boundary, 1.0) if self.side == "high" else (0.0, self.boundary)

    def holds(self, time: float) -> bool:
        """Whether this flow time, in float32, is one of its own."""
        return (time >= self.boundary - _ROUNDING) == (self.side == "high")


class ExpertInputs(WireDocument):
    """What an expert is given besides noisy latents and text, and how it reads time."""

    masked: bool = Field(default=False, description="Whether the expert is told which text tokens are padding, and ignores those")
    guidance: Rate = Field(
        default=1.0, description="Guidance that an expert with embedded guidance is told while it trains; 1: none was applied"
    )
    rope_scale: tuple[Positive, Positive, Positive] | None = Field(
        default=None, description="Seconds, rows and columns of pixels per latent, by which LTX scales its positions; null: 1"
    )
    fps: Positive | None = Field(default=None, description="Frames per second that the expert is told; null: none")
    reversed: bool = Field(default=False, description="Whether its time runs from noise (0) to data (1), and its velocity too")
    first_frame: Share | None = added(
        None,
        "Share of samples that are trained with their first latent frame given, clean and at time 0, as Wan 2.2 TI2V and "
        "LTX-Video take a picture; null: none, and no pictures",
    )
    noise_part: NoisePart | None = added(
        None, "Part of the noise levels that the expert is trained and asked at; another model has the rest; null: all of them"
    )


class PictureSpec(WireDocument):
    """What shards hold of the first picture of each clip, for experts that take it in channels of their own."""

    frames: Literal["all", "first"] = Field(
        description="Latents of the picture followed by grey frames (all, as Wan), or of the picture alone (first, as CogVideoX)"
    )
    mask: int = Field(default=0, ge=0, le=64, description="Channels between clip and picture that are 1 in the first frame alone")
    scale: Positive = Field(default=1.0, description="What the picture's normalised latents are multiplied by")
    vision_tokens: int = Field(
        default=0, ge=0, le=65536, description="Vectors that the pipeline's image encoder gives a picture; 0: none is used"
    )
    vision_width: int = Field(default=0, ge=0, le=65536, description="Numbers in each of these vectors")


class TextRecipe(WireDocument):
    """How a pipeline turns a caption into tokens. `LatentSpec.text_encoder` names the pipeline that holds the parts."""

    encoder: Component = Field(default="text_encoder", description="Folder of the model that gives the tokens")
    tokenizer: Component = Field(default="tokenizer", description="Folder of its tokenizer")
    pooled_encoder: Component | None = Field(
        default=None, description="Folder of the model that gives the pooled vector; null: the mean over the caption's tokens"
    )
    pooled_tokenizer: Component | None = Field(default=None, description="Folder of its tokenizer")
    cleaned: bool = Field(
        default=False, description="Whether entities and broken letters of captions are mended and spaces joined, as Wan does"
    )
    template: Annotated[str, Field(max_length=2000)] = Field(
        default="{}", description="Text around the caption, which stands in place of {}"
    )
    crop: int = Field(default=0, ge=0, le=4096, description="Tokens of the template that are left out at the beginning")
    layer: int = Field(default=0, ge=0, le=64, description="Layers before the last whose output is the tokens; 0: the last")
    attends_padding: bool = Field(default=False, description="Whether the encoder itself reads the padding, too")
    keeps_padding: bool = Field(
        default=False, description="Whether vectors of padding are kept as the encoder gives them; otherwise they are zero"
    )
    null: Literal["zeros", "empty", "blind"] = Field(
        default="empty",
        description="The null condition: zeros; the empty caption; or the empty caption as padding alone (Mochi)",
    )


class SchedulerSpec(WireDocument):
    """The diffusers scheduler that clips are sampled with."""

    class_name: Literal[
        "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
        "DPMSolverMultistepScheduler", "DDIMScheduler",
    ] = Field(description="Its class")  # fmt: skip
    config: Config = Field(description="Its configuration, as diffusers reads it")
    grid: Literal["own", "uniform", "linear-quadratic"] = Field(
        default="own",
        description="Times of the steps: the scheduler's own, evenly spaced, or Mochi's (first linear, then quadratic)",
    )
