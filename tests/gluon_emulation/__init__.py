"""Runs Triton's and Gluon's kernels as they are, on the CPU: what a GPU computes, and how it could go wrong.

Emulated are

- kernels one after another as on a stream with programmatic dependent launch: the next one's programs start when all
  have allowed it, and wait for the end of the one before only where they say so;
- warp groups (`warp_specialize`), which take turns by a seed: at barriers, atomic operations, copies and products;
- mbarriers with their phases, counts of arrivals and bytes; what hangs ends with `Hang`, which names the barriers;
- TMA and cp.async as copies that are complete some time later: until then NaN is where they write;
- wgmma, which reads its operands until it has been waited for;
- global memory in which a store is seen late (`memory`), and signals, copies or arrivals that a test holds back;
- integers of 32 and 64 bits that raise `Overflow`, pointers that raise where they leave their tensor; a
  tensor may be too large for any memory (`Huge`).

An `EmulationError` is raised too where a copy writes what is being read or written, where a product reads what was
stored by threads and not fenced, where a barrier gets too many arrivals, where a kernel stores an element twice, and
where a program ends before its copies or products.

Not emulated: layouts, registers, bank conflicts, time, the order of floating-point sums inside of a product, and races
between the threads of one warp group. A test under one seed is one interleaving: use several.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl

from .language import TileDescriptor
from .memory import GlobalMemory, Huge, Pointer
from .schedule import Delay, Hang, Machine, Task
from .translate import Translator
from .values import EmulationError, Overflow, Scalar

__all__ = ["EmulationError", "Hang", "Huge", "Overflow", "Task", "launch", "launches", "run_steps"]

_translate = Translator()


def launch(
    kernels: Sequence[tuple[Any, tuple[int, ...], Mapping[str, Any], int]],
    seed: int = 0,
    delay: Delay | None = None,
    only: Sequence[tuple[int, ...]] = (),
) -> None:
    """Run kernels, each a jitted function, its grid, its arguments by name and its number of warps.

    ``only`` are the programs of the grids that run, if not all.
    """
    memory = GlobalMemory()
    machine = Machine(memory, seed, delay)
    for function, grid, arguments, warps in kernels:
        body = _translate(function)
        parameters = inspect.signature(function.fn).parameters
        values = {
            name: value if _is_constant(parameters[name]) else _argument(memory, name, value)
            for name, value in arguments.items()
        }
        machine.launch(function.fn.__name__, grid, functools.partial(body, **values), 32 * warps, only)
    machine.run()


def run_steps(
    steps: Sequence[Any],
    calls: Sequence[Mapping[str, Any]],
    seed: int = 0,
    delay: Delay | None = None,
    only: Sequence[tuple[int, ...]] = (),
) -> None:
    """Run the steps of a plan, once for each call, which says what their names stand for (`plan.by_name`)."""
    launch([kernel for call in calls for kernel in launches(steps, call)], seed, delay, only)


def launches(steps: Sequence[Any], call: Mapping[str, Any]) -> list[tuple[Any, tuple[int, ...], dict[str, Any], int]]:
    """Of the steps of a plan, as `launch` wants them."""
    found = []
    for step in steps:
        constants = step.constants
        values = [_operand(operand, call) for operand in step.operands]
        names = list(inspect.signature(step.kernel.function.fn).parameters)
        arguments = dict(zip(names, [*values, *constants.arguments.values()], strict=True))
        assert list(constants.arguments) == names[len(values) :], step.kernel.function.fn.__name__
        found.append((step.kernel.function, step.grid, arguments, constants.options.get("num_warps", 4)))
    return found


def _operand(operand: Any, call: Mapping[str, Any]) -> Any:
    if isinstance(operand, str):
        return call[operand]
    return operand.descriptor(call[operand.name]) if hasattr(operand, "descriptor") else operand


def _is_constant(parameter: inspect.Parameter) -> bool:
    return "constexpr" in str(parameter.annotation) or parameter.annotation is tl.constexpr


def _argument(memory: GlobalMemory, name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor | Huge):
        return Pointer(memory.region(name, value))
    if hasattr(value, "block_shape"):
        region = memory.region(name, value.base)
        return TileDescriptor(region, value.shape, value.strides, value.block_shape)
    if isinstance(value, int):
        return Scalar(value, 32 if abs(value) < 2**31 else 64)
    return value
