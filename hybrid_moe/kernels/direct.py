"""Launches of compiled kernels by addresses, straight through the function in C at the bottom of Triton's launcher.

Triton's own launch makes a closure, asks every tensor for its address and the driver whether that address is the
device's, and encodes every tensor descriptor again: together about as long as the launch itself. All of that depends on
the shapes alone, except for profilers' hooks: where one is set, Triton launches (`is_hooked`). So it does with any
release but those below, as the function is internal to Triton.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel

from .launcher import Constants
from .steps import Tiles

# (stream, values): launches with those of the values that are the kernel's arguments.
Launcher: TypeAlias = Callable[[int, Sequence[Any]], None]

_RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
# How the function takes the kernel's arguments: one by one, or in a tuple at the end.
_FLAT = ((3, 6),)
_NESTED = ((3, 7), (3, 8), (3, 9))


def is_hooked() -> bool:
    """Whether a profiler, say, wants to be called at each launch."""
    runtime = knobs.runtime
    return not (_is_silent(runtime.launch_enter_hook) and _is_silent(runtime.launch_exit_hook))


def _is_silent(hook: Any) -> bool:
    return hook is None or (isinstance(hook, knobs.HookChain) and not hook.calls)


def launcher(
    compiled: CompiledKernel, grid: tuple[int, ...], arguments: Sequence[int], constants: Constants
) -> Launcher | None:
    """What launches a kernel; None where only Triton itself can.

    Parameters
    ----------
    compiled
        Loaded on the current device.
    grid
        One to three numbers of programs.
    arguments
        Where among the values the kernel's arguments are: numbers, addresses, and for each tensor descriptor what
        `expanded` says.
    constants
        The rest of the kernel's signature.
    """
    run = compiled.run
    launch = _function(run)
    if launch is None:
        return None
    head = (*grid, 1, 1)[:3]
    flags = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    compile_time = tuple(constants.arguments.values())
    pick = itemgetter(*arguments)
    middle: tuple[Any, ...]
    if _RELEASE in _FLAT:
        # Two scratch buffers, the metadata, and the hooks.
        middle = (*flags, None, None, compiled.packed_metadata, None, None, None)

        def flat(stream: int, values: Sequence[Any]) -> None:
            launch(*head, stream, *middle, *pick(values), *compile_time)

        return flat

    middle = (*flags, compiled.packed_metadata, *(None,) * 5, run.arg_annotations, run.kernel_signature)

    def nested(stream: int, values: Sequence[Any]) -> None:
        launch(*head, stream, *middle, pick(values) + compile_time)

    return nested


def _function(run: Any) -> Callable[..., None] | None:
    """The function in C that a kernel's launcher calls; None if the launcher does anything that isn't done here."""
    if _RELEASE not in (*_FLAT, *_NESTED) or type(run).__name__ != "CudaLauncher":
        return None
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    launch = run.launch
    # For kernels with descriptors it is wrapped in a function that encodes them.
    return inspect.getclosurevars(launch).nonlocals.get("launcher") if inspect.isfunction(launch) else launch


class _Address:
    """What Triton asks of a tensor to encode its descriptor."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


@functools.lru_cache(maxsize=1024)  # what is encoded for one number of tokens is for all with the same kernel
def expanded(
    compiled: CompiledKernel, tiles: Tiles, number: int
) -> tuple[Callable[[int], Any], tuple[int, ...]] | None:
    """What a tensor descriptor becomes in a launch: the function of its encoding by address, and the numbers behind.

    These are its shape and its strides. It is the kernel's descriptor ``number``, from 0 on.

    An encoding holds an address and what never changes for one kernel (`Tiles`, swizzling), so that one that is kept by
    the address is that of any tensor there. None if the kernel doesn't take it encoded.
    """
    described = getattr(compiled.metadata, "tensordesc_meta", None)
    if not described or number >= len(described) or described[number] is None:
        return None
    from triton.backends.nvidia import driver

    # From 3.8 on it also takes the launch's other arguments, which it doesn't need on this device.
    rest = (None,) if _RELEASE >= (3, 8) else ()

    # One for each layer of the process.
    @functools.lru_cache(maxsize=1024)
    def encode(address: int) -> Any:
        descriptor = tiles.descriptor(_Address(address, torch.float8_e4m3fn))
        return driver.make_tensordesc_arg(descriptor, described[number], *rest)[0]

    return encode, (*tiles.shape, *tiles.strides)
