"""Launches of compiled kernels by addresses, straight through the function in C at the bottom of Triton's launcher.

On the way there Triton makes a closure for each launch, asks every tensor for its address and the driver whether that
is the device's, and encodes every tensor descriptor again: about as much time again as the launch takes, for each. What
is left out here depends on the shapes alone, but for the hooks of profilers: where one is set, Triton's own launch is
wanted (`is_hooked`). Another release than those below gets that too, as nothing promises that the function stays.
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
# The function takes its arguments one after another in the first, in a tuple at the end in the others.
_FLAT = ((3, 6),)
_NESTED = ((3, 7), (3, 8), (3, 9))


def is_hooked() -> bool:
    """Whether something, as a profiler, wants to be called at each launch."""
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
        # No memory of its own twice, the metadata, and nothing for hooks.
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
    # Around it is a function that encodes descriptors, for kernels that have any.
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

    # From 3.8 on it wants the other arguments of the launch too, for the other devices' sake.
    rest = (None,) if _RELEASE >= (3, 8) else ()

    # As many as there are layers, in a process that has several models.
    @functools.lru_cache(maxsize=1024)
    def encode(address: int) -> Any:
        descriptor = tiles.descriptor(_Address(address, torch.float8_e4m3fn))
        return driver.make_tensordesc_arg(descriptor, described[number], *rest)[0]

    return encode, (*tiles.shape, *tiles.strides)
