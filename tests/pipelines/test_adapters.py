"""Adapters on a pipeline: the run takes all else from it, and the stock pipeline loads what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.data.parts.reader import load_shard
from lutetia.models.experts.adapters.base_sources import read_paths
from lutetia.models.mixing.stitch import stitch
from lutetia.models.pipeline import load_pipeline
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.protocol.schema.capabilities import ADAPTERS, PIPELINES
from tests.pipelines.made_pipeline import Made, apart, draw_mixture, draw_stock
from tests.pipelines.tiny_clips import create_by_command
from tests.pipelines.tiny_pipelines import pipeline_folder

_ADAPTER = """
[run.expert.adapter]
base = "{base}"
rank = 4
alpha = 8.0
dtype = "float32"
"""


@pytest.mark.parametrize("made", ["wan21", "ltx-i2v", "wan22-a14b"], indirect=True)
def test_stock_pipeline_with_the_trained_adapter_gives_the_mixtures_latents(made: Made, tmp_path: Path) -> None:
    """Of Wan 2.2 A14B the adapter is on the transformer for low noise."""
    base, low = pipeline_folder(made.name), made.name == "wan22-a14b"
    settings = _ADAPTER.format(base=f"{base}/transformer_2" if low else base)
    options = ("--part", "low") if low else ()
    manifest = create_by_command(made.name, made.folder / "data", tmp_path / "run", *options, more=settings)
    assert {ADAPTERS, PIPELINES} <= set(manifest.needs)
    taken = ("prediction", "noise_schedule", "betas", *(() if low else ("inputs",)))
    assert [getattr(manifest.expert, name) for name in taken] == [getattr(made.manifest.expert, name) for name in taken]
    assert (manifest.expert.init, manifest.sampling) == (None, made.manifest.sampling)
    assert manifest.optimisation.time == made.manifest.optimisation.time

    data = load_shard(made.folder / "data" / "shards" / "000.train.safetensors", manifest.latent)
    trainer = ExpertTrainer(manifest, 0, data, base=read_paths(RunFolder(tmp_path / "run").base))
    for _ in range(2 * manifest.steps_per_epoch):
        trainer.step()
    write_weights(trainer.snapshot(), tmp_path / "weights.safetensors")
    stitch(tmp_path / "mixture", manifest, [tmp_path / "weights.safetensors"], None)

    stock: Any = DiffusionPipeline.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    mixture = load_pipeline(tmp_path / "mixture", base=base)
    adapted = Made(made.name, tmp_path, manifest, stock, mixture, made.noise)
    plain = draw_stock(adapted)
    stock.load_lora_weights(str(tmp_path / "mixture" / "expert_000"), **({"load_into_transformer_2": True} if low else {}))
    theirs, ours = draw_stock(adapted), draw_mixture(adapted)
    assert apart(plain, theirs) > 1e-4, "the adapter was trained"
    assert apart(ours, theirs) <= 1e-6
    how = 'expert_000", load_into_transformer_2=True)' if low else 'expert_000")'
    assert how in (tmp_path / "mixture" / "README.md").read_text()
