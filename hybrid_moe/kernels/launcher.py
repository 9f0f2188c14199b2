"""Kernels with what they are compiled for, and the limits of the device that they are launched on."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from triton import AsyncCompileMode, JITFunction
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

Argument: TypeAlias = torch.Tensor | TensorDescriptor | int | float


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What bounds launches on a device.

    Parameters
    ----------
    num_sms
        Streaming multiprocessors: they bound the grids.
    pdl
        Whether kernels use programmatic dependent launch (compute capability 9.0 on).
    """

    num_sms: int
    pdl: bool

    @property
    def options(self) -> dict[str, bool]:
        """Launch options of every kernel; fused multiply-add is said outright, as Triton's default is changing."""
        return {"launch_pdl": self.pdl, "enable_fp_fusion": True}


@functools.cache
def limits_of(device: torch.device) -> DeviceLimits:
    """Of the device that a call's tensors are on; of no GPU in the interpreter."""
    if device.type != "cuda":
        return DeviceLimits(num_sms=4, pdl=False)
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(properties.multi_processor_count, pdl=properties.major >= 9)


@contextmanager
def compiling_in_parallel() -> Iterator[None]:
    """What is compiled within, without a launch, is compiled side by side, and is there at the end.

    Threads do: most of a compilation is outside of Python, or in a process of its own. What fails to compile says so
    when it is launched.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor, AsyncCompileMode(executor, ignore_errors=True):
        yield


class Constants:
    """A kernel's compile-time arguments, in the order of its signature, and its launch options.

    Compared by identity: make it once for each problem and tile, and for each dtype of a tensor that may have several.
    """

    __slots__ = ("arguments", "options")

    def __init__(self, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)
        self.options = dict(options)


class Kernel:
    """A Triton kernel, launched by Triton; keeps the binaries, which `direct` launches by addresses.

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
        """The binary for tensors that start at multiples of 16 bytes; None before their first launch on ``device``."""
        return self._compiled.get((constants, device.index))

    def compile(self, arguments: tuple[Argument, ...], constants: Constants) -> None:
        """Compile what `launch` would, without a launch; see `compiling_in_parallel`."""
        if isinstance(self.function, JITFunction):  # not in the interpreter
            self.function.warmup(*arguments, grid=(1,), **constants.arguments, **constants.options)

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
            Whether every tensor starts at a multiple of 16 bytes: the binary is kept for such.
        """
        # Launches by addresses go by position.
        assert self._names[len(arguments) :] == list(constants.arguments), f"order of {self.function.fn.__name__}"
        compiled = self.function[grid](*arguments, **constants.arguments, **constants.options)
        # The interpreter returns None.
        if aligned and isinstance(compiled, CompiledKernel):
            self._compiled[constants, device.index] = compiled
