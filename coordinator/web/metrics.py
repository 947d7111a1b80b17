"""The coordinator's process, its run and the status document as Prometheus metrics, in base units and with few labels."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lutetia.coordinator.ledger.status_builder import Health
from lutetia.coordinator.web.api.history import History
from lutetia.protocol.schema.status import SwarmStatus

STALL_KINDS = ("shard", "lineage", "audit", "node", "ledger")
"""Kinds of stalls of the status document; others are counted under their own names."""


@dataclass(frozen=True)
class ServerFacts:
    """What the metrics show besides the status document.

    Args:
        sent: bytes of blobs sent to peers and over HTTP since the process started.
        history: of the ledger's events; None: it is not shown.
        expires: when the manifest expires, in Unix seconds; None: not shown.
        disk_free: free bytes of the disk with the run's folder; None: not known.
        bootstrap_down: addresses of the ticket that do not answer.
        process: id of the process that is measured; None: this one.
    """

    sent: int = 0
    history: History | None = None
    expires: float | None = None
    disk_free: int | None = None
    bootstrap_down: int = 0
    process: int | None = None


class _StatusCollector(Collector):
    """The metrics of one document."""

    def __init__(self, status: SwarmStatus, facts: ServerFacts) -> None:
        self._status, self._facts = status, facts

    def collect(self) -> Iterator[Metric]:
        yield from _server_metrics(self._status, self._facts)
        yield from _run_metrics(self._status)
        yield from _stall_metrics(self._status)
        yield from _check_metrics(self._status)
        yield from _shard_metrics(self._status)


def _server_metrics(status: SwarmStatus, facts: ServerFacts) -> Iterator[Metric]:
    build = GaugeMetricFamily("lutetia_build_info", "1; the labels say what runs.", labels=["version", "manifest_version"])
    build.add_metric([status.software, str(status.manifest_version)], 1)
    yield build
    yield CounterMetricFamily("lutetia_blob_sent_bytes", "Bytes of blobs sent to peers and over HTTP.", facts.sent)
    if facts.disk_free is not None:
        yield GaugeMetricFamily("lutetia_disk_free_bytes", "Free bytes of the disk with the run's folder.", facts.disk_free)
    down = GaugeMetricFamily("lutetia_bootstrap_down", "Addresses of the ticket that do not answer.", facts.bootstrap_down)
    yield down
    if facts.expires is not None:
        yield GaugeMetricFamily("lutetia_manifest_expires_seconds", "When the manifest expires, Unix seconds.", facts.expires)
    if facts.history is not None:
        refusals = CounterMetricFamily(
            "lutetia_shard_refusals", "Results refused for good, by shard and check.", labels=["shard", "check"]
        )
        for index, shard in sorted(facts.history.shards.items()):
            for check, count in sorted(shard.refusals.items()):
                refusals.add_metric([str(index), check], count)
        yield refusals
        yield CounterMetricFamily(
            "lutetia_accepted_bytes", "Bytes of the weights of all accepted results.", facts.history.weights_bytes
        )
        yield CounterMetricFamily(
            "lutetia_samples_accepted", "Samples of accepted results, void ones included.", facts.history.trained
        )


def _stall_metrics(status: SwarmStatus) -> Iterator[Metric]:
    """The red lines by kind: of shards all, of the others those that the document has room for."""
    stalls = GaugeMetricFamily("lutetia_stalls", "What does not go on, by kind.", labels=["kind"])
    since = GaugeMetricFamily("lutetia_stalls_oldest_seconds", "Since when the oldest does not, Unix seconds.", labels=["kind"])
    tally = Tally(stall.kind for stall in status.stalls)
    tally["shard"] = len(status.stalled_shards)
    for kind in dict.fromkeys((*STALL_KINDS, *tally)):
        stalls.add_metric([kind], tally[kind])
        if moments := [stall.since for stall in status.stalls if stall.kind == kind]:
            since.add_metric([kind], min(moments))
    yield from (stalls, since)


def _run_metrics(status: SwarmStatus) -> Iterator[Metric]:
    yield CounterMetricFamily("lutetia_results_accepted", "Results accepted.", status.accepted)
    yield CounterMetricFamily("lutetia_results_rejected", "Results found invalid.", status.rejected)
    yield CounterMetricFamily("lutetia_events", "Events in the ledger.", status.events)
    peers = GaugeMetricFamily("lutetia_peers", "Peers seen, by health.", labels=["health"])
    tally = Tally(node.health for node in status.nodes)
    for health in get_args(Health):
        peers.add_metric([health], tally[health])
    yield peers
    yield GaugeMetricFamily("lutetia_peers_not_shown", "Further peers online, not counted by health.", status.nodes_not_shown)
    yield GaugeMetricFamily(
        "lutetia_finished", "1 once every budget is done and the final mixture is stitched.", int(status.finished)
    )
    if status.router:
        yield GaugeMetricFamily("lutetia_router_accuracy_ratio", "Held-out accuracy of the router.", status.router.accuracy)
    yield GaugeMetricFamily("lutetia_status_time_seconds", "Time of the status document, Unix seconds.", status.time)


def _check_metrics(status: SwarmStatus) -> Iterator[Metric]:
    labels = ["check", "outcome"]
    count = CounterMetricFamily("lutetia_checks", "Acceptance checks run.", labels=labels)
    seconds = CounterMetricFamily("lutetia_check_seconds", "Seconds that acceptance checks took.", labels=labels)
    size = CounterMetricFamily("lutetia_check_bytes", "Bytes that acceptance checks fetched or read.", labels=labels)
    for spent in status.checks:
        for family, value in ((count, spent.count), (seconds, spent.seconds), (size, spent.size)):
            family.add_metric([spent.check, spent.outcome], value)
    yield from (count, seconds, size)
    yield GaugeMetricFamily("lutetia_audits_due", "Accepted results that wait for an audit.", status.audits_due)
    yield GaugeMetricFamily(
        "lutetia_audits_stalled", "Audits that do not end.", sum(stall.kind == "audit" for stall in status.stalls)
    )
    yield GaugeMetricFamily("lutetia_peers_quarantined", "Peers whose work an audit found invalid.", len(status.quarantined))


def _shard_metrics(status: SwarmStatus) -> Iterator[Metric]:
    epochs = GaugeMetricFamily("lutetia_shard_epochs", "Accepted checkpoints.", labels=["shard"])
    budget = GaugeMetricFamily("lutetia_shard_budget_epochs", "Budget of the shard in accepted checkpoints.", labels=["shard"])
    loss = GaugeMetricFamily("lutetia_shard_holdout_loss", "Held-out loss of the accepted checkpoint.", labels=["shard"])
    samples = GaugeMetricFamily("lutetia_shard_samples", "Samples of the accepted checkpoint.", labels=["shard"])
    last = GaugeMetricFamily("lutetia_shard_last_accepted_seconds", "Unix time of the last acceptance.", labels=["shard"])
    copies = GaugeMetricFamily("lutetia_shard_copies", "Peers that hold the accepted checkpoint.", labels=["shard"])
    stalls = frozenset(status.stalled_shards)
    stalled = GaugeMetricFamily("lutetia_shard_stalled", "1 if something holds the shard up.", labels=["shard"])
    states = GaugeMetricFamily("lutetia_shards", "Shards by state.", labels=["state"])
    tally = Tally(shard.state for shard in status.shards)
    for state in ("unclaimed", "claimed", "training", "overdue", "done"):
        states.add_metric([state], tally[state])
    lanes = GaugeMetricFamily("lutetia_lanes", "Lanes of a run with lanes, by state.", labels=["state"])
    tally_of_lanes = Tally(lane.state for shard in status.shards for lane in shard.lanes)
    for state, count in sorted(tally_of_lanes.items()):
        lanes.add_metric([state], count)
    yield lanes
    for shard in status.shards:
        label = [str(shard.shard)]
        epochs.add_metric(label, shard.epoch)
        budget.add_metric(label, shard.epochs)
        samples.add_metric(label, shard.samples)
        stalled.add_metric(label, int(shard.shard in stalls))
        if shard.holdout_loss is not None:
            loss.add_metric(label, shard.holdout_loss)
        if shard.last_accepted is not None:
            last.add_metric(label, shard.last_accepted)
        if shard.copies is not None:
            copies.add_metric(label, shard.copies)
    yield from (epochs, budget, samples, loss, last, copies, stalled, states)


def metrics_text(status: SwarmStatus, facts: ServerFacts | None = None) -> bytes:
    """The exposition text of `status`, of `facts` and of their process."""
    collectors, facts = CollectorRegistry(), facts or ServerFacts()
    collectors.register(_StatusCollector(status, facts))
    ProcessCollector("", lambda: facts.process or "self", "/proc", collectors)
    PlatformCollector(collectors)
    return generate_latest(collectors)
