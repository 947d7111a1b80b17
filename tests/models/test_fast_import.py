"""The fast import of a trainer process: every class still trains, with the same losses."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from hypothesis import given
from hypothesis import strategies as st

from lutetia.models.experts.classes.cogvideox import resized_region
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from tests.child_environment import child_environment
from tests.models.tiny_experts import CONFIGS, tiny_data, tiny_manifest

CHILD = Path(__file__).with_name("fast_import_process.py")


def test_every_class_trains_after_fast_import(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path)], env=child_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    losses = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in losses] == [*CONFIGS, "CogVideoXTransformer3DModel", "adapter"]
    assert all(math.isfinite(float(loss)) for _, loss in losses)
    for name, loss in losses[: len(CONFIGS)]:
        spec = ExpertSpec(class_name=name, config=CONFIGS[name])
        assert ExpertTrainer(tiny_manifest(expert=spec), 0, tiny_data()).step() == pytest.approx(float(loss), rel=1e-5)


side = st.integers(1, 200)


@given(side, side, side, side)
def test_resized_region_equals_that_of_diffusers(height: int, width: int, base_height: int, base_width: int) -> None:
    ours = resized_region((height, width), (base_height, base_width))
    assert ours == get_resize_crop_region_for_grid((height, width), base_width, base_height)
