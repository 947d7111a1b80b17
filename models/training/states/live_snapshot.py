"""A training state that is written while training goes on, almost without a copy.

Forward and backward passes do not change weights, moments and averages; only the update at the end of a step does. So a writer
reads the live tensors, one after another, while the next step computes its gradients. The update waits for what is not read yet.
At most `spare` bytes of it are copied instead, so that the update does not wait for the last tensors. A copy of the whole state
would need as much memory again as the state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lutetia.models.training.checkpoint_io import Snapshot

_LOOK = 0.2  # seconds between looks at whether the wait still makes sense


@dataclass
class LiveSnapshot(Snapshot):
    """A snapshot whose tensors are those that are trained. One thread reads it; the trainer calls `before_update`."""

    spare: int = 0
    """Bytes of tensors that may be copied so that an update need not wait."""
    waited: float = 0.0
    """Seconds for which updates had to wait."""
    _unread: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _copies: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _current: int | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)
    _updated: bool = False
    _stream: torch.cuda.Stream | None = None

    def __post_init__(self) -> None:
        live = list(self.packed.values()) or [*self.parameters.values(), *self.ema.values(), *self.moments.values()]
        self._unread = {id(tensor): tensor for tensor in live}
        devices = {tensor.device for tensor in self.ema.values() if tensor.device.type == "cuda"}
        for device in devices:  # copies to the host go beside the next step's kernels, after what is queued now
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def nbytes(self) -> int:
        """Bytes of a local state."""
        return sum(tensor.nbytes for part in (self.parameters, self.ema, self.moments) for tensor in part.values())

    @contextmanager
    def reading(self, tensor: Tensor) -> Iterator[Tensor]:
        """Gives the tensor's values on the CPU. They do not change within the block."""
        key = id(tensor)
        with self._changed:
            copy = self._copies.pop(key, None)
            self._current = key if copy is None and key in self._unread else None
        try:
            yield self._on_host(tensor) if copy is None else copy
        finally:
            with self._changed:
                self._current = None
                self._unread.pop(key, None)
                self._changed.notify_all()

    def rewind(self) -> bool:
        """Whether no update has come yet, so that it can be read once more; then all of it counts as unread."""
        with self._changed:
            if not self._updated:
                self.__post_init__()
            return not self._updated

    def release(self) -> None:
        """It is read, or no longer wanted: updates need not wait any more."""
        with self._changed:
            self._unread.clear()
            self._copies.clear()
            self._changed.notify_all()

    def before_update(self, may_wait: Callable[[], bool]) -> bool:
        """Call it before the tensors change. Waits until they are read, or copied. False: `may_wait` said no meanwhile."""
        begun = time.monotonic()
        with self._changed:
            while sum(tensor.nbytes for key, tensor in self._unread.items() if key != self._current) > self.spare:
                if not may_wait():
                    return False
                self._changed.wait(_LOOK)
            for key in [key for key in self._unread if key != self._current]:
                self._copies[key] = self.values(self._unread.pop(key)).to("cpu", copy=True)
            while self._unread and may_wait():  # the tensor that is being read
                self._changed.wait(_LOOK)
            self._updated = not self._unread
        self.waited += time.monotonic() - begun
        return self._updated

    def _on_host(self, tensor: Tensor) -> Tensor:
        if self._stream is None:
            return self.values(tensor)
        with torch.cuda.stream(self._stream):
            return self.values(tensor).to("cpu")
