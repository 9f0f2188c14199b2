"""Where the intermediate tensors of a call lie in the one reservation that it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

# Of every tensor: enough for TMA, the libraries, and a line of L2.
ALIGNMENT = 256


class Place(NamedTuple):
    """A tensor inside of the reservation, contiguous."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """Names of the intermediate tensors and their places, which are a function of the shapes alone.

    Attributes
    ----------
    places : dict[str, Place]
    bytes : int
        Of the whole reservation.
    """

    __slots__ = ("places", "bytes")

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.bytes = 0

    def reserve(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Add a tensor behind all that are there."""
        self.overlay(name, self.bytes, shape, dtype)
        end = self.bytes + self.places[name].bytes
        self.bytes = -(-end // ALIGNMENT) * ALIGNMENT

    def overlay(self, name: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Name what lies at ``offset`` already, as a part of another tensor or as its memory used once more."""
        assert name not in self.places, name
        self.places[name] = Place(offset, shape, dtype)

    def tensors(self, memory: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Views of ``memory``, bytes that start at an aligned address."""
        return {
            name: memory[place.offset : place.offset + place.bytes].view(place.dtype).view(place.shape)
            for name, place in self.places.items()
        }
