"""A coordinator stops when the DHT holds a record under its own key that its ledger lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lutetia.coordinator.ledger.events import CheckpointAccepted
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.runtime.split_brain import refuse_split_brain
from lutetia.protocol.dht_records import publish
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import IdentityError
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, first_event, make_manifest, make_record
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual

MANIFEST = make_manifest(epochs=3)


def anything(key: str | None, subkey: str, value: bytes, expires: float) -> str:
    return key or ""


def acceptance(epoch: int, parent: str | None, text: str = "", by: Identity = COORDINATOR) -> AcceptanceRecord:
    record = make_record(MANIFEST, PEERS[0], epoch=epoch, parent=parent, text=text)
    return AcceptanceRecord(
        run=record.run, owner=by.public_key, issued=START, shard=0, epoch=epoch, checkpoint=record.digest, parent=parent,
        weights=record.weights, state=record.state, samples=record.samples, author=record.owner, tenure_until=START,
        holdout_loss=0.5,
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path):
    """A ledger with two accepted epochs of shard 0."""
    ledger = Ledger.create(tmp_path / "ledger.sqlite", first_event(MANIFEST))  # pyright: ignore[reportArgumentType]
    first = acceptance(1, None)
    second = acceptance(2, first.checkpoint)
    ledger.append([CheckpointAccepted(time=START, acceptance=given, parent_loss=0.6) for given in (first, second)])
    yield ledger
    ledger.close()


def compared(ledger: Ledger, record: AcceptanceRecord, by: Identity) -> Callable[[], None]:
    """Look for a split brain in a swarm that holds `record`."""

    async def scenario() -> None:
        network = MemoryNetwork(seed=1)
        other, coordinator = (network.peer(Identity.derived(name), anything) for name in ("other", "coordinator"))
        assert await publish(other, by, record, 600)
        await refuse_split_brain(coordinator, ledger, COORDINATOR.public_key)

    return lambda: run_virtual(scenario)


def test_acceptances_in_the_ledger_are_no_split_brain(ledger: Ledger) -> None:
    compared(ledger, acceptance(1, None), COORDINATOR)()
    compared(ledger, acceptance(2, acceptance(1, None).checkpoint), COORDINATOR)()


@pytest.mark.parametrize(("epoch", "text"), [(2, "another result"), (3, "")], ids=["same epoch", "later epoch"])
def test_unknown_acceptance_under_its_key_stops_it(ledger: Ledger, epoch: int, text: str) -> None:
    with pytest.raises(IdentityError, match="does not know: another coordinator is at work, or this folder is an old copy"):
        compared(ledger, acceptance(epoch, "ab" * 32, text), COORDINATOR)()


def test_acceptance_by_another_coordinator_is_no_split_brain(ledger: Ledger) -> None:
    colleague = Identity.derived("colleague")
    compared(ledger, acceptance(3, "ab" * 32, by=colleague), colleague)()


def test_offline_coordinator_sees_no_split_brain(ledger: Ledger) -> None:
    async def scenario() -> None:
        coordinator = MemoryNetwork(seed=1).peer(COORDINATOR, anything)
        await refuse_split_brain(coordinator, ledger, COORDINATOR.public_key)
        await coordinator.close()
        await refuse_split_brain(coordinator, ledger, COORDINATOR.public_key)

    run_virtual(scenario)
