"""What a caller passes to the pipeline: checked before any weights are read, then turned into text vectors and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from lutetia.models.data.encode.text import TextEncoder
from lutetia.models.mixing.sampling import initial_noise
from lutetia.models.mixture import Mode
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import UsageError

MAX_PROMPT_CHARACTERS = 2000
NEEDS_PICTURE = "the experts of this mixture were trained on clips that begin with a picture; {}"
OUTPUT_TYPES = ("np", "pt", "pil", "latent")


class PipelineInputError(UsageError, ValueError):
    """What a caller passed to the pipeline contradicts itself or the mixture. A ValueError, as diffusers' pipelines raise."""


EncodeTexts = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Texts:
    """The prompts and negative prompts of one call, each either in words or already encoded.

    Shapes for N prompts, with L tokens of width D and pooled vectors of width P as in the run's LatentSpec:
    `embeds`, `negative_embeds` [N, L, D]; `pooled`, `negative_pooled` [N, P].
    """

    prompts: Sequence[str] | None = None
    negative: Sequence[str] | None = None
    embeds: Tensor | None = None
    pooled: Tensor | None = None
    negative_embeds: Tensor | None = None
    negative_pooled: Tensor | None = None

    @classmethod
    def of(cls, prompt: str | Sequence[str] | None, negative_prompt: str | Sequence[str] | None, **encoded: Any) -> Texts:
        """Texts as a caller gives them; one negative prompt serves all prompts."""
        texts = cls(_as_list("prompt", prompt), None, **encoded)
        return replace(texts, negative=_as_list("negative_prompt", negative_prompt, len(texts)))

    def __len__(self) -> int:
        """How many prompts there are."""
        if self.prompts is not None:
            return len(self.prompts)
        return 0 if self.embeds is None else len(self.embeds)

    def check(self, latent: LatentSpec) -> None:
        """Raises PipelineInputError unless there is one text per prompt, in words or as vectors of the run's shapes."""
        if self.prompts is not None and self.embeds is not None:
            raise PipelineInputError("both prompt and prompt_embeds were given; give one of them")
        if self.negative is not None and self.negative_embeds is not None:
            raise PipelineInputError("both negative_prompt and negative_prompt_embeds were given; give one of them")
        _check_pair("prompt_embeds", self.embeds, "pooled_prompt_embeds", self.pooled)
        _check_pair(
            "negative_prompt_embeds", self.negative_embeds, "negative_pooled_prompt_embeds", self.negative_pooled
        )  # fmt: skip
        if not len(self):
            raise PipelineInputError("no prompt was given; give at least one prompt, or prompt_embeds")
        for number, text in enumerate(self.prompts or [], 1):
            _check_words(f"prompt {number}", text)
            if not text.strip():
                raise PipelineInputError(f"prompt {number} is empty; say in words what the clip shows")
        if self.negative is not None and len(self.negative) != len(self):
            raise PipelineInputError(
                f"{len(self.negative)} negative prompts were given for {len(self)} prompts; give one, or one each"
            )
        for number, text in enumerate(self.negative or [], 1):
            _check_words(f"negative prompt {number}", text)
        tokens, pooled = [len(self), latent.text_tokens, latent.text_width], [len(self), latent.pooled_width]
        for name, tensor, shape in (
            ("prompt_embeds", self.embeds, tokens),
            ("pooled_prompt_embeds", self.pooled, pooled),
            ("negative_prompt_embeds", self.negative_embeds, tokens),
            ("negative_pooled_prompt_embeds", self.negative_pooled, pooled),
        ):
            if tensor is not None:
                _check_finite_input(name, tensor)
            if tensor is not None and list(tensor.shape) != shape:
                raise PipelineInputError(
                    f"{name} must have shape {shape}, not {list(tensor.shape)}; encode the prompts with encode_prompt"
                )

    def check_lengths(self, encoder: TextEncoder) -> None:
        """Raises PipelineInputError for a text with more tokens than the experts read."""
        for problem in self.too_long(encoder):
            raise PipelineInputError(f"{problem}; shorten it")

    def too_long(self, encoder: TextEncoder) -> Iterator[str]:
        """A clause about every text with more tokens than the experts read."""
        for what, given in (("prompt", self.prompts), ("negative prompt", self.negative)):
            for number, text in enumerate(given or [], 1):
                count = encoder.count([text])
                if count > encoder.tokens:
                    yield f"{what} {number} has {count} tokens, but this mixture reads {encoder.tokens}"

    @property
    def has_negative(self) -> bool:
        """Whether negative prompts were given, in words or encoded."""
        return self.negative is not None or self.negative_embeds is not None

    def encode(
        self, encode: EncodeTexts, repeats: int = 1, null: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token and pooled vectors of the prompts, then of the negative prompts, each row `repeats` times.

        Without negative prompts those are `null`, tokens [L, D] and pooled [P], or zeros.
        """
        tokens, pooled = self.embeds, self.pooled
        if self.prompts is not None:
            tokens, pooled = encode(self.prompts)
        if tokens is None or pooled is None:
            raise PipelineInputError("no prompt was given; give at least one prompt, or prompt_embeds")
        negative_tokens, negative_pooled = self.negative_embeds, self.negative_pooled
        if self.negative is not None:
            negative_tokens, negative_pooled = encode(self.negative)
        if negative_tokens is None or negative_pooled is None:
            nothing = null or (torch.zeros_like(tokens[0]), torch.zeros_like(pooled[0]))
            negative_tokens, negative_pooled = (each.expand(len(tokens), *each.shape).to(tokens) for each in nothing)
        given = (tokens, pooled, negative_tokens, negative_pooled)
        a, b, c, d = (rows.repeat_interleave(repeats, dim=0) if repeats > 1 else rows for rows in given)
        return a, b, c, d


def draw_noise(shape: Sequence[int], seeds: Sequence[int], generator: Generators | None) -> Tensor:
    """Standard normals, float32 `[N, C, F, H, W]`: from `generator`, one for all clips or one each, else by a seed per clip."""
    if generator is None:
        return initial_noise(tuple(shape[1:]), seeds)
    if isinstance(generator, torch.Generator):
        return randn_tensor(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
    return randn_tensor(tuple(shape), generator=list(generator), device=generator[0].device, dtype=torch.float32)


def draw_seeds(count: int, generator: Generators) -> list[int]:
    """One seed per clip, from the generator of that clip."""
    each = [generator] * count if isinstance(generator, torch.Generator) else generator
    return [int(torch.randint(1 << 31, (1,), generator=drawn, device=drawn.device)) for drawn in each]


def check_numbers(steps: Any, guidance: Any, videos: Any) -> None:
    """Raises PipelineInputError unless steps and videos per prompt are whole and at least 1, and guidance is finite."""
    if not isinstance(steps, Integral) or steps < 1:
        raise PipelineInputError(f"{steps} steps cannot make a clip; ask for a whole number of at least 1")
    if not isinstance(guidance, Real) or not math.isfinite(guidance):
        raise PipelineInputError(f"guidance_scale is {guidance}; give a finite number")
    if not isinstance(videos, Integral) or videos < 1:
        raise PipelineInputError(f"num_videos_per_prompt is {videos}; ask for a whole number of at least 1")


def find_size(latent: LatentSpec, num_frames: int | None, height: int | None, width: int | None) -> LatentSpec:
    """The bucket of that size in frames and pixels: the first one that agrees with what is given.

    Raises PipelineInputError if the mixture was trained on no such bucket.
    """
    asked_for = (num_frames, height, width)
    sizes = [(each.pixel_frames, each.pixel_height, each.pixel_width) for each in latent.of_buckets]
    for size, bucket in zip(sizes, latent.of_buckets, strict=True):
        if all(asked in (None, makes) for asked, makes in zip(asked_for, size, strict=True)):
            return bucket
    if len(sizes) > 1:
        known = "; ".join(f"{frames}, {h}, {w}" for frames, h, w in sizes)
        raise PipelineInputError(
            f"this mixture makes no clips of num_frames={num_frames}, height={height}, width={width}; ask for one of {known}"
        )
    named = zip(("num_frames", "height", "width"), sizes[0], asked_for, strict=True)
    name, makes, asked = next(each for each in named if each[2] not in (None, each[1]))
    raise PipelineInputError(f"this mixture makes clips of {name}={makes}, not {asked}; leave {name} out")


def pictures_of(image: Any, prompts: int, latent: LatentSpec, taken: bool, processor: VideoProcessor) -> Tensor | None:
    """The first frames, `[prompts, 3, H, W]` in -1..1; None without `image`.

    Where the data hold pictures the experts know no clips without, and `image` is required.

    Args:
        image: of the call: one for all prompts, or a list of one each.
        prompts: how many there are.
        latent: the bucket, whose size in pixels they get.
        taken: whether the experts were trained with first frames.
        processor: resizes them, as diffusers' pipelines do.

    Raises PipelineInputError: the experts take none, the number is another, the clips have one frame, or it is no picture.
    """
    if image is None:
        if latent.picture:
            raise PipelineInputError(NEEDS_PICTURE.format("give image"))
        return None
    if not taken and not latent.picture:
        raise PipelineInputError("this mixture makes clips from text alone: its experts were not trained with first frames")
    if latent.frames < 2:
        raise PipelineInputError("these clips have one latent frame, of which a picture leaves nothing; ask for longer ones")
    try:
        pictures = processor.preprocess(image, height=latent.pixel_height, width=latent.pixel_width).float()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise PipelineInputError(f"image cannot be read as a picture: {str(error)[:200]}; give a PIL.Image") from error
    if len(pictures) not in (1, prompts) or pictures.shape[1:] != (3, latent.pixel_height, latent.pixel_width):
        raise PipelineInputError(
            f"image has shape {list(pictures.shape)} for {prompts} prompts; give one picture in three colours, or one each"
        )
    _check_finite_input("image", pictures)
    return pictures.expand(prompts, -1, -1, -1)


def images_of(image: Any, pictures: Tensor | None) -> list[Any]:
    """The pictures of a call for an image encoder: as they came, or, where those are numbers, as they were resized, in uint8."""
    given = list(image) if isinstance(image, list | tuple) else [image]
    if all(isinstance(each, Image.Image) for each in given):
        return given
    return [] if pictures is None else list(((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def check_noise(shape: Sequence[int], generator: Generators | None, latents: Tensor | None) -> None:
    """Raises PipelineInputError unless `latents` are finite and have `shape`, and there is one generator, or one per clip.

    `shape` is [clips, C, F, H, W].
    """
    if latents is not None and list(latents.shape) != list(shape):
        raise PipelineInputError(f"latents must have shape {list(shape)}, not {list(latents.shape)}; draw noise of that shape")
    if latents is not None:
        _check_finite_input("latents", latents)
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not all(isinstance(each, torch.Generator) for each in generator):
        raise PipelineInputError("generator must be a torch.Generator or a list of them; make one with torch.Generator()")
    if len(generator) != shape[0]:
        raise PipelineInputError(f"{len(generator)} generators were given for {shape[0]} clips; give one, or one per clip")
    if len({each.device for each in generator}) > 1:
        raise PipelineInputError("the generators are on several devices; make them all on one")


def check_finite(tensor: Tensor, guidance: float, dtype: torch.dtype) -> None:
    """Raises PipelineInputError if what was computed is not finite, which would be shown as black."""
    if not torch.isfinite(tensor).all():
        raise PipelineInputError(
            f"the clip has values that are not finite, with guidance_scale {guidance:g} in {str(dtype).removeprefix('torch.')}; "
            "use a smaller guidance_scale, or bfloat16 or float32"
        )


def named_dtype(dtype: Any) -> torch.dtype | None:
    """The dtype that a caller names: itself, by its name, or by `default` in a dictionary of components, as in diffusers."""
    if isinstance(dtype, dict):
        dtype = dtype.get("transformer", dtype.get("default"))
    named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if named is None and dtype in (None, "auto"):
        return None
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise PipelineInputError(f"{dtype!r} is no dtype to compute in; use torch.float32, torch.bfloat16 or torch.float16")
    return named


def check_choices(output_type: Any, mode: Any, tensor_inputs: Sequence[str], known_inputs: Sequence[str]) -> None:
    """Raises PipelineInputError for an output type, a routing mode or a callback tensor that the pipeline does not have."""
    if output_type not in OUTPUT_TYPES:
        raise PipelineInputError(f"there is no output type {output_type!r}; use {', '.join(OUTPUT_TYPES)}")
    if mode not in get_args(Mode):
        raise PipelineInputError(f"there is no routing mode {mode!r}; use one of {', '.join(get_args(Mode))}")
    unknown = [name for name in tensor_inputs if name not in known_inputs]
    if unknown:
        raise PipelineInputError(f"callback_on_step_end_tensor_inputs has no {unknown}; use {', '.join(known_inputs)}")


def check_expert(entries: Sequence[dict[str, Any]], expert: int | None) -> None:
    """Raises PipelineInputError for an expert that the mixture does not hold; `entries` is its list of experts."""
    if expert is not None and not (0 <= expert < len(entries) and entries[expert]["folder"]):
        held = [k for k, entry in enumerate(entries) if entry["folder"]]
        raise PipelineInputError(f"this mixture has no expert {expert}; it has {held}")


def _as_list(name: str, texts: Any, copies: int = 1) -> list[str] | None:
    if texts is None:
        return None
    if isinstance(texts, str):
        return [texts] * copies
    if not isinstance(texts, Iterable):
        raise PipelineInputError(f"{name} is of type {type(texts).__name__}; give a text or a list of texts")
    return list(texts)


def _check_pair(name: str, tokens: Tensor | None, pooled_name: str, pooled: Tensor | None) -> None:
    if (tokens is None) != (pooled is None):
        given, missing = (name, pooled_name) if pooled is None else (pooled_name, name)
        raise PipelineInputError(f"{given} was given without {missing}; give both, as encode_prompt returns them")


def _check_finite_input(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise PipelineInputError(f"{name} have values that are not finite; give finite numbers")


def _check_words(what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise PipelineInputError(f"{what} is of type {type(text).__name__}; give a text")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise PipelineInputError(f"{what} has {len(text)} characters, more than {MAX_PROMPT_CHARACTERS}; shorten it")
