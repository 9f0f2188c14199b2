"""Global memory, as late as the memory model allows it to be seen, and the shared memory of a program.

A store waits in its warp group until a release that follows a barrier, or the end of the kernel. An ordinary load sees
what was there before a store of another program until its warp group has acquired, and TMA until a proxy fence too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .values import EmulationError, Pointer, Tensor, made

POISON = 0x00FFFFFF  # far from every index and count, but times a small number still an int32


class Storage:
    """The memory behind one or several tensors, with who stored what and when."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
        self._views: dict[torch.dtype, torch.Tensor] = {}
        self.tracked = False

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it as elements."""
        if dtype not in self._views:
            self._views[dtype] = _elements(self._raw, dtype)
        return self._views[dtype]

    def _track(self) -> None:
        if not self.tracked:
            self.tracked = True
            self._before = self._raw.clone()
            self._stored_at = torch.zeros(self._raw.numel(), dtype=torch.int32)
            self._stored_by = torch.full((self._raw.numel(),), -1, dtype=torch.int32)
            self._kernel = torch.full((self._raw.numel(),), -1, dtype=torch.int16)

    def write(self, region: Region, index: torch.Tensor, values: Any, now: int, program: Any, once: bool) -> None:
        """Make a store visible; ``once``: a kernel stores an element no more than once."""
        self._track()
        view, size = self.view(region.dtype), region.dtype.itemsize
        where = index * size
        if once and bool((self._kernel[where] == program.kernel.number).any()):
            at = index[self._kernel[where] == program.kernel.number][0] - region.first
            raise EmulationError(f"{program} stores {region.name}[{int(at)}], which this kernel has stored already")
        _elements(self._before, region.dtype)[index] = view[index]
        view[index] = values
        end = self._raw.numel() // size * size
        self._stored_at[:end].view(-1, size)[index] = now
        self._stored_by[:end].view(-1, size)[index] = program.number
        if once:
            self._kernel[:end].view(-1, size)[index] = program.kernel.number

    def read(self, dtype: torch.dtype, index: torch.Tensor, seen: int | None, program: int = -1) -> torch.Tensor:
        """Elements as they were at time ``seen``, or None for now; the program's own are as they are."""
        values = self.view(dtype)[index]
        if seen is None or not self.tracked:
            return values
        where = index * dtype.itemsize
        stale = (self._stored_at[where] > seen) & (self._stored_by[where] != program)
        if bool(stale.any()):
            values[stale] = _elements(self._before, dtype)[index[stale]]
        return values


def _elements(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


class Huge:
    """In the place of a tensor that no memory holds: ``values`` over and over; ``stored`` is what was stored."""

    def __init__(self, elements: int, values: torch.Tensor) -> None:
        self.elements, self.dtype, self._values = elements, values.dtype, values.flatten()
        self.stored: dict[int, float] = {}

    def data_ptr(self) -> int:
        """Aligned, as a descriptor wants it."""
        return 0

    def read(self, dtype: torch.dtype, index: torch.Tensor, seen: int | None, program: int = -1) -> torch.Tensor:
        """The values over and over."""
        return self._values[index % self._values.numel()]

    def write(self, region: Region, index: torch.Tensor, values: Any, now: int, program: Any, once: bool) -> None:
        """Keep them."""
        self.stored.update(zip(index.tolist(), values.tolist(), strict=True))


class Region:
    """A tensor that a kernel has as an argument."""

    def __init__(self, name: str, tensor: torch.Tensor | Huge, storage: Storage | Huge) -> None:
        self.name, self.dtype, self.storage = name, tensor.dtype, storage
        if isinstance(tensor, Huge):
            self.first, self.end = 0, tensor.elements
            return
        self.first = tensor.storage_offset()
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.end = self.first + (span if tensor.numel() else 0)

    def index(self, offsets: torch.Tensor) -> torch.Tensor:
        """Of the elements in the storage, checked."""
        index = offsets + self.first
        if index.numel():
            low, high = torch.aminmax(index)
            if int(low) < self.first or int(high) >= self.end:
                bad = int(low if int(low) < self.first else high) - self.first
                raise EmulationError(f"{self.name}[{bad}] is outside of its {self.end - self.first} elements")
        return index


class GlobalMemory:
    """All storages, and a clock that every visible store advances."""

    def __init__(self) -> None:
        self._storages: dict[int, Storage] = {}
        self.now = 0

    def region(self, name: str, tensor: torch.Tensor | Huge) -> Region:
        """Of an argument."""
        if isinstance(tensor, Huge):
            return Region(name, tensor, tensor)
        key = tensor.untyped_storage().data_ptr()
        if key not in self._storages:
            self._storages[key] = Storage(tensor)
        return Region(name, tensor, self._storages[key])

    def flush(self, store: Store) -> None:
        """Let everybody see it."""
        self.now += 1
        region = store.region
        region.storage.write(region, store.index, store.values, self.now, store.program, True)


class Store:
    """One that is not visible yet; ``joined`` by a barrier of its warp group since."""

    def __init__(self, region: Region, index: torch.Tensor, values: torch.Tensor, program: Any) -> None:
        self.region, self.index, self.values, self.program = region, index, values, program
        self.joined = False


def places(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets in the shape of pointer and mask, and which of them count."""
    offsets = torch.as_tensor(pointer.offset)
    wanted = mask.data if isinstance(mask, Tensor) else torch.tensor(True if mask is None else bool(mask))
    return torch.broadcast_tensors(offsets, wanted)  # type: ignore[return-value]


def gather(pointer: Pointer, mask: Any, other: Any, seen: int | None, program: int) -> torch.Tensor:
    """Elements by their places; ``other``, or poison, where masked off."""
    region = pointer.region
    if mask is None:
        return region.storage.read(region.dtype, region.index(torch.as_tensor(pointer.offset)), seen, program)
    offsets, wanted = places(pointer, mask)
    if bool(wanted.all()):
        return region.storage.read(region.dtype, region.index(offsets), seen, program)
    result = torch.empty(offsets.shape, dtype=region.dtype)
    if other is None:
        poison(result)
    else:
        result.copy_(torch.as_tensor(other.data if isinstance(other, Tensor) else other).to(region.dtype))
    result[wanted] = region.storage.read(region.dtype, region.index(offsets[wanted]), seen, program)
    return result


def poison(tensor: torch.Tensor) -> None:
    """NaN, or a number that no result has."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.dtype.is_floating_point:
        tensor.fill_(math.nan)
    else:
        tensor.fill_(POISON)


class Descriptor:
    """A tensor that is read in blocks, with zeros outside of it."""

    def __init__(self, region: Region, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> None:
        self.region, self.shape, self.strides, self.block_shape = region, list(shape), list(strides), list(block)

    def read(self, start: Sequence[int], seen: int | None) -> torch.Tensor:
        """The block that starts there."""
        offsets, inside = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for first, length, stride, size in zip(start, self.block_shape, self.strides, self.shape, strict=True):
            at = torch.arange(int(first), int(first) + length)
            offsets = offsets[..., None] + at * stride
            inside = inside[..., None] & (at >= 0) & (at < size)
        return gather(Pointer(self.region, offsets), Tensor(inside), 0.0, seen, -1)


class Allocation:
    """Shared memory by one name, and for each element what is still at work on it."""

    def __init__(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.name = name
        self.data = torch.empty(list(shape), dtype=dtype)
        poison(self.data)
        # How many async copies are writing it, how many products are reading it, and when an ordinary store wrote it.
        self.writing, self.reading = torch.zeros(self.data.shape, dtype=torch.int16), torch.zeros(self.data.shape)
        self.stored_at = torch.zeros(self.data.shape, dtype=torch.int32)
        self.barriers: dict[int, Barrier] = {}


class Shared:
    """A descriptor of shared memory: a view of an allocation."""

    def __init__(self, allocation: Allocation, views: Sequence[torch.Tensor] | None = None, path: str = "") -> None:
        self.allocation, self._path = allocation, path
        self.views = views or (allocation.data, allocation.writing, allocation.reading, allocation.stored_at)
        self.data, self.writing, self.reading, self.stored_at = self.views

    def __str__(self) -> str:
        return self.allocation.name + self._path

    @property
    def shape(self) -> list[int]:
        """Of the view."""
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.data.dtype

    def _view(self, function: Any, path: str) -> Shared:
        return Shared(self.allocation, [function(view) for view in self.views], self._path + path)

    def index(self, number: int) -> Shared:
        """One of the first dimension."""
        if not 0 <= number < self.shape[0]:
            raise EmulationError(f"{self}[{int(number)}]: there are {self.shape[0]}")
        return self._view(lambda view: view[int(number)], f"[{int(number)}]")

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """A part along one dimension."""
        return self._view(lambda view: view.narrow(dim, int(start), int(length)), f"[{start}:{start + length}]")

    def permute(self, order: Sequence[int]) -> Shared:
        """With its dimensions in another order."""
        return self._view(lambda view: view.permute(*order), "")

    @property
    def barrier(self) -> Barrier:
        """What is there, once initialised."""
        found = self.allocation.barriers.get(self.data.storage_offset())
        if found is None or self.data.numel() != 1:
            raise EmulationError(f"{self} is no initialised barrier")
        return found

    def make_barrier(self, count: int) -> None:
        """Initialise one."""
        assert self.data.numel() == 1, f"{self} is more than one barrier"
        self.allocation.barriers[self.data.storage_offset()] = Barrier(str(self), count)

    def read(self) -> torch.Tensor:
        """What is there; poison where a copy is writing."""
        return self.data.clone()

    def check_writable(self, who: Any) -> None:
        """Raise if a copy writes it or a product reads it."""
        if bool(self.writing.any()):
            raise EmulationError(f"{who} writes {self}, which an async copy is still writing")
        if bool(self.reading.any()):
            raise EmulationError(f"{who} writes {self}, which a product is still reading")

    def load(self, layout: Any = None) -> Any:
        """As a tensor."""
        return made(self.read(), self.dtype)


class Barrier:
    """An mbarrier: a phase ends with its last arrival and its last byte."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.pending, self.bytes, self.phase = name, count, count, 0, 0

    def __str__(self) -> str:
        arrived = f"{self.count - self.pending} of {self.count} arrivals"
        return f"{self.name} in its phase {self.phase}: {arrived}, {self.bytes} bytes to come"

    def arrive(self, count: int) -> None:
        """So many times."""
        self.pending -= count
        if self.pending < 0:
            raise EmulationError(f"{self}: more than it was made for")
        self._advance()

    def expect(self, count: int) -> None:
        """Arrive once, with bytes that have to come before the phase ends."""
        self.bytes += count
        self.arrive(1)

    def receive(self, count: int) -> None:
        """Some of the bytes."""
        self.bytes -= count
        self._advance()

    def _advance(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def has_passed(self, parity: int) -> bool:
        """Whether the phase of this parity, the current one or that before, has ended."""
        return self.phase & 1 != parity
