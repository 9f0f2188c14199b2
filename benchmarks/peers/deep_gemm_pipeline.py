"""Peer: the layer as a user of DeepGEMM writes it: torch around `m_grouped_fp8_gemm_nt_contiguous`.

Nothing of `hybrid_moe`'s kernels is in it. DeepGEMM has no permutation, activation or combine, so these are torch, and
the quantisation is what the library's own `per_token_cast_to_fp8` does.

By default the rows are reserved for the worst routing, and the library is told on the device where each expert's rows
end (``use_psum_layout``): it can be captured in a CUDA graph. With ``read_back=True`` the number of rows is read by the
host, as SGLang's prefill path gets it, and only those are worked on, with an expert for each row: faster for many
tokens, eager only.
"""

from __future__ import annotations

import deep_gemm
import torch

from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.problem import MoEProblem

from .routing import biased_grouped_topk


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1x128 e4m3 and scales ``[rows, columns/128]``."""
    pieces = values.unflatten(1, (-1, 128))
    scale = pieces.abs().amax(dim=2).float().clamp(1e-4) / 448.0
    return (pieces * (1.0 / scale.unsqueeze(2))).to(FP8).flatten(1), scale


def run(inputs: MoEInputs, problem: MoEProblem, output: torch.Tensor, *, read_back: bool = False) -> None:
    """Write the layer's result into ``output``."""
    device, e = output.device, problem.num_local_experts
    tokens, h, i = inputs.num_tokens, problem.hidden_size, problem.intermediate_size
    align = deep_gemm.get_mk_alignment_for_contiguous_layout()

    weights, ids = biased_grouped_topk(inputs, problem)
    local = (ids - inputs.local_expert_offset).flatten()
    local = torch.where((local >= 0) & (local < e), local, e)
    # Each expert's rows start at a multiple of the library's tile; a pair's row is its place among the expert's pairs.
    expert = torch.arange(e, device=device)
    chosen = local.unsqueeze(1) == expert
    counts = chosen.sum(dim=0)
    extents = (counts + align - 1) // align * align
    starts = extents.cumsum(0) - extents
    places = chosen.int().cumsum(0) - 1
    is_local = local < e
    row = ((places + starts) * chosen).sum(dim=1)

    if read_back:
        capacity = int(extents.sum())
        if capacity == 0:
            output.zero_()
            return
    else:
        most = tokens * problem.max_local_rows_per_token
        active = min(e, most)
        capacity = (active + (most - active) // align) * align
    # One row more, for the pairs of other ranks' experts.
    to = torch.where(is_local, row, capacity)
    source = torch.zeros(capacity + 1, dtype=torch.int64, device=device)
    source.scatter_(0, to, torch.arange(tokens, device=device).repeat_interleave(problem.top_k))
    source = source[:capacity]
    # torch indexes no e4m3; in words of eight it moves the same bytes in fewer steps.
    a = inputs.hidden_states.contiguous().view(torch.int64).index_select(0, source).view(FP8)
    a_scale = inputs.hidden_states_scale.t().index_select(0, source)

    if read_back:
        layout = torch.full((capacity + 1,), -1, dtype=torch.int32, device=device)
        layout = layout.scatter_(0, to, local.int())[:capacity]
        options = {}
    else:
        layout = (starts + counts).int()
        options = {
            "use_psum_layout": True,
            "expected_m_for_psum_layout": -(-tokens * problem.top_k // problem.num_experts),
        }
    c1 = torch.empty((capacity, 2 * i), dtype=torch.bfloat16, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (a, a_scale), (inputs.gemm1_weights, inputs.gemm1_weights_scale), c1, layout, **options
    )
    first, second = c1[:, :i], c1[:, i:]
    up, gate = (second, first) if problem.gate_first else (first, second)
    activated, scale = quantize(torch.nn.functional.silu(gate) * up)
    c2 = torch.empty((capacity, h), dtype=torch.bfloat16, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (activated, scale), (inputs.gemm2_weights, inputs.gemm2_weights_scale), c2, layout, **options
    )
    # The pairs of other ranks' experts take row 0, masked: it may hold anything.
    values = c2.index_select(0, torch.where(is_local, row, 0)).masked_fill(~is_local.unsqueeze(1), 0.0)
    torch.bmm(weights.to(torch.bfloat16).unsqueeze(1), values.view(tokens, problem.top_k, h), out=output.unsqueeze(1))
