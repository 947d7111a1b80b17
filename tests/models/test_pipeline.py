"""The pipeline: loaded by stock diffusers in a process that has lutetia only as an installed package, and called directly."""

import hashlib
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.utils import export_utils
from diffusers.utils.export_utils import export_to_video

from lutetia.models.pipeline import LutetiaPipeline, load_pipeline
from lutetia.models.video_files import to_uint8
from lutetia.system.errors import UsageError
from tests.models.mixing.tiny_mixture import compressed_mixture, pixel_mixture

TOKENS, POOLED = torch.zeros(1, 6, 64), torch.zeros(1, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A mixture of two experts on pixels, with position channels and the text encoder that needs no weights."""
    return pixel_mixture(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pipe(folder, device) -> LutetiaPipeline:
    return load_pipeline(folder, device=device)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Path:
    """A mixture of one expert; its autoencoder was a local folder that no longer exists."""
    return compressed_mixture(tmp_path_factory.mktemp("compressed"))


def test_stock_diffusers_loads_and_runs_a_mixture(folder, compressed, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).parent / "pipeline_process.py"), str(folder), str(compressed)]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "lutetia.models.pipeline NoneType float32 2 4 8 8 3 3 2 2"
    assert lines[2] == "lutetia.models.pipeline AutoencoderTiny float32 2 4 16 16 3 3 2 1"
    for place, theirs in ((folder, lines[1]), (compressed, lines[3])):
        ours = load_pipeline(place)(["a red ball", "a blue ball"], num_inference_steps=3, seed=5).frames
        assert hashlib.sha256(ours.tobytes()).hexdigest() == theirs


def test_frames_are_decoded_by_the_vae_component(compressed) -> None:
    pipe = load_pipeline(compressed)
    assert pipe.decoder.module is pipe.vae
    latents = pipe("a ball", seed=1, output_type="latent").frames
    with torch.no_grad():
        pictures = pipe.vae.decode((latents * 2 + 0.5)[0].transpose(0, 1)).sample
    expected = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
    assert (to_uint8(pipe("a ball", seed=1).frames[0]) == expected.numpy()).all()


def test_prompt_and_seed_give_the_same_clip_in_any_batch(pipe) -> None:
    both = pipe(["a red ball", "a blue ball"], seed=5, output_type="latent").frames
    alone = pipe("a blue ball", seed=6, output_type="latent").frames
    assert torch.allclose(both[1:], alone, atol=1e-4)
    other = pipe("a blue ball", seed=7, output_type="latent").frames
    assert not torch.allclose(other, alone, atol=0.1)


def test_defaults_are_those_of_the_run(pipe) -> None:
    result = pipe("a ball", seed=1)
    assert result.routing.shape == (2, 1, 2)
    assert ((result.routing == 0) | (result.routing == 1)).all()
    full = pipe("a ball", 3, 1.0, mode="full", seed=1)
    assert full.routing.shape == (3, 1, 2)
    assert torch.allclose(full.routing.sum(-1), torch.ones(3, 1))
    assert pipe("a ball", seed=1, expert=1).routing[..., 1].eq(1).all()
    sticky = pipe(["a ball"] * 4, 4, mode="sticky", seed=1).routing
    assert (sticky == sticky[:1]).all()
    assert pipe.fps == 6


def test_output_types_match_diffusers_video_pipelines(pipe) -> None:
    frames, routing = pipe(["a ball", "a cube"], seed=1, return_dict=False)
    assert (frames.dtype, frames.shape, routing.shape) == (np.float32, (2, 4, 8, 8, 3), (2, 2, 2))
    assert 0 <= frames.min() < frames.max() <= 1
    tensor = pipe(["a ball", "a cube"], seed=1, output_type="pt").frames
    assert (tensor.dtype, tensor.shape) == (torch.float32, (2, 4, 3, 8, 8))
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).cpu().numpy(), frames)
    pictures = pipe(["a ball", "a cube"], seed=1, output_type="pil").frames
    assert [len(clip) for clip in pictures] == [4, 4]
    assert np.array_equal(np.array([[np.asarray(picture) for picture in clip] for clip in pictures]), to_uint8(frames))
    assert pipe("a ball", seed=1, output_type="latent").frames.shape == (1, 3, 4, 8, 8)


def test_export_to_video_of_diffusers_writes_the_clip(folder, tmp_path, monkeypatch) -> None:
    """Every pixel becomes a square of 8 by 8, so that its colour survives the lossy codec."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:  # imageio may be installed without its ffmpeg; then OpenCV writes
        monkeypatch.setattr(export_utils, "is_imageio_available", lambda: False)
    pipe = load_pipeline(folder)
    frames = pipe("a red ball", seed=1).frames[0]
    export_to_video(list(frames.repeat(8, axis=1).repeat(8, axis=2)), str(tmp_path / "clip.mp4"), fps=int(pipe.fps))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    blocks = read.reshape(4, 8, 8, 8, 8, 3).mean(axis=(2, 4))
    assert abs(blocks - frames * 255).mean() < 8  # of 255; frames of another range are off by about 120


def test_noise_comes_from_seed_generator_or_latents(pipe) -> None:
    drawn = [pipe("a ball", generator=torch.Generator().manual_seed(3), output_type="latent").frames for _ in range(2)]
    assert torch.equal(*drawn)
    noise = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pipe("a ball", latents=noise, output_type="latent").frames, drawn[0])


def sampled(pipe: LutetiaPipeline, *arguments: Any, **options: Any) -> torch.Tensor:
    """The latents of a call, from noise of seed 1 by default."""
    return pipe(*arguments, **{"seed": 1, **options}, output_type="latent").frames


def test_generators_per_clip_draw_each_clips_noise(pipe) -> None:
    noise = torch.cat([torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (3, 4)])
    expected = pipe(["a ball", "a cube"], latents=noise, output_type="latent").frames
    generators = [torch.Generator().manual_seed(k) for k in (3, 4)]
    assert torch.equal(pipe(["a ball", "a cube"], generator=generators, output_type="latent").frames, expected)


def test_generator_fixes_the_experts_that_sticky_draws(pipe) -> None:
    first, again = (
        pipe(["a ball"] * 8, mode="sticky", generator=torch.Generator().manual_seed(3)).routing for _ in range(2)
    )  # fmt: skip
    assert torch.equal(first, again)


def test_num_videos_per_prompt_repeats_every_prompt(pipe) -> None:
    repeated = sampled(pipe, ["a ball", "a cube"], num_videos_per_prompt=2)
    assert torch.equal(repeated, sampled(pipe, ["a ball", "a ball", "a cube", "a cube"]))


def test_negative_prompt_replaces_the_null_condition(pipe) -> None:
    plain = sampled(pipe, "a ball", guidance_scale=3.0)
    assert torch.equal(sampled(pipe, "a ball", guidance_scale=3.0, negative_prompt=""), plain)
    assert (sampled(pipe, "a ball", guidance_scale=3.0, negative_prompt="a cube") - plain).abs().max() > 1e-3
    unguided = sampled(pipe, "a ball", guidance_scale=1.0)
    assert (unguided - plain).abs().max() > 1e-3
    same_text = sampled(pipe, "a ball", guidance_scale=3.0, negative_prompt="a ball")
    assert torch.allclose(same_text, unguided, atol=1e-4), "both branches are equal"
    assert torch.equal(sampled(pipe, "a ball", guidance_scale=1.0, negative_prompt="a cube"), unguided)


def test_guidance_zero_gives_the_negative_prompt_alone(pipe) -> None:
    options = {"expert": 0, "seed": 1}
    away = sampled(pipe, ["a ball", "a star"], guidance_scale=0.0, negative_prompt=["a cube", "a cup"], **options)
    assert torch.allclose(away, sampled(pipe, ["a cube", "a cup"], guidance_scale=1.0, **options), atol=1e-4)


def test_embeddings_give_the_clips_of_their_prompts(pipe) -> None:
    texts = {"prompt": ["a ball", "a cube"], "negative_prompt": "a cup"}
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    embeddings = dict(zip(names, pipe.encode_prompt(**texts), strict=True))
    assert [list(each.shape) for each in embeddings.values()] == [[2, 6, 64], [2, 64]] * 2
    assert torch.equal(sampled(pipe, **embeddings), sampled(pipe, **texts))
    repeated = sampled(pipe, **embeddings, num_videos_per_prompt=2)
    assert torch.equal(repeated, sampled(pipe, **texts, num_videos_per_prompt=2))


def test_callback_replaces_tensors_at_every_step(pipe) -> None:
    seen = []

    def halve(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipeline is pipe, step, round(float(timestep)), float(pipeline.current_timestep), sorted(tensors)))
        return {"latents": tensors["latents"] / 2}

    inputs = ["latents", "prompt_embeds"]
    changed = sampled(pipe, "a ball", 1, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=inputs)
    assert torch.equal(changed, sampled(pipe, "a ball", 1) / 2)
    sampled(pipe, "a ball", 2, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=inputs)
    assert seen == [(True, step, t, t, inputs) for step, t in ((0, 1000), (0, 1000), (1, 500))]


def test_callback_changes_the_text_and_stops_the_sampling(pipe) -> None:
    other = pipe.encode_prompt("a cube")

    def switch(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other[0], "pooled_prompt_embeds": other[1]} if step == 0 else {}

    def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = step == 1
        return {}

    assert not torch.equal(sampled(pipe, "a ball", 2, callback_on_step_end=switch), sampled(pipe, "a ball", 2))
    stopped = pipe("a ball", 4, seed=1, callback_on_step_end=stop)
    assert (len(stopped.routing), stopped.frames.shape) == (2, (1, 4, 8, 8, 3))
    assert torch.equal(sampled(pipe, "a ball", 4), sampled(pipe, "a ball", 4)), "a later call is not interrupted"


def test_callback_classes_of_diffusers_name_their_own_tensors(pipe) -> None:
    class Watch(PipelineCallback):
        tensor_inputs = ["latents", "negative_prompt_embeds"]  # pyright: ignore[reportAssignmentType]
        seen: ClassVar[list[list[str]]] = []

        def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
            self.seen.append(list(callback_kwargs))
            return callback_kwargs

    pipe("a ball", 2, seed=1, callback_on_step_end=Watch())
    assert Watch.seen == [Watch.tensor_inputs] * 2


def test_one_expert_in_memory_gives_the_same_clips(folder, pipe, device) -> None:
    frugal = load_pipeline(folder, device=device, experts_in_memory=1)
    options = {"mode": "full", "seed": 2, "output_type": "latent"}
    assert torch.equal(frugal("a ball", **options).frames, pipe("a ball", **options).frames)
    assert len(frugal.transformer._held) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["as loaded", "by its name", "afterwards"])
def test_half_precision_works_to_the_last_step(compressed, dtype, cast) -> None:
    match cast:
        case "as loaded":
            rough = LutetiaPipeline.from_pretrained(compressed, torch_dtype=dtype)
        case "by its name":
            rough = LutetiaPipeline.from_pretrained(compressed, dtype=str(dtype).removeprefix("torch."))
        case _:
            rough = load_pipeline(compressed).to(dtype)
    assert (rough.vae.dtype, rough.transformer.dtype) == (dtype, dtype)
    frames = rough("a ball", seed=2).frames
    assert frames.dtype == np.float32
    assert abs(frames - load_pipeline(compressed)("a ball", seed=2).frames).mean() < 0.1


def test_half_precision_works_with_a_router(folder, pipe, device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        clip = load_pipeline(folder, device=device, dtype=dtype)("a ball", seed=2, output_type="latent").frames
        assert clip.dtype == torch.float32
        assert (clip - pipe("a ball", seed=2, output_type="latent").frames).abs().mean() < 0.1


def test_clip_that_is_not_finite_is_refused(pipe) -> None:
    """It would be shown as black."""
    with pytest.raises(ValueError, match=r"values that are not finite, with guidance_scale 1e\+38 in float32; use a smaller"):
        pipe("a ball", 4, 1e38, seed=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": []}, "no prompt was given"),
        ({"prompt": ["a ball", "  "]}, "prompt 2 is empty"),
        ({"prompt": "one two three four five six seven"}, "prompt 1 has 7 tokens, but this mixture reads 6"),
        ({"prompt": "x" * 2001}, "prompt 1 has 2001 characters"),
        ({"prompt": "a", "num_frames": 16}, "makes clips of num_frames=4, not 16"),
        ({"prompt": "a", "height": 64}, "makes clips of height=8, not 64"),
        ({"prompt": "a", "num_inference_steps": 0}, "0 steps cannot make a clip"),
        ({"prompt": "a", "expert": 2}, r"no expert 2; it has \[0, 1\]"),
        ({"prompt": "a", "mode": "best"}, "no routing mode 'best'"),
        ({"prompt": "a", "output_type": "mp4"}, "no output type 'mp4'"),
        ({"prompt": "a", "latents": torch.zeros(1, 3, 4, 8, 9)}, r"latents must have shape \[1, 3, 4, 8, 8\]"),
        ({}, "no prompt was given"),
        ({"prompt": ["a", 3]}, "prompt 2 is of type int; give a text"),
        ({"prompt": 3}, "prompt is of type int; give a text or a list of texts"),
        ({"prompt": "a", "prompt_embeds": TOKENS}, "both prompt and prompt_embeds were given"),
        ({"prompt_embeds": TOKENS}, "prompt_embeds was given without pooled_prompt_embeds"),
        ({"pooled_prompt_embeds": POOLED}, "pooled_prompt_embeds was given without prompt_embeds"),
        ({"prompt_embeds": TOKENS[..., :9], "pooled_prompt_embeds": POOLED}, r"must have shape \[1, 6, 64\], not \[1, 6, 9\]"),
        ({"prompt_embeds": TOKENS, "pooled_prompt_embeds": POOLED[:, :9]}, r"must have shape \[1, 64\], not \[1, 9\]"),
        (
            {"prompt": ["a", "b"], "negative_prompt_embeds": TOKENS, "negative_pooled_prompt_embeds": POOLED},
            r"negative_prompt_embeds must have shape \[2, 6, 64\]",
        ),
        (
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": TOKENS},
            "both negative_prompt and negative_prompt_embeds were given",
        ),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, "2 negative prompts were given for 1 prompts"),
        ({"prompt": "a", "negative_prompt": "one two three four five six seven"}, "negative prompt 1 has 7 tokens"),
        ({"prompt": "a", "guidance_scale": math.nan}, "guidance_scale is nan; give a finite number"),
        ({"prompt": "a", "guidance_scale": math.inf}, "guidance_scale is inf; give a finite number"),
        ({"prompt": "a", "latents": torch.full((1, 3, 4, 8, 8), math.nan)}, "latents have values that are not finite"),
        ({"prompt_embeds": TOKENS / 0, "pooled_prompt_embeds": POOLED}, "prompt_embeds have values that are not finite"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "2.5 steps cannot make a clip"),
        ({"prompt": "a", "num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators were given for 1 clips"),
        ({"prompt": "a", "generator": [3]}, "generator must be a torch.Generator or a list of them"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, r"tensor_inputs has no \['noise'\]; use latents"),
    ],
)
def test_bad_input_raises_one_sentence(pipe, arguments, says) -> None:
    with pytest.raises(UsageError, match=says) as refusal:
        pipe(**arguments)
    assert isinstance(refusal.value, ValueError)
    assert "\n" not in str(refusal.value)
