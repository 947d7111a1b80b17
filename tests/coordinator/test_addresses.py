"""Addresses in a ticket: who can dial them."""

from __future__ import annotations

import pytest

from lutetia.cli.commands.run import reach_warning
from lutetia.coordinator.addresses import Reach, dialled_address, reach


@pytest.mark.parametrize(
    ("addresses", "who"),
    [
        (("127.0.0.1:41000",), "machine"),
        (("localhost:41000", "[::1]:1"), "machine"),
        (("192.168.1.5:41000",), "network"),
        (("127.0.0.1:41000", "10.0.0.1:41000"), "network"),
        (("10.0.0.1:41000", "8.8.8.8:41000"), "anyone"),
        (("training.example.org:41000",), "anyone"),
        (("coordinator:41000",), "anyone"),
        (("[2600::1]:41000",), "anyone"),
    ],
)
def test_who_can_dial(addresses: tuple[str, ...], who: Reach) -> None:
    assert [dialled_address(address) for address in addresses] == list(addresses)
    assert reach(addresses) == who


def test_a_ticket_for_one_machine_comes_with_a_warning() -> None:
    assert reach_warning(("127.0.0.1:41000",)).startswith("only this machine can join")
    assert "--address HOST:PORT" in reach_warning(("127.0.0.1:41000",))
    assert reach_warning(("192.168.0.2:1",)).startswith("only machines of the same network")
    assert not reach_warning(("training.example.org:41000",))
