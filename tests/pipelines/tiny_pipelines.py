"""Tiny diffusers pipelines with random weights, saved by diffusers itself: each has the classes and files of the real one.

`pipeline_folder` builds each once in a test session.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

diffusers: Any = import_module("diffusers")  # both load lazily, which hides their names from a type checker
transformers: Any = import_module("transformers")

WORDS = ("a", "red", "green", "ball", "square", "moves", "left", "up", "the", "video", "and", "of", "describe")
WIDTH = 32
FRAMES = 9
PROMPTS = ["a red ball moves left", "a green square"]


def _tokenizer(length: int, begin: bool = False) -> Any:
    """One token a word, with an end token and, for models that have one, a token at the beginning."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>" if begin else "$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length, padding_side="right",
    )  # fmt: skip


def _t5(family: str) -> Any:
    config = {
        "vocab_size": 20, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "pad_token_id": 0,
        "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    return getattr(transformers, f"{family}EncoderModel")(getattr(transformers, f"{family}Config")(**config))


def _llama() -> Any:
    return transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0, bos_token_id=3, eos_token_id=1,
        )
    )  # fmt: skip


def _clip() -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=3, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


def _wan_vae(**config: Any) -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=config.pop("z_dim", 16), dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], **config,
    )  # fmt: skip


def _wan_transformer(**config: Any) -> Any:
    return diffusers.WanTransformer3DModel(**{
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
        "text_dim": WIDTH, "freq_dim": 64, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32, **config,
    })  # fmt: skip


def _unipc(shift: float) -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _wan(**more: Any) -> Any:
    return diffusers.WanPipeline(
        tokenizer=_tokenizer(512), text_encoder=_t5("UMT5"), vae=_wan_vae(), scheduler=_unipc(3.0),
        transformer=_wan_transformer(), **more,
    )  # fmt: skip


def _wan_a14b() -> Any:
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


def _wan_a14b_i2v() -> Any:
    first, second = (_wan_transformer(in_channels=36, num_layers=1) for _ in range(2))
    return diffusers.WanImageToVideoPipeline(
        tokenizer=_tokenizer(512), text_encoder=_t5("UMT5"), vae=_wan_vae(), scheduler=_unipc(3.0), image_encoder=None,
        image_processor=None, transformer=first, transformer_2=second, boundary_ratio=0.875,
    )  # fmt: skip


def _wan_ti2v(kind: Any = diffusers.WanPipeline, **more: Any) -> Any:
    vae = _wan_vae(
        z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12, decoder_base_dim=4, scale_factor_spatial=16,
        latents_mean=[0.01 * channel for channel in range(48)], latents_std=[0.5 + channel / 48 for channel in range(48)],
    )  # fmt: skip
    return kind(
        tokenizer=_tokenizer(512), text_encoder=_t5("UMT5"), vae=vae, scheduler=_unipc(5.0),
        transformer=_wan_transformer(in_channels=48, out_channels=48), expand_timesteps=True, **more,
    )  # fmt: skip


def _wan_i2v() -> Any:
    vision = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
        )
    )
    return diffusers.WanImageToVideoPipeline(
        tokenizer=_tokenizer(512), text_encoder=_t5("UMT5"), vae=_wan_vae(), scheduler=_unipc(3.0), image_encoder=vision,
        image_processor=transformers.CLIPImageProcessor(size=16, crop_size=16),
        transformer=_wan_transformer(in_channels=36, image_dim=16, added_kv_proj_dim=24),
    )  # fmt: skip


def _skyreels() -> Any:
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=WIDTH,
        freq_dim=64, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.SkyReelsV2Pipeline(
        tokenizer=_tokenizer(512), text_encoder=_t5("UMT5"), vae=_wan_vae(), scheduler=_unipc(8.0), transformer=transformer
    )


def _ltx(kind: Any = diffusers.LTXPipeline, scale: float = 0.9) -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=2, patch_size_t=1,
        encoder_causal=True, decoder_causal=False, scaling_factor=scale,
    )  # fmt: skip
    vae.encoder.conv_out.conv.bias[-1] = -40.0  # the posterior has hardly any variance: LTX's image-to-video draws from it
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.3, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=2,
        caption_channels=WIDTH,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    return kind(tokenizer=_tokenizer(128), text_encoder=_t5("T5"), vae=vae, scheduler=scheduler, transformer=transformer)


def _cogvideox(rotary: bool, pictures: bool = False, newer: bool = False) -> Any:
    """`newer`: version 1.5, which joins two latent frames into a patch, and is told an offset beside pictures."""
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        scaling_factor=0.7 if rotary else 1.15258426, invert_scale_latents=pictures,
    )  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8 if pictures else 4, out_channels=4, time_embed_dim=8,
        ofs_embed_dim=8 if pictures and newer else None, text_embed_dim=WIDTH, num_layers=2, patch_size_t=2 if newer else None,
        sample_width=8, sample_height=8, sample_frames=FRAMES, max_text_seq_length=12, patch_bias=not newer,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    vae.encoder.conv_out.conv.bias.data[4:] = -40.0  # the posterior has hardly any variance: image-to-video draws from it
    kind = diffusers.CogVideoXDPMScheduler if rotary and not pictures else diffusers.CogVideoXDDIMScheduler
    scheduler = kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=1.0 if rotary else 3.0, timestep_spacing="trailing", set_alpha_to_one=True,
    )  # fmt: skip
    pipeline = diffusers.CogVideoXImageToVideoPipeline if pictures else diffusers.CogVideoXPipeline
    return pipeline(tokenizer=_tokenizer(226), text_encoder=_t5("T5"), vae=vae, scheduler=scheduler, transformer=transformer)


def _hunyuan() -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.476986,
    )  # fmt: skip
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, guidance_embeds=True, text_embed_dim=WIDTH, pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        text_encoder=_llama(), tokenizer=_tokenizer(512, begin=True), text_encoder_2=_clip(),
        tokenizer_2=_tokenizer(77, begin=True), transformer=transformer, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def _mochi(invert: bool = True) -> Any:
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=WIDTH, time_embed_dim=8, max_sequence_length=16,
    )  # fmt: skip
    return diffusers.MochiPipeline(
        tokenizer=_tokenizer(256), text_encoder=_t5("T5"), vae=vae, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=invert),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "wan21": _wan,
    "wan22-ti2v": _wan_ti2v,
    "ltx": _ltx,
    "ltx-i2v": lambda: _ltx(diffusers.LTXImageToVideoPipeline, 1.0),  # which scales only what it decodes; LTX's factor is 1
    "cogvideox-2b": lambda: _cogvideox(rotary=False),
    "cogvideox-5b": lambda: _cogvideox(rotary=True),
    "hunyuan": _hunyuan,
    "mochi": _mochi,
    "skyreels-v2": _skyreels,
    "wan22-a14b": _wan_a14b,
    "wan22-a14b-i2v": _wan_a14b_i2v,
    "wan21-i2v": _wan_i2v,
    "cogvideox-i2v": lambda: _cogvideox(rotary=True, pictures=True),
    "cogvideox-1.5-i2v": lambda: _cogvideox(rotary=True, pictures=True, newer=True),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "wan22-i2v": lambda: _wan_ti2v(diffusers.WanImageToVideoPipeline, image_encoder=None, image_processor=None),
}
"""Of the parts of another one, or refused."""
SIZES: dict[str, tuple[int, int]] = {
    "wan22-ti2v": (FRAMES, 64),
    "wan22-i2v": (FRAMES, 64),
    "mochi": (7, 32),
    "cogvideox-1.5-i2v": (5, 32),
}
"""Frames and pixels of a side of a clip; 9 and 32 of those that are not named."""


@cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lutetia-pipelines."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def pipeline_folder(name: str) -> Path:
    """The folder of a pipeline, built at the first call in this process and removed at its end."""
    folder = _root() / name
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        pipeline = (PIPELINES | OTHERS)[name]()
        for part in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
            _wake(part)
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _wake(model: nn.Module | None) -> None:
    """Fill what starts at zero, so that every input matters to the output."""
    for name, parameter in model.named_parameters() if model is not None else ():
        if parameter.abs().max() < 1e-6 and (parameter.ndim > 1 or name.endswith("bias")):
            parameter.normal_(0, 0.05)
