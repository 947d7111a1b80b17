"""The recipe of the demo as plain data: its clips, its shards, the training of its experts, and the sampling.

It was found by trials on two cores. The most effective choices, in order: a small autoencoder, so that a patch has fewer numbers
than the expert has channels; position channels beside the noisy latents; many small updates at a high rate; training times
shifted towards noise, where the words decide what is drawn.
"""

from typing import Any

CHANNELS, POSITIONS, WORD_WIDTH = 8, 18, 64
"""Channels of the latents, of the position (frame, row, column) x 3 octaves x (sine, cosine), and of a word."""

CLIPS: dict[str, int] = {"clips": 1200, "frames": 8, "size": 64, "seed": 0}
"""Arguments of `synthetic.make_clips`: number of clips, frames of a clip, height and width in px, seed."""

DATA: dict[str, Any] = {
    "experts": 3,
    "frames": 8,
    "height": 64,
    "width": 64,
    "latents": "builtin:demo",
    "normalisation": "shipped",
    "text": "builtin:words",
    "text_tokens": 9,
}
"""Settings of `build_data`; latents [8, 8, 8, 8] = [C, F, H, W]."""

EXPERT: dict[str, Any] = {
    "class_name": "WanTransformer3DModel",
    "prediction": "velocity",
    "config": {
        "patch_size": [2, 2, 2],
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "in_channels": CHANNELS + POSITIONS,
        "out_channels": CHANNELS,
        "text_dim": WORD_WIDTH,
        "freq_dim": 64,
        "ffn_dim": 512,
        "num_layers": 4,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    },
}
"""1.25 million parameters, 64 tokens per clip."""

OPTIMISATION: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 5e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.01,
    "warmup_steps": 100,
    "schedule": "cosine",
    "gradient_clip": 1.0,
    "batch": 8,
    "ema_decay": 0.995,
    "text_dropout": 0.1,
    "time": {"mean": 0.0, "std": 1.0, "shift": 2.0},
}

PROMPTS: tuple[str, ...] = (
    "a red handwritten three moves to the left",
    "a blue handwritten seven moves up",
    "a yellow handwritten five moves down",
    "a purple star bounces",
    "an orange heart grows",
    "a black triangle spins",
    "the camera pans right over a flower",
    "the camera zooms in on a cat",
    "the camera zooms out from a temple",
)
"""Three of each kind. The first seven combinations of words are in no training clip (`synthetic.HELD_OUT`)."""

SAMPLING: dict[str, Any] = {"mode": "top1", "steps": 25, "guidance": 2.0, "time_shift": 2.0, "prompts": PROMPTS}

ROUTER: dict[str, Any] = {
    "hidden": 96,
    "layers": 3,
    "text_conditioned": True,
    "samples": 6000,
    "batch": 32,
    "learning_rate": 2e-3,
}

RUN: dict[str, Any] = {
    "name": "demo",
    "experts": DATA["experts"],
    "expert": EXPERT,
    "optimisation": OPTIMISATION,
    "samples_per_shard": 8400,
    "checkpoint_samples": 1200,
    "router": ROUTER,
    "sampling": SAMPLING,
    "audit": {"replay_steps": 2, "whole_epoch": 0.02},
}
"""Settings of `lutetia run create` with the preset `demo`."""

DEMO: dict[str, Any] = {"clips": CLIPS, "data": DATA, "run": RUN}
