"""Loads mixtures with stock diffusers and prints class, shapes and hash of a clip. Runs in an empty folder."""

import hashlib
import os
import sys

import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

assert os.listdir(".") == []
assert "lutetia" not in sys.modules
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(["a red ball", "a blue ball"], num_inference_steps=3, seed=5)  # pyright: ignore[reportCallIssue]
    vae = type(pipe.vae).__name__  # pyright: ignore[reportAttributeAccessIssue]
    print(type(pipe).__module__, vae, result.frames.dtype, *result.frames.shape, *result.routing.shape)
    half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half("a red ball", seed=5).frames.shape == (1, *result.frames.shape[1:])  # pyright: ignore[reportCallIssue]
    print(hashlib.sha256(result.frames.tobytes()).hexdigest())
