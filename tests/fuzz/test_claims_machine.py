"""Many peers, one shard, stale views: once everybody has looked and settled there is one owner, and tenure holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from benchmarks.fuzz import examples
from lutetia.protocol.claims import LiveClaim, ShardView, free_shards, shard_owner
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import AcceptanceRecord, ClaimRecord

RUN, SHARD, EPOCHS, LEASE, TENURE = examples.manifest().run_id, 1, 50, 6.0, 60.0
PEERS = [Identity.derived(f"claimant {number}").public_key for number in range(6)]
peer_names = st.sampled_from(PEERS)


@dataclass
class Peer:
    """What one peer knows and wants: the protocol's steps, look, claim, settle, judge, renew, yield, one at a time."""

    phase: str = "idle"  # idle, claiming, training
    seen: ShardView = ShardView(SHARD)


class Claims(RuleBasedStateMachine):
    """The DHT is a dictionary; a peer acts on what it saw at its last look."""

    def __init__(self) -> None:
        super().__init__()
        self.now = examples.NOW
        self.claims: dict[str, LiveClaim] = {}
        self.acceptance: AcceptanceRecord | None = None
        self.peers = {name: Peer() for name in PEERS}

    def view(self) -> ShardView:
        return ShardView(SHARD, tuple(self.claims[owner] for owner in sorted(self.claims)), self.acceptance)

    def write(self, owner: str, state: Any) -> None:
        epoch = self.acceptance.epoch if self.acceptance else 0
        record = ClaimRecord(run=RUN, owner=owner, issued=self.now, shard=SHARD, epoch=epoch, samples=0, state=state)
        old = self.claims.get(owner)
        self.claims[owner] = LiveClaim(record, max(self.now + LEASE, old.expires + 0.001 if old else 0.0))

    def without_own(self, owner: str, view: ShardView) -> ShardView:
        return replace(view, claims=tuple(claim for claim in view.claims if claim.record.owner != owner))

    @rule(seconds=st.sampled_from((0.5, 2.0, 5.0, LEASE, 30.0, TENURE)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(owner=peer_names)
    def look(self, owner: str) -> None:
        self.peers[owner].seen = self.view()

    @rule(owner=peer_names)
    def claim_if_free(self, owner: str) -> None:
        """On what may be an old view: so several claim at once."""
        peer = self.peers[owner]
        if peer.phase == "idle" and free_shards([self.without_own(owner, peer.seen)], EPOCHS, self.now):
            peer.phase = "claiming"
            self.write(owner, "claiming")

    @rule(owner=peer_names)
    def judge(self, owner: str) -> None:
        """After one propagation delay: a claimant sees all other claims."""
        peer = self.peers[owner]
        peer.seen = self.view()
        if peer.phase == "idle":
            return
        if shard_owner(RUN, peer.seen, self.now) == owner:
            peer.phase = "training"
            self.write(owner, "training")
        else:
            peer.phase = "idle"
            self.write(owner, "released")

    @rule(owner=peer_names)
    def renew(self, owner: str) -> None:
        if self.peers[owner].phase == "training":
            self.write(owner, "training")

    @rule(owner=peer_names)
    def give_up(self, owner: str) -> None:
        if self.peers[owner].phase != "idle":
            self.peers[owner].phase = "idle"
            self.write(owner, "released")

    @rule(owner=peer_names)
    def die(self, owner: str) -> None:
        """Without a word: the claim stays until it expires."""
        self.peers[owner].phase = "idle"

    @rule(author=peer_names)
    def accept(self, author: str) -> None:
        """The coordinator accepts whoever's result comes first, owner or not."""
        epoch = self.acceptance.epoch + 1 if self.acceptance else 1
        if epoch <= EPOCHS:
            self.acceptance = AcceptanceRecord(
                run=RUN, owner=examples.COORDINATOR.public_key, issued=self.now, shard=SHARD, epoch=epoch, checkpoint="5" * 64,
                parent=None, weights=examples.blob(), state=examples.blob(), samples=8, author=author,
                tenure_until=self.now + TENURE, holdout_loss=0.5,
            )  # fmt: skip

    @rule()
    def settle(self) -> None:
        """Everybody looks, judges and yields; then nobody disagrees, and a second round changes nothing."""
        for owner in PEERS:
            self.judge(owner)
        holders = [owner for owner in PEERS if self.peers[owner].phase == "training"]
        assert len(holders) <= 1
        named = shard_owner(RUN, self.view(), self.now)
        live = {claim.record.owner for claim in self.view().live(self.now)}
        dead = {owner for owner in live if self.peers[owner].phase == "idle"}
        assert named is None or named in holders or named in dead
        if live and not dead:
            assert [named] == holders
        for owner in PEERS:
            self.judge(owner)
        assert [owner for owner in PEERS if self.peers[owner].phase == "training"] == holders

    @invariant()
    def all_readers_agree(self) -> None:
        view = self.view()
        turned = replace(view, claims=tuple(reversed(view.claims)))
        assert shard_owner(RUN, view, self.now) == shard_owner(RUN, turned, self.now)

    @invariant()
    def the_owner_has_a_live_claim(self) -> None:
        owner = shard_owner(RUN, self.view(), self.now)
        assert owner is None or owner in {claim.record.owner for claim in self.view().live(self.now)}

    @invariant()
    def tenure_holds_while_its_claim_lives(self) -> None:
        accepted = self.acceptance
        if accepted and self.now < accepted.tenure_until:
            live = {claim.record.owner for claim in self.view().live(self.now)}
            assert accepted.author not in live or shard_owner(RUN, self.view(), self.now) == accepted.author

    @invariant()
    def a_claimed_shard_is_not_free_and_a_free_one_is_not_owned(self) -> None:
        free = bool(free_shards([self.view()], EPOCHS + 1, self.now))
        assert free == (shard_owner(RUN, self.view(), self.now) is None)


Claims.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestClaims = Claims.TestCase
