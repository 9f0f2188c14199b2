"""What every kernel of the pipeline shares: how it is launched, and programmatic dependent launch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import triton.language as tl
from triton import JITFunction, jit
from triton.compiler import CompiledKernel
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

Argument: TypeAlias = torch.Tensor | TensorDescriptor | int | float


@jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the kernel before this one has finished and its writes are visible (programmatic dependent launch)."""
    if PDL:
        gdc_wait()


@jit
def let_next_kernel_start(PDL: tl.constexpr):
    """Allow the next kernel's blocks to be scheduled: they set up while this one still works, then wait."""
    if PDL:
        gdc_launch_dependents()


class Constants:
    """A kernel's compile-time arguments, in the order of its signature, and its launch options.

    Compared by identity: make it once for each problem and tile, and for each dtype of a tensor that may have several.
    """

    __slots__ = ("arguments", "options")

    def __init__(self, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)
        self.options = dict(options)


class Kernel:
    """A Triton kernel whose repeated launches skip Triton's binding of arguments, which costs far more than the launch.

    Parameters
    ----------
    function
        The jitted kernel: its tensors and numbers first, its ``constexpr`` arguments last. Its integers must not be
        specialised (`triton.jit(do_not_specialize=...)`), so that one binary serves any of them.
    """

    def __init__(self, function: JITFunction) -> None:
        self.function = function
        self._names = list(inspect.signature(function.fn).parameters)
        self._compiled: dict[tuple[Constants, int | None], CompiledKernel] = {}

    def compiled(self, constants: Constants, device: torch.device) -> CompiledKernel | None:
        """What repeated launches on ``device`` use; None before the first, and in the interpreter."""
        return self._compiled.get((constants, device.index))

    def launch(
        self,
        grid: tuple[int, ...],
        arguments: tuple[Argument, ...],
        constants: Constants,
        device: torch.device,
        aligned: bool,
    ) -> None:
        """Launch on the current stream of ``device``, which must be the current one.

        Parameters
        ----------
        grid
            One to three numbers of programs.
        arguments
            Tensors, descriptors and numbers, in the order of the signature.
        constants
            The rest of the signature.
        device
            Of the tensors.
        aligned
            Whether every tensor starts at a multiple of 16 bytes: the binary that is kept assumes it. Others go through
            Triton's own launch.
        """
        key = (constants, device.index)
        compiled = self._compiled.get(key) if aligned else None
        if compiled is None:
            # Later launches go by position alone.
            assert self._names[len(arguments) :] == list(constants.arguments), f"order of {self.function.fn.__name__}"
            compiled = self.function[grid](*arguments, **constants.arguments, **constants.options)
            # The interpreter returns nothing to keep.
            if aligned and isinstance(compiled, CompiledKernel):
                self._compiled[key] = compiled
        else:
            three = (*grid, 1, 1)[:3]
            compiled[three](*arguments, *constants.arguments.values())
