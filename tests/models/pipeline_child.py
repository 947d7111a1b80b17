"""Runs in an empty directory: nothing but installed packages can be imported. Prints what the stock loader made of the folder."""

import hashlib
import os
import sys

from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

folder = sys.argv[1]
assert os.listdir(".") == []
assert "lutetia" not in sys.modules
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
result = pipe(["a red ball", "a blue ball"], num_inference_steps=3, seed=5)  # pyright: ignore[reportCallIssue]
print(type(pipe).__module__, result.frames.dtype, *result.frames.shape, *result.routing.shape)
print(hashlib.sha256(result.frames.tobytes()).hexdigest())
