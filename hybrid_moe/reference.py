"""The specification: the layer in readable torch, expert by expert, and its quantisation-aware twin.

Follows the reference of the flashinfer-bench definition
``moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048``; equal scores go to the lower index, which that
reference leaves to `torch.topk`.
"""

from __future__ import annotations

import torch

from .inputs import FP8, Inputs, MoEInputs
from .problem import MoEProblem

FP8_MAX = 448.0
# A block of zeros gets this amax, so that its scale is not zero.
MIN_AMAX = 1e-10


def route(
    logits: torch.Tensor, bias: torch.Tensor, routed_scaling_factor: float, problem: MoEProblem
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token (by default as DeepSeek-V3, without auxiliary loss).

    Parameters
    ----------
    logits
        ``[T, num_experts]`` float32.
    bias
        ``[num_experts]``, added to the scores for the choice alone.
    routed_scaling_factor
        Factor on the normalised weights.
    problem
        The layer.

    Returns
    -------
    topk_ids : torch.Tensor
        ``[T, top_k]`` int64 global expert ids, best first.
    topk_weights : torch.Tensor
        ``[T, top_k]`` float32; NaN for a token any of whose scores is, by its logits or by the bias. Such a score is
        the greatest.
    """
    tokens = logits.shape[0]
    if problem.softmax:
        scores = logits.float().softmax(dim=1)
    else:
        scores = 1.0 / (1.0 + torch.exp(-logits.float()))
    biased = scores + bias.float()
    has_nan = biased.isnan().any(dim=1, keepdim=True)
    if problem.topk_group < problem.n_group:
        grouped = biased.view(tokens, problem.n_group, problem.group_size)
        group_scores = grouped.topk(2, dim=2).values.sum(dim=2)
        kept = _top_lower_index_first(group_scores, problem.topk_group)
        eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, kept, True)
        dropped = ~eligible.repeat_interleave(problem.group_size, dim=1)
        # A dropped group comes after even an expert that a bias of -inf masks.
        biased = biased.clamp_min(torch.finfo(torch.float32).min).masked_fill(dropped, -torch.inf)
    ids = _top_lower_index_first(biased, problem.top_k)
    weights = scores.gather(1, ids)
    if problem.renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    weights = (weights * routed_scaling_factor).masked_fill(has_nan, torch.nan)
    return ids, weights


def chosen_experts(inputs: Inputs, problem: MoEProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights as `route` has them, or as a call gives them; behind them those of the shared experts.

    A shared expert's id is the first that no routed one has, or follows; its weight is one.
    """
    if isinstance(inputs, MoEInputs):
        ids, weights = route(inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor, problem)
    else:
        ids, weights = inputs.topk_ids, inputs.topk_weights
    if not problem.num_shared_experts:
        return ids, weights
    routed, every = problem.num_experts, problem.all_routed.num_experts
    ids = ids.masked_fill((ids < 0) | (ids >= routed), -1)  # a shared expert's id chooses none
    shared = torch.arange(routed, every, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    return torch.cat([ids, shared], dim=1), torch.cat([weights, torch.ones_like(shared, dtype=weights.dtype)], dim=1)


def weighted_input(inputs: Inputs, weights: torch.Tensor, problem: MoEProblem) -> tuple[Inputs, torch.Tensor]:
    """The call with the weights on its input and ones in their place, where the problem has them there."""
    if not problem.weight_on_input:
        return inputs, weights
    return inputs._replace(hidden_states_scale=inputs.hidden_states_scale * weights.t()), torch.ones_like(weights)


def _top_lower_index_first(values: torch.Tensor, k: int) -> torch.Tensor:
    # torch.topk promises no order between equal values; a stable sort does.
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def dequantize_rows(values: torch.Tensor, scale: torch.Tensor, block: int = 128) -> torch.Tensor:
    """``[T, H]`` fp8 and ``[H/block, T]`` scales to ``[T, H]`` float32."""
    return values.float() * scale.t().float().repeat_interleave(block, dim=1)


def dequantize_blocks(values: torch.Tensor, scale: torch.Tensor, block: int = 128) -> torch.Tensor:
    """``[N, K]`` fp8 and ``[N/block, K/block]`` scales to ``[N, K]`` float32."""
    return values.float() * scale.repeat_interleave(block, dim=0).repeat_interleave(block, dim=1)


def quantize_rows(values: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, H]`` float to fp8 with one scale for each 1 x ``block`` piece: ``[T, H]`` e4m3 and ``[H/block, T]``."""
    pieces = values.float().unflatten(1, (-1, block))
    scale = pieces.abs().amax(dim=2).clamp_min(MIN_AMAX) / FP8_MAX
    quantized = (pieces / scale.unsqueeze(2)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return quantized.flatten(1), scale.t().contiguous()


def moe_reference(inputs: Inputs, problem: MoEProblem, *, quantize_intermediate: bool = False) -> torch.Tensor:
    """The layer's result in float32.

    One expert's weights are expanded at a time: besides the inputs it takes about 0.3 GB and two ``[T, H]`` float32.

    Parameters
    ----------
    inputs
        The ten inputs, already checked (`inputs.problem_of`).
    problem
        The layer.
    quantize_intermediate
        Round the activation between the two GEMMs to e4m3 with 1x128 scales, as every FP8 kernel does. The definition
        doesn't; use this twin to tell a kernel's own error from that rounding.

    Returns
    -------
    torch.Tensor
        ``[T, H]`` float32; zeros for a token without a local expert.
    """
    ids, weights = chosen_experts(inputs, problem)
    inputs, weights = weighted_input(inputs, weights, problem)
    output = torch.zeros(inputs.hidden_states.shape, dtype=torch.float32, device=inputs.hidden_states.device)
    half = problem.intermediate_size
    for local in range(problem.all_routed.num_local_experts):
        token, position = (ids == inputs.local_expert_offset + local).nonzero(as_tuple=True)
        if not token.numel():
            continue
        x = dequantize_rows(inputs.hidden_states[token], inputs.hidden_states_scale[:, token], problem.block)
        w13 = dequantize_blocks(inputs.gemm1_weights[local], inputs.gemm1_weights_scale[local], problem.block)
        hidden = x @ w13.t()
        first, second = hidden[:, :half], hidden[:, half:]
        up, gate = (second, first) if problem.gate_first else (first, second)
        activated = gate / (1.0 + torch.exp(-gate)) * up
        if quantize_intermediate:
            activated = dequantize_rows(*quantize_rows(activated, problem.block), problem.block)
        w2 = dequantize_blocks(inputs.gemm2_weights[local], inputs.gemm2_weights_scale[local], problem.block)
        output.index_add_(0, token, activated @ w2.t() * weights[token, position].unsqueeze(1))
    return output


def has_local_work(inputs: Inputs, problem: MoEProblem) -> torch.Tensor:
    """``[T]`` bool: whether the token chose at least one local expert."""
    return (local_rows_per_expert_and_token(inputs, problem)).any(dim=1)


def local_rows_per_expert_and_token(inputs: Inputs, problem: MoEProblem) -> torch.Tensor:
    """``[T, num_local_experts + num_shared_experts]`` bool: which of this rank's experts each token has."""
    local = chosen_experts(inputs, problem)[0].unsqueeze(2) - inputs.local_expert_offset
    return (local == torch.arange(problem.all_routed.num_local_experts, device=local.device)).any(dim=1)
