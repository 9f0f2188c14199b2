"""Provider ``triton``: the two Triton GEMMs with their tiles; needs no other library."""

from __future__ import annotations

import torch

from ...problem import FP8, DeviceKey, MoEInputs, MoEProblem
from ..pipeline import GroupedGemm, Launch, Routed, column_chunk, combine, pow2, row_capacity
from .tiles import TilePlan, max_row_tiles, tile_plan
from .triton import gemm1_swiglu_kernel, gemm2_kernel


class TritonGroupedGemm(GroupedGemm):
    """Two launches: GEMM1 with gather, SwiGLU and quantisation; GEMM2."""

    name = "triton"

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """None: what Triton needs is asked by the backend."""
        return []

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        """The activation with its scales, and one column chunk of the result's rows."""
        rows = row_capacity(problem, num_tokens)
        quantized = tile_plan(problem, num_tokens).quantized
        width = problem.intermediate_size
        activation = rows * (width + width // problem.block * 4 if quantized else width * 4)
        return activation + rows * column_chunk(problem, rows) * 2

    def run(
        self, inputs: MoEInputs, routed: Routed, problem: MoEProblem, launch: Launch, output: torch.Tensor
    ) -> None:
        """Launch GEMM1, then GEMM2 and the combine for each chunk of columns."""
        plan = tile_plan(problem, inputs.num_tokens)
        activated, scale = gemm1(inputs, routed, problem, launch, plan)
        capacity = activated.shape[0]
        columns = column_chunk(problem, capacity)
        rows = torch.empty((capacity, columns), dtype=torch.bfloat16, device=output.device)
        for first_column in range(0, problem.hidden_size, columns):
            gemm2(activated, scale, inputs, routed, problem, launch, plan, rows, first_column)
            combine(rows, routed, problem, launch, output, first_column)


def gemm1(
    inputs: MoEInputs, routed: Routed, problem: MoEProblem, launch: Launch, plan: TilePlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU of the first GEMM: ``[capacity, I]`` e4m3 and ``[I/128, capacity]`` scales.

    Where the plan leaves quantisation to GEMM2, the values are float32 and the scales are not written.
    """
    tokens, tile, device = inputs.num_tokens, plan.gemm1, inputs.hidden_states.device
    capacity, width = row_capacity(problem, tokens), problem.intermediate_size
    activated = torch.empty((capacity, width), dtype=FP8 if plan.quantized else torch.float32, device=device)
    scale_rows = capacity if plan.quantized else 0
    scale = torch.empty((width // problem.block, scale_rows), dtype=torch.float32, device=device)
    tiles = max_row_tiles(problem, tokens, tile.block_m) * (width // tile.block_n)
    gemm1_swiglu_kernel[(min(tiles, launch.multiprocessors * tile.programs_per_multiprocessor),)](
        inputs.hidden_states,
        inputs.hidden_states_scale,
        inputs.gemm1_weights,
        inputs.gemm1_weights_scale,
        routed.counts,
        routed.slot_token,
        activated,
        scale,
        inputs.hidden_states.stride(0),
        inputs.hidden_states_scale.stride(0),
        inputs.hidden_states_scale.stride(1),
        tokens,
        capacity,
        HIDDEN=problem.hidden_size,
        INTERMEDIATE=width,
        GATE_FIRST=problem.gate_first,
        E=problem.num_local_experts,
        E_POW2=pow2(problem.num_local_experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        QUANTIZE=plan.quantized,
        PDL=launch.pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch.options,
    )
    return activated, scale


def gemm2(
    activated: torch.Tensor,
    scale: torch.Tensor,
    inputs: MoEInputs,
    routed: Routed,
    problem: MoEProblem,
    launch: Launch,
    plan: TilePlan,
    rows: torch.Tensor,
    first_column: int,
) -> None:
    """Columns ``[first_column, first_column + rows.shape[1])`` of the second GEMM into ``rows`` bfloat16."""
    capacity, columns = rows.shape
    tile = plan.gemm2
    tiles = max_row_tiles(problem, inputs.num_tokens, tile.block_m) * (columns // tile.block_n)
    gemm2_kernel[(min(tiles, launch.multiprocessors * tile.programs_per_multiprocessor),)](
        activated,
        scale,
        inputs.gemm2_weights,
        inputs.gemm2_weights_scale,
        routed.counts,
        rows,
        first_column,
        capacity,
        HIDDEN=problem.hidden_size,
        INTERMEDIATE=problem.intermediate_size,
        COLUMNS=columns,
        E=problem.num_local_experts,
        E_POW2=pow2(problem.num_local_experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        QUANTIZED=plan.quantized,
        PDL=launch.pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch.options,
    )
