"""flashinfer's `cutlass_fused_moe` with DeepSeek's block scales in torch: its arguments, layouts and roundings.

Written from flashinfer's docstring and kernels (0.7.2.post1), and from nothing of this package, so that it can tell
whether the package calls flashinfer rightly. It reads memory as the kernels do: strides are ignored.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
SWIGLU = 3


def _as_packed(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel sees that takes the pointer and the shape and never asks for the strides."""
    return tensor.as_strided(tensor.shape, torch.empty(tensor.shape).stride())


def _quantized(rows: torch.Tensor) -> torch.Tensor:
    """``[R, N]`` bf16 as e4m3 with one scale for 128 columns of a row, read back as float32."""
    pieces = rows.float().unflatten(1, (-1, 128))
    amax = pieces.abs().amax(dim=2, keepdim=True)
    scale = torch.where(amax == 0, torch.ones_like(amax), 448.0 / amax)
    return ((pieces * scale).to(FP8).float() * (1 / scale)).flatten(1)


def _expand(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.repeat_interleave(128, dim=-2).repeat_interleave(128, dim=-1)


def cutlass_fused_moe(
    input,
    token_selected_experts,
    token_final_scales,
    fc1_expert_weights,
    fc2_expert_weights,
    output_dtype,
    quant_scales,
    fc1_expert_biases=None,
    fc2_expert_biases=None,
    input_sf=None,
    swiglu_alpha=None,
    swiglu_beta=None,
    swiglu_limit=None,
    tp_size=1,
    tp_rank=0,
    ep_size=1,
    ep_rank=0,
    cluster_size=1,
    cluster_rank=0,
    output=None,
    enable_alltoall=False,
    use_deepseek_fp8_block_scale=False,
    use_w4_group_scaling=False,
    use_mxfp8_act_scaling=False,
    min_latency_mode=False,
    use_packed_weights=False,
    use_wfp4afp8_humming=False,
    tune_max_num_tokens=8192,
    enable_pdl=None,
    activation_type=SWIGLU,
    swizzled_input_sf=True,
    use_fused_finalize=True,
    profile_ids=None,
    workspace_buffer=None,
    *,
    clamped_relu2_limit=None,
    situ_beta=None,
    situ_linear_beta=None,
    backend="cutlass",
):
    """Emulate the call; what the emulation doesn't cover is an AssertionError."""
    assert use_deepseek_fp8_block_scale is True and activation_type == SWIGLU and backend == "cutlass"
    for unused in (
        *(fc1_expert_biases, fc2_expert_biases, input_sf, swiglu_alpha, swiglu_beta, swiglu_limit),
        *(clamped_relu2_limit, situ_beta, situ_linear_beta, workspace_buffer),
    ):
        assert unused is None
    for other in (use_w4_group_scaling, use_mxfp8_act_scaling, min_latency_mode, use_packed_weights, enable_alltoall):
        assert other is False
    assert use_wfp4afp8_humming is False and swizzled_input_sf is True and use_fused_finalize is True
    assert (tp_size, tp_rank, cluster_size, cluster_rank) == (1, 0, 1, 0)
    assert profile_ids in (None, [-1, -1])
    assert type(ep_size) is int and type(ep_rank) is int and 0 <= ep_rank < ep_size
    assert enable_pdl is None or type(enable_pdl) is bool
    # The binding's own checks of dtypes, shapes and contiguity.
    tokens, top_k = token_selected_experts.shape
    local, hidden, inner = fc2_expert_weights.shape
    assert input.shape == (tokens, hidden) and input.dtype == torch.bfloat16
    assert token_selected_experts.dtype == torch.int32
    assert token_final_scales.shape == (tokens, top_k) and token_final_scales.dtype == torch.float32
    assert fc1_expert_weights.shape == (local, 2 * inner, hidden)
    assert fc1_expert_weights.dtype == fc2_expert_weights.dtype == FP8
    for tensor in (input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights):
        assert tensor.is_contiguous()
    assert output_dtype == torch.bfloat16
    assert output.shape == (tokens, hidden) and output.dtype == torch.bfloat16
    # It takes the scales' pointers only.
    fc1_scale, fc2_scale = quant_scales
    assert fc1_scale.shape == (local, 2 * inner // 128, hidden // 128) and fc1_scale.dtype == torch.float32
    assert fc2_scale.shape == (local, hidden // 128, inner // 128) and fc2_scale.dtype == torch.float32
    ids = token_selected_experts.long()
    # Any other number is passed over by its range alone; an expert that is here has room for each token once.
    mine = [[i for i in row if 0 <= i - ep_rank * local < local] for row in ids.tolist()]
    assert all(len(set(row)) == len(row) for row in mine)

    x = _quantized(_as_packed(input))
    w13 = _as_packed(fc1_expert_weights).float() * _expand(_as_packed(fc1_scale))
    w2 = _as_packed(fc2_expert_weights).float() * _expand(_as_packed(fc2_scale))
    for token in range(tokens):
        accumulator = torch.zeros(hidden)
        for expert, weight in zip(ids[token].tolist(), token_final_scales[token], strict=True):
            mine = expert - ep_rank * local
            if not 0 <= mine < local:
                continue
            gemm1 = (w13[mine] @ x[token]).bfloat16().float()
            linear, gate = gemm1[:inner], gemm1[inner:]
            activated = (torch.nn.functional.silu(gate) * linear).bfloat16()
            accumulator += weight * (w2[mine] @ _quantized(activated[None])[0]).bfloat16().float()
        output.as_strided(output.shape, (hidden, 1))[token] = accumulator.bfloat16()
    return [output]
