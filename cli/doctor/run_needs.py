"""What a run takes of machines: for its owner at `run create`, for a volunteer in `doctor TICKET`."""

from __future__ import annotations

import time
from functools import lru_cache

from lutetia.cli.doctor.checks import DoctorFinding
from lutetia.models.training.memory.forecast import Forecast, forecast
from lutetia.models.training.memory.plan import GB
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import HardwareError, LutetiaError

_TIMEOUT = 8.0


def forecasts(manifest: Manifest) -> list[Forecast]:
    """One for each kind of expert, the largest first."""
    kinds = {canonical(manifest.expert_of(shard.index)): shard.index for shard in manifest.shards}
    return sorted((_forecast(canonical(manifest), shard) for shard in kinds.values()), key=lambda each: -each.parameters)


@lru_cache(maxsize=8)
def _forecast(manifest: bytes, shard: int) -> Forecast:
    return forecast(Manifest.model_validate_json(manifest), shard)


def node_needs(manifest: Manifest) -> list[str]:
    """What a node needs, in sentences, for the largest expert."""
    return forecasts(manifest)[0].lines()


def coordinator_needs(manifest: Manifest) -> str:
    """What the coordinator's disk must hold by the end of the run."""
    from lutetia.coordinator.acceptance.retention import kept_bytes
    from lutetia.coordinator.settings import ServeSettings

    largest, kept = forecasts(manifest)[0], ServeSettings.model_fields["kept_states"].default
    results = len(manifest.shards) * kept_bytes(
        largest.weights, largest.checkpoint - largest.weights, largest.epochs, kept, None, manifest.adapter is not None
    )
    data = sum(shard.data_bytes or shard.train.size for shard in manifest.shards)
    return (
        f"the coordinator's disk: up to {(results + data) / GB:.3g} GB, of which results {results / GB:.3g} GB (weights of all "
        f"epochs, which mixtures name, unless the setting kept_mixtures bounds these, and training states of the last {kept}), "
        "and as much as the largest result for each that arrives"
    )


def check_run(ticket: Ticket) -> DoctorFinding:
    """Whether this machine's device can train the run's experts, and by which means."""
    import psutil

    from lutetia.models.training.memory.activations import expert_facts
    from lutetia.models.training.memory.plan import plan_memory
    from lutetia.node.trainer.devices import Accelerators, choose_device, choose_precision
    from lutetia.node.trainer.probe import available_memory
    from lutetia.protocol.light_client.documents import fetch_document
    from lutetia.protocol.rpc.introduction import MANIFEST
    from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, open_manifest

    try:
        document = fetch_document(ticket, MANIFEST, _TIMEOUT, MAX_MANIFEST_BYTES)
        manifest = open_manifest(document, now=time.time(), run=ticket.run, owner=ticket.owner).manifest
        needs = node_needs(manifest)
        seen = Accelerators.seen()
        device = choose_device("auto", seen)[0]
        precision, _ = choose_precision(device, "auto", seen)
        plan = plan_memory(
            expert_facts(manifest, 0), available_memory(device), manifest.optimisation.batch, precision, device,
            manifest.optimisation.optimizer, narrower=device == "cpu", host=psutil.virtual_memory().available,
        )  # fmt: skip
    except LutetiaError as error:
        advice = "use a machine with more memory" if isinstance(error, HardwareError) else "see lutetia swarm status"
        return DoctorFinding("run", "fail", str(error), advice, error.code)
    return DoctorFinding("run", "ok", "; ".join([*needs, f"here on {device}: {plan.reason}"]))
