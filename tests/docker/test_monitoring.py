"""Prometheus, its alert rules, the Grafana board and Caddy: what they name exists, and their own tools accept them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lutetia.coordinator.ledger.events import CheckCost, ResultRefused
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting, status
from lutetia.coordinator.web.listener import bind, page_address
from lutetia.coordinator.web.metrics import STALL_KINDS, ServerFacts, metrics_text
from lutetia.protocol.schema.records import Hardware, NodeRecord
from lutetia.protocol.schema.status import SwarmStatus
from tests.coordinator.acceptance.judge_driver import PEERS, blob
from tests.coordinator.web.api.recorded_run import RecordedRun, record_run, serving
from tests.docker.test_docker import DOCKER, tool

MONITORING = DOCKER / "monitoring"
BOARD = json.loads((MONITORING / "grafana/lutetia.json").read_text())
RULES = [rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
_NAME = re.compile(r"\b(?:lutetia|process|python)_\w+")


@pytest.fixture
def run(tmp_path: Path) -> RecordedRun:
    return record_run(tmp_path / "run")


def promtool(*arguments: object, **options: Any) -> None:
    done = subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


async def shown(run: RecordedRun) -> str:
    """What `/metrics` answers, with a copy and a check that are counted."""
    driver, document = run.driver, run.source.status
    spent = CheckCost(check="transfer", outcome="inconclusive", seconds=2.0, size=5)
    lost = {"shard": 0, "epoch": 3, "owner": PEERS[3].public_key, "checkpoint": blob("lost").digest}
    text = "it did not come"
    run.write(ResultRefused(time=driver.now, verdict="inconclusive", check="transfer", text=text, costs=(spent,), **lost))

    def with_copies():
        shards = driver.state.run.shards
        node = NodeRecord(
            run=driver.manifest.run_id, owner=PEERS[0].public_key, issued=driver.now, peer_id=PEERS[0].peer_id,
            samples_per_second=1.0, software="0.1", state="training", hardware=Hardware(device="cpu", memory_bytes=1, cores=1),
        )  # fmt: skip
        held = {shard.accepted: 1 for shard in shards.values() if shard.accepted}
        view = LiveView([Sighting(node, driver.now + 9, driver.now)], copies=held)
        return status(run.source.ledger.state, driver.manifest, view, document().time, software="0.1.0")

    run.source.status = with_copies
    async with serving(run) as client:
        return (await client.get("/metrics")).text


async def test_board_and_rules_name_only_metrics_that_are_shown(run: RecordedRun) -> None:
    samples = {sample.name for family in text_string_to_metric_families(await shown(run)) for sample in family.samples}
    asked = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]] + [rule["expr"] for rule in RULES]
    named = {name for text in asked for name in _NAME.findall(text)}
    assert len(named) > 20
    assert named <= samples


async def test_metrics_tell_build_refusals_stalls_bytes_and_the_process(run: RecordedRun) -> None:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(await shown(run)):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(label for _, label in sorted(sample.labels.items()))] = sample.value
    assert found["lutetia_build_info"] == {("0", "0.1.0"): 1}
    assert found["lutetia_shard_refusals_total"] == {("numbers", "0"): 1, ("transfer", "0"): 1}
    assert set(found["lutetia_stalls"]) == {(kind,) for kind in STALL_KINDS}
    assert found["lutetia_samples_accepted_total"] == {(): 12}
    assert found["lutetia_accepted_bytes_total"] == {(): 300}
    assert found["lutetia_manifest_expires_seconds"] == {(): run.driver.manifest.expires}
    assert found["lutetia_disk_free_bytes"][()] > 0
    assert found["process_resident_memory_bytes"][()] > 1 << 20
    assert found["process_cpu_seconds_total"][()] > 0


def test_bytes_sent_are_those_of_the_rate_limit(run: RecordedRun) -> None:
    assert b"lutetia_blob_sent_bytes_total 7.0" in metrics_text(run.source.status(), ServerFacts(sent=7))


async def test_promtool_finds_nothing_in_metrics_rules_and_settings(run: RecordedRun) -> None:
    promtool("check", "metrics", input=await shown(run))
    promtool("check", "rules", MONITORING / "alerts.yml")
    promtool("check", "config", MONITORING / "prometheus.yml")


async def test_prometheus_reads_a_served_run_and_answers_every_query(run: RecordedRun, tmp_path: Path) -> None:
    """The real one, with our settings and rules; only the coordinator's address is another, and it asks every second."""
    await shown(run)
    folder = tmp_path / "prometheus"
    folder.mkdir()
    (folder / "alerts.yml").write_text((MONITORING / "alerts.yml").read_text())
    document, reads, read_often = run.source.status, 0, asyncio.Event()

    def counted() -> SwarmStatus:
        nonlocal reads
        reads += 1
        if reads == 4:  # Prometheus has kept the answers before
            read_often.set()
        return document()

    run.source.status = counted
    listener = bind("127.0.0.1:0")
    own = page_address(listener)
    listener.close()
    async with serving(run) as client, httpx.AsyncClient(base_url=own, timeout=10) as asking:
        settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        settings["global"] = dict.fromkeys(settings["global"], "1s")
        settings["scrape_configs"][0]["static_configs"][0]["targets"] = [client.base_url.netloc.decode()]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        process = await asyncio.create_subprocess_exec(
            tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={own.removeprefix('http://')}", stderr=asyncio.subprocess.DEVNULL,
            env={"HOME": str(folder), "GOMAXPROCS": "1"},
        )  # fmt: skip
        try:

            async def ask(query: str) -> Any:
                answer = (await asking.get("/api/v1/query", params={"query": query})).json()
                assert answer["status"] == "success", (query, answer)
                return answer["data"]["result"]

            async with asyncio.timeout(60):
                await read_often.wait()
            assert (await ask('up{job="lutetia"}'))[0]["value"][1] == "1"
            asked = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
            empty = [query for query in asked if not await ask(query)]
            assert empty == ["increase(lutetia_shard_refusals_total[1h]) > 0"], "nothing was refused meanwhile"
            for rule in RULES:
                await ask(rule["expr"])
            rules = (await asking.get("/api/v1/rules")).json()["data"]["groups"][0]["rules"]
            assert [(rule["name"], rule.get("lastError")) for rule in rules] == [(rule["alert"], None) for rule in RULES]
        finally:
            process.terminate()
            await process.wait()


def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", MONITORING / "alerts_test.yml")
    tested = {case["alertname"] for test in yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
              for case in test["alert_rule_test"] if case["exp_alerts"]}  # fmt: skip
    assert tested == {rule["alert"] for rule in RULES}


def test_compose_mounts_what_exists_and_prometheus_asks_the_coordinator() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    mounted = [volume.split(":") for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    files = {source: target for source, target, *_ in mounted if source.startswith("./")}
    assert all((DOCKER / source).is_file() for source in files)
    [job] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert services[host]["environment"]["LUTETIA_COORDINATOR_HTTP"] == f"0.0.0.0:{port}"
    boards = yaml.safe_load((MONITORING / "grafana/dashboards.yml").read_text())["providers"][0]["options"]["path"]
    assert files["./monitoring/grafana/lutetia.json"] == f"{boards}/lutetia.json"
    [source] = yaml.safe_load((MONITORING / "grafana/datasource.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in BOARD["panels"]} == {source["uid"]}
    for name, service in services.items():
        if name != "coordinator":
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "only peers come from outside"


def test_caddy_accepts_its_file(tmp_path: Path) -> None:
    command = [tool("caddy"), "validate", "--adapter", "caddyfile", "--config", DOCKER / "Caddyfile"]
    done = subprocess.run(command, capture_output=True, text=True, env={"HOME": str(tmp_path), "RUN_NAME": "run.example.org"})
    assert done.returncode == 0, done.stderr
