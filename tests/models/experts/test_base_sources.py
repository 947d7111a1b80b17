"""Where the base of adapters is looked for: a folder, the store, the hub's cache; each file compared by digest before use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lutetia.models.experts.adapters import base_sources
from lutetia.models.experts.adapters.base_sources import check_files, digest_of_file, find_base, missing_base
from lutetia.models.experts.adapters.describe import describe_base
from lutetia.models.experts.families import build_expert, full_config
from lutetia.node.daemon import find_local_model
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.model.adapter import BaseSpec
from lutetia.system.errors import ConfigError
from tests.models.experts.tiny_base import FILE, adapting, tiny_base
from tests.models.tiny_experts import WAN, tiny_manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTETIA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def spec(tmp_path: Path) -> BaseSpec:
    files = tiny_base(tmp_path / "base")
    refs = {name: ChunkTable.of_file(path).ref for name, path in files.items()}
    return BaseSpec(source=f"owner/name/transformer@{COMMIT}", files=refs)


def hub_cache(root: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> Path:
    """A hub cache that holds `source` as the transformer of owner/name."""
    snapshot = root / "hub" / "models--owner--name" / "snapshots" / COMMIT / "transformer"
    snapshot.mkdir(parents=True)
    (snapshot.parents[2] / "refs").mkdir()
    (snapshot.parents[2] / "refs" / "main").write_text(COMMIT)
    for path in source.iterdir():
        os.link(path, snapshot / path.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
    return snapshot


def test_base_is_found_in_a_folder_the_store_and_the_hubs_cache(spec, tmp_path, monkeypatch) -> None:
    assert find_base(spec) is None
    assert find_base(spec, tmp_path / "base") == {FILE: tmp_path / "base" / FILE}
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "transformer").symlink_to(tmp_path / "base")
    assert find_base(spec, tmp_path / "pipeline") == {FILE: tmp_path / "pipeline" / "transformer" / FILE}
    store = BlobStore(tmp_path / "store")
    ref = store.add_file(tmp_path / "base" / FILE)
    assert find_base(spec, None, store) == {FILE: store.path(ref.digest)}
    snapshot = hub_cache(tmp_path, monkeypatch, tmp_path / "base")
    assert find_base(spec) == {FILE: snapshot / FILE}


def test_wrong_base_is_refused_by_digest_with_what_to_do(spec, tmp_path, monkeypatch) -> None:
    other = tiny_base(tmp_path / "other", seed=12)
    with pytest.raises(ConfigError) as refusal:
        find_base(spec, tmp_path / "other")
    given, wanted = ChunkTable.of_file(other[FILE]).ref.digest[:16], spec.files[FILE].digest[:16]
    assert str(refusal.value) == (
        f"{other[FILE]} is not {FILE} of the run's base {spec.source}: its digest is {given} instead of {wanted}; "
        f"fetch it with `hf download owner/name --revision {COMMIT}`, or name its folder with --base"
    )
    other[FILE].write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"has 5 bytes, .* \d+; fetch it with"):
        check_files(spec, other)
    hub_cache(tmp_path, monkeypatch, tmp_path / "other")
    assert find_base(spec) is None, "another in the hub's cache is passed over"


def test_digest_is_read_once_while_size_and_time_stay(tmp_path, monkeypatch) -> None:
    path = tiny_base(tmp_path / "base")[FILE]
    first = digest_of_file(path)
    monkeypatch.setattr(base_sources, "ChunkTable", None)
    assert digest_of_file(path) == first
    os.utime(path, ns=(1, 1))
    with pytest.raises(AttributeError):
        digest_of_file(path)


@pytest.mark.parametrize("served", [False, True])
def test_node_without_the_base_joins_only_where_it_is_served(served, tmp_path) -> None:
    files = tiny_base(tmp_path / "base")
    expert = adapting(files)
    assert expert.adapter
    base = expert.adapter.base.model_copy(update={"served": served})
    manifest = tiny_manifest(expert=expert.model_copy(update={"adapter": expert.adapter.model_copy(update={"base": base})}))
    store = BlobStore(tmp_path / "store")
    assert find_local_model(manifest, tmp_path / "base", store) == files
    if served:
        assert find_local_model(manifest, None, store) is None
    else:
        with pytest.raises(ConfigError, match=r"tiny/base@0123456 \(0.0 GB\), which is not on this machine and which"):
            find_local_model(manifest, None, store)
    assert "name its folder with --base" in str(missing_base(base))


def test_base_is_described_from_a_pipeline_folder(tmp_path, monkeypatch) -> None:
    model = build_expert(WAN, 3)
    folder = tmp_path / "some-pipeline"
    model.save_pretrained(folder / "transformer", max_shard_size="20KB")  # pyright: ignore[reportCallIssue]
    (folder / "model_index.json").write_text("{}")
    network, base, files = describe_base(str(folder), "bfloat16", served=True)
    assert full_config(network) == full_config(WAN)
    assert (base.source, base.dtype, base.served) == ("some-pipeline/transformer", "bfloat16", True)
    assert len(files) > 1
    assert base.files == {name: ChunkTable.of_file(path).ref for name, path in files.items()}
    snapshot = hub_cache(tmp_path, monkeypatch, folder / "transformer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert describe_base("owner/name/transformer", "fp8", False)[1].source == f"owner/name/transformer@{COMMIT}"
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no diffusion_pytorch_model"):
        describe_base(str(snapshot), "fp8", False)
