"""A stitched folder: its contents, that it is replaced as a whole, can be verified, and that every part loads by its class."""

import json
import os
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from lutetia.models.mixing.description import read_mixture, verify_mixture
from lutetia.models.mixing.layout import WEIGHTS
from lutetia.models.mixing.router import build_router, read_router, router_of, write_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.pipeline import load_pipeline
from lutetia.models.training.checkpoint_checks import CheckpointMisfit
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import AuthorisationError, ConfigError, IntegrityError
from tests.models.tiny_experts import CONFIGS, LATENT, OWNER, accept, tiny_data, tiny_manifest

EPSILON = ExpertSpec(
    class_name="LTXVideoTransformer3DModel",
    config=CONFIGS["LTXVideoTransformer3DModel"],
    prediction="epsilon",
    noise_schedule="vp_cosine",
)
PIXELS = LATENT.model_copy(
    update={"channels": 3, "text_width": 64, "pooled_width": 64, "text_tokens": 8, "pixel_height": 8, "pixel_width": 8}
)


@pytest.fixture
def mixed(tmp_path) -> tuple[Manifest, list[Path]]:
    """Two shards: a Wan that predicts velocity, an LTX that predicts epsilon on another schedule."""
    manifest = tiny_manifest(experts={1: EPSILON})
    files = [tmp_path / f"weights{shard}" for shard in range(2)]
    for shard, file in enumerate(files):
        write_weights(ExpertTrainer(manifest, shard, tiny_data()).snapshot(), file)
    return manifest, files


def test_stitched_folder_is_signed_and_its_parts_load_alone(mixed, tmp_path) -> None:
    manifest, files = mixed
    accepted = [accept(manifest, shard, file) for shard, file in enumerate(files)]
    folder = tmp_path / "mixture"
    digest = stitch(folder, manifest, files, build_router(manifest), accepted, OWNER.sign)
    document = verify_mixture(folder, [OWNER.public_key])
    assert document.digest == digest
    assert document.run == manifest.run_id
    assert [entry.folder for entry in document.experts] == ["expert_000", "expert_001"]
    for shard, spec in enumerate((manifest.expert_of(0), EPSILON)):
        model = getattr(diffusers, spec.class_name).from_pretrained(folder / f"expert_{shard:03d}")
        trained = ExpertTrainer(manifest, shard, tiny_data()).model
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    mixture = MixtureTransformer.from_pretrained(folder / "transformer")
    data = tiny_data(3)
    routing = {"routing_text": data.pooled, "mode": "full"}
    velocity = mixture(data.latents, torch.tensor([900.0, 500.0, 100.0]), data.tokens, attention_kwargs=routing).sample
    assert velocity.shape == data.latents.shape
    assert torch.isfinite(velocity).all()
    assert len(mixture._held) == 2


def test_stitching_again_replaces_the_whole_folder(mixed, tmp_path) -> None:
    manifest, files = mixed
    folder = tmp_path / "out" / "mixture"
    first = stitch(folder, manifest, files, build_router(manifest, 0))
    (folder.parent / ".mixture.killed.part").mkdir()
    old = MixtureTransformer.from_pretrained(folder / "transformer")
    second = stitch(folder, manifest, files, build_router(manifest, 1))
    assert first != second
    assert read_mixture(folder).mixture.digest == second
    assert [entry.name for entry in folder.parent.iterdir()] == ["mixture"]
    with pytest.raises(IntegrityError, match="replaced by a newer one while in use"):
        old.expert(0)
    assert stitch(folder, manifest, files, build_router(manifest, 1)) == second


def test_failed_stitch_leaves_the_old_folder(mixed, tmp_path) -> None:
    manifest, files = mixed
    folder = tmp_path / "out" / "mixture"
    digest = stitch(folder, manifest, files, build_router(manifest))
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(CheckpointMisfit):
        stitch(folder, manifest, files, build_router(manifest))
    assert read_mixture(folder).mixture.digest == digest
    assert os.listdir(folder.parent) == ["mixture"]


def test_shards_without_acceptance_are_left_out(mixed, tmp_path) -> None:
    manifest, files = mixed
    folder = tmp_path / "mixture"
    stitch(folder, manifest, files[1:], build_router(manifest), [accept(manifest, 1, files[1])])
    assert not (folder / "expert_000").exists()
    mixture = MixtureTransformer.from_pretrained(folder / "transformer")
    weights = mixture.route(torch.randn(5, *LATENT.shape), torch.rand(5), torch.randn(5, 8))
    assert weights.tolist() == [[0.0, 1.0]] * 5


def test_tampered_folder_is_refused(mixed, tmp_path) -> None:
    manifest, files = mixed
    folder, keys = tmp_path / "mixture", [OWNER.public_key]

    def fresh() -> None:
        stitch(folder, manifest, files, build_router(manifest), (), OWNER.sign)
        verify_mixture(folder, keys)

    fresh()
    (folder / "pipeline.py").write_text("import os")
    with pytest.raises(IntegrityError, match=r"pipeline\.py .* was changed"):
        verify_mixture(folder, keys)
    fresh()
    (folder / "router" / WEIGHTS).unlink()
    with pytest.raises(IntegrityError, match="lacks router/"):
        verify_mixture(folder, keys)
    fresh()
    (folder / "transformer" / "mixture.py").write_text("import os")
    with pytest.raises(IntegrityError, match="did not sign"):
        verify_mixture(folder, keys)
    fresh()
    text = (folder / "mixture.json").read_text()
    (folder / "mixture.json").write_text(text.replace('"toy"', '"toy 2"'))
    with pytest.raises(AuthorisationError, match="not signed by a coordinator"):
        verify_mixture(folder, keys)
    stitch(folder, manifest, files, build_router(manifest))
    with pytest.raises(AuthorisationError):
        verify_mixture(folder, keys)


def test_router_file_round_trips_and_other_runs_refuse_it(tmp_path) -> None:
    manifest = tiny_manifest()
    router = build_router(manifest, 3)
    write_router(router, tmp_path / "router")
    again = read_router(manifest, tmp_path / "router")
    assert all(torch.equal(a, b) for a, b in zip(router.parameters(), again.parameters(), strict=True))
    with pytest.raises(IntegrityError, match="not the router of this run"):
        read_router(tiny_manifest(shards=3), tmp_path / "router")


@pytest.mark.parametrize("weighted", [True, False])
def test_router_file_keeps_its_weighting(tmp_path, weighted: bool) -> None:
    manifest = tiny_manifest()
    router = router_of(manifest.latent, manifest.router, 2, weighted=weighted)
    write_router(router, tmp_path / "router")
    assert read_router(manifest, tmp_path / "router").config["weighted"] is weighted
    save_file(router.state_dict(), tmp_path / "without an entry")
    assert read_router(manifest, tmp_path / "without an entry").config["weighted"] is False


def test_incomplete_mixture_is_refused(mixed, tmp_path) -> None:
    manifest, files = mixed
    with pytest.raises(ConfigError, match="2 expected, 1 given"):
        stitch(tmp_path / "m", manifest, files[:1], build_router(manifest))
    with pytest.raises(ConfigError, match="of 2 shards needs a router"):
        stitch(tmp_path / "m", manifest, files, None)
    with pytest.raises(ConfigError, match="holds no mixture"):
        load_pipeline(tmp_path)
    stitch(tmp_path / "m", manifest, files, build_router(manifest))
    assert json.loads((tmp_path / "m/model_index.json").read_text())["_class_name"] == ["pipeline", "LutetiaPipeline"]
    (tmp_path / "m/expert_001/config.json").unlink()
    with pytest.raises(IntegrityError, match="lacks expert_001"):
        load_pipeline(tmp_path / "m")
