"""What a run takes of machines, as owner and volunteer read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lutetia.cli.doctor.run_needs import check_run, coordinator_needs, here_lines, node_needs
from lutetia.coordinator.acceptance.retention import kept_bytes
from lutetia.models.training.memory.forecast import checkpoint_form, forecast, run_needs
from lutetia.models.training.memory.needs import hours_text, size_text
from lutetia.node.runtime.workspace import RunPaths
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.capabilities import COMPACT
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import BootstrapError, ConfigError
from tests.models.experts.tiny_base import adapting, tiny_base
from tests.models.tiny_experts import WAN, tiny_manifest
from tests.models.training.memory.test_plan import WAN_1_3B, WAN_256
from tests.node.runtime.test_tasks import probe_result
from tests.protocol.example_documents import STRANGER


def test_needs_of_a_large_expert_are_named_in_gb():
    manifest = tiny_manifest(expert=WAN_1_3B, latent=WAN_256, checkpoints="compact", needs=(COMPACT,))
    expert, card, checkpoint, hours = node_needs(manifest)
    assert "1419 million parameters" in expert
    assert "with all that saves memory" in card
    assert "5.69 GB on the wire" in checkpoint
    assert "a shard's budget: about a minute at 30 TFLOP/s" in hours
    needed = forecast(manifest)
    assert needed.plain > 28e9 > 16e9 > needed.least
    assert needed.host == 4 * needed.needs.trained
    assert "unless the setting kept_mixtures bounds these" in coordinator_needs(manifest)


def test_sizes_and_times_have_the_unit_that_fits():
    sizes = {12: "12 B", 1_234: "1.23 kB", 64_900: "64.9 kB", 260e6: "260 MB", 5.69e9: "5.69 GB", 2e12: "2 TB"}
    assert {count: size_text(count) for count in sizes} == sizes
    assert [hours_text(hours) for hours in (0.001, 0.02, 0.6, 8, 120.4)] == [
        "less than a minute",
        "about a minute",
        "about 36 minutes",
        "about 8 hours",
        "about 120 hours",
    ]


def test_large_experts_get_compact_checkpoints_unless_the_owner_says_otherwise():
    form, why = checkpoint_form("auto", WAN_1_3B)
    assert form == "compact"
    assert "22.7 GB" in why
    assert checkpoint_form("auto", WAN)[0] == "float32"
    assert checkpoint_form("float32", WAN_1_3B) == ("float32", "as set")


@pytest.mark.parametrize(
    ("epochs", "mixtures", "copied", "size"),
    [(10, 1, False, 35), (100, 1, False, 145), (100, 9, False, 161), (100, None, False, 215), (100, None, True, 415)],
)
def test_forecast_of_the_coordinators_disk_follows_the_rule(epochs: int, mixtures: int | None, copied: bool, size: int):
    assert kept_bytes(2, 3, epochs, 4, mixtures, copied) == size


def test_doctor_tells_hours_by_the_probed_rate_and_the_base_to_fetch(tmp_path: Path):
    expert = adapting(tiny_base(tmp_path / "base"), rank=2)
    assert expert.adapter
    base = expert.adapter.base
    large = base.model_copy(update={"served": True, "files": {"model.safetensors": BlobRef(digest="0" * 64, size=28 * 10**9)}})
    manifest = tiny_manifest(expert=expert.model_copy(update={"adapter": expert.adapter.model_copy(update={"base": large})}))
    seen = "; ".join(here_lines(manifest, tmp_path))
    assert "the base: 28 GB to fetch once, about 37 minutes at 100 Mbit/s" in seen
    assert "a minute at 30 TFLOP/s" in seen
    paths = RunPaths(tmp_path, manifest.run_id)
    paths.folder.mkdir(parents=True)
    paths.probe_result("cpu").write_bytes(canonical(probe_result().model_copy(update={"samples_per_second": 2.0})))
    assert "bytes: about " in seen
    assert "--bytes-per-day and --bytes-per-month keep it below what you set" in seen
    told = f"{hours_text(manifest.samples_per_shard / 7200)} at 2 samples/s, as probed here"
    probed = "; ".join(here_lines(manifest, tmp_path))
    assert told in probed
    assert f"({7200 / manifest.checkpoint_samples:.3g} results an hour)" in probed
    with pytest.raises(ConfigError, match="which the run's owner does not serve"):
        here_lines(tiny_manifest(expert=expert), tmp_path)


def test_join_tells_all_of_it_in_two_lines():
    needs = run_needs(tiny_manifest(expert=WAN_1_3B, latent=WAN_256)).model_copy(update={"base": 10**9})
    first, second = needs.two_lines("cuda:0", (16 * 10**9, 5 * 10**9), 0.5, base_here=False)
    assert first == "expert: 1419 million parameters, 1419 million trained; on cuda:0: 16 GB and 5 GB of main memory"
    hours = f"{hours_text(needs.samples / 1800)} at 0.5 samples/s"
    for part in ("a checkpoint: 22.7 GB", "a node's disk: ", hours, "the base: 1 GB to fetch once"):
        assert part in second
    assert "on this machine already" in needs.two_lines("cuda:0", None, None, base_here=True)[1]


def test_run_that_cannot_be_reached_is_a_finding_with_its_exit_code(tmp_path: Path):
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}"
    finding = check_run(Ticket(run="0" * 64, owner=STRANGER.public_key, addresses=(address,)), tmp_path)
    assert (finding.verdict, finding.code) == ("fail", BootstrapError.code)
    assert "connection refused" in finding.seen
