"""What the tests of experts that are chosen before the call share."""

from __future__ import annotations

import torch

from hybrid_moe.inputs import MoEInputs, RoutedInputs
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import route


def routed_of(inputs: MoEInputs, problem: MoEProblem) -> RoutedInputs:
    """The same call with the reference's choice given."""
    ids, weights = route(inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor, problem)
    return RoutedInputs(ids.int(), weights, *inputs[2:])


def random_choice(problem: MoEProblem, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights: experts in any order, in a third of the places none, of every sort that counts as none."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, problem.num_experts)
    ids = torch.rand(shape, generator=generator).argsort(dim=1)[:, : problem.top_k].int()
    none = torch.tensor([-1, -1, -1, -7, problem.num_experts, 2**31 - 1, -(2**31)], dtype=torch.int32)
    absent = torch.rand(ids.shape, generator=generator) < 1 / 3
    picked = none[torch.randint(len(none), ids.shape, generator=generator)]
    return torch.where(absent, picked, ids), torch.rand(ids.shape, generator=generator) * 2
