"""Provider ``triton``: the two Triton GEMMs with their tiles; needs no other library."""

from __future__ import annotations

import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...problem import FP8, DeviceKey, MoEInputs, MoEProblem
from ..launch import Argument, Constants, Kernel
from ..pipeline import GroupedGemm, Launch, Routed, column_chunk, combine, pow2, row_capacity
from .tiles import Tile, TilePlan, max_row_tiles, tile_plan
from .triton_kernels import gemm1_swiglu_kernel, gemm2_kernel


class TritonGroupedGemm(GroupedGemm):
    """Two launches: GEMM1 with gather, SwiGLU and quantisation; GEMM2."""

    name = "triton"

    def __init__(self, capability: tuple[int, int] | None = None) -> None:
        self._capability = capability

    def plan(self, problem: MoEProblem, num_tokens: int) -> TilePlan:
        """The tiles that `run` uses."""
        return tile_plan(problem, num_tokens, self._capability)

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """None: what Triton needs is asked by the backend."""
        return []

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        """The activation with its scales (twice over in float32 for narrow tiles), and one chunk of result columns."""
        rows, width = row_capacity(problem, num_tokens), problem.intermediate_size
        total = rows * (width + width // problem.block * 4) + rows * column_chunk(problem, rows) * 2
        if self.plan(problem, num_tokens).gemm1.block_n < problem.block:
            total += rows * width * 4 + self.num_tickets(problem, num_tokens) * 4
        return total

    def num_tickets(self, problem: MoEProblem, num_tokens: int) -> int:
        """Those of the plan's GEMM1."""
        return tickets_of(problem, num_tokens, self.plan(problem, num_tokens).gemm1)

    def run(self, inputs: MoEInputs, routed: Routed, problem: MoEProblem, launch: Launch, output: torch.Tensor) -> None:
        """Launch GEMM1, then GEMM2 and the combine for each chunk of columns."""
        plan = self.plan(problem, inputs.num_tokens)
        activated, scale = gemm1(inputs, routed, problem, launch, plan.gemm1)
        capacity = activated.shape[0]
        columns = column_chunk(problem, capacity)
        rows = torch.empty((capacity, columns), dtype=torch.bfloat16, device=output.device)
        for first_column in range(0, problem.hidden_size, columns):
            gemm2(activated, scale, inputs, routed, problem, launch, plan.gemm2, rows, first_column)
            combine(rows, routed, problem, launch, output, first_column)


def tickets_of(problem: MoEProblem, num_tokens: int, tile: Tile) -> int:
    """One for each row tile and 128 block of the activation, where several tiles of `gemm1` share a block."""
    if tile.block_n == problem.block:
        return 0
    return max_row_tiles(problem, num_tokens, tile.block_m) * (problem.intermediate_size // problem.block)


def gemm1(
    inputs: MoEInputs, routed: Routed, problem: MoEProblem, launch: Launch, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU of the first GEMM: ``[capacity, I]`` e4m3 and ``[I/128, capacity]`` scales.

    ``routed.tickets`` must be zeros if the tile is narrower than 128 columns.
    """
    tokens, device = inputs.num_tokens, inputs.hidden_states.device
    capacity, width = row_capacity(problem, tokens), problem.intermediate_size
    activated = torch.empty((capacity, width), dtype=FP8, device=device)
    scale = torch.empty((width // problem.block, capacity), dtype=torch.float32, device=device)
    narrow = tile.block_n < problem.block
    unquantized = torch.empty((capacity, width), dtype=torch.float32, device=device) if narrow else scale
    arguments = (
        inputs.hidden_states,
        inputs.hidden_states_scale,
        weights_argument(inputs.gemm1_weights, 2, 1 + tile.joined, tile.block_n, routed.aligned),
        inputs.gemm1_weights_scale,
        routed.counts,
        routed.slot_token,
        activated,
        scale,
        unquantized,
        routed.tickets,
        inputs.hidden_states_scale.stride(0),
        inputs.hidden_states_scale.stride(1),
        tokens,
        capacity,
    )
    tiles = max_row_tiles(problem, tokens, tile.block_m) * (width // tile.block_n)
    grid = (min(tiles, launch.multiprocessors * tile.programs_per_multiprocessor),)
    constants = _gemm1_constants(problem, launch, tile, inputs.hidden_states.stride(0), routed.aligned)
    GEMM1.launch(grid, arguments, constants, device, routed.aligned)
    return activated, scale


def gemm2(
    activated: torch.Tensor,
    scale: torch.Tensor,
    inputs: MoEInputs,
    routed: Routed,
    problem: MoEProblem,
    launch: Launch,
    tile: Tile,
    rows: torch.Tensor,
    first_column: int,
) -> None:
    """Columns ``[first_column, first_column + rows.shape[1])`` of the second GEMM into ``rows`` bfloat16."""
    capacity, columns = rows.shape
    block_n = tile.block_n if columns % tile.block_n == 0 else problem.block
    tiles = max_row_tiles(problem, inputs.num_tokens, tile.block_m) * (columns // block_n)
    arguments = (
        activated,
        scale,
        weights_argument(inputs.gemm2_weights, 1, 1, block_n if tile.joined else block_n // 2, routed.aligned),
        inputs.gemm2_weights_scale,
        routed.counts,
        rows,
        first_column,
        capacity,
    )
    grid = (min(tiles, launch.multiprocessors * tile.programs_per_multiprocessor),)
    constants = _gemm2_constants(problem, launch, tile, columns, block_n, routed.aligned)
    GEMM2.launch(grid, arguments, constants, rows.device, routed.aligned)


def weights_argument(weights: torch.Tensor, parts: int, box_parts: int, box_rows: int, aligned: bool) -> Argument:
    """A descriptor of ``[experts * parts, rows of a part, columns]``, or the tensor where TMA can't read.

    It loads ``box_rows`` rows by 128 columns of each of ``box_parts`` neighbouring parts.
    """
    if not aligned:
        return weights
    experts, rows, inner = weights.shape
    shape = [experts * parts, rows // parts, inner]
    return TensorDescriptor(weights, shape, [rows // parts * inner, inner, 1], [box_parts, box_rows, 128])


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
        "JOINED": tile.joined,
        "TIERS": _tiers(tile),
        "TMA": tma,
        "PDL": launch.pdl,
    }
    return Constants(arguments, _options(launch, tile))


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
        "JOINED": tile.joined,
        "TIERS": _tiers(tile),
        "TMA": tma,
        "PDL": launch.pdl,
    }
    return Constants(arguments, _options(launch, tile))


def _tiers(tile: Tile) -> tuple[tuple[int, int, int, int], ...]:
    """Each tier as the kernels want it: the rows above which and up to which it is taken, stages, unrolling."""
    above = (0, *(tier.block_m for tier in tile.tiers))
    return tuple((low, t.block_m, t.num_stages, t.k_unroll) for low, t in zip(above, tile.tiers, strict=False))


def _options(launch: Launch, tile: Tile) -> dict[str, int | bool]:
    limit = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {**launch.options, "num_warps": tile.num_warps, **limit}
