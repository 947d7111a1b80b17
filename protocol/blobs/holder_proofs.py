"""Which peers really hold a checkpoint. Provider records are only words, so a holder counts when it answered a random chunk."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from lutetia.protocol.async_helpers import gather_bounded
from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.blobs.stream import BLOB, BlobClient
from lutetia.protocol.blobs.worker import Provider
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import IntegrityError
from lutetia.system.retry import backoff

ASKED_PER_LOOK = 4
"""Peers that are asked for a chunk at one look, per checkpoint."""
PROVED_SECONDS = 900.0
"""How long an answer counts."""
FIRST_PAUSE, LONGEST_PAUSE = 120.0, 7200.0
"""How long a peer that gave none is not asked again: after each time twice as long."""
_ANSWER_TIMEOUT = 20.0
_AT_ONCE = 4
_MOST_ANSWERS = 4096


@dataclass
class HolderProofs:
    """The answers of one reader's questions.

    Each costs a chunk (1 MiB) and a chunk table, so few peers are asked at a look; who was not asked yet does not count.
    """

    _answers: dict[tuple[str, frozenset[str]], tuple[float, int]] = field(default_factory=dict)
    """(peer id, digests) -> when it was asked, and how often in a row it has given no answer."""

    async def proved(self, transport: Transport, candidates: Sequence[Provider], refs: Sequence[BlobRef]) -> set[str]:
        """The peer ids of those of `candidates` that hold all of `refs`, as far as is known after asking some more.

        Those go first that gave an answer before or were never asked, in random order: liars cannot come first twice.
        """
        now, digests = transport.now(), frozenset(ref.digest for ref in refs)
        self._forget(now)
        due = [provider.peer_id for provider in candidates if self._is_due(provider.peer_id, digests, now)]
        random.shuffle(due)
        due.sort(key=lambda peer: self._answers.get((peer, digests), (0.0, 0))[1])
        asked = [provider for provider in candidates if provider.peer_id in due[:ASKED_PER_LOOK]]

        async def ask(provider: Provider) -> None:
            key = provider.peer_id, digests
            failures = self._answers.pop(key, (now, 0))[1]
            self._answers[key] = now, 0 if await holds_all(transport, provider, refs) else failures + 1

        await gather_bounded(ask, asked, _AT_ONCE)
        return {peer for peer in (provider.peer_id for provider in candidates) if self._holds(peer, digests, now)}

    def _holds(self, peer: str, digests: frozenset[str], now: float) -> bool:
        asked, failures = self._answers.get((peer, digests), (0.0, 1))
        return not failures and abs(now - asked) < PROVED_SECONDS

    def _is_due(self, peer: str, digests: frozenset[str], now: float) -> bool:
        if (peer, digests) not in self._answers:
            return True
        asked, failures = self._answers[peer, digests]
        pause = backoff(failures, first=FIRST_PAUSE, longest=LONGEST_PAUSE) if failures else PROVED_SECONDS
        return abs(now - asked) >= pause

    def _forget(self, now: float) -> None:
        live = {key: entry for key, entry in self._answers.items() if abs(now - entry[0]) < 2 * LONGEST_PAUSE}
        self._answers = dict(list(live.items())[-_MOST_ANSWERS:])


async def holds_all(transport: Transport, provider: Provider, refs: Sequence[BlobRef]) -> bool:
    """Whether a peer sends a random chunk of each blob that matches its hash."""
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT):
            for ref in refs:
                await _ask_chunk(transport, provider, ref)
    except (OSError, EOFError, TimeoutError, IntegrityError):
        return False
    return True


async def _ask_chunk(transport: Transport, provider: Provider, ref: BlobRef) -> None:
    """Raises ConnectionError or IntegrityError."""
    stream = await transport.open_stream(provider.peer_id, BLOB, provider.addresses)
    client = BlobClient(stream, ref)
    try:
        table = ChunkTable.checked(ref, await client.table())
        if table.count:
            index, chunk = random.randrange(table.count), bytearray(CHUNK)
            await client.ask_chunks(index, 1)
            wanted = memoryview(chunk)[: table.chunk_size(index)]
            await client.read_into(wanted)
            client.finished()
            table.verify(index, wanted)
    finally:
        await client.close()
