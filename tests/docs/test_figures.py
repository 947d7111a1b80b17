"""Figures of the explanations are those of the code: a page that quotes a constant, and the constant, change together."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from lutetia.cli.study import stages
from lutetia.coordinator.acceptance import audit_comparison as bounds
from lutetia.coordinator.acceptance import loss_bounds
from lutetia.coordinator.acceptance.audit_comparison import secret_steps
from lutetia.coordinator.acceptance.intake import fetch_queue, newcomer_holds, rate_limits
from lutetia.coordinator.acceptance.intake.rate_limits import LOAN_FACTOR
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.ledger.run_state import HISTORY
from lutetia.coordinator.ledger.status_builder import NODES_SHOWN
from lutetia.coordinator.lending.agreement import ROWS_APART
from lutetia.coordinator.settings import ServeSettings
from lutetia.coordinator.web.connections import LIMITS as HTTP
from lutetia.models.data.decode.pool import CLIP_MEMORY, CLIP_SECONDS
from lutetia.models.study.config import Control
from lutetia.node.machine.claiming import WAVE
from lutetia.node.machine.state import NodeRules
from lutetia.node.pacing import LOCAL_COST_SHARE
from lutetia.node.services.standby_policy import CHANGING, STEADY
from lutetia.node.trainer.assignment import LOCAL_BYTES_PER_DAY
from lutetia.node.trainer.loop import DATA_SECONDS
from lutetia.protocol.blobs import upload_limit
from lutetia.protocol.blobs.holder_proofs import PROVED_SECONDS
from lutetia.protocol.blobs.stream import MAX_STREAMS_PER_PREFIX
from lutetia.protocol.peerstore import MAX_PEERS, PER_HOST
from lutetia.protocol.rpc.introduction import OLDEST_PROTOCOL, PROTOCOL_VERSION
from lutetia.protocol.schema.canonical import MOST_UNKNOWN_FIELDS
from lutetia.protocol.schema.manifest import AuditPolicy, Manifest, Timing
from lutetia.protocol.schema.records import MAX_QUARANTINED
from lutetia.protocol.stalled_claims import IDLE, SLOWEST
from lutetia.protocol.transport import dial_policy, idle_connections, inbound_limits
from lutetia.protocol.transport.hivemind.dht import ip_diversity, lookup, node, record_quota, rpc_server
from lutetia.system.log_limit import MOST_SOURCES
from tests.test_docs import DOCS, ROOT

RULES, NODE, AUDIT, MANIFEST, SERVE = JudgeRules, NodeRules, AuditPolicy(), Timing(), ServeSettings()
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def counted(number: float) -> str:
    """A small whole number as prose writes it."""
    return WORDS[int(number)] if number <= 10 else f"{int(number):,}"


FIGURES: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
    "audits.md": [
        ("`audit.streak` ({}) every result is audited", (AUDIT.streak,)),
        ("`audit.replay_steps` ({}), and half as many more on average", (AUDIT.replay_steps,)),
        ("share `audit.whole_epoch` ({:.0f} %) of audits", (100 * AUDIT.whole_epoch,)),
        ("the last {} accepted epochs of each shard", (HISTORY,)),
        ("last `kept_states` ({})", (SERVE.kept_states,)),
        ("spaces their requests to {} a second", (counted(RULES.asks_per_second),)),
        (
            "within a minute, or it is not brought back within {} (a whole epoch: within {} times what its author took",
            (counted(RULES.audit_loan / 60), counted(LOAN_FACTOR)),
        ),
    ],
    "threat-model.md": [
        (
            "it keeps {claims} live claims and {checkpoints} results per shard, {providers} providers per blob".format(
                **record_quota.PER_KEY
            ),
            (),
        ),
        ("{} records under other keys, {:,} in all", (record_quota.PER_OTHER_KEY, record_quota.PER_ORIGIN)),
        (
            "of the {} peers nearest to a key the {} replicas are chosen",
            (counted(node.SEARCH_WIDTH), counted(node.REPLICAS)),
        ),
        ("a peer that names silent ones is ignored after {}", (counted(lookup.SILENT_ALLOWED),)),
        ("of one address {} strangers come in at once", (ip_diversity.NEWCOMERS_AT_ONCE,)),
        ("{} keys a call, {} MiB of records an answer", (rpc_server.MAX_KEYS_PER_FIND, rpc_server.ANSWER_BYTES >> 20)),
        (
            "may cost {:,} calls at once and {:.0f} a second",
            (rpc_server.CALLS_AT_ONCE, rpc_server.CALLS_PER_SECOND),
        ),
        ("do not rise for {} tenures no longer protects", (counted(IDLE),)),
        ("two tenures ({:.0f} minutes by default)", (IDLE * MANIFEST.tenure / 60,)),
        ("{} hours per identity by default", (counted(SLOWEST * MANIFEST.tenure / 3600),)),
        (
            "every protocol has {} places. It keeps {} of them",
            (inbound_limits.PLACES, inbound_limits.PLACES // inbound_limits.KEPT_SHARE),
        ),
        ("One identity gets {}.", (inbound_limits.PLACES // inbound_limits.PEER_SHARE,)),
        ("of one prefix {} idle ones stay open", (idle_connections.IDLE_PER_PREFIX,)),
        ("{} connections, {} of one origin", (HTTP.connections, HTTP.per_origin)),
        ("{:.0f} s for a request, {:.0f} s without a byte", (HTTP.request_seconds, HTTP.stall_seconds)),
        (
            "at most {} addresses are dialled, of one host {} at once",
            (counted(dial_policy.ADDRESSES_DIALLED), counted(dial_policy.DIALS_PER_HOST)),
        ),
        ("left alone for {:.0f} seconds, then twice as long each time", (dial_policy.FIRST_PAUSE,)),
        ("{0} peers and {0} addresses of a host", (counted(PER_HOST),)),
        ("each of up to {} addresses at a start", (2 * MAX_PEERS,)),
        ("it shows {:,} nodes", (NODES_SHOWN,)),
        ("asked again after {:.0f} minutes", (PROVED_SECONDS / 60,)),
        ("a limit of memory ({:.0f} GiB) and a deadline ({:.0f} s)", (CLIP_MEMORY / 1024, CLIP_SECONDS)),
        ("at most by the tolerance, or by {:.0f} % of the loss", (100 * loss_bounds.WIDEST,)),
        ("every audit policy replays a newcomer's first {} epochs whole", (counted(newcomer_holds.NEWCOMER_EPOCHS),)),
        ("Others may add {} epochs on such an epoch", (counted(newcomer_holds.BUILT_AT_ONCE),)),
        ("for one tenure, two, four, then {} each", (counted(newcomer_holds.LONGEST_HOLD),)),
        ("on a shard within {} tenures", (newcomer_holds.PROBATION_TENURES,)),
        ("for a tenure, two, four, up to {};", (newcomer_holds.LONGEST_PROBATION,)),
        ("{} dials at a time, one at each host", (counted(rate_limits.DIALS_AT_ONCE),)),
        ("({} results for each refused one)", (counted(fetch_queue.ACCEPTED_PER_REFUSAL),)),
        ("until {} minutes have passed or a result of it was accepted", (counted(fetch_queue.FORGIVEN_AFTER / 60),)),
        ("keeps its place for up to {} minutes while it trickles", (counted(fetch_queue.LONG_FETCH / 60),)),
        ("{} lines a minute in all", (MOST_SOURCES + 1,)),
        ("an answer of {:.0f} seconds or more may end", (upload_limit.HELD_SECONDS,)),
        ("Others wait {} seconds for their turn", (counted(upload_limit.TURN_TIMEOUT),)),
        ("is still shared by up to {}: set `upload_rate`", (upload_limit.MAX_STREAMS,)),
        ("a liar moves losses by up to {:.1f} %, a quarter of the usual tolerance", (100 * ROWS_APART,)),
    ],
    "faults.md": [
        ("at most {} epochs ahead", (NodeRules.max_ahead,)),
        ("after {} such rounds it is on standby for ten leases", (counted(NodeRules.unjudged_limit),)),
        ("no report for {:.0f} s", (NodeRules.hang_after,)),
        ("this node {} to {}; install the matching version", (OLDEST_PROTOCOL, PROTOCOL_VERSION)),
    ],
    "decisions.md": [
        ("claim without work protects for {} tenures, one with invented progress for", (counted(IDLE),)),
        ("watch each shard, however many there are", ()),
        ("the {:.0f} % quantile of t", (100 * loss_bounds.CONFIDENCE,)),
        ("or larger than the tolerance again, at least {:.0f} %", (100 * loss_bounds.WIDEST,)),
        ("a check scores what fits, at least {} rows", (loss_bounds.FEWEST_ROWS,)),
        ("tenures, one with invented progress for {}", ("twenty-four" if SLOWEST == 24 else SLOWEST,)),
        ("at most {} epochs ahead;** with one that answers, {}.", (NODE.max_ahead, counted(NODE.max_pending))),
        ("overtaken {} times in a row gives the shard up", (counted(NODE.max_pending + 1),)),
        ("cannot judge {} times in a row", (counted(NODE.unjudged_limit),)),
        ("A newcomer looks at {} shards", ("sixteen" if WAVE == 16 else WAVE,)),
        ("waited {} minutes for a part ends", (counted(DATA_SECONDS / 60),)),
        (
            "at most as often as costs {:.0f} % of the time, and {:.0f} GB a day",
            (100 * LOCAL_COST_SHARE, LOCAL_BYTES_PER_DAY / 1e9),
        ),
        ("{} epochs of others are accepted at once", (counted(newcomer_holds.BUILT_AT_ONCE).capitalize(),)),
        ("then twice as long each time, up to {}", (counted(newcomer_holds.LONGEST_HOLD),)),
        ("of the {} epochs that can be audited or rolled back to, states of the last {}", (HISTORY, counted(SERVE.kept_states))),
        ("Beyond the {} newest that a quarantine record holds", (MAX_QUARANTINED,)),
        ("asked again after {:.0f} minutes", (PROVED_SECONDS / 60,)),
        ("come in at one a second after the first {}", (ip_diversity.NEWCOMERS_AT_ONCE,)),
        ("and {} silent names cost the peer", (counted(lookup.SILENT_ALLOWED),)),
    ],
    "compatibility.md": [("{} in one table, names of letters", (MOST_UNKNOWN_FIELDS,))],
}


@pytest.mark.parametrize("page", FIGURES)
def test_quoted_figures_are_those_of_the_code(page: str) -> None:
    text = " ".join((DOCS / "explanation" / page).read_text().split())
    expected = [template.format(*values) for template, values in FIGURES[page]]
    assert not [figure for figure in expected if figure not in text]


def test_standbys_per_shard_are_as_decided() -> None:
    assert (max(STEADY, CHANGING), STEADY + CHANGING) == (8, 16), "decisions.md: eight to sixteen standbys watch each shard"


def test_undecided_results_of_one_origin_are_eight() -> None:
    assert rate_limits.Admission()._undecided == 8, "threat-model.md: 8 undecided results"


def test_shares_of_the_threat_model_are_those_of_the_code() -> None:
    assert 2 * MAX_STREAMS_PER_PREFIX == upload_limit.MAX_STREAMS, "one prefix gets half of the blob places"
    tolerance = Manifest.model_fields["holdout_tolerance"].default
    assert tolerance == 4 * ROWS_APART, "a liar moves losses by a quarter of the tolerance"


def test_budgets_of_the_benchmarks_are_those_that_the_code_prints() -> None:
    page = (DOCS / "benchmarks.md").read_text()
    shown = dict(re.findall(r"^\| ([^|]+?) \| [^|]*\| [^|]*\| [^|]*\| ([≤≥] [^|]+?) \|", page, re.MULTILINE))
    for name in ("blobs", "overhead"):
        code = (ROOT / "benchmarks" / "measures" / f"{name}.py").read_text()
        budgets = re.findall(r"Row\.of\(\"([^\"]+)\",.*?\"([≤≥] [^\"]+)\"", code)
        assert budgets
        assert budgets == [(what, shown.get(what)) for what, _ in budgets]


def test_table_of_bounds_is_that_of_the_audits() -> None:
    rows = re.findall(r"^\| (?:cpu, cpu|different kinds).*$", (DOCS / "explanation" / "audits.md").read_text(), re.MULTILINE)
    tolerances = (bounds.FLOAT32_CPU, bounds.BFLOAT16_CPU, bounds.FLOAT32_OTHER, bounds.BFLOAT16_OTHER)
    for row, tolerance in zip(rows, tolerances, strict=True):
        cells = [tuple(map(float, re.findall(r"\d[\d.e-]*", cell.split("(")[0]))) for cell in row.split("|")[2:6]]
        assert cells == [tolerance.first, tolerance.later, tolerance.drift, tolerance.noise], tolerance.name
        assert ("assumed" in row) is not tolerance.measured


def test_secret_number_of_steps_is_as_likely_as_the_page_says() -> None:
    text = " ".join((DOCS / "explanation" / "audits.md").read_text().split())
    draws = [(index + 0.5) / 2_000 for index in range(2_000)]
    beyond = [
        sum(secret_steps(draw, AUDIT.replay_steps, epoch) > AUDIT.replay_steps for draw in draws) / len(draws)
        for epoch in (16, 100, 1000)
    ]
    assert "beyond the fourth step with probability {:.2f}, {:.2f} and {:.2f}".format(*beyond) in text
    caught = [share + AUDIT.whole_epoch * (1 - share) for share in (beyond[0], beyond[2])]
    threats = (DOCS / "explanation" / "threat-model.md").read_text()
    often = [counted(round(1 / share)) for share in caught]
    assert "who stops after four of 16 steps is caught in one audit of {}, of 1,000 steps in one of {}".format(*often) in threats


def test_study_page_names_every_config_control_and_changeable_setting() -> None:
    text = (DOCS / "explanation" / "study.md").read_text()
    configs = set(re.findall(r"`([\w-]+\.(?:toml|sh))`", text.partition("## What it does")[0]))
    assert configs == {path.name for path in (ROOT / "docs" / "studies").iterdir()}
    controls = text.partition("## Controls")[2].partition("\n## ")[0]
    rows = "".join(re.findall(r"^\| (`.*?) \|", controls, re.MULTILINE))
    arms = {name for part in get_args(Control) for name in (get_args(part) or (part,))}
    assert set(re.findall(r"`([\w-]+)`", rows)) == {*arms, "expert_counts", "learning_rates"}
    (changeable,) = re.findall(r"Only (.*) may\s+change between calls", text)
    assert set(re.findall(r"`(\w+)`", changeable)) == stages._MAY_CHANGE
