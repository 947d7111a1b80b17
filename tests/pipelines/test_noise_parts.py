"""Wan 2.2 A14B: a run trains one of the two transformers, at its noise levels, and clips are made by both parts together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from lutetia.models.data.parts.reader import load_shard
from lutetia.models.experts.objectives import times
from lutetia.models.mixing.parts.other_part import mixture_part
from lutetia.models.mixing.sampling import sample, time_grid
from lutetia.models.mixing.stitch import stitch
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.pipeline import load_pipeline
from lutetia.models.training.batches import Batches
from lutetia.models.training.holdout_loss import holdout_rows
from lutetia.protocol.schema.capabilities import NOISE_PARTS
from lutetia.protocol.schema.model.pipeline_spec import NoisePart
from lutetia.protocol.schema.model.training_spec import TimeSampling
from lutetia.system.errors import ConfigError, UsageError
from tests.cli.command_runner import lutetia
from tests.pipelines.made_pipeline import Made, apart, draw_mixture, draw_stock, train
from tests.pipelines.tiny_clips import STEPS, create_by_command
from tests.pipelines.tiny_pipelines import PROMPTS, pipeline_folder

HIGH, LOW = (NoisePart(side=side, boundary=0.875) for side in ("high", "low"))


@pytest.fixture(scope="module")
def both(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run for low noise on the same data. The stock pipeline holds what both runs trained."""
    folder = tmp_path_factory.mktemp("low")
    (folder / "data").symlink_to(made.folder / "data")
    manifest = create_by_command(made.name, folder / "data", folder / "run", "--part", "low")
    train(manifest, folder)
    stitch(folder / "mixture", manifest, [folder / "weights.safetensors"], None)
    stock: Any = DiffusionPipeline.from_pretrained(pipeline_folder(made.name))
    stock.transformer = made.stock.transformer
    stock.set_progress_bar_config(disable=True)
    stock.transformer_2 = type(stock.transformer).from_pretrained(folder / "mixture" / "expert_000")
    return Made(made.name, folder, manifest, stock, load_pipeline(folder / "mixture"), made.noise)


def drawn_times(made: Made) -> Tensor:
    manifest = made.manifest
    data = load_shard(made.folder / "data" / "shards" / "000.train.safetensors", manifest.latent)
    held_out = holdout_rows(manifest, 0, data, noises=16)[2]
    return torch.cat([held_out, *(Batches(manifest, 0, data).at(epoch, 0).time for epoch in range(32))])


@pytest.mark.parametrize("made", ["wan22-a14b"], indirect=True)
def test_each_run_trains_its_transformer_at_its_noise_levels(made: Made, both: Made) -> None:
    assert (made.manifest.expert.noise_part, both.manifest.expert.noise_part) == (HIGH, LOW)
    assert NOISE_PARTS in made.manifest.needs
    assert NOISE_PARTS in both.manifest.needs
    assert drawn_times(made).min() >= 0.875
    assert drawn_times(both).max() <= 0.875
    card = (made.folder / "mixture" / "README.md").read_text()
    assert "trained for high noise (flow times from 0.875 on)" in card


@pytest.mark.parametrize("made", ["wan22-a14b"], indirect=True)
def test_mixtures_of_both_parts_make_the_clips_of_the_stock_pipeline(made: Made, both: Made) -> None:
    theirs = draw_stock(both)
    high = load_pipeline(made.folder / "mixture", experts_in_memory=1).pair_with(both.folder / "mixture")
    assert apart(draw_mixture(replace(made, mixture=high)), theirs) < 1e-5
    assert not high.transformer._held, "experts for high noise are dropped once they are done, where few may be held"
    low = load_pipeline(both.folder / "mixture").pair_with(made.folder / "mixture")
    assert apart(draw_mixture(replace(both, mixture=low)), theirs) < 1e-5
    assert apart(draw_mixture(made), theirs) > 1e-4, "that is with the pipeline's own transformer for low noise"
    own, both.stock.transformer_2 = both.stock.transformer_2, both.mixture.transformer
    try:
        assert apart(draw_stock(both, made.mixture.transformer), theirs) < 1e-5
    finally:
        both.stock.transformer_2 = own


@pytest.mark.parametrize("made", ["wan22-a14b"], indirect=True)
@pytest.mark.parametrize("mode", ["top2", "sticky"])
def test_steps_of_the_other_part_have_no_weights(both: Made, mode: Any) -> None:
    options: dict[str, Any] = {"output_type": "latent", "return_dict": False, "latents": both.noise.clone()}
    _, routing = both.mixture(PROMPTS, mode=mode, **options)
    assert routing.shape == (STEPS, 2, 1)
    assert routing[:, 0, 0].tolist() == [0, 0, 1, 1], "steps at 1.0 and 0.9, at 0.75 and 0.5"


@pytest.mark.parametrize("made", ["wan22-a14b"], indirect=True)
def test_generate_takes_the_mixture_of_the_other_part(made: Made, both: Made, tmp_path: Path) -> None:
    options = ("--mixture", made.folder / "mixture", "--seed", "3", "--device", "cpu")
    run = lutetia("generate", PROMPTS[0], *options, "--other", both.folder / "mixture", "--out", tmp_path / "clip.gif")
    assert run.returncode == 0, run.stderr
    assert f"in 2 of {STEPS} steps, the other part in 2 of {STEPS} steps" in run.stdout
    run = lutetia("generate", PROMPTS[0], *options, "--other", made.folder / "mixture", "--out", tmp_path / "clip.gif")
    assert run.returncode != 0
    assert "is of high noise (boundary 0.875), but low noise (boundary 0.875) would be needed beside this one" in run.stderr


@pytest.mark.parametrize("made", ["wan22-a14b"], indirect=True)
def test_mixture_without_the_other_part_makes_no_clips(made: Made, tmp_path: Path) -> None:
    mixture: MixtureTransformer = made.mixture.transformer
    tokens, pooled, *_ = made.mixture.encode_prompt(PROMPTS)
    with pytest.raises(UsageError, match="only together with a model of the other part"):
        sample(mixture, tokens, pooled, made.noise, times=time_grid(2))
    latent = made.manifest.latent.model_copy(update={"mean": (), "std": ()})
    with pytest.raises(ConfigError, match="was trained with mean .*, this one with .*; name one that was made from the same"):
        mixture_part(made.folder / "mixture", LOW, latent, torch.float32)
    alone = load_pipeline(made.folder / "mixture")
    alone.spec = alone.spec.model_copy(update={"text_encoder": "owner/not-downloaded"})
    with pytest.raises(ConfigError, match="on the hub and was not downloaded before; allow that: --hub"):
        alone(PROMPTS)


def test_times_of_a_part_are_those_of_the_whole_distribution_that_lie_in_it() -> None:
    sampling, uniforms = TimeSampling(shift=3.0, mean=0.2, std=0.8), (torch.arange(20000) + 0.5) / 20000
    whole = times(sampling, uniforms)
    for part, inside in ((HIGH, whole >= 0.875), (LOW, whole <= 0.875)):
        drawn, expected = times(sampling, uniforms, part), whole[inside]
        for quantile in (0.02, 0.3, 0.7, 0.98):
            assert drawn.quantile(quantile) == pytest.approx(expected.quantile(quantile).item(), abs=2e-4)
    ends = times(TimeSampling(), torch.tensor([0.0, 1.0]), LOW)
    assert ends.tolist() == pytest.approx([0.0086, 0.875], abs=1e-4), "the whole distribution ends there, too"


def test_step_at_the_boundary_is_one_of_the_high_part() -> None:
    at = torch.tensor(0.9).item()
    high, low = (NoisePart(side=side, boundary=0.9) for side in ("high", "low"))
    assert at < 0.9
    assert (high.holds(at), low.holds(at)) == (True, False)
    assert (high.holds(0.899), low.holds(0.899)) == (False, True)
