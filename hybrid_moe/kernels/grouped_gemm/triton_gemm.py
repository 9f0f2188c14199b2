"""Provider ``triton``: the two Triton GEMMs with their tiles; needs no other library."""

from __future__ import annotations

import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...problem import FP8, DeviceKey, MoEInputs, MoEProblem
from ..launch import Argument, Constants, Kernel
from ..pipeline import GroupedGemm, Launch, Routed, column_chunk, combine, pow2, row_capacity
from .stream_k import gemm1_stream_k_kernel, gemm2_stream_k_kernel
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

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int, launch: Launch) -> int:
        """The activation with its scales, what is left of unfinished tiles, and one chunk of result columns."""
        rows, width = row_capacity(problem, num_tokens), problem.intermediate_size
        total = rows * (width + width // problem.block * 4) + rows * column_chunk(problem, rows) * 2
        gemm1_tile = self.plan(problem, num_tokens).gemm1
        if gemm1_tile.block_n < problem.block:
            total += rows * width * 4
        partial = partial_elements(problem, num_tokens, self.plan(problem, num_tokens), launch)
        return total + 4 * (partial + self.num_tickets(problem, num_tokens))

    def num_tickets(self, problem: MoEProblem, num_tokens: int) -> int:
        """Those of both GEMMs."""
        plan = self.plan(problem, num_tokens)
        return tickets_of(problem, num_tokens, plan.gemm1) + tickets_of_gemm2(problem, num_tokens, plan.gemm2)

    def run(self, inputs: MoEInputs, routed: Routed, problem: MoEProblem, launch: Launch, output: torch.Tensor) -> None:
        """Launch GEMM1, then GEMM2 and the combine for each chunk of columns."""
        tokens, device = inputs.num_tokens, output.device
        plan = self.plan(problem, tokens)
        elements = partial_elements(problem, tokens, plan, launch)
        partial = torch.empty(elements, dtype=torch.float32, device=device) if elements else None
        first = tickets_of(problem, tokens, plan.gemm1)
        activated, scale = gemm1(inputs, routed, problem, launch, plan.gemm1, partial)
        capacity = activated.shape[0]
        columns = column_chunk(problem, capacity)
        rows = torch.empty((capacity, columns), dtype=torch.bfloat16, device=device)
        tickets = routed.tickets[first:]
        for column in range(0, problem.hidden_size, columns):
            gemm2(activated, scale, inputs, routed, problem, launch, plan.gemm2, rows, column, partial, tickets)
            combine(rows, routed, problem, launch, output, column)


def tickets_of(problem: MoEProblem, num_tokens: int, tile: Tile) -> int:
    """How many tickets `gemm1` takes: one for each group of programs that share a 128 block of the activation."""
    blocks = problem.intermediate_size // problem.block
    if tile.stream_k:
        return problem.num_local_experts * (problem.intermediate_size // tile.block_n + blocks)
    return 0 if tile.block_n == problem.block else max_row_tiles(problem, num_tokens, tile.block_m) * blocks


def tickets_of_gemm2(problem: MoEProblem, num_tokens: int, tile: Tile) -> int:
    """How many tickets `gemm2` takes."""
    if not tile.stream_k:
        return 0
    return problem.num_local_experts * column_chunk(problem, row_capacity(problem, num_tokens)) // tile.block_n


def partial_elements(problem: MoEProblem, num_tokens: int, plan: TilePlan, launch: Launch) -> int:
    """Float32 elements that stream-K tiles leave for one another: two tiles of all rows of an expert a program."""
    return max(
        2 * launch.multiprocessors * tile.programs_per_multiprocessor * num_tokens * width if tile.stream_k else 0
        for tile, width in ((plan.gemm1, 2 * plan.gemm1.block_n), (plan.gemm2, plan.gemm2.block_n))
    )


def gemm1(
    inputs: MoEInputs,
    routed: Routed,
    problem: MoEProblem,
    launch: Launch,
    tile: Tile,
    partial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU of the first GEMM: ``[capacity, I]`` e4m3 and ``[I/128, capacity]`` scales.

    The first `tickets_of` of ``routed.tickets`` must be zeros; ``partial`` has `partial_elements` for stream-K tiles.
    """
    tokens, device = inputs.num_tokens, inputs.hidden_states.device
    capacity, width = row_capacity(problem, tokens), problem.intermediate_size
    activated = torch.empty((capacity, width), dtype=FP8, device=device)
    scale = torch.empty((width // problem.block, capacity), dtype=torch.float32, device=device)
    narrow = tile.block_n < problem.block
    unquantized = torch.empty((capacity, width), dtype=torch.float32, device=device) if narrow else scale
    rest = (
        routed.tickets,
        inputs.hidden_states_scale.stride(0),
        inputs.hidden_states_scale.stride(1),
        tokens,
        capacity,
    )
    arguments: tuple[Argument, ...] = (
        inputs.hidden_states,
        inputs.hidden_states_scale,
        weights_argument(inputs.gemm1_weights, tile.block_n, routed.aligned),
        inputs.gemm1_weights_scale,
        routed.counts,
        routed.slot_token,
        activated,
        scale,
        unquantized,
    )
    constants = _gemm1_constants(problem, launch, tile, inputs.hidden_states.stride(0), routed.aligned)
    programs = launch.multiprocessors * tile.programs_per_multiprocessor
    if tile.stream_k:
        assert partial is not None
        GEMM1_STREAM_K.launch((programs,), (*arguments, partial, *rest), constants, device, routed.aligned)
    else:
        tiles = max_row_tiles(problem, tokens, tile.block_m) * (width // tile.block_n)
        GEMM1.launch((min(tiles, programs),), (*arguments, *rest), constants, device, routed.aligned)
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
    partial: torch.Tensor | None = None,
    tickets: torch.Tensor | None = None,
) -> None:
    """Columns ``[first_column, first_column + rows.shape[1])`` of the second GEMM into ``rows`` bfloat16.

    Stream-K tiles want ``partial``, of `partial_elements`, and ``tickets``, `tickets_of_gemm2` zeros.
    """
    capacity, columns = rows.shape
    block_n = tile.block_n if columns % tile.block_n == 0 else problem.block
    arguments: tuple[Argument, ...] = (
        activated,
        scale,
        weights_argument(inputs.gemm2_weights, min(block_n, 128), routed.aligned),
        inputs.gemm2_weights_scale,
        routed.counts,
        rows,
    )
    constants = _gemm2_constants(problem, launch, tile, columns, block_n, routed.aligned)
    programs = launch.multiprocessors * tile.programs_per_multiprocessor
    if tile.stream_k:
        assert partial is not None and tickets is not None
        arguments = (*arguments, partial, tickets, first_column, inputs.num_tokens, capacity)
        GEMM2_STREAM_K.launch((programs,), arguments, constants, rows.device, routed.aligned)
    else:
        tiles = max_row_tiles(problem, inputs.num_tokens, tile.block_m) * (columns // block_n)
        arguments = (*arguments, first_column, capacity)
        GEMM2.launch((min(tiles, programs),), arguments, constants, rows.device, routed.aligned)


def weights_argument(weights: torch.Tensor, block_rows: int, aligned: bool) -> Argument:
    """A descriptor of the rows of all experts in tiles of ``block_rows`` by 128, or the tensor where TMA can't read."""
    if not aligned:
        return weights
    experts, rows, inner = weights.shape
    return TensorDescriptor(weights, [experts * rows, inner], [inner, 1], [block_rows, 128])


GEMM1, GEMM2 = Kernel(gemm1_swiglu_kernel), Kernel(gemm2_kernel)
GEMM1_STREAM_K, GEMM2_STREAM_K = Kernel(gemm1_stream_k_kernel), Kernel(gemm2_stream_k_kernel)


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
