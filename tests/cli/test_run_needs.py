"""What a run takes of machines, as owner and volunteer read it."""

from __future__ import annotations

import pytest

from lutetia.cli.doctor.run_needs import check_run, coordinator_needs, node_needs
from lutetia.coordinator.acceptance.retention import kept_bytes
from lutetia.models.training.memory.forecast import checkpoint_form, forecast
from lutetia.protocol.schema.capabilities import COMPACT
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import BootstrapError
from tests.models.tiny_experts import WAN, tiny_manifest
from tests.models.training.memory.test_plan import WAN_1_3B, WAN_256
from tests.protocol.example_documents import STRANGER


def test_needs_of_a_large_expert_are_named_in_gb():
    manifest = tiny_manifest(expert=WAN_1_3B, latent=WAN_256, checkpoints="compact", needs=(COMPACT,))
    expert, card, checkpoint, hours = node_needs(manifest)
    assert "1419 million parameters" in expert
    assert "with all that saves memory" in card
    assert "5.69 GB on the wire" in checkpoint
    assert "hours" in hours
    needed = forecast(manifest)
    assert needed.plain > 28e9 > 16e9 > needed.least
    assert needed.host == 4 * needed.trained
    assert "unless the setting kept_mixtures bounds these" in coordinator_needs(manifest)


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


def test_run_that_cannot_be_reached_is_a_finding_with_its_exit_code():
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}"
    finding = check_run(Ticket(run="0" * 64, owner=STRANGER.public_key, addresses=(address,)))
    assert (finding.verdict, finding.code) == ("fail", BootstrapError.code)
    assert "connection refused" in finding.seen
