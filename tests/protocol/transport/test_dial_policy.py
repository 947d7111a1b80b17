"""Which addresses of others are dialled, when, and which are remembered."""

from __future__ import annotations

import ipaddress

import pytest

from lutetia.protocol.peerstore import MAX_PEERS, PER_HOST, addresses_to_keep
from lutetia.protocol.transport.dial_policy import FAILING_PER_HOST, NEW_ADDRESS_PAUSE, DialBackoff, DialPolicy
from lutetia.protocol.transport.reachability import policy_of

PUBLIC, LAN, LOOPBACK = "/ip4/198.51.99.7/tcp/4001", "/ip4/192.168.1.5/tcp/4001", "/ip4/127.0.0.1/tcp/4001"


@pytest.mark.parametrize(
    ("ticket", "allowed", "refused"),
    [
        ([PUBLIC], ["ip4/8.8.4.4", "ip6/2606:4700::1"], ["ip4/127.0.0.1", "ip4/10.0.0.1", "ip4/192.168.1.5", "ip6/fe80::1"]),
        ([PUBLIC, LAN], ["ip4/8.8.4.4"], ["ip4/192.168.1.6"]),
        ([LAN], ["ip4/192.168.7.7"], ["ip4/127.0.0.1", "ip4/10.0.0.1", "ip4/172.16.0.1", "ip4/8.8.4.4", "ip4/169.254.169.254"]),
        ([LAN, LOOPBACK], ["ip4/192.168.7.7"], ["ip4/127.0.0.1"]),
        ([LOOPBACK], ["ip4/127.0.0.9"], ["ip4/192.168.1.5", "ip4/8.8.4.4", "ip6/::1"]),
        (["/ip6/fd00::1/tcp/1"], ["ip6/fd12::9"], ["ip6/2606:4700::1", "ip4/10.0.0.1", "ip6/::1"]),
        (["/ip4/0.0.0.0/tcp/0"], ["ip4/8.8.4.4"], ["ip4/127.0.0.1", "ip4/0.0.0.0"]),
        ([], ["ip4/8.8.4.4"], ["ip4/127.0.0.1", "ip4/224.0.0.1", "ip4/255.255.255.255", "ip6/ff02::1"]),
    ],
)
def test_a_policy_follows_the_reach_of_the_ticket(ticket: list[str], allowed: list[str], refused: list[str]) -> None:
    policy = DialPolicy.of(ticket)
    for host in allowed:
        assert policy.allows(f"/{host}/tcp/4002/p2p/12D3KooW"), host
    for host in refused:
        assert not policy.allows(f"/{host}/tcp/4002/p2p/12D3KooW"), host


@pytest.mark.parametrize(
    "address",
    [
        "/dns4/localhost/tcp/22/p2p/x", "/dns/swarm.example/tcp/1/p2p/x", "/ip4/8.8.4.4/tcp/1/p2p/x/p2p-circuit", "/ip4/x/tcp/1",
        "/ip6/::ffff:127.0.0.1/tcp/1/p2p/x", "/ip6/64:ff9b::7f00:1/tcp/1/p2p/x", "/ip6/2002:7f00:1::/tcp/1/p2p/x", "",
        "/ip6/::127.0.0.1/tcp/1/p2p/x", "/ip6/fec0::1/tcp/1/p2p/x", "/ip4/192.88.99.1/tcp/1/p2p/x", "/ip4/8.8.4.4/tcp/0/p2p/x",
        "/ip4/8.8.4.4/tcp/99999/p2p/x", "/ip4/0.0.0.0/tcp/1/p2p/x",
        "/ip4/255.255.255.255/tcp/1/p2p/x", "/ip6/ff02::1/tcp/1/p2p/x",
    ],
)  # fmt: skip
def test_names_and_disguised_addresses_are_refused(address: str) -> None:
    assert not DialPolicy.of([PUBLIC]).allows(address)


async def test_places_of_the_ticket_are_always_dialled() -> None:
    policy = await policy_of(["/dns4/localhost/tcp/4001/p2p/a", "/dns4/no.such.invalid/tcp/1/p2p/b"])
    assert policy.allows("/dns4/localhost/tcp/4001/p2p/another-key")
    assert not policy.allows("/dns4/localhost/tcp/22/p2p/a")
    assert policy.allows("/ip4/127.0.0.1/tcp/5/p2p/a")  # the name of the ticket resolves to this machine
    assert not policy.allows("/ip4/8.8.4.4/tcp/5/p2p/a")
    assert DialPolicy.of(["/dns4/x/tcp/1"], [ipaddress.ip_address("10.1.2.3")]).allows("/ip4/10.9.9.9/tcp/5/p2p/a")


def test_a_peer_that_listens_at_any_port_of_loopback_lives_there() -> None:
    policy = DialPolicy.of(["/ip4/127.0.0.1/tcp/0"])
    assert policy.allows("/ip4/127.0.0.2/tcp/4001")
    assert not policy.allows("/ip4/127.0.0.2/tcp/0")


def test_a_silent_address_is_dialled_ever_more_rarely() -> None:
    backoff, address, dials, now = DialBackoff(), f"{PUBLIC}/p2p/x", 0, 0.0
    while now < 24 * 3600:
        if backoff.allows(address, now):
            dials += 1
            backoff.failed([address], now)
        now += 5
    assert dials <= 34  # 17,280 without pauses
    backoff.answered(address)
    assert backoff.allows(address, now)


def test_made_up_peers_at_one_host_cause_few_dials() -> None:
    """512 addresses of a third party, all tried every 20 seconds for an hour."""
    backoff, dials = DialBackoff(), 0
    victim = [f"/ip4/203.0.113.9/tcp/{4000 + number % 8}/p2p/sybil{number}" for number in range(512)]
    known = "/ip4/203.0.113.9/tcp/9/p2p/honest"
    backoff.answered(known)
    for now in range(0, 3600, 20):
        for address in victim:
            if backoff.allows(address, now):
                dials += 1
                backoff.failed([address], now)
        assert backoff.allows(known, now)
        assert backoff.allows("/ip4/203.0.113.10/tcp/9/p2p/other", now)
    assert dials <= FAILING_PER_HOST * 10 + 3600 / NEW_ADDRESS_PAUSE * 10  # 92,160 without pauses


def test_a_liar_fills_few_places_of_the_peerstore() -> None:
    """It is seen at one host under 64 keys, and names addresses of others."""
    sybils = [[f"/ip4/203.0.113.9/tcp/{n}/p2p/s{n}", f"/ip4/198.51.100.{n}/tcp/1/p2p/s{n}"] for n in range(1, 65)]
    honest = [[f"/ip4/192.0.2.{n}/tcp/1/p2p/h{n}", f"/ip4/192.0.2.{n}/tcp/2/p2p/h{n}"] for n in range(1, 81)]
    kept = addresses_to_keep([address for peer in [*sybils, *honest] for address in peer])
    assert sum("/p2p/s" in address for address in kept) == 2 * PER_HOST
    assert sum("/p2p/h" in address for address in kept) == 2 * (MAX_PEERS - PER_HOST)
    third_party = [f"/ip4/192.0.2.{n}/tcp/1/p2p/p{n}" for n in range(64)]
    aimed = [address for n, seen in enumerate(third_party) for address in (seen, f"/ip4/198.51.100.1/tcp/{n + 1}/p2p/p{n}")]
    assert sum("/ip4/198.51.100.1/" in address for address in addresses_to_keep(aimed)) == PER_HOST
