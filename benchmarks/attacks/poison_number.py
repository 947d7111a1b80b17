"""Signed results with a number that is legal JSON and absurd: hundreds of digits where an epoch, a shard or a size stands.

Each goes both ways into the coordinator: parsed as from a stream or the DHT, and, as if the parser had let it pass, to the judge.
"""

from __future__ import annotations

import random
from collections import Counter

from lutetia.coordinator.acceptance.judge_isolation import judge_isolated
from lutetia.coordinator.acceptance.messages import Answer, Offered
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import RecordLimits, RecordRefused, open_record, seal
from tests.coordinator.acceptance.judge_driver import START, drive_judge, make_record

_LIMITS = RecordLimits(2.0, 10.0)


def poison_number(tries: int) -> Counter[str]:
    """How often the parser refused such a record, and what the judge answered where it was handed one all the same."""
    found: Counter[str] = Counter()
    for seed in range(tries):
        rng, driver, who = random.Random(seed), drive_judge(), Identity.derived(f"poisoner {seed}")
        name = rng.choice(("epoch", "samples", "shard"))
        number = rng.choice((-1, 1)) * 10 ** rng.randrange(20, 4000)
        record = make_record(driver.manifest, who, 0, 1, addresses=()).model_copy(update={name: number})
        found[f"parser: {_parsed(seal(record, who, START + 60), who)}"] += 1
        judged = judge_isolated(driver.rules, driver.state, Offered(record, START))
        [answer] = [action for action in judged.actions if isinstance(action, Answer)]
        found[f"judge: {answer.reply.verdict}"] += 1
        honest = make_record(driver.manifest, Identity.derived("honest"))
        after = judge_isolated(driver.rules, judged.state, Offered(honest, START))
        found["an honest result after it is queued"] += any(
            isinstance(action, Answer) and action.reply.verdict == "queued" for action in after.actions
        )
    return found


def _parsed(sealed: bytes, who: Identity) -> str:
    try:
        open_record(sealed, key=None, subkey=who.public_key, expires=START + 60, now=START, limits=_LIMITS)
    except RecordRefused:
        return "refused"
    return "let through"
