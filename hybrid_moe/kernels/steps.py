"""One launch of a call as data: everything in it that is the same whenever the shapes are, and names for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .launcher import Constants, Kernel


class Tiles(NamedTuple):
    """Matrices that a kernel reads in tiles by a descriptor (TMA): ``box_rows`` by 128 of ``box_matrices`` neighbours.

    Parameters
    ----------
    name
        Of the tensor: e4m3, contiguous, and aligned to 16 bytes.
    matrices, rows, inner
        Its shape, however its dimensions are called elsewhere.
    box_matrices, box_rows
        Of a tile.
    """

    name: str
    matrices: int
    rows: int
    inner: int
    box_matrices: int
    box_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.matrices, self.rows, self.inner

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.rows * self.inner, self.inner, 1

    def descriptor(self, base: Any) -> TensorDescriptor:
        """Triton's description of it; ``base`` has ``data_ptr()`` and ``dtype``."""
        return TensorDescriptor(base, list(self.shape), list(self.strides), [self.box_matrices, self.box_rows, 128])


# The name of an input, an intermediate tensor or the output; a tiled one of these; or a number.
Operand: TypeAlias = str | Tiles | int | float


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A launch of one of this package's kernels.

    Parameters
    ----------
    kernel, grid, constants
        See `Kernel.launch`.
    operands
        What the kernel's arguments are before its constants.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    operands: tuple[Operand, ...]
    constants: Constants

    def run(self, call: Mapping[str, Any], device: torch.device, aligned: bool = False) -> None:
        """Launch with the tensors and numbers of a call, by name; ``aligned`` as `Kernel.launch` has it."""
        self.kernel.launch(self.grid, self._arguments(call), self.constants, device, aligned)

    def compile(self, call: Mapping[str, Any]) -> None:
        """Compile the kernel for such a call."""
        self.kernel.compile(self._arguments(call), self.constants)

    def _arguments(self, call: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(
            call[operand]
            if isinstance(operand, str)
            else operand.descriptor(call[operand.name])
            if isinstance(operand, Tiles)
            else operand
            for operand in self.operands
        )


@dataclass(frozen=True, slots=True, eq=False)
class LibraryStep:
    """A call of another library, which takes tensors."""

    function: Callable[[Mapping[str, Any]], None]

    def run(self, call: Mapping[str, Any], device: torch.device, aligned: bool = False) -> None:
        """Call it with the tensors of a call, by name."""
        self.function(call)


AnyStep: TypeAlias = Step | LibraryStep
