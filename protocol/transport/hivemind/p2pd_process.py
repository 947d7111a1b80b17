"""One p2pd process: it has this peer's identity and a private folder of sockets, and the kernel kills it with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.hivemind.bindings import P2PD
from lutetia.protocol.transport.hivemind.own_dials import Allows, OwnDials, descriptor_of
from lutetia.protocol.transport.hivemind.p2pd_client import P2pdClient
from lutetia.system.errors import IdentityError, UnreachableError
from lutetia.system.files import disk_errors, write_atomic
from lutetia.system.tether import command

log = logging.getLogger(__name__)

START_TIMEOUT = 20.0
_IDLE_TIMEOUT = "0s" if sys.platform.startswith("linux") else "60s"
"""How long p2pd lives without a DHT client. Where the kernel does not kill it with its parent, this ends it."""
_LONGEST_SOCKET_PATH = 100  # bytes; Linux takes 107, macOS 103


@dataclass(frozen=True)
class Reachability:
    """How a peer makes itself reachable from outside.

    Attributes:
        nat_port_map: ask the router for a port (UPnP).
        auto_nat: tell other peers whether they can be dialled.
        relay: be reached through circuit relays, and be one for whoever asks: p2pd cannot do the first alone.
        auto_relay: ask `trusted_relays` for a place while nobody can dial this peer.
        trusted_relays: addresses with peer ids.
        no_listen: listen nowhere.
    """

    nat_port_map: bool = True
    auto_nat: bool = True
    relay: bool = False
    auto_relay: bool = False
    trusted_relays: tuple[str, ...] = ()
    no_listen: bool = False

    @classmethod
    def of(cls, listen: str) -> Reachability:
        """Everything off for a loopback address, so that nothing outside is asked; else the defaults."""
        host = listen.split("/")[2] if listen.count("/") >= 2 else ""
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host).is_loopback:
                return cls(nat_port_map=False, auto_nat=False)
        return cls()

    def arguments(self) -> list[str]:
        switches = {"natPortMap": self.nat_port_map, "autonat": self.auto_nat, "relay": self.relay, "autoRelay": self.auto_relay}
        arguments = [f"-{name}={int(on)}" for name, on in switches.items()]
        if self.trusted_relays:
            arguments.append("-trustedRelays=" + ",".join(self.trusted_relays))
        return [*arguments, "-noListenAddrs"] if self.no_listen else arguments


class P2pdProcess:
    """A running p2pd and `control`, the client of its socket. Make it with `start`."""

    def __init__(
        self, process: asyncio.subprocess.Process, sockets: _SocketFolder, peer_id: str, own_dials: OwnDials | None = None
    ) -> None:
        self.process, self.own_dials = process, own_dials
        self.control = P2pdClient(str(sockets.path), peer_id)
        self._sockets = sockets
        self._output: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        identity: Identity,
        listen: str,
        state_folder: Path,
        reach: Reachability | None = None,
        announce: Sequence[str] = (),
        allows: Allows | None = None,
    ) -> P2pdProcess:
        """Start p2pd under `identity`. `allows`: where it may dial; None: anywhere.

        Raises UnreachableError (the listen address is taken or invalid, or p2pd does not start) or IdentityError (the state
        folder is in use).
        """
        _require_free(listen)
        sockets = _SocketFolder(state_folder)
        try:
            process, own_dials = await _spawn(identity, listen, sockets, reach or Reachability.of(listen), announce, allows)
            daemon = cls(process, sockets, identity.peer_id, own_dials)
        except BaseException:
            sockets.remove()  # or the lock of this process would block its next attempt
            raise
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await daemon._wait_until_ready(listen)
        except TimeoutError as error:
            await daemon.close()
            raise UnreachableError(f"p2pd did not start within {START_TIMEOUT:.0f} s; is this machine overloaded?") from error
        except BaseException:
            await daemon.close()
            raise
        finally:
            _key_file(sockets).unlink(missing_ok=True)
        return daemon

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    async def close(self, hung: bool = False) -> None:
        """End the handlers and p2pd, and remove its folder. A `hung` p2pd is killed at once. Idempotent."""
        await self.control.close()
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                (self.process.kill if hung else self.process.terminate)()
        try:
            async with asyncio.timeout(5):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        if self._output:
            await asyncio.gather(self._output, return_exceptions=True)
        if self.own_dials:
            self.own_dials.close()
        self._sockets.remove()

    async def _wait_until_ready(self, listen: str) -> None:
        assert self.process.stdout
        output = []
        while line := (await self.process.stdout.readline()).decode(errors="replace").strip():
            output.append(line)
            if line.startswith("Peer ID:"):
                self._output = asyncio.create_task(self._log_output(self.process.stdout))
                return
        raise UnreachableError(_why_not_listening(listen, " ".join(output)))

    async def _log_output(self, output: asyncio.StreamReader) -> None:
        async for line in output:
            log.debug("p2pd: %s", line.decode(errors="replace").strip())


async def _spawn(
    identity: Identity, listen: str, sockets: _SocketFolder, reach: Reachability, announce: Sequence[str], allows: Allows | None
) -> tuple[asyncio.subprocess.Process, OwnDials | None]:
    key, config = _key_file(sockets), sockets.path / "config.json"
    write_atomic(key, identity.libp2p_bytes(), mode=0o600)
    # -relay=0 alone does nothing: p2pd then takes its default, which is a relay for every libp2p peer of the world
    write_atomic(config, json.dumps({"Relay": {"Enabled": reach.relay}}).encode())
    # noise alone secures connections, as fast as TLS here: strangers then reach no certificate parser of an old Go
    arguments = [
        f"-f={config}", f"-id={key}",
        f"-listen=/unix{sockets.path}/control.sock", f"-hostAddrs={listen}", "-dhtServer", "-connManager=1",
        f"-idleTimeout={_IDLE_TIMEOUT}", "-tls=0", *reach.arguments(),
    ]  # fmt: skip
    if announce:
        arguments.append("-announceAddrs=" + ",".join(announce))
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            limited = allows is not None and sys.platform == "linux"
            process = await _executed(arguments, theirs.fileno() if limited else -1)
        if allows is None or not limited:
            return process, None
        await _readable(ours)  # it sends something or ends
        listener = descriptor_of(ours)
    if listener is None:
        log.info("this machine cannot limit what p2pd dials by itself: its kernel or container offers no seccomp filter for that")
        return process, None
    return process, OwnDials(listener, process.pid, allows, map_ports=reach.nat_port_map)


async def _executed(arguments: Sequence[str], report: int) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command(P2PD, *arguments, report=report), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, env={"GOLOG_LOG_LEVEL": "error", **os.environ}, limit=1 << 20,
            start_new_session=True,  # Ctrl-C ends this process only: it still needs the network to say goodbye
            pass_fds=[report] if report >= 0 else [],
        )  # fmt: skip
    except OSError as error:
        raise UnreachableError(f"p2pd cannot be started ({error.strerror}); free memory or processes and try again") from error


async def _readable(channel: socket.socket) -> None:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(channel, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(channel)


def _key_file(sockets: _SocketFolder) -> Path:
    return sockets.path / "identity"


class _SocketFolder:
    """A private folder for sockets inside the state folder, cleared at every start because a killed process leaves its own.

    `path` is short enough for a socket. If the real path is too long, it leads through an open descriptor of this process.
    """

    def __init__(self, state_folder: Path) -> None:
        """Raises IdentityError while another process uses `state_folder`."""
        home = state_folder.resolve()
        self._folder, self._descriptor = home / "p2pd", -1
        self.path = self._folder
        with disk_errors(self._folder):
            home.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(home / "p2pd.lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._claim(home)
            try:
                self._make()
            except BaseException:
                self.remove()
                raise

    def _make(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        if len(os.fsencode(self._folder / "control.sock")) > _LONGEST_SOCKET_PATH:
            self.path = self._short_path()

    def remove(self) -> None:
        """Clear the folder and unlock the state folder. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._descriptor >= 0:
                os.close(self._descriptor)
            elif self.path != self._folder:
                self.path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def _short_path(self) -> Path:
        if sys.platform.startswith("linux"):
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        link = Path(tempfile.gettempdir()) / f"lutetia-{hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:16]}"
        link.unlink(missing_ok=True)
        link.symlink_to(self._folder)
        return link

    def _claim(self, home: Path) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise IdentityError(f"another process uses the state folder {home}; stop it or choose another folder") from error


def _require_free(listen: str) -> None:
    """Raises UnreachableError for a taken port. Two p2pd of one user would share it (SO_REUSEPORT) and mix up their peers."""
    match = re.fullmatch(r"/ip([46])/([^/]+)/tcp/(\d+)", listen)
    if match is None:
        raise UnreachableError(f"cannot listen on {listen}; give an address such as /ip4/0.0.0.0/tcp/41000")
    family = socket.AF_INET if match[1] == "4" else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((match[2], int(match[3])))
        except (OSError, OverflowError) as error:
            raise UnreachableError(_why_not_listening(listen, str(error))) from error


def _why_not_listening(listen: str, reported: str) -> str:
    if "in use" in reported:
        return f"cannot listen on {listen}: another program holds the port; stop it or choose another port with --listen"
    if "assign" in reported:
        return f"cannot listen on {listen}: this machine has no such address; choose one of its own or /ip4/0.0.0.0/tcp/0"
    if "ermission" in reported:
        return f"cannot listen on {listen}: not permitted; choose a port above 1023"
    return f"cannot listen on {listen}: {reported or 'p2pd ended without an error'}; choose another address with --listen"
