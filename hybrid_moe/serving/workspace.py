"""Memory for the intermediate tensors of layers that are promised not to take more than a number of tokens.

A piece belongs to one stream of a device. All layers of that device share it, as a stream runs their kernels one after
another, so that a model of sixty layers reserves it once. Its lock is held while a call is launched: threads that
share a stream launch their calls one by one, each whole. A captured graph has none of it: see `Workspaces.piece`.
"""

from __future__ import annotations

import threading
import weakref

import torch


class Piece:
    """The memory of one stream, and the lock to hold from a call's first launch to its last."""

    __slots__ = ("lock", "memory")

    def __init__(self, memory: torch.Tensor) -> None:
        self.lock = threading.Lock()
        self.memory = memory


class Workspaces:
    """The pieces of one device, as large as the largest that a layer has asked for.

    They live as long as a layer that holds this object.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes = 0
        self._lock = threading.Lock()
        self._pieces: dict[int, Piece] = {}

    @staticmethod
    def of(device: torch.device) -> Workspaces:
        """Those that the layers of a device share."""
        with _LOCK:
            found = _OF_DEVICE.get(device)
            if found is None:
                found = _OF_DEVICE[device] = Workspaces(device)
            return found

    def grow(self, size: int) -> None:
        """Make every piece that is taken from now on hold ``size`` bytes."""
        with self._lock:
            self._bytes = max(self._bytes, size)

    def piece(self) -> Piece | None:
        """The memory of the current stream, reserved when it is first asked for.

        None while a graph is captured: what is reserved in a capture comes from the graph's own pool and stays its own,
        so that a replay may run beside calls on other streams.
        """
        if self._device.type != "cuda":
            stream = 0
        elif torch.cuda.is_current_stream_capturing():
            return None
        else:
            stream = torch.cuda.current_stream(self._device).cuda_stream
        piece = self._pieces.get(stream)
        if piece is None or piece.memory.numel() < self._bytes:
            with self._lock:
                piece = self._pieces.get(stream)
                if piece is None or piece.memory.numel() < self._bytes:
                    # What it replaces may still be in use by the stream: its memory is handed on in the stream's order.
                    piece = Piece(torch.empty(self._bytes, dtype=torch.uint8, device=self._device))
                    self._pieces[stream] = piece
        return piece


_LOCK = threading.Lock()
_OF_DEVICE: weakref.WeakValueDictionary[torch.device, Workspaces] = weakref.WeakValueDictionary()
