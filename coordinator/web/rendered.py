"""The status document as bytes, made once however many ask."""

from __future__ import annotations

from collections.abc import Callable

from lutetia.protocol.schema.status import SwarmStatus


class Rendered:
    """The newest status document as bytes, rendered once per document, however many ask for it."""

    def __init__(self, produce: Callable[[], SwarmStatus], render: Callable[[SwarmStatus], bytes]) -> None:
        self._produce, self._render = produce, render
        self._of: SwarmStatus | None = None
        self._data = b""

    def latest(self) -> bytes:
        status = self._produce()
        if status is not self._of:
            self._data, self._of = self._render(status), status
        return self._data
