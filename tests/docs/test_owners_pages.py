"""Figures and tables of the pages for owners are those of the code: guide/runs.md, audits.md and compatibility.md."""

from __future__ import annotations

import re

from lutetia.coordinator.acceptance.intake.newcomer_holds import BUILT_AT_ONCE, LONGEST_HOLD, LONGEST_PROBATION, PROBATION_TENURES
from lutetia.coordinator.acceptance.loss_bounds import FEWEST_ROWS, chance_refused
from lutetia.coordinator.acceptance.rollback import KEPT_DEPTH, KEPT_PROOFS
from lutetia.coordinator.ledger.run_state import HISTORY
from lutetia.coordinator.settings import RunSettings, ServeSettings
from lutetia.coordinator.web.api import answers, event_stream
from lutetia.coordinator.web.connections import LIMITS
from lutetia.node.machine.state import NodeRules
from lutetia.node.runtime.replication_policy import COPIES_WANTED
from lutetia.protocol.rpc.audit_request import MAX_STEPS
from lutetia.protocol.schema.capabilities import CAPABILITIES
from lutetia.protocol.schema.manifest_upgrade import CHANGEABLE
from lutetia.protocol.schema.records import MAX_QUARANTINED
from tests.docs.test_figures import counted
from tests.test_docs import DOCS, section

RUN, SERVE = RunSettings(), ServeSettings()


def words(page: str) -> str:
    return " ".join((DOCS / page).read_text().split())


def test_guide_quotes_the_limits_of_the_code() -> None:
    expected = [
        f"the interval, at most {MAX_STEPS:,} batches where",
        f"fewer training clips than the default of {RUN.optimisation.batch}",
        f"weights and traces of each shard's last {HISTORY} epochs",
        f"training states of the last `kept_states` ({SERVE.kept_states})",
        f"at most {NodeRules.max_ahead}; then they wait",
        f"{counted(NodeRules.max_pending)} results of a node may wait".capitalize(),
        f"hold {LIMITS.connections} connections, {LIMITS.per_origin} of one address",
        f"{LIMITS.request_seconds:.0f} seconds to arrive, an answer {LIMITS.stall_seconds:.0f} without",
        f"{answers.BURST} requests at once and {answers.REQUESTS_PER_SECOND:.0f} a second",
        f"hold {event_stream.STREAMS_PER_ORIGIN} streams of {event_stream.STREAMS} in all",
        f"newest checkpoint until {counted(COPIES_WANTED)} hold it besides the coordinator",
        f"room for {MAX_QUARANTINED} peers",
    ]
    text = words("guide/runs.md").lower()
    assert not [figure for figure in expected if figure.lower() not in text]


def test_guide_names_all_that_a_version_may_change() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section("guide/runs.md", "5. Changing a run").partition("\n### ")[0], re.MULTILINE)
    assert {*re.findall(r"`(\w+)", "".join(rows))} == (CHANGEABLE - {"expires"}) | {"valid_days"}


def test_audits_page_quotes_holds_and_what_a_conviction_keeps() -> None:
    expected = [
        f"{counted(BUILT_AT_ONCE)} epochs of other authors are accepted on an epoch",
        f"then four, then {counted(LONGEST_HOLD)} each",
        f"within {PROBATION_TENURES} tenures, then two, four, up to {LONGEST_PROBATION}",
        f"at least {counted(KEPT_DEPTH)} epochs stand on the faked one",
        f"found {counted(KEPT_PROOFS)} of them valid",
        f"the {counted(KEPT_PROOFS + 1)} newest are due",
        f"`check_seconds` ({SERVE.check_seconds:.0f})",
        f"**at least {FEWEST_ROWS}**",
    ]
    text = words("explanation/audits.md").lower()
    assert not [figure for figure in expected if figure not in text]


def test_table_of_refusals_is_what_the_bound_gives() -> None:
    text = (DOCS / "explanation" / "audits.md").read_text()
    head = re.search(r"^\| spread of a row \| rows \| just within the tolerance (.*)$", text, re.MULTILINE)
    assert head
    beyond = [0, *map(int, re.findall(r"(\d+) % beyond", head[1]))]
    rows = re.findall(r"^\| (\d+) % \| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 12
    for spread, count, cells in rows:
        tolerance = RUN.holdout_tolerance
        found = [chance_refused(int(count), tolerance + each / 100, int(spread) / 100, tolerance) for each in beyond]
        assert cells.split(" | ") == [f"{chance:.3f}" for chance in found], (spread, count)


def test_compatibility_lists_every_capability() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|", section("explanation/compatibility.md", "The introduction"), re.MULTILINE)
    assert rows == [*CAPABILITIES]
