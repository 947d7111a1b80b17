"""`lutetia generate`: prompts from a file, what is chosen by itself, the order in which memory is used, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lutetia.cli.commands.generate import wanted_prompts
from lutetia.cli.local.sampler import MixtureLoader
from lutetia.cli.local.sampling_plan import SamplingPlan, bucket_of, clips_at_once, expert_sizes, experts_that_fit, plan_sampling
from lutetia.cli.main import app
from lutetia.models.mixing.description import read_mixture
from lutetia.protocol.schema.model.latent_spec import LatentShape
from lutetia.system.errors import HardwareError, UsageError
from tests.models.emulated_device import DEVICE, emulated_device
from tests.models.mixing.tiny_mixture import PIXELS, compressed_mixture, pixel_mixture


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_mixture(tmp_path_factory.mktemp("generate"), shards=2)


def test_prompts_of_a_file_become_numbered_clips(mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red ball\n\n  a blue cup that turns slowly to the left \n".encode())
    options = ["--mixture", str(mixture), "--negative", "a cat", "--device", "cpu", "--n", "2", "--json"]
    app(
        ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "clip.gif"), *options],
        standalone_mode=False,
    )
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [Path(file).name for file in document["files"]] == [f"clip-{number}.gif" for number in (1, 2, 3, 4)]
    assert document["prompts"] == ["a red ball"] * 2 + ["a blue cup that turns slowly to the left"] * 2
    assert all(getattr(Image.open(file), "n_frames", 1) == 4 for file in document["files"])
    assert "warning: prompt 3 has 9 tokens, but this mixture reads 6; its end is cut, as in training" in printed.err
    assert "device cpu: as set; dtype float32: CPU; all 2 experts in memory" in printed.err
    assert re.search(r"generate: steps\D+2/2", printed.err)


def test_clips_are_those_of_the_pipeline_whatever_is_in_memory(mixture: Path) -> None:
    prompts = ["a ball", "a cube", "a star"]
    whole = MixtureLoader(mixture).sample(prompts, seed=3, mode="full")
    frugal = MixtureLoader(mixture, plan=SamplingPlan("cpu", "float32", 1, True))
    clips = list(frugal.generate(prompts, seed=3, batch=2, mode="full"))
    for clip, expected, experts in zip(clips, whole.clips, whole.experts, strict=True):
        assert abs(clip.frames.astype(int) - expected).max() <= 1
        assert clip.experts[0].keys() == experts[0].keys()


def test_each_part_is_in_memory_only_while_it_is_needed(mixture: Path) -> None:
    sampler = MixtureLoader(mixture, plan=SamplingPlan("cpu", "float32", 1, False))
    pipeline, steps = sampler.pipeline, []

    def look(done: int, total: int) -> None:
        steps.append((done, total))
        assert pipeline._text is None, "the text encoder is freed before sampling"
        assert len(pipeline.transformer._held) == 1

    clips = sampler.generate(["a ball", "a cube"], batch=1, mode="full", on_step=look)
    next(clips)
    assert not pipeline.transformer._held, "experts are freed before decoding"
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_generate_on_an_accelerator_gives_the_clips_of_the_cpu(mixture: Path) -> None:
    prompts = ["a ball", "a cube"]
    expected = MixtureLoader(mixture).sample(prompts, seed=1)
    with emulated_device():
        sampler = MixtureLoader(mixture, plan=SamplingPlan(DEVICE, "float32", 1, False))
        clips = [clip.frames for clip in sampler.generate(prompts, seed=1)]
    assert max(abs(a.astype(int) - b).max() for a, b in zip(clips, expected.clips, strict=True)) <= 1


def test_as_many_experts_are_held_as_half_of_the_free_memory_takes(mixture: Path) -> None:
    assert experts_that_fit([10, 10, 10], free=60) == (None, "all 3 experts in memory")
    count, reason = experts_that_fit([6 * 10**9] * 8, free=24 * 10**9)
    assert (count, reason) == (2, "2 of 8 experts in memory: 24.0 GB are free")
    assert experts_that_fit([10, 10], free=1)[0] == 1, "one is always needed"
    document = read_mixture(mixture).mixture
    assert [size // 2 for size in expert_sizes(document, "float32")] == expert_sizes(document, "bfloat16")


def test_large_clips_are_sampled_one_by_one_and_decoded_in_tiles(mixture: Path) -> None:
    large = PIXELS.model_copy(update={"frames": 21, "height": 60, "width": 104, "pixel_height": 480, "pixel_width": 832})
    assert (clips_at_once(large), clips_at_once(PIXELS)) == (1, 8)
    document = read_mixture(mixture).mixture
    plan = plan_sampling(document.model_copy(update={"latent": large}), device="cpu")
    assert plan.tiling
    assert plan.reason.endswith("decoding in tiles")
    assert not plan_sampling(document, device="cpu").tiling
    assert not plan_sampling(document.model_copy(update={"latent": large}), device="cpu", tiling=False).tiling


def test_unusable_prompts_and_devices_are_refused_in_one_sentence(mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_text("a\n" * 1001)
    for prompt, name, says in (
        ("a ball", "empty.txt", "give a prompt, or a file of prompts by --prompts, and not both"),
        (None, "empty.txt", "must hold 1 to 1000 prompts"),
        (None, "long.txt", "must hold 1 to 1000 prompts .* not 1001"),
        (None, "latin.txt", "is not text in UTF-8"),
        (None, "missing.txt", "cannot read prompts from"),
    ):
        with pytest.raises(UsageError, match=says):
            wanted_prompts(prompt, tmp_path / name)
    with pytest.raises(UsageError, match="not both"):
        wanted_prompts(None, None)
    document = read_mixture(mixture).mixture
    with pytest.raises(UsageError, match="there is no device 'tpu'; use auto, cpu"):
        plan_sampling(document, device="tpu")
    with pytest.raises(HardwareError, match="device xpu:9 is set"):
        plan_sampling(document, device="xpu:9")


def test_size_and_frames_choose_among_the_runs_buckets(tmp_path: Path) -> None:
    wide = LatentShape(frames=4, height=4, width=16, pixel_frames=4, pixel_height=4, pixel_width=16)
    still = LatentShape(frames=1, height=8, width=8, pixel_frames=1, pixel_height=8, pixel_width=8)
    folder = pixel_mixture(tmp_path, (wide, still))
    for options, size, frames in (
        (["--size", "16x4"], (16, 4), 4), (["--size", "8x8", "--frames", "1"], (8, 8), 1), ([], (8, 8), 4),
    ):  # fmt: skip
        out = tmp_path / "clip.gif"
        command = ["generate", "a ball", "--mixture", str(folder), "--out", str(out), "--device", "cpu", *options]
        app(command, standalone_mode=False)
        with Image.open(out) as clip:
            assert (clip.width / clip.height, getattr(clip, "n_frames", 1)) == (size[0] / size[1], frames)
    latent = read_mixture(folder).mixture.latent
    with pytest.raises(UsageError, match=r"trained on no clips of --size 4x16 --frames 1; it has 8x8 with 4 frames, 16x4 with 4"):
        bucket_of(latent, "4x16", 1)
    with pytest.raises(UsageError, match="wide is no size; write width and height"):
        bucket_of(latent, "wide", None)
