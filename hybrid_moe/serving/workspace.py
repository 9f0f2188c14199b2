"""Memory for the intermediate tensors of layers that are promised not to take more than a number of tokens.

A piece belongs to one stream of a device. All layers of that device share it, as a stream runs their kernels one after
another, so that a model of sixty layers reserves it once. Threads that share a stream launch their calls one by one,
each whole: see `Piece.run`. A captured graph has none of it: see `Workspaces.piece`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Piece:
    """The memory of one stream, for one call at a time from its first launch to its last."""

    __slots__ = ("_lock", "busy", "memory")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        # Reentrant: a signal handler, a finaliser or what a launch calls may itself call a layer on this stream.
        self._lock = threading.RLock()
        self.busy = False

    def run(self, launch: Callable[[torch.Tensor | None], Result]) -> Result:
        """What ``launch`` returns, given the memory; given None in the middle of another call of the same thread."""
        with self._lock:
            if self.busy:
                return launch(None)
            try:
                self.busy = True
                return launch(self.memory)
            finally:
                self.busy = False


class Workspaces:
    """The pieces of one device, as large as the largest that a layer has asked for.

    They live as long as a layer that holds this object.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.renew()

    def renew(self, size: int = 0) -> None:
        """Forget all pieces; those taken from now on hold ``size`` bytes.

        The memory of one that is in use is handed on in its stream's order, once the call that has it is launched.
        """
        # One reference, so that a piece is always found with its size.
        self._state: tuple[int, dict[int, Piece]] = size, {}

    @staticmethod
    def of(device: torch.device) -> Workspaces:
        """Those that the layers of a device share."""
        with _LOCK:
            found = _OF_DEVICE.get(device)
            if found is None:
                found = _OF_DEVICE[device] = Workspaces(device)
            return found

    @property
    def size(self) -> int:
        """Bytes of every piece that is taken from now on."""
        return self._state[0]

    def grow(self, size: int) -> None:
        """Make every piece that is taken from now on hold ``size`` bytes."""
        with _LOCK:
            if size > self.size:
                self.renew(size)

    def piece(self) -> Piece | None:
        """The memory of the current stream, reserved when it is first asked for.

        None while a graph is captured: what is reserved in a capture comes from the graph's own pool and stays its own,
        so that a replay may run while calls do so on other streams.
        """
        if self._device.type != "cuda":
            stream = 0
        elif torch.cuda.is_current_stream_capturing():
            return None
        else:
            stream = torch.cuda.current_stream(self._device).cuda_stream
        size, pieces = self._state
        piece = pieces.get(stream)
        if piece is None:
            # Without a lock, as reserving may run anybody's finalisers; of threads that come at once one's is kept.
            piece = pieces.setdefault(stream, Piece(torch.empty(size, dtype=torch.uint8, device=self._device)))
        return piece


# Nothing but a few assignments is done under it. Reentrant, for a signal handler that makes a layer.
_LOCK = threading.RLock()
_OF_DEVICE: weakref.WeakValueDictionary[torch.device, Workspaces] = weakref.WeakValueDictionary()


def _after_fork_in_child() -> None:
    # Locks may be held by threads that are not in the child, in the middle of calls that nobody ends.
    global _LOCK
    _LOCK = threading.RLock()
    for workspaces in _OF_DEVICE.values():
        workspaces.renew(workspaces.size)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
