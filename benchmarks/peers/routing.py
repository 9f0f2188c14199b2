"""Routing that both peers share: torch alone, as SGLang's `biased_grouped_topk` where its kernel is missing."""

from __future__ import annotations

import torch

from hybrid_moe.inputs import MoEInputs
from hybrid_moe.problem import MoEProblem


def biased_grouped_topk(inputs: MoEInputs, problem: MoEProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's routing without a kernel: weights and global ids of each token's experts."""
    tokens, groups = inputs.num_tokens, problem.n_group
    scores = inputs.routing_logits.sigmoid()
    for_choice = scores + inputs.routing_bias.float()
    group_scores = for_choice.view(tokens, groups, -1).topk(2, dim=-1).values.sum(dim=-1)
    group_index = group_scores.topk(problem.topk_group, dim=-1, sorted=False).indices
    group_mask = torch.zeros_like(group_scores).scatter_(1, group_index, 1)
    mask = group_mask.unsqueeze(-1).expand(tokens, groups, problem.group_size).reshape(tokens, -1)
    ids = for_choice.masked_fill(~mask.bool(), float("-inf")).topk(problem.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(dim=-1, keepdim=True) * inputs.routed_scaling_factor
    return weights, ids
