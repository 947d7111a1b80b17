"""The parts of a pipeline: those of the folder, and the models before and behind the experts, which are loaded on first use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from torch import Tensor

from lutetia.models.data.encode.latents import Latents, component_latents, load_latents
from lutetia.models.data.encode.picture_encoder import VisionEncoder, picture_latents
from lutetia.models.data.encode.text import TextEncoder, load_text_encoder
from lutetia.models.experts.pictures import Pictures
from lutetia.models.mixing.folder import MixtureFolder
from lutetia.models.mixing.layout import SCHEDULER_CONFIG
from lutetia.models.mixing.parts.other_part import follow, mixture_part, stock_part
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.pipeline_inputs import Texts
from lutetia.protocol.schema.model.latent_spec import LatentSpec


def read_parts(folder: MixtureFolder, dtype: torch.dtype | None, base: Any = None, hub: bool = False) -> dict[str, Any]:
    """The arguments of LutetiaPipeline from a mixture's folder; `dtype` None means float32; `base` and `hub` as for a mixture.

    Raises ConfigError without the base that its experts adapt, IntegrityError."""
    index = folder.index()
    scheduler = folder.config(f"scheduler/{SCHEDULER_CONFIG}")
    with folder.reading("scheduler"):
        steps = getattr(diffusers, index.scheduler).from_config(scheduler)
    return {
        "transformer": MixtureTransformer.from_pretrained(folder.path / "transformer", torch_dtype=dtype, base=base, hub=hub),
        "scheduler": steps,
        "vae": folder.load(getattr(diffusers, index.vae), "vae", torch_dtype=dtype) if index.vae else None,
        "latent": index.latent.model_dump(mode="json"),
        "sampling": index.sampling.model_dump(mode="json"),
    }


class PromptsAndPictures:
    """The text encoder and the autoencoder of a pipeline.

    Attributes:
        allow_hub: whether those that the mixture names by a hub id may be downloaded. Otherwise only what was downloaded before
            is used.
    """

    allow_hub = False
    spec: LatentSpec
    transformer: Any
    vae: Any
    _execution_device: torch.device
    _other: MixtureTransformer | None = None
    _text: TextEncoder | None = None
    _vision: VisionEncoder | None = None
    _decoder: Latents | None = None

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""
        Encodes prompts as the experts and the router read them; texts that are too long lose their end.

        Args:
            prompt (`str` or `list[str]`):
                The prompt or prompts to encode.
            negative_prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts that guidance leads away from. If not defined, the null condition is returned.
            num_videos_per_prompt (`int`, defaults to 1):
                Every prompt's vectors are repeated so many times.

        Returns:
            `prompt_embeds [N, L, D]`, `pooled_prompt_embeds [N, P]`, `negative_prompt_embeds [N, L, D]` and
            `negative_pooled_prompt_embeds [N, P]`, in the dtype and on the device that the experts run in.
        """
        texts = Texts.of(prompt, negative_prompt)
        texts.check(self.spec)
        tokens, pooled, negative_tokens, negative_pooled = self._encode(texts, num_videos_per_prompt)
        return tokens, pooled, negative_tokens, negative_pooled

    def pair_with(self, mixture: Path | str, base: Any = None) -> Self:
        """Make clips together with the mixture in the folder `mixture`, which has the other part of the noise levels.

        `base` is the folder of its base, if it holds adapters. Returns itself.

        Raises ConfigError if that mixture is not of the other part, or fits this one in another way not.
        """
        part = self.transformer.noise_part
        self._other = mixture_part(Path(mixture), part, self.spec, self.transformer.dtype, base, self.allow_hub)
        return self

    @property
    def other_part(self) -> MixtureTransformer | None:
        """What makes the steps at the noise levels that the experts were not trained for; None: they have all of them.

        That is the mixture of `pair_with`, else the other transformer of the run's pipeline.

        Raises ConfigError if that transformer is not on this machine and may not be downloaded.
        """
        part = self.transformer.noise_part
        if part is None:
            return None
        if self._other is None:
            self._other = stock_part(self.transformer, part, self.spec, self.allow_hub)
        return follow(self._other, self.transformer)

    @property
    def fps(self) -> float:
        """Frames per second of its clips."""
        return self.spec.fps

    @property
    def text(self) -> TextEncoder:
        """The text encoder that the run's shards were built with, loaded at first use."""
        if self._text is None:
            self._text = load_text_encoder(self.spec.text_encoder, self.spec.text_tokens, self.spec.text, hub=self.allow_hub)
        return self._text

    def free_text_encoder(self) -> None:
        """Drop the text encoder from memory; it is read again at its next use."""
        self._text = None

    @property
    def decoder(self) -> Latents:
        """The run's autoencoder, normalised as the run's latents are. Shares its weights with `vae` where that is a component."""
        device = str(self._execution_device)
        if self._decoder is None or self._decoder.device != device:
            if self.vae is not None:
                self._decoder = component_latents(self.vae, self.spec, device=device)
            else:
                self._decoder = load_latents(self.spec.vae, self.spec, device=device, hub=self.allow_hub)
        return self._decoder

    def encode_first_frames(self, pictures: Tensor, repeats: int = 1) -> Tensor:
        """Latents `[N, C, 1, h, w]` of first frames `[N, 3, H, W]` in -1..1, as they begin the latents of a clip; `repeats` rows
        of each.
        """
        latents = self.decoder.encode_pictures(pictures[:, :, None].to(self._execution_device))
        return latents.repeat_interleave(repeats, dim=0)

    def _begin(
        self, pictures: Tensor | None, looks: Sequence[Any] | None, bucket: LatentSpec, repeats: int, tokens: Tensor
    ) -> tuple[Tensor | None, Pictures | None]:
        """What clips begin with: latents of first frames, or pictures for channels of their own, in the data type of `tokens`.

        Args:
            pictures: [N, 3, H, W] in -1..1; None: the clips begin with what the prompt says.
            looks: the same as the image encoder takes them; None: it is not asked.
            bucket: of the clips.
            repeats: clips of each picture.
            tokens: of the call, for its device and data type.
        """
        if pictures is None:
            return None, None
        spec = self.spec.picture
        if spec is None:
            return self.encode_first_frames(pictures, repeats).to(tokens.device), None
        latents = spec.scale * picture_latents(spec, self.decoder, pictures.to(self._execution_device), bucket.pixel_frames)
        vision = None
        if looks is not None:
            if self._vision is None or self._vision.device != str(self._execution_device):
                self._vision = VisionEncoder(self.spec.text_encoder, str(self._execution_device), self.allow_hub)
            vision = self._vision.encode(looks).expand(len(pictures), -1, -1)
        shown = Pictures(latents, vision, spec.mask)
        return None, shown.each(lambda tensor: tensor.repeat_interleave(repeats, dim=0).to(tokens))

    def _encode(self, texts: Texts, repeats: int, guided: bool = True) -> tuple[Tensor, ...]:
        """The text vectors of a call; without guidance, zeros stand for the null condition, which is not needed then."""
        device, dtype = self._execution_device, self.transformer.dtype
        null = self.text.null() if guided and self.spec.text and not texts.has_negative else None
        rows = texts.encode(lambda captions: self.text.encode(captions), repeats, null)
        return tuple(each.to(device, dtype) for each in rows)
