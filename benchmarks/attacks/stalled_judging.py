"""Results whose blobs never arrive, against the coordinator's own judge in virtual time: how long an honest result waits.

The shell is modelled: a fetch of nothing ends after `chunk_limit`, one that trickles after `fetch_limit`, both times the
patience that the judge grants; an honest fetch and the checks take a few seconds each.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.rate_limits import Admission
from lutetia.coordinator.acceptance.messages import CheckDone, FetchDone, JudgeTick, Offered, StartCheck, StartFetch
from lutetia.coordinator.runtime.check_runner import chunk_limit, fetch_limit
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import CheckpointRecord
from tests.coordinator.acceptance.judge_driver import START, JudgeDriver, drive_judge, make_record

FETCH_SECONDS, CHECK_SECONDS = 2.0, 6.0
USUAL = FETCH_SECONDS + CHECK_SECONDS
_SLOWEST = 65536.0
_SIZE = 1 << 20
_REOFFER = 3.0


@dataclass(frozen=True)
class StallAttack:
    """Whom the judge hears besides the honest node. Each key offers again as soon as it may.

    Args:
        origins: network addresses, each with `keys` keys that offer by stream.
        polled: keys for each shard whose records are in the DHT only.
        trickle: send a little, so that each fetch lasts to its end; else send nothing.
        garbage: let everything arrive, and fail the checks.
        veterans: of the keys by stream, how many have one accepted epoch in another shard.
    """

    name: str
    origins: int = 1
    keys: int = 8
    polled: int = 0
    trickle: bool = False
    garbage: bool = False
    veterans: int = 0
    shards: int = 1


ATTACKS = (
    StallAttack("no attack", origins=0),
    StallAttack("8 keys of one address, silent"),
    StallAttack("8 keys of one address and 24 DHT records, silent", polled=24),
    StallAttack("8 keys of one address, trickling", trickle=True),
    StallAttack("DHT records only", origins=0, polled=24),
    StallAttack("4 shards, 8 keys of one address", shards=4),
    StallAttack("4 shards, 16 addresses of 8 keys, silent", origins=16, shards=4),
    StallAttack("16 addresses of 8 keys, silent", origins=16),
    StallAttack("16 addresses of 8 keys, trickling", origins=16, trickle=True),
    StallAttack("2 keys with an accepted epoch each, silent", keys=2, veterans=2),
    StallAttack("8 keys of one address, garbage that arrives", garbage=True),
)


@dataclass
class _Scene:
    attack: StallAttack
    seed: int
    driver: JudgeDriver = field(init=False)
    admission: Admission = field(default_factory=Admission)
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.driver = drive_judge(shards=8, epochs=50, rules={"offers_per_minute": 30})
        self.accepted: dict[str, float] = {}
        self.honest = Identity.derived(f"honest {self.seed}")

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (seconds, next(self._count), action))

    @property
    def now(self) -> float:
        return self.driver.now - START

    def run(self, offered: float, newcomer: bool, most: float = 3600.0) -> float:
        """Seconds from the honest node's first offer, `offered` seconds after the attack began, to its acceptance."""
        if not newcomer:
            self.driver.accept(self.honest, 6)
            self.driver.finish_audit("valid")
        for key in range(self.attack.veterans):
            self.driver.accept(Identity.derived(f"sybil 0 {key}"), 7)
        self.driver.arrives = False
        self.at(0.0, self.tick)
        for origin, key in itertools.product(range(self.attack.origins), range(self.attack.keys)):
            who = Identity.derived(f"sybil {origin} {key}")
            self.at(self.random.uniform(0, _REOFFER), self.lying(who, key % self.attack.shards, f"198.51.100.{origin}"))
        for shard, key in itertools.product(range(self.attack.shards), range(self.attack.polled)):
            self.at(self.random.uniform(0, _REOFFER), self.lying(Identity.derived(f"dht {shard} {key}"), shard, ""))
        self.at(offered, self.offer_honestly)
        while self._due and self.now < most and self.honest.public_key not in self.accepted:
            seconds, _, action = heapq.heappop(self._due)
            self.driver.now = START + seconds
            action()
        return self.accepted.get(self.honest.public_key, most) - offered

    def tick(self) -> None:
        self.hear(JudgeTick(self.driver.now))
        self.at(self.now + 1.0, self.tick)

    def lying(self, who: Identity, shard: int, origin: str) -> Callable[[], None]:
        def offer() -> None:
            ledger, told = self.driver.state.run.shards[shard], self.now
            if not ledger.undecided_of(who.public_key):
                text = f"{told}"
                record = make_record(self.driver.manifest, who, shard, ledger.epoch + 1, ledger.accepted, text)
                self.offer(record, origin)
            self.at(told + _REOFFER, offer)

        return offer

    def offer_honestly(self) -> None:
        if not self.driver.state.run.shards[0].undecided_of(self.honest.public_key):
            record = make_record(self.driver.manifest, self.honest)
            self.offer(record, "203.0.113.1")
            self.at(self.now + 5.0, self.offer_honestly)

    def offer(self, record: CheckpointRecord, origin: str) -> None:
        if not origin:
            self.hear(Offered(record, self.driver.now, "poll"))
            return
        shards = self.driver.state.run.shards.values()
        waiting = {candidate.record.peer_id for shard in shards for candidate in shard.candidates.values()}
        if self.admission.refusal(record.peer_id, origin, waiting, self.driver.now) is None:
            self.hear(Offered(record, self.driver.now, "offer", origin))

    def hear(self, stimulus: Offered | FetchDone | CheckDone | JudgeTick) -> None:
        for action in self.driver.send(stimulus):
            if isinstance(action, StartFetch):
                self.fetch(action)
            elif isinstance(action, StartCheck):
                self.check(action.record)
        given = self.driver.state.run.shards[0].acceptance
        if given:
            self.accepted.setdefault(given.author, self.now)

    def fetch(self, fetch: StartFetch) -> None:
        record, seconds, outcome = fetch.record, FETCH_SECONDS, "valid"
        if record.owner != self.honest.public_key and not self.attack.garbage:
            limit = fetch_limit if self.attack.trickle else chunk_limit
            seconds, outcome = max(3.0, fetch.patience * limit(_SIZE, _SLOWEST)), "inconclusive"
        verdict = Verdict(outcome, "transfer", "" if outcome == "valid" else "it did not arrive")
        self.at(self.now + seconds, lambda: self.hear(FetchDone(record, verdict, self.driver.now)))

    def check(self, record: CheckpointRecord) -> None:
        verdict = Verdict("valid", "holdout", "", 0.4, 0.5)
        if record.owner != self.honest.public_key:
            verdict = Verdict("invalid", "holdout", "its held-out loss is worse", 0.9, 0.5)
        self.at(self.now + CHECK_SECONDS, lambda: self.hear(CheckDone(record, verdict, self.driver.now)))


def honest_delay(attack: StallAttack, seed: int, newcomer: bool = True) -> float:
    """Seconds until an honest node's result is accepted under `attack`, which began some time before; USUAL without one."""
    return _Scene(attack, seed).run(random.Random(seed).uniform(0.0, 60.0), newcomer)
