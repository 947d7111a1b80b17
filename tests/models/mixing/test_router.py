"""The router learns which shard a noisy latent comes from, is calibrated, and follows the shards' priors."""

from pathlib import Path

import pytest
import torch

from lutetia.models.data.parts.reader import load_shard, open_shard
from lutetia.models.data.parts.writer import write_shard
from lutetia.models.mixing.router import MAX_PATCHES, VideoRouter, _patch_size, build_router
from lutetia.models.mixing.router_training import _calibration_error, report_router, train_router
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import DataError
from tests.models.tiny_experts import tiny_data, tiny_manifest


def uneven(text: bool, samples: int = 2400) -> Manifest:
    """Three shards of 70, 20 and 10 per cent."""
    manifest = tiny_manifest(3, router={"hidden": 32, "layers": 1, "samples": samples, "batch": 24, "text_conditioned": text})
    shards = [shard.model_copy(update={"prior": prior}) for shard, prior in zip(manifest.shards, (0.7, 0.2, 0.1), strict=True)]
    return manifest.model_copy(update={"shards": tuple(shards)})


SHARDS = [tiny_data(40, seed=k, offset=0.6 * (k - 1)) for k in range(3)]


def test_router_without_text_is_calibrated_from_data_to_noise() -> None:
    manifest = uneven(text=False, samples=7200)
    router, report = train_router(manifest, SHARDS, seed=0)
    assert len(report.accuracy_by_time) == len(report.ece_by_time) == 10
    assert min(report.accuracy_by_time[:5]) > 0.9
    assert report.accuracy > 0.8
    assert report.ece < 0.12
    noise = torch.randn(64, *manifest.latent.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = router(noise, torch.ones(64)).softmax(1).mean(0)
    assert torch.allclose(posterior, torch.tensor([0.7, 0.2, 0.1]), atol=0.12)


def test_router_with_text_is_accurate_at_all_times() -> None:
    _, report = train_router(uneven(text=True, samples=4800), SHARDS, seed=0)
    assert min(report.accuracy_by_time) > 0.85


def test_router_ignores_pure_noise_and_reads_noisy_clips() -> None:
    manifest = uneven(text=True)
    router, _ = train_router(manifest, SHARDS, seed=0, steps=20)
    noise = torch.randn(8, *manifest.latent.shape, generator=torch.Generator().manual_seed(0))
    prompt = SHARDS[1].pooled[:1].expand(8, -1)
    with torch.no_grad():
        at_first, later = (router(noise, torch.full((8,), t), prompt) for t in (1.0, 0.5))
    # rows of one batch may differ in their last bits: a matrix product may round each row of its tiles in another order
    assert torch.allclose(at_first, at_first[:1].expand_as(at_first), rtol=0, atol=1e-5)
    assert later.std(0).max() > 1e-3


def test_train_router_is_deterministic_and_reports_progress(device) -> None:
    manifest, progress = uneven(text=True), []
    arguments = {"seed": 4, "steps": 5, "holdouts": [shard.take(range(6)) for shard in SHARDS], "device": device}
    a, report = train_router(manifest, SHARDS, on_progress=lambda *done: progress.append(done[:2]), **arguments)
    b, again = train_router(manifest, SHARDS, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert report == again == report_router(manifest, a, arguments["holdouts"], steps=5)
    assert progress == [(step, 5) for step in range(1, 6)]


def test_shards_on_disk_give_the_same_router(tmp_path: Path) -> None:
    manifest, paths = uneven(text=True), [tmp_path / f"{number}.safetensors" for number in range(len(SHARDS))]
    for path, shard in zip(paths, SHARDS, strict=True):
        write_shard(path, shard, manifest.latent, size=4000)
    readers = [open_shard(path, manifest.latent) for path in paths], [load_shard(path, manifest.latent) for path in paths]
    routers = [train_router(manifest, shards, seed=4, steps=5) for shards in readers]
    (a, report), (b, again) = routers
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert report == again


def test_router_saves_and_loads_by_its_own_class(tmp_path) -> None:
    router = build_router(uneven(text=True), 2)
    router.save_pretrained(tmp_path)
    again = VideoRouter.from_pretrained(tmp_path)
    assert isinstance(again, VideoRouter)
    assert all(torch.equal(x, y) for x, y in zip(router.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("size", [(8, 8, 8), (4, 8, 8), (1, 64, 64), (21, 60, 104), (7, 11, 13), (8, 32, 32)])
def test_patch_size_divides_the_latent_into_few_patches(size) -> None:
    patch = _patch_size(size)
    assert all(length % step == 0 for length, step in zip(size, patch, strict=True))
    count = torch.tensor([length // step for length, step in zip(size, patch, strict=True)]).prod()
    assert 1 <= count <= MAX_PATCHES


def test_calibration_error_of_known_cases() -> None:
    sure = torch.full((100,), 0.8)
    assert _calibration_error(sure, (torch.arange(100) < 80).float()) == pytest.approx(0, abs=1e-6)
    assert _calibration_error(sure, torch.zeros(100)) == pytest.approx(0.8)


def test_train_router_without_all_shards_is_refused() -> None:
    with pytest.raises(DataError, match="needs the data of all 3 shards, not of 2"):
        train_router(uneven(text=True), SHARDS[:2], seed=0)
