"""Launches of the warp-specialised GEMMs of `hopper_kernels`: for many rows, on compute capability 9.0."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ....problem import MoEProblem
from ...launch import Constants, Kernel
from ...pipeline import Launch, pow2, row_capacity
from ...plan import Form
from ...steps import Step, Tiles
from ..completion import Signals
from . import many_rows_kernels
from .many_rows_kernels import E4M3, hopper_gemm1_kernel, hopper_gemm2_kernel


class Ring(NamedTuple):
    """Resources of a program: a producer and two consumers, four warps each.

    Parameters
    ----------
    stages
        128 blocks of the sum in shared memory at once.
    consumer_registers, producer_registers
        Of each thread, once the groups have shared what the program started with. The first consumer has what is left.
    registers
        Of each thread at the start; None for a program that has all 65,536 of a multiprocessor.
    """

    stages: int
    consumer_registers: int
    producer_registers: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": 4} | ({} if self.registers is None else {"maxnreg": self.registers})


RING = Ring(4, 232, 40)
ROWS, COLUMNS = many_rows_kernels.ROWS.value, 2 * many_rows_kernels.COLUMNS.value  # of a tile

GEMM1, GEMM2 = Kernel(hopper_gemm1_kernel), Kernel(hopper_gemm2_kernel)


class SwizzledTiles(Tiles):
    """Tiles of all matrices' rows under one another, with the layout in shared memory that Gluon wants to be told."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""
        return self.matrices * self.rows, self.inner

    @property
    def strides(self) -> tuple[int, ...]:
        """Of all rows."""
        return self.inner, 1

    def descriptor(self, base: Any) -> TensorDescriptor:
        """Gluon's description of it."""
        return TensorDescriptor(base, list(self.shape), list(self.strides), [self.box_rows, 128], E4M3.value)


def fits(problem: MoEProblem) -> tuple[bool, bool]:
    """Whether GEMM1 and GEMM2 of this problem have the sizes that the kernels want."""
    # The ring must not hold more than a tile, and GEMM2's tile has 256 columns.
    long = min(problem.hidden_size, problem.intermediate_size) >= RING.stages * 128
    return long, long and problem.hidden_size % COLUMNS == 0


def num_tickets(problem: MoEProblem, columns: int) -> int:
    """Of GEMM1 and, for each chunk of ``columns``, of GEMM2: programs draw their tiles by them."""
    return 1 + problem.hidden_size // columns


def gemm1(problem: MoEProblem, launch: Launch, form: Form) -> Step:
    """SwiGLU of the first GEMM: ``[capacity, I]`` e4m3 and ``[I/128, capacity]`` scales."""
    e, width, inner = problem.num_local_experts, problem.intermediate_size, problem.hidden_size
    operands = (
        "hidden_states",
        "hidden_states_scale",
        SwizzledTiles("gemm1_weights", e, 2 * width, inner, 1, 64),
        "gemm1_weights_scale",
        "counts",
        "slot_token",
        "activated",
        "activated_scale",
        "finished",
        "tickets",
        0,
        form.stride_scale_k,
        form.stride_scale_t,
        form.num_tokens,
        row_capacity(problem, form.num_tokens),
    )
    constants = gemm1_constants(problem, launch, RING, form.stride_hidden)
    return Step(GEMM1, (launch.multiprocessors,), operands, constants, True)


def signals(problem: MoEProblem) -> Signals:
    """Of `gemm1`: both consumers' for each row tile and 128 block of the activation."""
    return Signals(ROWS, 2 * problem.intermediate_size // problem.block)


def gemm2(problem: MoEProblem, launch: Launch, form: Form, columns: int, first_column: int, first: Signals) -> Step:
    """Columns ``[first_column, first_column + columns)`` of the second GEMM into ``rows`` bfloat16.

    ``first`` are the signals of the step that computed the activation.
    """
    e, inner, capacity = problem.num_local_experts, problem.intermediate_size, row_capacity(problem, form.num_tokens)
    operands = (
        SwizzledTiles("activated", 1, capacity, inner, 1, ROWS),
        "activated_scale",
        SwizzledTiles("gemm2_weights", e, problem.hidden_size, inner, 1, 128),
        "gemm2_weights_scale",
        "counts",
        "finished",
        "rows",
        "tickets",
        1 + first_column // columns,
        first_column,
        capacity,
    )
    constants = gemm2_constants(problem, launch, RING, columns, first)
    return Step(GEMM2, (launch.multiprocessors,), operands, constants, True)


@functools.lru_cache(maxsize=256)
def gemm1_constants(problem: MoEProblem, launch: Launch, ring: Ring, stride_hidden: int) -> Constants:
    """What the kernels for few and for many rows are compiled for."""
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        **_shared_arguments(problem, launch, ring),
    }
    return Constants(arguments, {**launch.options, **ring.options})


@functools.lru_cache(maxsize=256)
def gemm2_constants(problem: MoEProblem, launch: Launch, ring: Ring, columns: int, first: Signals) -> Constants:
    """The same for the second GEMM; ``first`` are the signals of the step that computed the activation."""
    arguments = {
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "COLUMNS": columns,
        "FIRST_M": first.block_m,
        "SIGNALS": first.per_row_tile,
        **_shared_arguments(problem, launch, ring),
    }
    return Constants(arguments, {**launch.options, **ring.options})


def _shared_arguments(problem: MoEProblem, launch: Launch, ring: Ring) -> dict[str, int | bool]:
    return {
        "E": problem.num_local_experts,
        # A lane of a warp without a value would cost it registers.
        "E_POW2": max(32, pow2(problem.num_local_experts)),
        "STAGES": ring.stages,
        "CONSUMER_REGISTERS": ring.consumer_registers,
        "PRODUCER_REGISTERS": ring.producer_registers,
        "PDL": launch.pdl,
    }
