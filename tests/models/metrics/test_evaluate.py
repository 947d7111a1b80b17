"""`evaluate`: from a folder of videos and a mixture to a report; the cache of samples; refused input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.metrics.clips import ClipSet, read_clips
from lutetia.models.metrics.generated_clips import MixtureSampler, generate
from lutetia.models.metrics.report import MetricsReport, evaluate
from lutetia.models.metrics.routing import loss_table, router_table, routing_figures
from lutetia.models.metrics.settings import EvaluateSettings, EvaluatorSettings
from lutetia.models.mixing.options import SamplingOptions
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.router_training import RouterReport
from lutetia.models.mixing.stitch import stitch
from lutetia.models.training.holdout_loss import HoldoutLoss
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError, UsageError
from tests.models.metrics.square_clips import square_clips
from tests.models.tiny_experts import CONFIGS, accept, tiny_data, tiny_manifest

SHAPE = ClipShape(frames=10, fps=8, height=32, width=32)


def write_videos(folder: Path, clips: ClipSet, splits: Sequence[str], first: int = 0) -> Path:
    """Append the clips to `folder` as nearly lossless mp4 files with metadata."""
    folder.mkdir(exist_ok=True)
    with (folder / "metadata.jsonl").open("a") as metadata:
        for number, (clip, caption, split) in enumerate(zip(clips.frames, clips.captions, splits, strict=True), first):
            name = f"clip_{number:04d}.mp4"
            with av.open(str(folder / name), "w") as out:
                stream = out.add_stream("libx264", rate=8)
                stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv444p"
                stream.options = {"crf": "4", "preset": "ultrafast"}
                for frame in clip:
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
                out.mux(stream.encode())
            row = {"file_name": name, "caption": caption, "split": split, "kind": caption.split()[1]}
            metadata.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real clips: 24 to fit on, 44 held out."""
    return write_videos(tmp_path_factory.mktemp("data") / "real", square_clips(68, seed=3), ["train"] * 24 + ["test"] * 44)


def toy_mixture(root: Path) -> tuple[Manifest, list[Path]]:
    """Two untrained experts on pixels of the same size."""
    latent = LatentSpec(
        channels=3, frames=10, height=32, width=32, vae="pixels", pixel_frames=10, pixel_height=32, pixel_width=32, fps=8,
        text_encoder="builtin:words", text_tokens=6, text_width=64, pooled_width=64,
    )  # fmt: skip
    config = {**CONFIGS["WanTransformer3DModel"], "in_channels": 9, "out_channels": 3, "text_dim": 64, "patch_size": [2, 8, 8]}
    manifest = tiny_manifest(expert=ExpertSpec(config=config), latent=latent, sampling={"steps": 2, "guidance": 1.0})
    files = [root / f"w{shard}" for shard in range(2)]
    for shard, file in enumerate(files):
        write_weights(ExpertTrainer(manifest, shard, tiny_data(latent=latent)).snapshot(), file)
    return manifest, files


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    manifest, files = toy_mixture(root)
    stitch(root / "toy", manifest, files, build_router(manifest))
    return root / "toy"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateSettings:
    """All metrics, without any weights: only the optical flow can be measured."""
    monkeypatch.setenv("LUTETIA_ASSETS", str(tmp_path / "no assets"))
    evaluator = EvaluatorSettings(cache=tmp_path / "cache", resamples=12)
    return EvaluateSettings(clips=22, spare=22, fit_clips=24, evaluator=evaluator)


def test_evaluate_reports_figures_and_what_was_left_out(mixture: Path, data: Path, settings: EvaluateSettings) -> None:
    steps: list[tuple[str, int, int]] = []
    report = evaluate(mixture, data, settings, lambda stage, done, total: steps.append((stage, done, total)))
    names = {entry.name: entry for entry in report.entries}
    assert {"motion distance", "motion distance, debiased", "motion distance, kernel distance", "motion, px/frame"} <= set(names)
    distance = names["motion distance"]
    assert distance.real is not None
    assert distance.figure.value > distance.real.value  # untrained: noise
    assert distance.real.n == distance.figure.n == 22
    assert names["motion distance, debiased"].figure.low > 0
    assert set(report.left_out) == {"fvd", "retrieval", "classifier", "clip"}
    assert "i3d_kinetics400_rgb.safetensors do not exist" in report.left_out["fvd"]
    assert "no CLIP is set" in report.left_out["clip"]
    assert report.routing is not None
    assert sum(report.routing.load) == pytest.approx(1)
    assert ("sampling", 22, 22) in steps
    assert MetricsReport.model_validate_json(report.model_dump_json()) == report
    text = report.markdown()
    assert "| motion distance ↓ |" in text
    assert "Left out: fvd: " in text
    again = evaluate(mixture, data, settings)
    assert again.entries == report.entries


def test_evaluate_mixture_lacking_an_expert_uses_the_others(data: Path, settings: EvaluateSettings, tmp_path: Path) -> None:
    manifest, files = toy_mixture(tmp_path)
    stitch(tmp_path / "toy", manifest, files[:1], build_router(manifest), [accept(manifest, 0, files[0])])
    report = evaluate(tmp_path / "toy", data, settings)
    assert {"mixture", "expert 0"} == set(report.losses)


def test_sampler_truncates_long_prompts_like_training_captions(mixture: Path) -> None:
    sampler, longer = MixtureSampler(mixture, SamplingOptions()), "a red square moves left and further than the encoder reads"
    assert sampler.pipeline.text.count([longer]) > sampler.pipeline.spec.text_tokens
    assert torch.equal(sampler([longer], 0)[0], sampler([" ".join(longer.split()[:6])], 0)[0])
    with pytest.raises(UsageError, match="prompt 1 has 11 tokens, but this mixture reads 6"):
        sampler.pipeline([longer])


def test_undecodable_clip_is_refused_or_replaced_by_the_next(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(data, folder)
    first, _, third = read_clips(data, SHAPE, split="test", limit=3).frames
    (folder / "clip_0025.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"clip_0025.mp4"):
        read_clips(folder, SHAPE, split="test", limit=3)
    kept = read_clips(folder, SHAPE, split="test", limit=2, skip_bad=True)
    assert torch.equal(kept.frames, torch.stack([first, third]))
    assert len(read_clips(folder, SHAPE, split="test", skip_bad=True)) == 43


def test_evaluate_accepts_folder_of_clips_without_metadata(data: Path, tmp_path: Path, settings: EvaluateSettings) -> None:
    """The captions are in text files of the same names."""
    for number, line in enumerate((data / "metadata.jsonl").read_text().splitlines()):
        row = json.loads(line)
        if row["split"] == "test":
            shutil.copy(data / row["file_name"], tmp_path / f"{number}.mp4")
            (tmp_path / f"{number}.txt").write_text(row["caption"])
    assert evaluate(tmp_path, data, settings.model_copy(update={"shape": SHAPE})).clips == 22


def test_real_videos_score_at_the_floor(data: Path, tmp_path: Path, settings: EvaluateSettings) -> None:
    held = read_clips(data, SHAPE, split="test", limit=22, seed=0)
    other = square_clips(400, seed=9)
    rows = [other.captions.index(caption) for caption in held.captions]
    videos = write_videos(tmp_path / "videos", other.take(rows), [""] * 22)
    report = evaluate(videos, data, settings.model_copy(update={"shape": SHAPE}))
    names = {entry.name: entry for entry in report.entries}
    assert names["motion distance, debiased"].figure.low < 0
    assert report.sampling is None
    assert report.routing is None
    with pytest.raises(DataError, match=r"set the frames, fps and size"):
        evaluate(videos, data, settings)


def test_evaluate_refuses_too_few_or_foreign_clips(data: Path, mixture: Path, tmp_path: Path, settings) -> None:
    few = write_videos(tmp_path / "few", square_clips(5), ["test"] * 5)
    with pytest.raises(DataError, match=r"5 clips of split test, fewer than 20"):
        evaluate(mixture, few, settings)
    with pytest.raises(DataError, match=r"clips of height 32, not 64"):
        evaluate(mixture, data, settings.model_copy(update={"shape": ClipShape(frames=10, height=64, width=32)}))
    foreign = square_clips(22)
    named = ClipSet(foreign.frames, tuple(f"a thing {number}" for number in range(22)))
    videos = write_videos(tmp_path / "foreign", named, [""] * 22)
    with pytest.raises(DataError, match=r"0 clips of .* have captions of held-out clips"):
        evaluate(videos, data, settings.model_copy(update={"shape": SHAPE}))


def test_read_clips_order_is_natural_or_stratified(data: Path) -> None:
    natural = read_clips(data, SHAPE, split="test", limit=12, seed=1)
    assert read_clips(data, SHAPE, split="test", limit=12, seed=1).captions == natural.captions
    assert read_clips(data, SHAPE, split="test", limit=12, seed=2).captions != natural.captions
    even = read_clips(data, SHAPE, split="test", limit=8, seed=1, stratified=True)
    assert sorted(even.kinds) == sorted(["blue", "green", "red", "white"] * 2)
    others = read_clips(data, SHAPE, split="test", first=12, seed=1)
    assert len(natural) + len(others) == 44
    with pytest.raises(DataError, match=r"no clips of split test from number 44"):
        read_clips(data, SHAPE, split="test", first=44)


class CountingSampler:
    """A sampler that counts its prompts; the brightness of a clip is its seed."""

    tag, shape, sampled = "counting", SHAPE, 0

    def __call__(self, prompts: Sequence[str], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.sampled += len(prompts)
        bright = (torch.arange(len(prompts)) + seed) % 251
        clips = bright.view(-1, 1, 1, 1, 1).expand(-1, 10, 32, 32, 3).to(torch.uint8)
        return clips.contiguous(), torch.full((2, len(prompts), 2), 0.5)


def test_interrupted_sampling_resumes(tmp_path: Path) -> None:
    prompts, sampling = square_clips(10), SamplingOptions(batch=4)

    class Interrupted(CountingSampler):
        def __call__(self, prompts: Sequence[str], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            if self.sampled == 8:
                raise KeyboardInterrupt
            return super().__call__(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        generate(Interrupted(), prompts, sampling, 0, tmp_path)
    resumed = CountingSampler()
    clips, routing = generate(resumed, prompts, sampling, 0, tmp_path)
    assert resumed.sampled == 2
    assert clips.frames[:, 0, 0, 0, 0].tolist() == list(range(10))
    assert clips.captions == prompts.captions
    assert routing.shape == (2, 10, 2)
    other = CountingSampler()
    generate(other, prompts, sampling.model_copy(update={"guidance": 2.0}), 0, tmp_path)
    assert other.sampled == 10


def test_routing_figures_and_tables_match_hand_calculation() -> None:
    weights = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]]])
    routing = routing_figures(weights)
    assert routing.load == (0.75, 0.25)
    assert routing.balance == pytest.approx(0.8113, abs=1e-4)
    assert routing.entropy == pytest.approx(0)
    assert routing.switches == 0.5
    with pytest.raises(DataError, match=r"\[steps, clips, experts\]"):
        routing_figures(torch.zeros(3, 2))
    losses = loss_table({"monolith": HoldoutLoss(0.5, (0.25, None), (0.5,)), "expert 0": HoldoutLoss(0.4, (0.2, 0.6), (0.4,))})
    assert "| held-out loss | all t | 0.0–0.5 | 0.5–1.0 |" in losses
    assert "| monolith | 0.5000 | 0.2500 | – |" in losses
    report = RouterReport(0.9, (1.0, 0.8), 0.02, (0.01, 0.03), 0.3, 100)
    assert "| router: accuracy | 0.900 | 1.000 | 0.800 |" in router_table({"router": report})
    assert np.isfinite(report.loss)
