"""Data that the gate must not call wrong: models, widths, routing loads and skewed activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.measure.workloads import (
    DEEPSEEK_V3,
    GLM_4_5_AIR,
    KIMI_K2,
    QWEN3_235B,
    RoutingLoad,
    Workload,
    make_inputs,
    random_weights,
)
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work


@dataclass(frozen=True, slots=True)
class DataSet:
    """Inputs of one kind.

    Attributes
    ----------
    problem
        At full size; `scaled` makes it narrower.
    change
        What makes the inputs skewed.
    width
        What `numerics.check` is told; ``None`` for the intermediate size.
    """

    name: str
    problem: MoEProblem
    routing: RoutingLoad = "uniform"
    change: Callable[[MoEInputs, torch.Generator], MoEInputs] | None = None
    width: int | None = None

    def scaled(self, hidden_size: int | None) -> DataSet:
        """The same with fewer columns, and as wide between the GEMMs."""
        return self if hidden_size is None else replace(self, problem=replace(self.problem, hidden_size=hidden_size))

    def inputs(self, tokens: int, device: str, seed: int) -> MoEInputs:
        """Seeded, on the device; only the tokens with local work, as the others say nothing."""
        problem = self.problem
        offset = problem.num_local_experts if problem.num_experts > problem.num_local_experts else 0
        workload = Workload(tokens, offset, self.routing, seed)
        inputs = make_inputs(workload, problem, random_weights(problem, device, seed))
        if self.change is not None:
            inputs = self.change(inputs, torch.Generator(device).manual_seed(seed))
        return tokens_of(inputs, has_local_work(inputs, problem).nonzero().flatten())


def tokens_of(inputs: MoEInputs, chosen: torch.Tensor | slice) -> MoEInputs:
    """The call with these tokens alone."""
    return inputs._replace(
        routing_logits=inputs.routing_logits[chosen],
        hidden_states=inputs.hidden_states.view(torch.uint8)[chosen].view(FP8),
        hidden_states_scale=inputs.hidden_states_scale[:, chosen].contiguous(),
    )


def outlier_channels(inputs: MoEInputs, generator: torch.Generator) -> MoEInputs:
    """Two channels of the hidden states 30 times as large as the others, as trained models have them."""
    hidden = inputs.hidden_states.float()
    hidden[:, [5, hidden.shape[1] // 2]] *= 30
    pieces = hidden.unflatten(1, (-1, 128))
    shrink = (pieces.abs().amax(dim=2, keepdim=True) / 448).clamp_min(1.0)
    scale = inputs.hidden_states_scale * shrink.squeeze(2).t()
    return inputs._replace(hidden_states=(pieces / shrink).flatten(1).to(FP8), hidden_states_scale=scale)


def outlier_blocks(inputs: MoEInputs, generator: torch.Generator) -> MoEInputs:
    """One block in ten of the hidden states 50 times as large."""
    scale = inputs.hidden_states_scale
    chosen = torch.rand(scale.shape, device=scale.device, generator=generator) < 0.1
    return inputs._replace(hidden_states_scale=torch.where(chosen, 50 * scale, scale))


def rows_of_all_sizes(inputs: MoEInputs, generator: torch.Generator) -> MoEInputs:
    """Rows between 10^-4 and 10^4 times as large: results from 10^-8, which grow as the square, to 10^8."""
    scale = inputs.hidden_states_scale
    power = torch.rand((1, scale.shape[1]), device=scale.device, generator=generator) * 8 - 4
    return inputs._replace(hidden_states_scale=scale * 10**power)


def normal_scales(inputs: MoEInputs, generator: torch.Generator) -> MoEInputs:
    """As flashinfer-bench draws them: values N(0, 1) within 2, every scale N(0, 1), negative ones too."""

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, device=like.device, generator=generator)

    def values(like: torch.Tensor) -> torch.Tensor:
        return torch.stack([normal(row).clamp(-2, 2).to(FP8).view(torch.uint8) for row in like]).view(FP8)

    return inputs._replace(
        hidden_states=values(inputs.hidden_states),
        hidden_states_scale=normal(inputs.hidden_states_scale),
        gemm1_weights=values(inputs.gemm1_weights),
        gemm1_weights_scale=normal(inputs.gemm1_weights_scale),
        gemm2_weights=values(inputs.gemm2_weights),
        gemm2_weights_scale=normal(inputs.gemm2_weights_scale),
    )


def outlier_activations(inputs: MoEInputs, generator: torch.Generator) -> MoEInputs:
    """Each expert has one block of 128 channels between the GEMMs that is 30 times as large."""
    scale = inputs.gemm1_weights_scale.clone()
    scale[:, 0] *= 30  # of the up half
    return inputs._replace(gemm1_weights_scale=scale)


def four_outliers(inputs: MoEInputs, generator: torch.Generator) -> MoEInputs:
    """Each expert has four channels between the GEMMs that are 100 times as large and carry all of the result.

    One alone would lose nothing: the largest of a block is what its scale is made of.
    """
    weights, scale = inputs.gemm1_weights.float(), inputs.gemm1_weights_scale.clone()
    weights[:, 4:128] /= 100
    scale[:, 0] *= 100
    return inputs._replace(gemm1_weights=weights.to(FP8), gemm1_weights_scale=scale)


# Of other sizes, few experts do: a token's error doesn't depend on how many others there are.
_FEW = MoEProblem(num_experts=16, num_local_experts=8, top_k=4, n_group=4, topk_group=2)
DATA_SETS = (
    DataSet("deepseek-v3", DEEPSEEK_V3),
    DataSet("deepseek-v3, zipf", DEEPSEEK_V3, "zipf"),
    DataSet("deepseek-v3, concentrated", DEEPSEEK_V3, "concentrated"),
    DataSet("kimi-k2", KIMI_K2),
    DataSet("glm-4.5-air", GLM_4_5_AIR),
    DataSet("qwen3-235b", QWEN3_235B),
    *(DataSet(f"width {width}", replace(_FEW, intermediate_size=width)) for width in (128, 256, 384, 512, 1024)),
    DataSet("width 128, one row a token", MoEProblem(32, 4, 1, 1, 1, intermediate_size=128)),
    DataSet("outlier channels", _FEW, change=outlier_channels),
    DataSet("outlier blocks", _FEW, change=outlier_blocks),
    DataSet("rows of all sizes", _FEW, change=rows_of_all_sizes),
    DataSet("scales N(0, 1)", _FEW, change=normal_scales),
    DataSet("scales N(0, 1), width 256", replace(_FEW, intermediate_size=256), change=normal_scales),
    DataSet("128 outlier activations", _FEW, change=outlier_activations, width=128),
    DataSet("4 outlier activations", _FEW, change=four_outliers, width=16),
)
