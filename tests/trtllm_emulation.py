"""flashinfer's `trtllm_fp8_block_scale_moe` in torch: its keyword arguments, its layouts, its roundings.

Written from flashinfer's docstring and kernels (0.7.2.post1), and from nothing of this package, so that it can tell
whether the package calls flashinfer rightly. It reads memory as the kernels do: strides are ignored.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
DEEPSEEK_V3 = 2
MAJOR_K = 0
DEEPSEEK_FP8 = 1
SWIGLU = 3


def _as_packed(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel sees that takes the pointer and the shape and never asks for the strides."""
    packed = torch.empty(tensor.shape).stride()
    return tensor.as_strided(tensor.shape, packed)


def _round_to_fp8(rows: torch.Tensor) -> torch.Tensor:
    """Store ``[R, N]`` as e4m3 with one scale for 128 columns of a row, and read it back."""
    pieces = rows.unflatten(1, (-1, 128))
    scale = (pieces.abs().amax(dim=2, keepdim=True) / 448.0).clamp_min(torch.finfo(torch.float32).tiny)
    return ((pieces / scale).to(FP8).float() * scale).flatten(1)


def _expand(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.repeat_interleave(128, dim=-2).repeat_interleave(128, dim=-1)


def _route(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, n_group: int, topk_group: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, top_k]`` expert ids and their bf16 weights, one token at a time."""
    ids, weights = [], []
    for row in logits.float():
        score = torch.sigmoid(row)
        biased = score + bias.float()
        groups = biased.view(n_group, -1)
        group_score = [float(group.sort(descending=True).values[:2].sum()) for group in groups]
        kept = sorted(range(n_group), key=lambda g: (-group_score[g], g))[:topk_group]
        size = groups.shape[1]
        eligible = [g * size + e for g in kept for e in range(size)]
        chosen = sorted(eligible, key=lambda e: (-float(biased[e]), e))[:top_k]
        weight = score[chosen] * factor / (score[chosen].sum() + 1e-20)
        ids.append(torch.tensor(chosen))
        weights.append(weight.bfloat16())
    return torch.stack(ids), torch.stack(weights)


def trtllm_fp8_block_scale_moe(
    *,
    routing_logits,
    routing_bias,
    hidden_states,
    hidden_states_scale,
    gemm1_weights,
    gemm1_weights_scale,
    gemm2_weights,
    gemm2_weights_scale,
    num_experts,
    top_k,
    n_group,
    topk_group,
    intermediate_size,
    local_expert_offset,
    local_num_experts,
    routed_scaling_factor,
    routing_method_type=0,
    use_shuffled_weight=False,
    weight_layout=0,
    do_finalize=True,
    enable_pdl=None,
    tune_max_num_tokens=8192,
    fp8_quantization_type=DEEPSEEK_FP8,
    num_fused_shared_experts=None,
    activation_type=SWIGLU,
    norm_topk_prob=True,
    routing_replay_out=None,
    gemm1_alpha=None,
    gemm1_beta=None,
    gemm1_clamp_limit=None,
    output=None,
    valid_hidden_size=None,
    valid_intermediate_size=None,
    gemm1_bias=None,
    gemm2_bias=None,
):
    """Emulate the call; what the emulation doesn't cover is an AssertionError."""
    assert (routing_method_type, weight_layout, use_shuffled_weight) == (DEEPSEEK_V3, MAJOR_K, False)
    assert (fp8_quantization_type, activation_type, norm_topk_prob) == (DEEPSEEK_FP8, SWIGLU, True)
    assert do_finalize is True and num_fused_shared_experts in (None, 0)
    for unused in (routing_replay_out, gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm1_bias, gemm2_bias):
        assert unused is None
    assert valid_hidden_size is None and valid_intermediate_size is None
    for integer in (num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts):
        assert type(integer) is int  # the C++ side takes int64_t and nothing else
    assert enable_pdl is None or type(enable_pdl) is bool
    assert type(tune_max_num_tokens) is int and tune_max_num_tokens > 0
    # The launcher's own checks of shapes and dtypes.
    tokens, hidden = hidden_states.shape
    inner = intermediate_size
    assert routing_logits.shape == (tokens, num_experts) and routing_logits.dtype in (torch.float32, torch.bfloat16)
    assert routing_bias.shape == (num_experts,) and routing_bias.dtype in (torch.float32, torch.bfloat16)
    assert hidden_states.dtype == gemm1_weights.dtype == gemm2_weights.dtype == FP8
    assert hidden_states_scale.shape == (hidden // 128, tokens)
    assert gemm1_weights.shape == (local_num_experts, 2 * inner, hidden)
    assert gemm2_weights.shape == (local_num_experts, hidden, inner)
    assert gemm1_weights_scale.shape == (local_num_experts, 2 * inner // 128, hidden // 128)
    assert gemm2_weights_scale.shape == (local_num_experts, hidden // 128, inner // 128)
    for scale in (hidden_states_scale, gemm1_weights_scale, gemm2_weights_scale):
        assert scale.dtype == torch.float32
    assert 0 <= local_expert_offset <= num_experts - local_num_experts
    assert num_experts % 4 == 0 and n_group <= 8 and num_experts // n_group <= 32
    assert topk_group <= 4 and top_k <= 8 and top_k < topk_group * num_experts // n_group
    assert output.shape == (tokens, hidden) and output.dtype == torch.bfloat16

    ids, weights = _route(
        _as_packed(routing_logits), routing_bias.bfloat16(), top_k, n_group, topk_group, routed_scaling_factor
    )
    scale = _as_packed(hidden_states_scale).t().repeat_interleave(128, dim=1)
    x = _as_packed(hidden_states).float() * scale
    w13 = _as_packed(gemm1_weights).float() * _expand(_as_packed(gemm1_weights_scale))
    w2 = _as_packed(gemm2_weights).float() * _expand(_as_packed(gemm2_weights_scale))
    for token in range(tokens):
        accumulator = torch.zeros(hidden)
        for expert, weight in zip(ids[token].tolist(), weights[token].float(), strict=True):
            local = expert - local_expert_offset
            if not 0 <= local < local_num_experts:
                continue
            gemm1 = _round_to_fp8((w13[local] @ x[token])[None])[0]
            linear, gate = gemm1[:inner], gemm1[inner:]
            activated = _round_to_fp8((torch.nn.functional.silu(gate) * linear)[None])[0]
            accumulator += weight * (w2[local] @ activated).bfloat16().float()
        output.as_strided(output.shape, (hidden, 1))[token] = accumulator.bfloat16()
    return output
