"""Fixes for hivemind's client of p2pd: no peer or cancellation can end its reader, and finished calls are forgotten."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from lutetia.protocol.transport.hivemind.bindings import P2P


class _PendingCalls(dict[UUID, "asyncio.Future[Any]"]):
    """Outgoing calls. The reader sets the result of a call in here; a second result, or one after a cancellation, would end it.

    A call that is done therefore does not count as contained, although its caller has not removed it yet.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)  # type: ignore[call-overload]  # any object may be looked up
        return future is not None and not future.done()


class _HandlerTasks(dict[UUID, "asyncio.Task[Any]"]):
    """Incoming calls. hivemind does not remove those that fail, are cancelled or do not fit into a message."""

    def __setitem__(self, call_id: UUID, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


def apply_fixes(p2p: P2P) -> None:
    """Apply both fixes. Call it before the first call in either direction."""
    control = _control(p2p)
    control._pending_calls, control._handler_tasks = _PendingCalls(control._pending_calls), _HandlerTasks(control._handler_tasks)


def responsive(p2p: P2P) -> bool:
    """Whether calls still work. If not, p2pd or hivemind has a fault that only a restart of the transport repairs."""
    control = _control(p2p)
    return not (control._read_task.done() or control._write_task.done())


def _control(p2p: P2P) -> Any:
    client: Any = p2p._client
    return client.control
