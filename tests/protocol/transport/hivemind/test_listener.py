"""What counts as a lost listener: refusals after an answer, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from lutetia.protocol.transport.hivemind.listener import ListenerCheck


@pytest.mark.parametrize(
    ("listen", "addresses", "place"),
    [
        ("/ip4/0.0.0.0/tcp/41000", [], ("127.0.0.1", 41000)),
        ("/ip6/::/tcp/0", ["/ip6/::1/tcp/5/p2p/Qm"], ("::1", 5)),
        ("/ip4/10.0.0.7/tcp/0", ["/ip4/1.2.3.4/tcp/9/p2p/Qr/p2p-circuit/p2p/Qm", "/ip4/10.0.0.7/tcp/7"], ("10.0.0.7", 7)),
        ("/ip4/0.0.0.0/tcp/0", [], None),
        ("", ["/ip4/10.0.0.7/tcp/7"], None),
    ],
)
def test_place_is_that_of_the_own_listener(listen: str, addresses: list[str], place: tuple[str, int] | None) -> None:
    assert ListenerCheck(listen, addresses).place == place


async def test_two_refusals_after_an_answer_are_a_loss() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    check, late = ListenerCheck(f"/ip4/127.0.0.1/tcp/{port}", ()), ListenerCheck(f"/ip4/127.0.0.1/tcp/{port}", ())
    assert not await check.is_lost()
    server.close()
    await server.wait_closed()
    assert [await check.is_lost() for _ in range(2)] == [False, True]
    assert [await late.is_lost() for _ in range(4)] == [False] * 4, "it was never seen to listen"
