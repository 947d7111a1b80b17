"""`run create`: a whole run or nothing, and one sentence for each wrong setting."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from lutetia.coordinator.admin.base import settle_base
from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import RunSettings, ServeSettings, small_expert, tiny_expert
from lutetia.models.data.description import files_of, read_data
from lutetia.models.experts.adapters.base_sources import read_paths
from lutetia.models.experts.families import build_expert
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.audit_request import MAX_STEPS
from lutetia.protocol.schema.capabilities import CAPABILITIES, LANES
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import open_manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import ConfigError, DataError, IdentityError, IntegrityError
from tests.coordinator.tiny_data import build_tiny, latent_spec

TINY = RunSettings(preset="tiny", name="tiny run", addresses=("127.0.0.1:41777",))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("built") / "data")


def test_create_run_makes_every_file(data: Path, tmp_path: Path):
    created = create_run(data, tmp_path / "run", TINY)
    run = RunFolder(created.folder)
    signed = run.read_manifest(time.time())
    assert signed.manifest == created.manifest
    assert created.run == signed.manifest.run_id
    assert (signed.manifest.samples_per_shard, signed.manifest.epochs) == (24, 3), "the preset's values"
    ticket = Ticket.decode(run.ticket.read_text())
    coordinator = Identity.load(run.coordinator_key)
    assert ticket == Ticket.decode(created.ticket)
    assert ticket.addresses == (f"/ip4/127.0.0.1/tcp/41777/p2p/{coordinator.peer_id}",)
    assert ticket.owner == Identity.load(run.owner_key).public_key == signed.manifest.owner
    assert signed.manifest.coordinators == (coordinator.public_key,)
    for key in (run.owner_key, run.coordinator_key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    served, own = set(BlobStore(run.blobs).digests()), set(BlobStore(run.holdouts).digests())
    assert served == blobs_of(data, "train"), "peers can fetch no held-out clip"
    assert own == blobs_of(data, "holdout")
    assert signed.manifest.needs == ("shard-parts",), "release 0.1 would take an index for the clips"
    assert stat.S_IMODE(run.holdouts.stat().st_mode) == 0o700
    ledger = Ledger.open(run.ledger, created.run)
    assert (ledger.state.manifest_version, ledger.state.accepted_epochs) == (1, (0, 0))
    ledger.close()
    assert run.read_endpoint().listen == "/ip4/127.0.0.1/tcp/41777"


@pytest.mark.parametrize(
    ("addresses", "listen", "first"),
    [
        (("203.0.113.5:4100", "swarm.example.org:4100"), "/ip4/0.0.0.0/tcp/4100", "/ip4/203.0.113.5/tcp/4100/p2p/"),
        (("swarm.example.org:4100",), "/ip4/0.0.0.0/tcp/4100", "/dns/swarm.example.org/tcp/4100/p2p/"),
        (("[2001:db8::7]:4100",), "/ip6/::/tcp/4100", "/ip6/2001:db8::7/tcp/4100/p2p/"),
        (("[::1]:4100",), "/ip6/::1/tcp/4100", "/ip6/::1/tcp/4100/p2p/"),
    ],
)
def test_addresses_set_listener_and_ticket(data: Path, tmp_path: Path, addresses, listen, first):
    created = create_run(data, tmp_path / "run", TINY.model_copy(update={"addresses": addresses}))
    assert RunFolder(created.folder).read_endpoint().listen == listen
    assert Ticket.decode(created.ticket).addresses[0].startswith(first)


BAD = [
    ({"experts": 5}, "wants? 5 experts, more than the data have clusters"),
    ({"experts": 1}, "fewer than the data have clusters"),
    ({"optimisation": Optimisation(batch=8)}, "has 6 clips, fewer than a batch of 8"),
    ({"checkpoint_samples": 7}, "batch must divide checkpoint_samples"),
    (
        {"checkpoint_samples": 2 * MAX_STEPS + 2, "samples_per_shard": 4 * MAX_STEPS + 4},
        f"epoch of {MAX_STEPS + 1} steps .* at most {2 * MAX_STEPS}",
    ),
    ({"expert": ExpertSpec(class_name="NoSuchModel", config={})}, "NoSuchModel"),
    ({"expert": ExpertSpec(config={"in_channels": 5, "out_channels": 5, "text_dim": 9})}, "in_channels is 5"),
    ({"expert": ExpertSpec(config={"colour": "red"})}, "unknown keys"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_wrong_settings_are_one_sentence_and_leave_nothing(data: Path, tmp_path: Path, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        create_run(data, tmp_path / "run", TINY.model_copy(update=change))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_warm_start_weights_are_a_blob_of_the_run(data: Path, tmp_path: Path):
    given = build_expert(tiny_expert(latent_spec()), 7)
    given.save_pretrained(tmp_path / "given")  # pyright: ignore[reportCallIssue]
    created = create_run(data, tmp_path / "run", TINY.model_copy(update={"warm_start": str(tmp_path / "given")}))
    init = created.manifest.expert.init
    assert init is not None
    weights = load_file(BlobStore(RunFolder(created.folder).blobs).path(init.digest))
    assert all(torch.equal(weights[name], tensor) for name, tensor in given.state_dict().items())
    assert RunFolder(created.folder).read_manifest(time.time()).manifest == created.manifest
    for unlike in (tiny_expert(latent_spec().model_copy(update={"text_width": 9})), small_expert(latent_spec())):
        settings = TINY.model_copy(update={"warm_start": str(tmp_path / "given"), "expert": unlike})
        with pytest.raises(ConfigError, match="the settings' expert"):
            create_run(data, tmp_path / "other", settings)
    path = tmp_path / "given" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="cannot load warm start"):
        create_run(data, tmp_path / "other", TINY.model_copy(update={"warm_start": str(tmp_path / "given")}))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["given", "run"]
    with pytest.raises(ValidationError, match="set warm_start to the model to take the first weights from"):
        RunSettings(expert=created.manifest.expert)


def test_team_stands_in_the_manifest_with_the_capability_that_it_needs(data: Path, tmp_path: Path):
    settings = RunSettings(preset="tiny", team={"lanes": 3, "shares": [1.0, 0.5]})  # pyright: ignore[reportArgumentType]
    created = create_run(data, tmp_path / "run", settings)
    assert created.manifest.lanes == 3
    assert [created.manifest.lane_steps(lane) for lane in range(3)] == [4, 2, 4]
    sealed = RunFolder(created.folder).manifest.read_bytes()
    assert open_manifest(sealed, now=time.time()).manifest == created.manifest
    with pytest.raises(ConfigError, match="the run needs lanes"):
        open_manifest(sealed, now=time.time(), known=[word for word in CAPABILITIES if word != LANES])
    assert LANES not in create_run(data, tmp_path / "alone", RunSettings(preset="tiny")).manifest.needs


def test_explicit_settings_override_the_preset():
    from lutetia.models.data import recipe

    demo = RunSettings(preset="demo", samples_per_shard=16 * recipe.RUN["checkpoint_samples"]).resolved()
    assert demo.samples_per_shard == 16 * recipe.RUN["checkpoint_samples"]
    assert demo.checkpoint_samples == recipe.RUN["checkpoint_samples"]
    assert demo.sampling.prompts == recipe.PROMPTS
    assert demo.name == "demo"


def test_existing_run_is_never_overwritten(data: Path, tmp_path: Path):
    folder = tmp_path / "run"
    create_run(data, folder, TINY)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="exists already"):
        create_run(data, folder, TINY)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_missing_or_changed_data_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.json"):
        create_run(tmp_path, tmp_path / "run", TINY)
    data = build_tiny(tmp_path / "data")
    path = data / "shards" / "001.train" / "0001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="has changed since it was built"):
        create_run(data, tmp_path / "run", TINY)
    assert not (tmp_path / "run").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def blobs_of(data: Path, split: str) -> set[str]:
    """The digests of the indexes and parts of all shards."""
    files = [getattr(shard, split) for shard in read_data(data).shards]
    return {blob.digest for file in files for _, blob in files_of(data / file.path, file.blob)}


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (RunSettings, {"expertz": 3}),
        (ServeSettings, {"port": 1}),
        (RunSettings, {"preset": "x"}),
        (ServeSettings, {"announce": ["203.0.113.5:41000"]}),
    ],
)
def test_unknown_settings_are_refused(model, values):
    with pytest.raises(ValidationError):
        model(**values)


def test_locked_folder_refuses_a_second_coordinator(data: Path, tmp_path: Path):
    run = RunFolder(create_run(data, tmp_path / "run", TINY).folder)
    with run.locked(), pytest.raises(IdentityError, match="another coordinator"), run.locked():
        pass
    with run.locked():
        pass


def test_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder(tmp_path).read_manifest(time.time())


def test_adapters_name_their_base_and_need_a_capability(data: Path, tmp_path: Path):
    build_expert(tiny_expert(latent_spec()), 7).save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    table = {"base": str(tmp_path / "base"), "rank": 2, "dtype": "bfloat16"}
    for serve in (False, True):
        settings = RunSettings(preset="tiny", expert={"adapter": {**table, "serve": serve}})  # pyright: ignore[reportArgumentType]
        created = create_run(data, tmp_path / f"run {serve}", settings)
        adapter, run = created.manifest.expert.adapter, RunFolder(created.folder)
        assert adapter is not None
        assert (adapter.rank, adapter.base.source, adapter.base.dtype) == (2, "base", "bfloat16")
        assert "adapters" in created.manifest.needs, "an older peer would train the whole network"
        assert [BlobStore(run.blobs).has(ref.digest) for ref in adapter.base.files.values()] == [serve]
    settle_base(run, created.manifest, None)
    assert read_paths(run.base) == {name: BlobStore(run.blobs).path(ref.digest) for name, ref in adapter.base.files.items()}
    run = RunFolder(tmp_path / "run False")
    settle_base(run, run.read_manifest(time.time()).manifest, None)
    (tmp_path / "base" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks diffusion_pytorch_model.safetensors"):
        settle_base(run, run.read_manifest(time.time()).manifest, None)


@pytest.mark.parametrize(
    ("expert", "options", "words"),
    [
        ({"adapter": {"base": "no/such-model"}}, {}, "cannot load base 'no/such-model'"),
        ({"adapter": {"base": "BASE", "targets": ["to_x"]}}, {}, "the adapter's target 'to_x' names no layer"),
        ({"adapter": {"base": "BASE"}}, {"warm_start": "BASE"}, "adapters start from their base; leave warm_start out"),
    ],
)
def test_wrong_adapter_is_one_sentence(data: Path, tmp_path: Path, monkeypatch, expert, options, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    build_expert(tiny_expert(latent_spec()), 7).save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    named = {key: str(tmp_path / "base") if value == "BASE" else value for key, value in expert["adapter"].items()}
    given = {key: str(tmp_path / "base") for key in options}
    with pytest.raises(ConfigError, match=words):
        create_run(data, tmp_path / "run", RunSettings(preset="tiny", expert={"adapter": named}, **given))  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "run").exists()
