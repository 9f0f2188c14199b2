"""Peer: the layer as a user of sgl-kernel writes it, piece by piece as SGLang's `cutlass_fused_experts_fp8` does.

Nothing of `hybrid_moe`'s kernels is in it. Routing is torch, as SGLang's `biased_grouped_topk` without a kernel:
sgl-kernel 0.4.4 is the last with `moe_fused_gate`. The rest are the library's ops: `prepare_moe_input`, `shuffle_rows`,
`fp8_blockwise_scaled_grouped_mm`, `silu_and_mul`, `sgl_per_token_group_quant_8bit_v2`, `apply_shuffle_mul_sum`.

All of it can be captured in a CUDA graph. It works on T * top_k rows whatever share of them is local, and there the
library changes its tiles at T * top_k > 2048.

Two things that SGLang does at load time are in `prepare`: the strides and scratch tensors, and the order of the halves
of the first weight, since `silu_and_mul` wants the gate first (a copy of 0.9 GB where they have the up half first).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.problem import MoEProblem

from .routing import biased_grouped_topk

WORKSPACE_BYTES = 90_000


@dataclass(slots=True)
class Prepared:
    """What a layer keeps from its load on."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    strides_h: torch.Tensor
    strides_i: torch.Tensor
    strides_2i: torch.Tensor
    pointers: tuple[torch.Tensor, ...]
    workspace: torch.Tensor
    expert_offsets: torch.Tensor
    problem_sizes1: torch.Tensor
    problem_sizes2: torch.Tensor


def prepare(inputs: MoEInputs, problem: MoEProblem) -> Prepared:
    """Do once what doesn't depend on the tokens."""
    device, e = inputs.gemm1_weights.device, problem.num_local_experts
    h, i = problem.hidden_size, problem.intermediate_size
    w13, scale = inputs.gemm1_weights, inputs.gemm1_weights_scale
    if not problem.gate_first:
        w13 = w13.view(torch.uint8).roll(i, dims=1).view(FP8)
        scale = scale.roll(i // problem.block, dims=1)

    def strides(value: int) -> torch.Tensor:
        return torch.full((e,), value, dtype=torch.int64, device=device)

    return Prepared(
        w13,
        scale,
        strides(h),
        strides(i),
        strides(2 * i),
        tuple(torch.empty(e, dtype=torch.int64, device=device) for _ in range(5)),
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        torch.empty(e + 1, dtype=torch.int32, device=device),
        torch.empty((e, 3), dtype=torch.int32, device=device),
        torch.empty((e, 3), dtype=torch.int32, device=device),
    )


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1x128 e4m3 by the library, scales row by row."""
    rows, columns = values.shape
    quantized = torch.empty((rows, columns), dtype=FP8, device=values.device)
    scale = torch.empty((rows, columns // 128), dtype=torch.float32, device=values.device)
    torch.ops.sgl_kernel.sgl_per_token_group_quant_8bit_v2.default(
        values, quantized, scale, 128, 1e-10, -448.0, 448.0, False, False, None
    )
    return quantized, scale


def run(inputs: MoEInputs, problem: MoEProblem, output: torch.Tensor, prepared: Prepared | None = None) -> None:
    """Write the layer's result into ``output``; without ``prepared`` that is done first, at its cost."""
    ops = torch.ops.sgl_kernel
    p = prepare(inputs, problem) if prepared is None else prepared
    device, e, h, i = output.device, problem.num_local_experts, problem.hidden_size, problem.intermediate_size
    rows = inputs.num_tokens * problem.top_k

    weights, ids = biased_grouped_topk(inputs, problem)
    local = ids - inputs.local_expert_offset
    is_local = (local >= 0) & (local < e)
    local = local.masked_fill(~is_local, -1).int()
    weights = weights.masked_fill(~is_local, 0.0).to(torch.bfloat16)

    # `prepare_moe_input` leaves the places of other ranks' experts unwritten, and the shuffles read them.
    maps = torch.zeros((2, rows), dtype=torch.int32, device=device)
    ops.prepare_moe_input.default(
        local, p.expert_offsets, None, p.problem_sizes1, p.problem_sizes2, maps[0], maps[1], e, i, h
    )
    a = torch.empty((rows, h), dtype=FP8, device=device)
    a_scale = torch.empty((rows, h // 128), dtype=torch.float32, device=device)
    ops.shuffle_rows.default(inputs.hidden_states.contiguous(), maps[0], a)
    ops.shuffle_rows.default(inputs.hidden_states_scale.t().contiguous(), maps[0], a_scale)

    layouts = [torch.empty((e, 5), dtype=torch.int32, device=device) for _ in range(2)]
    offsets = p.expert_offsets[:-1]
    c1 = torch.empty((rows, 2 * i), dtype=torch.bfloat16, device=device)
    ops.fp8_blockwise_scaled_grouped_mm.default(
        c1,
        *p.pointers,
        a,
        p.w13.transpose(1, 2),
        a_scale,
        p.w13_scale.transpose(1, 2),
        p.strides_h,
        p.strides_h,
        p.strides_2i,
        *layouts,
        p.problem_sizes1,
        offsets,
        p.workspace,
    )
    activated = torch.empty((rows, i), dtype=torch.bfloat16, device=device)
    ops.silu_and_mul.default(activated, c1)
    quantized, scale = quantize(activated)
    c2 = torch.empty((rows, h), dtype=torch.bfloat16, device=device)
    # Other ranks' experts add row 0 with weight 0: it has to be finite where no expert writes it.
    c2[0].zero_()
    ops.fp8_blockwise_scaled_grouped_mm.default(
        c2,
        *p.pointers,
        quantized,
        inputs.gemm2_weights.transpose(1, 2),
        scale,
        inputs.gemm2_weights_scale.transpose(1, 2),
        p.strides_i,
        p.strides_i,
        p.strides_h,
        *layouts,
        p.problem_sizes2,
        offsets,
        p.workspace,
    )
    ops.apply_shuffle_mul_sum.default(c2, output, maps[1], weights)
