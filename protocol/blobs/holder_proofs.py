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

ASKED_PER_LOOK = 4
"""Peers that are asked for a chunk at one look, per checkpoint."""
PROVED_SECONDS, FAILED_SECONDS = 900.0, 120.0
"""How long an answer counts, and how long a peer that gave none is not asked again."""
_ANSWER_TIMEOUT = 20.0
_AT_ONCE = 4
_MOST_ANSWERS = 4096


@dataclass
class HolderProofs:
    """The answers of one reader's questions.

    Each costs a chunk (1 MiB) and a chunk table, so few peers are asked at a look; who was not asked yet does not count.
    """

    _answers: dict[tuple[str, frozenset[str]], tuple[float, bool]] = field(default_factory=dict)
    """(peer id, digests) -> when it was asked, and whether it answered."""

    async def proved(self, transport: Transport, candidates: Sequence[Provider], refs: Sequence[BlobRef]) -> set[str]:
        """The peer ids of those of `candidates` that hold all of `refs`, as far as is known after asking some more.

        Peers are asked in random order: liars cannot come first.
        """
        now, digests = transport.now(), frozenset(ref.digest for ref in refs)
        self._forget(now)
        new = [provider for provider in candidates if (provider.peer_id, digests) not in self._answers]
        asked = random.sample(new, min(ASKED_PER_LOOK, len(new)))

        async def ask(provider: Provider) -> None:
            self._answers[provider.peer_id, digests] = now, await holds_all(transport, provider, refs)

        await gather_bounded(ask, asked, _AT_ONCE)
        return {provider.peer_id for provider in candidates if self._answers.get((provider.peer_id, digests), (0, False))[1]}

    def _forget(self, now: float) -> None:
        def counts(asked: float, held: bool) -> bool:
            return abs(now - asked) < (PROVED_SECONDS if held else FAILED_SECONDS)

        live = {key: entry for key, entry in self._answers.items() if counts(*entry)}
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
