"""Provider ``triton``: the two Triton GEMMs with their tiles; needs no other library."""

from __future__ import annotations

import functools

import torch

from ...layout import Layout
from ...problem import FP8, DeviceKey, MoEProblem
from ..launch import Constants, Kernel
from ..pipeline import GroupedGemm, Launch, column_chunk, combine, pow2, row_capacity
from ..plan import Form
from ..steps import AnyStep, Operand, Step, Tiles
from .tiles import Tile, TilePlan, max_row_tiles, tile_plan
from .triton_kernels import gemm1_swiglu_kernel, gemm2_kernel


class TritonGroupedGemm(GroupedGemm):
    """Two launches: GEMM1 with gather, SwiGLU and quantisation; GEMM2."""

    name = "triton"

    def __init__(self, capability: tuple[int, int] | None = None) -> None:
        self._capability = capability

    def plan(self, problem: MoEProblem, num_tokens: int) -> TilePlan:
        """The tiles that `steps` uses."""
        return tile_plan(problem, num_tokens, self._capability)

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """None: what Triton needs is asked by the backend."""
        return []

    def reserve(self, layout: Layout, problem: MoEProblem, num_tokens: int, row_alignment: int) -> None:
        """The activation with its scales (twice over in float32 for narrow tiles), and one chunk of result columns."""
        rows = row_capacity(problem, num_tokens)
        reserve_activation(layout, problem, rows, self.plan(problem, num_tokens).gemm1)
        layout.reserve("rows", (rows, column_chunk(problem, rows)), torch.bfloat16)

    def num_tickets(self, problem: MoEProblem, num_tokens: int) -> int:
        """Those of the plan's GEMM1."""
        return tickets_of(problem, num_tokens, self.plan(problem, num_tokens).gemm1)

    def steps(self, problem: MoEProblem, launch: Launch, form: Form) -> list[AnyStep]:
        """GEMM1, then GEMM2 and the combine for each chunk of columns."""
        plan = self.plan(problem, form.num_tokens)
        steps: list[AnyStep] = [gemm1(problem, launch, form, plan.gemm1)]
        columns = column_chunk(problem, row_capacity(problem, form.num_tokens))
        for first_column in range(0, problem.hidden_size, columns):
            steps.append(gemm2(problem, launch, form, plan.gemm2, columns, first_column))
            steps.append(combine(problem, launch, form, columns, first_column))
        return steps


def tickets_of(problem: MoEProblem, num_tokens: int, tile: Tile) -> int:
    """One for each row tile and 128 block of the activation, where several tiles of `gemm1` share a block."""
    if tile.block_n == problem.block:
        return 0
    return max_row_tiles(problem, num_tokens, tile.block_m) * (problem.intermediate_size // problem.block)


def reserve_activation(layout: Layout, problem: MoEProblem, rows: int, tile: Tile) -> None:
    """Add the result of `gemm1`, and what it gathers in float32 where its tiles are narrower than a 128 block."""
    width = problem.intermediate_size
    layout.reserve("activated", (rows, width), FP8)
    layout.reserve("activated_scale", (width // problem.block, rows), torch.float32)
    if tile.block_n < problem.block:
        layout.reserve("unquantized", (rows, width), torch.float32)


def gemm1(problem: MoEProblem, launch: Launch, form: Form, tile: Tile) -> Step:
    """SwiGLU of the first GEMM: ``[capacity, I]`` e4m3 and ``[I/128, capacity]`` scales.

    ``tickets`` must be zeros if the tile is narrower than 128 columns.
    """
    tokens, width = form.num_tokens, problem.intermediate_size
    narrow = tile.block_n < problem.block
    operands = (
        "hidden_states",
        "hidden_states_scale",
        weights_operand("gemm1_weights", problem, 2 * width, problem.hidden_size, tile.block_n, form.aligned),
        "gemm1_weights_scale",
        "counts",
        "slot_token",
        "activated",
        "activated_scale",
        "unquantized" if narrow else "activated_scale",
        "tickets" if narrow else "counts",
        form.stride_scale_k,
        form.stride_scale_t,
        tokens,
        row_capacity(problem, tokens),
    )
    tiles = max_row_tiles(problem, tokens, tile.block_m) * (width // tile.block_n)
    grid = (min(tiles, launch.multiprocessors * tile.programs_per_multiprocessor),)
    constants = _gemm1_constants(problem, launch, tile, form.stride_hidden, form.aligned)
    return Step(GEMM1, grid, operands, constants, form.aligned)


def gemm2(problem: MoEProblem, launch: Launch, form: Form, tile: Tile, columns: int, first_column: int) -> Step:
    """Columns ``[first_column, first_column + columns)`` of the second GEMM into ``rows`` bfloat16."""
    block_n = tile.block_n if columns % tile.block_n == 0 else problem.block
    tiles = max_row_tiles(problem, form.num_tokens, tile.block_m) * (columns // block_n)
    block_rows, inner = min(block_n, problem.block), problem.intermediate_size
    operands = (
        "activated",
        "activated_scale",
        weights_operand("gemm2_weights", problem, problem.hidden_size, inner, block_rows, form.aligned),
        "gemm2_weights_scale",
        "counts",
        "rows",
        first_column,
        row_capacity(problem, form.num_tokens),
    )
    grid = (min(tiles, launch.multiprocessors * tile.programs_per_multiprocessor),)
    constants = _gemm2_constants(problem, launch, tile, columns, block_n, form.aligned)
    return Step(GEMM2, grid, operands, constants, form.aligned)


def weights_operand(name: str, problem: MoEProblem, rows: int, inner: int, block_rows: int, aligned: bool) -> Operand:
    """The rows of all experts in tiles of ``block_rows`` by 128, or the tensor where TMA can't read."""
    return Tiles(name, problem.num_local_experts * rows, inner, block_rows) if aligned else name


GEMM1, GEMM2 = Kernel(gemm1_swiglu_kernel), Kernel(gemm2_kernel)


@functools.lru_cache(maxsize=256)
def _gemm1_constants(problem: MoEProblem, launch: Launch, tile: Tile, stride_hidden: int, tma: bool) -> Constants:
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        **_pipelines(tile),
        "TMA": tma,
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": tile.num_warps})


@functools.lru_cache(maxsize=256)
def _gemm2_constants(
    problem: MoEProblem, launch: Launch, tile: Tile, columns: int, block_n: int, tma: bool
) -> Constants:
    arguments = {
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "COLUMNS": columns,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": block_n,
        **_pipelines(tile),
        "TMA": tma,
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": tile.num_warps})


def _pipelines(tile: Tile) -> dict[str, int]:
    few_m, few_stages, few_unroll = tile.few
    return {
        "NUM_STAGES": tile.num_stages,
        "K_UNROLL": tile.k_unroll,
        "FEW_M": few_m,
        "FEW_STAGES": few_stages,
        "FEW_UNROLL": few_unroll,
    }
