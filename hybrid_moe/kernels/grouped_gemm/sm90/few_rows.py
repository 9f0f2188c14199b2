"""Launches of the warp-specialised GEMMs of `hopper_few_kernels`: for few rows, on compute capability 9.0."""

from __future__ import annotations

from ....problem import MoEProblem
from ...launch import Kernel
from ...pipeline import Launch, max_row_tiles, row_capacity
from ...plan import Form
from ...steps import Step
from ..completion import Signals
from . import few_rows_kernels
from .few_rows_kernels import hopper_few_gemm1_kernel, hopper_few_gemm2_kernel
from .many_rows import Ring, SwizzledTiles, gemm1_constants, gemm2_constants

PROGRAMS = 2  # that fit on a multiprocessor at once
RING = Ring(8, 80, 48, 72)
ROWS, WIDTH = few_rows_kernels.MOST.value, few_rows_kernels.WIDTH.value

GEMM1, GEMM2 = Kernel(hopper_few_gemm1_kernel), Kernel(hopper_few_gemm2_kernel)


def fits(problem: MoEProblem) -> tuple[bool, bool]:
    """Whether GEMM1 and GEMM2 of this problem have the sizes that the kernels want."""
    # The ring must not hold more than a tile.
    long = min(problem.hidden_size, problem.intermediate_size) >= RING.stages * 128
    return long, long


def signals(problem: MoEProblem) -> Signals:
    """Of `gemm1`: one for each row tile and 128 block of the activation."""
    return Signals(ROWS, problem.intermediate_size // problem.block)


def first_ticket(problem: MoEProblem, columns: int) -> int:
    """Behind those that tiles are drawn by: GEMM1's and, for each chunk of ``columns``, GEMM2's."""
    return 1 + problem.hidden_size // columns


def num_tickets(problem: MoEProblem, num_tokens: int, columns: int) -> int:
    """Of both GEMMs; GEMM1 quantises by those of its row tiles' 128 blocks."""
    blocks = problem.intermediate_size // problem.block
    return first_ticket(problem, columns) + max_row_tiles(problem, num_tokens, ROWS) * blocks


def gemm1(problem: MoEProblem, launch: Launch, form: Form, columns: int) -> Step:
    """SwiGLU of the first GEMM: ``[capacity, I]`` e4m3 and ``[I/128, capacity]`` scales."""
    e, width, inner = problem.num_local_experts, problem.intermediate_size, problem.hidden_size
    operands = (
        "hidden_states",
        "hidden_states_scale",
        SwizzledTiles("gemm1_weights", e, 2 * width, inner, 1, 32),
        "gemm1_weights_scale",
        "counts",
        "slot_token",
        "activated",
        "activated_scale",
        "unquantized",
        "finished",
        "tickets",
        0,
        first_ticket(problem, columns),
        form.stride_scale_k,
        form.stride_scale_t,
        form.num_tokens,
        row_capacity(problem, form.num_tokens),
    )
    tiles = max_row_tiles(problem, form.num_tokens, ROWS) * (width // (WIDTH // 2))
    grid = (min(tiles, PROGRAMS * launch.multiprocessors),)
    return Step(GEMM1, grid, operands, gemm1_constants(problem, launch, RING, form.stride_hidden), True)


def gemm2(
    problem: MoEProblem,
    launch: Launch,
    form: Form,
    columns: int,
    first_column: int,
    first: Signals,
) -> Step:
    """Columns ``[first_column, first_column + columns)`` of the second GEMM into ``rows`` bfloat16.

    ``first`` are the signals of the step that computed the activation.
    """
    e, inner, capacity = problem.num_local_experts, problem.intermediate_size, row_capacity(problem, form.num_tokens)
    operands = (
        "activated",
        "activated_scale",
        SwizzledTiles("gemm2_weights", e, problem.hidden_size, inner, 1, WIDTH),
        "gemm2_weights_scale",
        "counts",
        "finished",
        "rows",
        "tickets",
        1 + first_column // columns,
        first_column,
        capacity,
    )
    tiles = max_row_tiles(problem, form.num_tokens, ROWS) * (columns // WIDTH)
    grid = (min(tiles, PROGRAMS * launch.multiprocessors),)
    return Step(GEMM2, grid, operands, gemm2_constants(problem, launch, RING, columns, first), True)
