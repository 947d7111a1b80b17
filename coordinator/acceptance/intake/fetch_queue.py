"""Which undecided results are fetched and checked next, and how long a fetch may take. Pure.

To offer a result costs its author nothing, and to wait for its blobs costs the coordinator time. So fetching is apart from
checking: a result takes a place among the checks only once all of it has arrived, and several results of a shard are fetched at
once. Owners with accepted work go first; of the others, those from where nothing has failed lately, then four of each prefix
before any has more, and of each source one before any other has its second. A result that did not arrive goes to the end of the
line, and the next fetch from there may take half as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from lutetia.coordinator.acceptance.transition import FetchKey, JudgeState, JudgeTransition
from lutetia.coordinator.ledger.run_state import RunState, WaitingResult
from lutetia.protocol.claims import slot_of
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.transport.network_origin import PREFIX_FACTOR, prefix_of

ACCEPTED_PER_REFUSAL = 8
"""An owner counts as known while it has more accepted results than this times its refused ones."""
UNKNOWN_ORIGINS = {"offer": "relay", "poll": "dht"}
"""The source of results whose origin is not known, by the way they came: an address in a record proves nothing."""
_PLACES_OF_ORIGIN, _PLACES_OF_UNKNOWN = (2, 1), (8, 4)
"""Fetches at once of unknown owners behind one network origin, or of no known origin: in all shards, and in one."""
LANES_OF_OWNER = 8
"""Undecided results of one owner in one shard, each of another lane: as many as all keys of one address may have."""
LONG_FETCH = 300.0
"""Seconds for which an unknown owner's result keeps its place in a full shard while it arrives."""
LEAST_PATIENCE = 1 / 8
FORGIVEN_AFTER = 600.0
"""Seconds without a failure after which a source has all its patience back."""
_REMEMBERED = 1024


def key_of(record: CheckpointRecord) -> FetchKey:
    return record.shard, record.owner, record.digest


def is_known(run: RunState, owner: str) -> bool:
    """Whether accepted work speaks for this owner: it cost training, which made-up identities do not have."""
    peer = run.peer(owner)
    return peer.accepted > ACCEPTED_PER_REFUSAL * peer.rejected


def source_of(state: JudgeState, record: CheckpointRecord) -> str:
    """With whom a result shares its turns: an owner with accepted work with nobody, others with their network origin.

    Results that came by way of a relay share one source, and so do those that were read from the DHT.
    """
    if is_known(state.run, record.owner):
        return record.owner
    return state.origins.get(record.owner, UNKNOWN_ORIGINS["poll"])


def in_line(state: JudgeState, waiting: Iterable[WaitingResult], held: Iterable[WaitingResult] = ()) -> list[WaitingResult]:
    """`waiting` in the order in which they get places; `held` are those that have places now."""
    sources = [source_of(state, candidate.record) for candidate in held]
    ahead, ahead_here = Counter(sources), Counter(map(prefix_of, sources))
    ranked: list[tuple[tuple[bool, int, int, int, int, float, str], WaitingResult]] = []
    for candidate in sorted(waiting, key=lambda one: (one.attempts, one.seen, one.record.owner)):
        owner, source = candidate.record.owner, source_of(state, candidate.record)
        known = is_known(state.run, owner)
        accepted = state.run.peer(owner).accepted if known else 0
        failures = max(candidate.attempts, _failures(state, candidate.record)[0])
        crowd = ahead_here[prefix_of(source)] // PREFIX_FACTOR
        ranked.append(((not known, failures, crowd, ahead[source], -accepted, candidate.seen, owner), candidate))
        ahead[source] += 1
        ahead_here[prefix_of(source)] += 1
    return [candidate for _, candidate in sorted(ranked, key=lambda entry: entry[0])]


def gives_way(state: JudgeState, newcomer: WaitingResult) -> WaitingResult | None:
    """The undecided result of a full shard (of its lane) that loses its place to `newcomer`; None when the newcomer has to wait.

    It is the last in line, if that is not the newcomer, else the first of an unknown owner that has taken longer than LONG_FETCH.
    Nothing that has arrived is given up, except what is held, for a known owner.
    """
    candidates = state.run.shards[newcomer.record.shard].candidates.values()
    there = [candidate for candidate in candidates if candidate.record.lane == newcomer.record.lane]
    kept = {*state.fetched} if is_known(state.run, newcomer.record.owner) else {*state.fetched, *state.held}
    others = [candidate for candidate in there if key_of(candidate.record) not in kept and candidate.doubt is None]
    last = in_line(state, [*others, newcomer])[-1]
    if last is not newcomer:
        return last
    slow = (one for one in others if newcomer.seen - one.seen >= LONG_FETCH and not is_known(state.run, one.record.owner))
    return min(slow, key=lambda one: one.seen, default=None)


def next_fetches(transition: JudgeTransition) -> Iterator[WaitingResult]:
    """The waiting results that may be fetched now, best first. The caller starts each before it asks for the next.

    Unknown owners get at most three quarters of all places, so that no other has to wait for them. Of the lanes of one owner in a
    shard one is fetched at a time: many lanes give nobody more places.
    """
    state, rules = transition.state, transition.rules
    if len(state.fetching) >= rules.fetches_at_once:
        return
    ready = list(_ready(transition))
    if not ready:
        return
    held = list(_candidates(state, state.fetching))
    strangers = [candidate.record for candidate in held if not is_known(state.run, candidate.record.owner)]
    free, free_to_strangers = rules.fetches_at_once - len(held), rules.fetches_at_once * 3 // 4 - len(strangers)
    of_source = Counter(source_of(state, record) for record in strangers)
    of_source_here = Counter((source_of(state, record), record.shard) for record in strangers)
    slots = Counter(_slot(candidate) for candidate in held)
    owners = {(candidate.record.shard, candidate.record.owner) for candidate in held}
    arrived = {_slot(candidate) for candidate in _candidates(state, [*state.fetched, *state.held])}
    if free_to_strangers <= 0:
        ready = [candidate for candidate in ready if is_known(state.run, candidate.record.owner)]
    for candidate in in_line(state, ready, held):
        shard, slot, source = candidate.record.shard, _slot(candidate), source_of(state, candidate.record)
        places = 1 if slot in arrived else rules.fetches_per_shard  # what has arrived may make all others superfluous
        owner = shard, candidate.record.owner
        if free <= 0 or slots[slot] >= places or owner in owners:
            continue
        if not is_known(state.run, candidate.record.owner):
            most, most_here = _PLACES_OF_UNKNOWN if source in UNKNOWN_ORIGINS.values() else _PLACES_OF_ORIGIN
            if free_to_strangers <= 0 or of_source[source] >= most or of_source_here[source, shard] >= most_here:
                continue
            of_source[source] += 1
            of_source_here[source, shard] += 1
            free_to_strangers -= 1
        yield candidate
        free -= 1
        slots[slot] += 1
        owners.add(owner)


def _slot(candidate: WaitingResult) -> int:
    return slot_of(candidate.record.shard, candidate.record.lane)


def _ready(transition: JudgeTransition) -> Iterator[WaitingResult]:
    """The candidates that are neither here nor on their way, and whose time has come."""
    state, now = transition.state, transition.now
    under_way = {*state.fetching, *state.fetched, *state.held}
    for index in sorted(state.pending):
        for (owner, digest), candidate in state.run.shards[index].candidates.items():
            if candidate.not_before <= now and candidate.doubt is None and (index, owner, digest) not in under_way:
                yield candidate


def next_held(state: JudgeState, shard: int, draw: Callable[[str], float]) -> list[WaitingResult]:
    """The results of a shard that have passed their checks and are held, best first.

    Owners with accepted work go first. Of the others to be early proves nothing, since a copy is there before honest work: of
    each source one before any other has its second, in the order of `draw`, which nobody can foresee.
    """
    ahead: Counter[str] = Counter()
    ranked: list[tuple[tuple[bool, int, float], WaitingResult]] = []
    for candidate in in_line(state, _candidates(state, [key for key in state.held if key[0] == shard])):
        source, known = source_of(state, candidate.record), is_known(state.run, candidate.record.owner)
        ranked.append(((not known, ahead[source], 0.0 if known else draw(candidate.record.digest)), candidate))
        ahead[source] += 1
    return [candidate for _, candidate in sorted(ranked, key=lambda entry: entry[0])]


def next_checks(transition: JudgeTransition) -> list[WaitingResult]:
    """The results that have arrived and wait for their checks, best first; those of sources under check after others."""
    state = transition.state
    there = list(_candidates(state, state.fetched.keys()))
    checked = [one for one in there if state.checking.get(_slot(one)) == (one.record.owner, one.record.digest)]
    return in_line(state, (candidate for candidate in there if _slot(candidate) not in state.checking), checked)


def _candidates(state: JudgeState, keys: Collection[FetchKey]) -> Iterator[WaitingResult]:
    for shard, owner, digest in sorted(keys):
        if candidate := state.run.shards[shard].candidates.get((owner, digest)):
            yield candidate


def forget_gone(transition: JudgeTransition) -> None:
    """Forget the fetches of results that are no longer undecided. What arrives of them is discarded with them."""
    state = transition.state
    if not state.fetching and not state.fetched and not state.held:
        return
    there = frozenset(key for keys in (state.fetching, state.fetched, state.held) for key in keys if _is_candidate(state, key))
    if len(there) < len(state.fetching) + len(state.fetched) + len(state.held):
        fetched = {key: costs for key, costs in state.fetched.items() if key in there}
        held = {key: verdict for key, verdict in state.held.items() if key in there}
        transition.set(fetching=state.fetching & there, fetched=fetched, held=held)


def _is_candidate(state: JudgeState, key: FetchKey) -> bool:
    shard, owner, digest = key
    return (owner, digest) in state.run.shards[shard].candidates


# --- patience ---------------------------------------------------------------------------------------------------------------


def patience(state: JudgeState, record: CheckpointRecord, now: float) -> float:
    """The fraction of the usual time that a fetch of this result may take."""
    failures, last = _failures(state, record)
    return max(LEAST_PATIENCE, 0.5**failures) if now - last < FORGIVEN_AFTER else 1.0


def note_failure(transition: JudgeTransition, record: CheckpointRecord) -> None:
    """A fetch failed, or what arrived was refused: count it against the source."""
    failures, last = _failures(transition.state, record)
    failures = failures + 1 if transition.now - last < FORGIVEN_AFTER else 1
    others = _without(transition, record)
    kept = dict(list(others.items())[max(0, len(others) - _REMEMBERED + 1) :])
    transition.set(failures={**kept, _blamed(transition.state, record): (failures, transition.now)})


def note_success(transition: JudgeTransition, record: CheckpointRecord) -> None:
    """A result that passed its checks makes up for all failures of its source."""
    if _blamed(transition.state, record) in transition.state.failures:
        transition.set(failures=_without(transition, record))


def _without(transition: JudgeTransition, record: CheckpointRecord) -> dict[str, tuple[int, float]]:
    blamed = _blamed(transition.state, record)
    return {name: value for name, value in transition.state.failures.items() if name != blamed}


def _failures(state: JudgeState, record: CheckpointRecord) -> tuple[int, float]:
    """(Failures of this source one after the other, when the last one was.)"""
    return state.failures.get(_blamed(state, record), (0, 0.0))


def _blamed(state: JudgeState, record: CheckpointRecord) -> str:
    """Whose patience a failure uses up: the source's, or the owner's where the origin is not known."""
    source = source_of(state, record)
    return record.owner if source in UNKNOWN_ORIGINS.values() else source
