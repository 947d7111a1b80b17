"""To whom a check is lent, and that none is forgotten."""

from __future__ import annotations

from dataclasses import replace

from lutetia.coordinator.lending.loans import (
    FORGIVEN_SECONDS,
    KEPT_SECONDS,
    PROOF_AHEAD,
    SILENT_SECONDS,
    Asker,
    LendingDesk,
    LentCheck,
    end_check_loans,
    lend_check,
    loan_seconds_for,
    take_report,
)
from lutetia.coordinator.lending.service import public_origin, shared_origin
from tests.coordinator.lending.test_agreement import key, report

CHECK = LentCheck(name="result x", kind="result", shard=0, since=0.0, excluded=frozenset({key("author")}))


def asker(name: str, *related: str, shards: frozenset[int] = frozenset({0})) -> Asker:
    return Asker(key(name), frozenset({"result"}), shards, frozenset(map(key, related)))


def desk_of(*checks: LentCheck) -> LendingDesk:
    desk = LendingDesk()
    for check in checks:
        desk = desk.with_check(check)
    return desk


def lent(desk: LendingDesk, *names: str, now: float = 0.0) -> LendingDesk:
    for name in names:
        desk, check = lend_check(desk, asker(name), key(f"loan of {name}"), now)
        assert check is not None, name
    return desk


def refused(desk: LendingDesk, one: Asker, now: float = 0.0) -> bool:
    return lend_check(desk, one, "i" * 64, now)[1] is None


def of(name: str, factor: float = 1.0, **fields: object):
    return report(name, factor, **fields).model_copy(update={"id": key(f"loan of {name}")})


def test_a_check_goes_to_two_that_are_unlike_its_author_and_each_other():
    desk = desk_of(CHECK)
    assert refused(desk, asker("author"))
    assert refused(desk, asker("cousin", "author"))
    assert refused(desk, asker("small", shards=frozenset({1}))), "its device does not run that expert"
    assert refused(desk, replace(asker("old"), kinds=frozenset()))
    desk = lent(desk, "ann")
    assert refused(desk, asker("anna", "ann")), "of the operator of the first"
    desk = lent(desk, "ben")
    assert refused(desk, asker("eve")), "two are enough while they do not disagree"


def test_a_borrower_that_asks_again_keeps_its_loan():
    desk = lent(desk_of(CHECK), "ann")
    desk, check = lend_check(desk, asker("ann"), "other", 200.0)
    assert check is not None
    assert (check.loans[key("ann")].id, check.loans[key("ann")].heard) == (key("loan of ann"), 200.0)


def test_two_of_one_public_address_do_not_check_together():
    home, away = "203.0.113.5", "198.51.100.7"
    desk, _ = lend_check(desk_of(CHECK), replace(asker("ann"), origin=home), "i" * 64, 0.0)
    assert refused(desk, replace(asker("ben"), origin=home)), "whatever their records say"
    assert not refused(desk, replace(asker("ben"), origin=away))
    assert public_origin("8.8.8.8") == "8.8.8.8"
    assert [public_origin(origin) for origin in ("127.0.0.1", "192.168.1.7", "", "fd00::/64")] == [""] * 4


def test_one_place_is_kept_for_a_peer_with_accepted_work():
    desk, free = lent(desk_of(CHECK), "ann"), frozenset({key("old hand"), key("author")})
    assert lend_check(desk, asker("ben"), "i" * 64, 1.0, free)[1] is None
    assert lend_check(desk, replace(asker("old hand"), known=True), "i" * 64, 1.0, free)[1] is not None
    assert lend_check(desk, asker("ben"), "i" * 64, 1.0, frozenset({key("author")}))[1] is not None, "nobody may come for it"
    assert lend_check(desk, asker("ben"), "i" * 64, KEPT_SECONDS, free)[1] is not None, "it did not come"


def test_disagreement_asks_a_third_and_names_the_liar():
    desk = lent(desk_of(CHECK), "ann", "liar")
    desk, _, settled = take_report(desk, of("liar", 2.0), 1.0)
    assert settled is None
    desk, _, settled = take_report(desk, of("ann"), 2.0)
    assert settled is None
    desk = lent(desk, "ben")
    desk, check, settled = take_report(desk, of("ben"), 3.0)
    assert check is not None
    assert settled is not None
    assert settled.liars == {key("liar")}
    assert not desk.checks


def test_reports_without_a_loan_change_nothing():
    desk = lent(desk_of(CHECK), "ann")
    assert take_report(desk, of("eve"), 1.0) == (desk, None, None)
    assert take_report(desk, of("ann").model_copy(update={"id": "0" * 64}), 1.0) == (desk, None, None)


def test_a_peer_that_failed_is_passed_over_for_a_while():
    desk = lent(desk_of(CHECK), "ann")
    desk, _, settled = take_report(desk, of("ann", outcome="failed"), 1.0)
    assert settled is None
    assert refused(desk, asker("ann"), 2.0)
    assert not refused(desk, asker("ann"), 1.0 + FORGIVEN_SECONDS)


def test_a_slow_borrower_is_not_waited_for_and_its_report_still_counts():
    desk = lent(desk_of(CHECK), "ann", "ben")
    later = CHECK.seconds + 1
    desk = lent(desk, "eve", now=later)
    desk, _, _ = take_report(desk, of("eve"), later + 1)
    desk, _, settled = take_report(desk, of("ann"), later + 2)
    assert settled is not None
    assert settled.report is not None


def test_peers_that_only_ask_hold_no_check_for_ever():
    """Four keys take every place of a check and ask again every two minutes. Before, no other peer ever got it."""
    desk, now = desk_of(CHECK), 0.0
    for name in ("eve", "mal", "joe", "kim"):
        desk = lent(desk, name, now=now)
        now += CHECK.seconds * (name in ("mal", "kim"))
    desk = lent(desk, "ann", "ben", now=now)
    assert refused(desk, asker("eve"), now + 1), "the loan that was late for longest gave way"
    desk, _, _ = take_report(desk, of("ann"), now + 1)
    desk, _, settled = take_report(desk, of("ben"), now + 2)
    assert settled is not None
    desk = desk.with_check(replace(CHECK, name="result y", since=now))
    assert refused(desk, asker("eve"), now + KEPT_SECONDS - 1), "others come first"
    desk = lent(desk, "ann", "eve", now=now + KEPT_SECONDS)
    later = now + KEPT_SECONDS + CHECK.seconds
    desk, _, _ = take_report(desk, of("eve"), later)
    assert desk.late[key("eve")] == 2, "a late report counts, and so does its lateness"
    assert key("ann") not in desk.late


def test_whoever_was_late_is_not_counted_on():
    desk = desk_of(CHECK).with_lateness(key("silent"), 1)
    now = 10 * KEPT_SECONDS
    desk = lent(desk, "silent", "ann", "ben", now=now)
    assert refused(desk, asker("eve"), now), "two others are enough, and the late one has a loan besides"
    desk, check, _ = take_report(desk, of("silent"), now + 1)
    assert check is not None
    assert check.reports, "its report counts"
    assert not desk.late, "and was in time, so it is counted on again"


def test_fresh_keys_of_one_address_cost_one_loan_however_many_checks_wait():
    """Nobody waits for a second loan of the address while the first is out, nor for any after it, until one reports in time."""
    checks = [replace(CHECK, name=f"result {number}") for number in range(6)]
    desk, now, home = desk_of(*checks), 0.0, "8.8.8.8"
    for number in range(6):
        fresh = replace(asker(f"key {number}"), origin=home, source=home)
        desk, check = lend_check(desk, fresh, key(f"loan of key {number}"), now)
        assert check is not None
        assert check.missing(now) == (1 if number == 0 else 2), "the coordinator waits for the first only"
    now = CHECK.seconds
    desk, _, _ = take_report(desk, of("key 0"), now)
    assert desk.lateness(replace(asker("another"), source=home)) == 1
    assert refused(desk, replace(asker("another"), source=home), KEPT_SECONDS - 1), "others come first"
    assert not desk.lateness(replace(asker("old hand"), source=home, known=True)), "accepted work speaks for itself"
    assert not desk.lateness(replace(asker("neighbour"), source="8.8.8.9")), "a prefix may cost four times as much"
    desk, _, _ = take_report(desk, of("key 1"), now - 1)
    assert desk.late == {key("key 0"): 1}, "a report in time makes up for a late one, also of a loan that nobody waited for"
    assert [shared_origin(one) for one in (home, "192.168.1.7", "", "127.0.0.1")] == [home, "192.168.1.7", "relay", ""]


def test_addresses_of_one_prefix_cost_four_loans():
    checks = [replace(CHECK, name=f"result {number}") for number in range(6)]
    desk = desk_of(*checks)
    for number in range(6):
        source = f"8.8.8.{number}"
        desk, _ = lend_check(desk, replace(asker(f"key {number}"), origin=source, source=source), key(f"{number}"), 0.0)
    loans = [loan for check in desk.checks.values() for loan in check.loans.values()]
    assert (len(loans), sum(loan.counts_until > 0.0 for loan in loans)) == (6, 4)
    desk = end_check_loans(desk, None, SILENT_SECONDS, lease=30.0)
    assert desk.lateness(replace(asker("next"), source="8.8.8.99")) == 1, "all six were silent, and that is late"


def test_loans_of_peers_that_are_gone_or_silent_go_back():
    desk = lent(desk_of(CHECK), "ann", "ben")
    kept = end_check_loans(desk, frozenset({key("ben")}), 50.0, lease=30.0)
    assert set(kept.checks[CHECK.name].loans) == {key("ben")}
    assert end_check_loans(desk, frozenset({key("ben")}), 10.0, lease=30.0) == desk, "a record may be missing for a lease"
    assert end_check_loans(desk, None, 50.0, lease=30.0) == desk, "nothing is known"
    assert not end_check_loans(desk, None, SILENT_SECONDS, lease=30.0).checks[CHECK.name].loans
    assert kept.late == {key("ann"): 1}, "it took a loan and did not report"


def test_a_begun_check_comes_before_an_older_one():
    begun = replace(CHECK, name="result y", since=5.0)
    desk = lent(desk_of(begun), "ann").with_check(CHECK)
    _, check = lend_check(desk, asker("ben"), "i" * 64, 6.0)
    assert check is not None
    assert check.name == "result y"


def test_loans_are_as_long_as_size_and_experience_ask_for():
    assert loan_seconds_for(0, 65536.0, None) == 600.0
    assert loan_seconds_for(65536 * 1000, 65536.0, 200.0) == 600.0 + 1000.0 + 600.0


def test_a_replay_for_which_a_result_waits_goes_first_but_not_for_ever():
    desk = lent(desk_of(replace(CHECK, name="begun")), "ann")
    for since, first in ((PROOF_AHEAD - 1, "proof"), (PROOF_AHEAD + 1, "begun")):
        proof = replace(CHECK, name="proof", since=since, ahead=PROOF_AHEAD)
        _, check = lend_check(desk.with_check(proof), asker("ben"), key("loan of ben"), since)
        assert check is not None
        assert check.name == first
