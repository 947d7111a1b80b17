"""Real p2pd processes: how they start and fail to start, and that none is left behind."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from lutetia.protocol.dht_records import publish
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import claim_key
from lutetia.protocol.transport import reachability
from lutetia.protocol.transport.hivemind import p2pd_process
from lutetia.protocol.transport.hivemind.bindings import DHTID, DictionaryDHTValue, PeerID
from lutetia.protocol.transport.hivemind.dht.node import _plausible
from lutetia.protocol.transport.hivemind.dht.routing_table import position_of
from lutetia.protocol.transport.hivemind.dht.storage import merged
from lutetia.protocol.transport.hivemind.p2pd_client import outside_addresses
from lutetia.protocol.transport.hivemind.p2pd_process import Reachability
from lutetia.system.errors import BootstrapError, DiskError, IdentityError, UnreachableError
from tests.protocol.example_documents import records
from tests.protocol.networks import LOOPBACK, manifest_of_now, until
from tests.protocol.transport.hivemind.p2pd_peer import ANNA, BEN, litter, peer

NOBODY = Identity.derived("nobody").peer_id
LIBRARIES = ("lutetia.protocol.light_client.bindings", "lutetia.protocol.transport.hivemind.bindings")


async def test_a_taken_port_is_refused_with_its_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        listen = f"/ip4/127.0.0.1/tcp/{holder.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=rf"{listen}: another program holds the port; .*--listen"):
            await peer("anna", tmp_path, manifest_of_now(), listen)
    assert list((tmp_path / "anna").glob("p2pd/*")) == []


async def test_two_peers_cannot_share_a_port_or_a_state_folder(tmp_path: Path) -> None:
    """p2pd itself would allow it, because it listens with SO_REUSEPORT."""
    run = manifest_of_now()
    anna = await peer("anna", tmp_path, run)
    try:
        with pytest.raises(UnreachableError, match="holds the port"):
            await peer("ben", tmp_path, run, anna.addresses()[0].partition("/p2p/")[0])
        with pytest.raises(IdentityError, match="another process uses the state folder"):
            await peer("anna", tmp_path, run)
        assert anna.alive()
        assert await anna.get(claim_key(run.run_id, 0)) == {}
    finally:
        await anna.close()
    await (await peer("anna", tmp_path, run)).close()


@pytest.mark.parametrize(
    ("listen", "says"),
    [
        ("/ip4/198.51.100.7/tcp/0", "no such address"),
        ("/ip4/127.0.0.1/udp/0/quic-v1", "give an address such as"),
        ("/ip4/127.0.0.1/tcp/99999", "cannot listen on"),
    ],
)
async def test_an_impossible_address_is_refused(tmp_path: Path, listen: str, says: str) -> None:
    with pytest.raises(UnreachableError, match=says):
        await peer("anna", tmp_path, manifest_of_now(), listen)


async def test_dead_bootstraps_are_named_with_their_reasons(tmp_path: Path) -> None:
    run = manifest_of_now()
    anna = await peer("anna", tmp_path, run)
    refused, wrong = f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}", anna.addresses()[0].replace(anna.peer_id, BEN.peer_id)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        deaf = f"/ip4/127.0.0.1/tcp/{stranger.getsockname()[1]}/p2p/{ANNA.peer_id}"
        with pytest.raises(BootstrapError) as caught:
            await peer("cleo", tmp_path, run, bootstrap=[refused, wrong, deaf])
    text = str(caught.value)
    assert f"{refused}: connection refused" in text
    assert f"{wrong}: wrong peer id" in text
    assert f"{deaf}: something answers there that is not a Lutetia peer" in text
    assert caught.value.code == 30
    await anna.close()


async def test_one_bootstrap_that_lives_is_enough(tmp_path: Path) -> None:
    run = manifest_of_now()
    anna = await peer("anna", tmp_path, run)
    ben = await peer("ben", tmp_path, run, bootstrap=[f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}", *anna.addresses()])
    assert await ben.neighbours() == [anna.peer_id]
    await ben.close()
    await anna.close()


async def test_its_own_address_among_the_bootstraps_is_ignored(tmp_path: Path) -> None:
    """A coordinator may start with its own ticket."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    own = f"/ip4/127.0.0.1/tcp/{port}/p2p/{ANNA.peer_id}"
    anna = await peer("anna", tmp_path, manifest_of_now(), own.partition("/p2p/")[0], bootstrap=[own])
    assert anna.addresses() == [own]
    await anna.close()


FAILED = "all dials failed\n  * [/ip4/1.2.3.4/tcp/4001]"


@pytest.mark.parametrize(
    ("host", "reported", "says"),
    [
        ("dns4/swarm.example", "failed to dial: failed to dial 12D3: no good addresses", "does not resolve"),
        ("ip4/0.0.0.0", "failed to dial: failed to dial 12D3: no good addresses", "no host can have that"),
        ("ip4/1.2.3.4", f"{FAILED} dial tcp4 1.2.3.4:4001: connect: no route to host", "no route"),
        ("ip4/1.2.3.4", f"{FAILED} dial tcp4 1.2.3.4:4001: i/o timeout", "no answer in time"),
        ("ip4/1.2.3.4", f"{FAILED} dial backoff", "no answer a moment ago"),
        ("ip4/1.2.3.4", "p2pd did not answer within 9 s", "no answer in time"),
        ("ip4/1.2.3.4", f"{FAILED} a new kind of error", "a new kind of error"),
    ],
)  # fmt: skip
def test_each_kind_of_failed_dial_has_its_reason(host: str, reported: str, says: str) -> None:
    assert says in reachability.why_unreachable(f"/{host}/tcp/4001/p2p/{NOBODY}", reported)


@pytest.mark.parametrize("host", ["dns4/a..b", f"dns4/{'a' * 64}.example", "dns/.", "ip4/a..b", "ip4/999.1.1.1"])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_an_impossible_host_is_unreachable(host: str, run: Callable[..., Any]) -> None:
    """Own records of earlier versions may hold such names. Resolving them raises UnicodeError."""
    for port in ("4001", "99999"):
        address = f"/{host}/tcp/{port}/p2p/{NOBODY}"
        assert reachability.why_unreachable(address, "dial failed")
        assert not run(reachability.answers(address))


@pytest.mark.parametrize(("security", "answer"), [("/tls/1.0.0", "na"), ("/noise", "/noise")])
async def test_strangers_reach_noise_and_not_the_certificates_of_tls(tmp_path: Path, security: str, answer: str) -> None:
    """By multistream-select: every message is its length, its text and a newline."""
    anna = await peer("anna", tmp_path, manifest_of_now())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(anna.addresses()[0].split("/")[4]))
    for text in ("/multistream/1.0.0", security):
        writer.write(bytes([len(text) + 1]) + text.encode() + b"\n")
    async with asyncio.timeout(60):
        answers = [(await reader.readexactly((await reader.readexactly(1))[0])).decode().strip() for _ in range(2)]
    assert answers == ["/multistream/1.0.0", answer]
    writer.close()
    await anna.close()


async def test_closing_leaves_nothing_but_a_lock_file(tmp_path: Path) -> None:
    before = litter()
    anna = await peer("anna", tmp_path, manifest_of_now())
    await anna.serve("/test/any", lambda stream: stream.close())
    await anna.close()
    assert [path.name for path in (tmp_path / "anna").iterdir()] == ["p2pd.lock"]
    assert litter() == before


async def test_a_long_state_folder_works(tmp_path: Path) -> None:
    """The path of a Unix socket must be short."""
    run, before = manifest_of_now(), litter()
    folder = tmp_path / ("long" * 30)
    anna = await peer("anna", folder, run)
    ben = await peer("ben", folder, run, bootstrap=anna.addresses())
    try:
        await anna.serve("/test/hello", lambda stream: stream.write(b"hello"))
        stream = await ben.open_stream(anna.peer_id, "/test/hello")
        assert await stream.read_exactly(5) == b"hello"
        await stream.close()
    finally:
        await ben.close()
        await anna.close()
    assert litter() == before
    assert {path.name for path in folder.rglob("*")} == {"anna", "ben", "p2pd.lock"}


async def test_a_bootstrap_peer_that_comes_back_is_found_again(tmp_path: Path) -> None:
    run = manifest_of_now()
    anna = await peer("anna", tmp_path, run)
    listen = anna.addresses()[0].partition("/p2p/")[0]
    ben = await peer("ben", tmp_path, run, bootstrap=anna.addresses())
    await anna.close()
    await ben._maintain()
    assert await ben.neighbours() == []
    anna = await peer("anna", tmp_path, run, listen)

    async def together() -> bool:
        await ben._maintain()
        return await ben.neighbours() == [anna.peer_id] and await anna.neighbours() == [ben.peer_id]

    await until(together)
    claim = records(BEN, run.run_id)["claim"].model_copy(update={"issued": time.time()})
    assert await publish(ben, BEN, claim, 30)
    assert BEN.public_key in await anna.get(claim.key())
    await ben.close()
    await anna.close()


@pytest.mark.parametrize("listen", [LOOPBACK, "/ip6/::1/tcp/0", "/ip4/127.8.8.8/tcp/4000"])
def test_on_loopback_nothing_outside_is_asked(listen: str) -> None:
    assert Reachability.of(listen) == Reachability(nat_port_map=False, auto_nat=False)
    assert {"-natPortMap=0", "-autonat=0", "-relay=0", "-autoRelay=0"} == set(Reachability.of(listen).arguments())


def test_outside_loopback_a_peer_makes_itself_reachable() -> None:
    arguments = Reachability.of("/ip4/0.0.0.0/tcp/0").arguments()
    assert {"-natPortMap=1", "-autonat=1", "-relay=0"} <= set(arguments)
    assert "-trustedRelays=/a,/b" in Reachability(trusted_relays=("/a", "/b")).arguments()


def test_an_answer_expires_with_its_records() -> None:
    answer, expires = DictionaryDHTValue(), time.time() + 30
    answer.store("owner", b"value", expires)
    answer.latest_expiration_time = float("inf")
    believed = merged([answer])
    assert believed.latest_expiration_time == expires
    assert believed.entries() == [("owner", b"value", expires)]
    assert not merged([])


def test_loopback_addresses_are_not_published() -> None:
    here, lan = ["/ip4/127.0.0.1/tcp/1/p2p/X", "/ip6/::1/tcp/1/p2p/X"], "/ip4/192.0.2.7/tcp/1/p2p/X"
    assert outside_addresses([*here, lan]) == [lan]
    assert outside_addresses(here) == here


def test_peers_at_wrong_positions_are_ignored() -> None:
    honest_peers = [PeerID.from_base58(Identity.derived(str(number)).peer_id) for number in range(60)]
    named = {position_of(peer): peer for peer in honest_peers}
    named[DHTID.generate(source=b"beside the key")] = PeerID.from_base58(NOBODY)
    assert _plausible(dict(reversed(named.items()))).keys() <= {position_of(peer) for peer in honest_peers}
    assert len(_plausible(named)) == 40


def test_the_dht_costs_neither_torch_nor_the_rest_of_hivemind() -> None:
    code = """if True:
        import sys, psutil, lutetia.protocol.transport.hivemind.transport
        print([m for m in ("torch", "scipy", "numpy", "hivemind.averaging", "hivemind.moe") if m in sys.modules])
        print(psutil.Process().memory_info().rss >> 20)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, megabytes = run.stdout.splitlines()
    assert loaded == "[]"
    assert int(megabytes) < 120


@pytest.mark.parametrize("modules", [LIBRARIES, LIBRARIES[::-1]], ids=["libp2p first", "hivemind first"])
def test_both_libp2p_libraries_fit_into_one_process(modules: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], check=True)


async def test_a_silent_p2pd_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec sleep 60\n")
    mute.chmod(0o755)
    monkeypatch.setattr(p2pd_process, "P2PD", str(mute))
    monkeypatch.setattr(p2pd_process, "START_TIMEOUT", 0.5)
    with pytest.raises(UnreachableError, match="did not start within"):
        await peer("anna", tmp_path, manifest_of_now())
    assert not list((tmp_path / "anna").glob("p2pd/*"))


@pytest.mark.parametrize("failing", ["write_atomic", "mkdir", "exec"])
async def test_a_failed_start_unlocks_the_state_folder(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When p2pd has died on a full disk, the same process must be able to start it again later."""

    def full(*_: object, **__: object) -> None:
        raise DiskError("no space left on device")

    def no_room(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "mkdir":
        (tmp_path / "anna").mkdir()
        monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: no_room() if path.name == "p2pd" else None)
    elif failing == "exec":
        monkeypatch.setattr(p2pd_process, "P2PD", str(tmp_path / "none"))
        monkeypatch.setattr(p2pd_process, "command", lambda *arguments, report: arguments)
    else:
        monkeypatch.setattr(p2pd_process, failing, full)
    with pytest.raises((DiskError, UnreachableError), match=r"(?i)no space left|cannot be started \(No such file"):
        await peer("anna", tmp_path, manifest_of_now())
    monkeypatch.undo()
    await (await peer("anna", tmp_path, manifest_of_now())).close()
