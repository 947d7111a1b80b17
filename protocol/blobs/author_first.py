"""Fetch a blob from the peer that offers it, while other providers are still looked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from lutetia.protocol.blobs.download import fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.worker import Progress, Provider
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import IntegrityError, UnreachableError

LOOK_AFTER = 1.0
"""Seconds that the author has alone."""


async def fetch_author_first(
    transport: Transport,
    store: BlobStore,
    ref: BlobRef,
    author: Provider,
    others: Callable[[], Awaitable[Sequence[Provider]]],
    on_progress: Progress | None = None,
) -> Path:
    """Fetch `ref` into `store` from `author`, and from what `others` finds where that is not done by then.

    A look-up in the DHT can take seconds and costs messages to many peers, and made-up neighbours make it take more. So it begins
    only when the author has failed, or has not sent everything within LOOK_AFTER seconds.

    Args:
        transport: How to reach the providers.
        store: Where the blob goes.
        ref: The blob.
        author: The peer that offers it.
        others: Looks for further providers.
        on_progress: Called with (bytes arrived, bytes in all).

    Raises as `fetch_blob`, and what `others` raises where the author does not serve it.
    """
    fetching = asyncio.ensure_future(fetch_blob(transport, store, ref, [author], on_progress))

    async def look() -> Sequence[Provider]:
        await asyncio.wait((fetching,), timeout=LOOK_AFTER)
        return () if fetching.done() and not fetching.cancelled() and fetching.exception() is None else await others()

    looking = asyncio.ensure_future(look())
    try:
        await asyncio.wait((fetching, looking), return_when=asyncio.FIRST_COMPLETED)
        found = () if fetching.done() or looking.exception() else looking.result()
        if not found:
            try:
                return await fetching
            except (UnreachableError, IntegrityError, ConnectionError):
                found = await looking
                if not found:
                    raise
    finally:
        for task in (fetching, looking):
            task.cancel()
        await asyncio.gather(fetching, looking, return_exceptions=True)
    return await fetch_blob(transport, store, ref, [author, *found], on_progress)
