"""What a run takes of machines: for its owner at `run create`, for a volunteer in `doctor TICKET`."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lutetia.cli.doctor.checks import DoctorFinding
from lutetia.models.training.memory.forecast import Forecast, forecast
from lutetia.models.training.memory.needs import RunNeeds, size_text
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import HardwareError, LutetiaError

if TYPE_CHECKING:
    from lutetia.node.runtime.workspace import RunPaths

_TIMEOUT = 8.0


def forecasts(manifest: Manifest) -> list[Forecast]:
    """One for each kind of expert, the largest first."""
    kinds = {canonical(manifest.expert_of(shard.index)): shard.index for shard in manifest.shards}
    return sorted((_forecast(canonical(manifest), shard) for shard in kinds.values()), key=lambda each: -each.needs.parameters)


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

    largest, kept = forecasts(manifest)[0].needs, ServeSettings.model_fields["kept_states"].default
    results = len(manifest.shards) * kept_bytes(
        largest.weights, largest.checkpoint - largest.weights, largest.epochs, kept, None, manifest.adapter is not None
    )
    data = sum(shard.data_bytes or shard.train.size for shard in manifest.shards)
    return (
        f"the coordinator's disk: up to {size_text(results + data)}, of which results {size_text(results)} (weights of all "
        f"epochs, which mixtures name, unless the setting kept_mixtures bounds these, and training states of the last {kept}), "
        "and as much as the largest result for each that arrives"
    )


def check_run(ticket: Ticket, state_folder: Path) -> DoctorFinding:
    """Whether this machine's device can train the run's experts, by which means, and how long it takes.

    `state_folder`: the node's; what it probed for this run earlier, and the base that it has, are found there.
    """
    from lutetia.protocol.light_client.documents import fetch_document
    from lutetia.protocol.rpc.introduction import MANIFEST
    from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, open_manifest

    try:
        document = fetch_document(ticket, MANIFEST, _TIMEOUT, MAX_MANIFEST_BYTES)
        manifest = open_manifest(document, now=time.time(), run=ticket.run, owner=ticket.owner).manifest
        return DoctorFinding("run", "ok", "; ".join(here_lines(manifest, state_folder)))
    except LutetiaError as error:
        advice = "use a machine with more memory" if isinstance(error, HardwareError) else "see lutetia swarm status"
        return DoctorFinding("run", "fail", str(error), advice, error.code)


def here_lines(manifest: Manifest, state_folder: Path) -> list[str]:
    """What the run takes of this machine, and by which means its device fits the largest expert.

    Raises HardwareError where it does not fit, ConfigError where the base of its adapters is nowhere to be had.
    """
    import psutil

    from lutetia.models.training.memory.activations import expert_facts
    from lutetia.models.training.memory.plan import plan_memory
    from lutetia.node.runtime.workspace import RunPaths
    from lutetia.node.trainer.devices import Accelerators, choose_device, choose_precision
    from lutetia.node.trainer.probe import available_memory

    paths, seen = RunPaths(state_folder, manifest.run_id), Accelerators.seen()
    here = _base_here(manifest, paths)
    device = choose_device("auto", seen)[0]
    precision, _ = choose_precision(device, "auto", seen)
    plan = plan_memory(
        expert_facts(manifest, 0), available_memory(device), manifest.optimisation.batch, precision, device,
        manifest.optimisation.optimizer, narrower=device == "cpu", host=psutil.virtual_memory().available,
    )  # fmt: skip
    largest, rate = forecasts(manifest)[0], _probed_rate(paths, device)
    needs = [*largest.lines(rate, base_here=here), *traffic_lines(manifest, largest.needs, rate)]
    return [*needs, f"here on {device}: {plan.reason}"]


def traffic_lines(manifest: Manifest, needs: RunNeeds, rate: float | None) -> list[str]:
    """Bytes that the run takes of a volunteer's line. `rate`: samples per second as probed; None: that of a card of 24 GB."""
    from lutetia.node.traffic.forecast import forecast_traffic

    forecast = forecast_traffic(
        result=needs.checkpoint, data=needs.data, rate=rate or needs.guessed_rate, samples=manifest.checkpoint_samples,
        heartbeat=manifest.timing.heartbeat,
    )  # fmt: skip
    return [*forecast.lines(), "--bytes-per-day and --bytes-per-month keep it below what you set"]


def _probed_rate(paths: RunPaths, device: str) -> float | None:
    """Samples per second that a node on this machine measured for the run; None if none did."""
    from lutetia.node.trainer.probe import ProbeResult

    try:
        return ProbeResult.model_validate_json(paths.probe_result(device).read_bytes()).samples_per_second or None
    except (OSError, ValidationError):
        return None


def _base_here(manifest: Manifest, paths: RunPaths) -> bool:
    """Whether the base that the experts adapt is on this machine. Raises ConfigError if it is not, and nobody serves it."""
    from lutetia.models.experts.adapters.base_sources import find_base, missing_base
    from lutetia.protocol.blobs.store import BlobStore

    if manifest.adapter is None:
        return False
    base = manifest.adapter.base
    found = find_base(base, store=BlobStore(paths.blobs) if paths.blobs.is_dir() else None)
    if found is None and not base.served:
        raise missing_base(base)
    return found is not None
