"""Inputs to run and to measure on: the definition's 19 workloads, and seeded random data for any problem."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ..inputs import FP8, MoEInputs
from ..problem import MoEProblem, sizes_of_definition
from ..reference import FP8_MAX, route
from .records import WorkloadKey

RoutingLoad = Literal["uniform", "zipf", "concentrated", "none", "light_rank", "mean_rank", "busy_rank"]
ROUTING_LOADS: tuple[RoutingLoad, ...] = get_args(RoutingLoad)
# Rows of a rank, of those that it has where all ranks have the same.
RANK_SHARES: Mapping[RoutingLoad, float] = {"light_rank": 0.5, "mean_rank": 1.0, "busy_rank": 1.5}

DEEPSEEK_V3 = MoEProblem()

# The layers of models as one GPU has them: one of eight ranks of expert parallelism, or of so many of tensor
# parallelism (TP), which has all experts and a shard of each. Sizes and routing are those of the checkpoints'
# config.json: moonshotai/Kimi-K2-Instruct (384 experts, no groups), zai-org/GLM-4.5-Air, GLM-4.6 and GLM-5 (no groups),
# MiniMaxAI/MiniMax-M2 (no groups), Qwen/Qwen3-235B-A22B and Qwen3-30B-A3B (softmax, renormalised; no bias, no factor).
KIMI_K2 = MoEProblem(num_experts=384, num_local_experts=48, n_group=1, topk_group=1)
GLM_4_5_AIR = MoEProblem(
    num_experts=128, num_local_experts=16, n_group=1, topk_group=1, hidden_size=4096, intermediate_size=1408
)
GLM_4_6 = replace(GLM_4_5_AIR, num_experts=160, num_local_experts=20, hidden_size=5120, intermediate_size=1536)
GLM_5 = MoEProblem(n_group=1, topk_group=1, hidden_size=6144)
MINIMAX_M2 = MoEProblem(n_group=1, topk_group=1, hidden_size=3072, intermediate_size=1536)
QWEN3_235B = MoEProblem(
    num_experts=128,
    num_local_experts=16,
    n_group=1,
    topk_group=1,
    hidden_size=4096,
    intermediate_size=1536,
    routing_method="softmax",
)
QWEN3_30B = replace(QWEN3_235B, num_local_experts=128, hidden_size=2048, intermediate_size=768)

ModelName = Literal[
    "deepseek-v3",
    "deepseek-v3-tp8",
    "kimi-k2",
    "qwen3-235b",
    "qwen3-235b-tp4",
    "qwen3-235b-tp8",
    "qwen3-30b-whole",
    "qwen3-30b-tp2",
    "glm-4.5-air",
    "glm-4.6",
    "glm-5",
    "minimax-m2",
]
MODELS: Mapping[ModelName, MoEProblem] = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-tp8": replace(DEEPSEEK_V3, num_local_experts=256, intermediate_size=2048 // 8),
    "kimi-k2": KIMI_K2,
    "qwen3-235b": QWEN3_235B,
    "qwen3-235b-tp4": replace(QWEN3_235B, num_local_experts=128, intermediate_size=1536 // 4),
    "qwen3-235b-tp8": replace(QWEN3_235B, num_local_experts=128, intermediate_size=256),  # 192, padded to whole blocks
    "qwen3-30b-whole": QWEN3_30B,
    "qwen3-30b-tp2": replace(QWEN3_30B, intermediate_size=768 // 2),
    "glm-4.5-air": GLM_4_5_AIR,
    "glm-4.6": GLM_4_6,
    "glm-5": GLM_5,
    "minimax-m2": MINIMAX_M2,
}


def num_experts_of(definition: str) -> int | None:
    """Experts of the whole model, where a definition is the layer of one of `MODELS` on however many ranks."""
    sizes = sizes_of_definition(definition)
    local = sizes.pop("num_local_experts")
    del sizes["num_shared_experts"], sizes["weight_on_input"]
    found = {
        model.num_experts
        for model in MODELS.values()
        if all(getattr(model, name) == size for name, size in sizes.items()) and model.num_experts % local == 0
    }
    return found.pop() if len(found) == 1 else None


# Of made-up inputs, whatever the problem: results are linear in it.
ROUTED_SCALING_FACTOR = 2.5


@dataclass(frozen=True, slots=True)
class Workload:
    """One point to measure.

    Parameters
    ----------
    num_tokens
        T, at least 0.
    local_expert_offset
        Global index of the first local expert.
    routing
        How the tokens spread over the experts:

        ``uniform``
            logits N(0, 1), bias 0.1 N(0, 1), or none with softmax routing; the first seed from ``10000 * seed`` on that
            gives local work (at T = 1: three active local experts where possible).
        ``zipf``
            as ``uniform``, and the popularity of the local experts falls as 1/rank.
        ``concentrated``
            every token chooses the same local experts, up to four of one group, and the rest elsewhere if it can.
        ``none``
            no token chooses a local expert.
        ``light_rank``, ``mean_rank``, ``busy_rank``
            as ``uniform``, with half of a rank's mean share of the rows, the whole of it, or 1.5 times: the logits of
            the local experts are shifted. In ``uniform`` the bias says which of these a rank comes near.
    seed
        Of the random data.
    uuid
        Identity in the flashinfer-bench data set, if it has one.
    """

    num_tokens: int
    local_expert_offset: int = 0
    routing: RoutingLoad = "uniform"
    seed: int = 0
    uuid: str | None = None

    @property
    def key(self) -> WorkloadKey:
        """What records of it have as `BenchRecord.at`."""
        return WorkloadKey(self.num_tokens, self.local_expert_offset, self.routing, self.seed, self.uuid or "")


# (T, local_expert_offset, uuid) of the definition's workloads in the flashinfer-trace data set.
_DEFINITION_WORKLOADS = (
    (1, 32, "e05c6c03-5603-4a1c-b34c-dcce0ecaeea4"),
    (7, 192, "b8f4f012-a32e-4356-b4e1-7665b3d598af"),
    (14, 0, "8cba5890-4288-448a-93b8-42c14c6b9420"),
    (15, 32, "2e69caee-ae5c-473b-aa99-5dc6659829d4"),
    (16, 224, "a7c2bcfd-a2f4-479e-8d32-200115df89cf"),
    (32, 32, "6230e838-67ca-41dd-a9d6-6f36b7676c6b"),
    (52, 160, "f7d6ac7c-24ec-47e4-aefc-4863a5e3e1d9"),
    (53, 32, "fc378037-e8fa-4305-b00f-4af47933fd53"),
    (54, 128, "76010cb4-f73c-4145-8365-8642a2ce99de"),
    (55, 128, "81955b1e-086f-49c1-9f40-a18a5aaf509d"),
    (56, 64, "4822167c-dae5-4bb1-bb53-e4adb256245b"),
    (57, 96, "74d7ff04-0365-4cf8-a824-ce61b7131dea"),
    (58, 64, "e626d3e6-6c29-4fd8-bb7c-5b09eec61702"),
    (59, 160, "eedc63b2-c03b-4cf2-8d16-1f46566e3af7"),
    (62, 96, "5eadab1e-a0e3-4966-b0fd-1115cd77497c"),
    (80, 96, "8f1ff9f1-6747-41d1-a1d8-2868cdacf893"),
    (901, 96, "1a4c6ba1-3cd2-4d7d-b716-84f2d52b69fc"),
    (11948, 128, "58a34f27-7995-4155-8b46-f60a7225e20e"),
    (14107, 32, "5e8dc11c-f2a9-42d5-8dce-9419cbf34d5d"),
)
DEFINITION_WORKLOADS: tuple[Workload, ...] = tuple(
    Workload(tokens, offset, uuid=uuid) for tokens, offset, uuid in _DEFINITION_WORKLOADS
)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The layer's own tensors, in the definition's layout; see `MoEInputs`."""

    gemm1_weights: torch.Tensor
    gemm1_weights_scale: torch.Tensor
    gemm2_weights: torch.Tensor
    gemm2_weights_scale: torch.Tensor


def random_weights(problem: MoEProblem, device: torch.device | str, seed: int = 0) -> LayerWeights:
    """Seeded normal weights, quantised in blocks with amax scales as checkpoints are.

    The second GEMM's are larger than in a trained model, so that results have a standard deviation near 1 and the
    absolute tolerance doesn't hide errors. Made expert by expert: 1.4 GB for DeepSeek-V3, 0.3 GB on the way.
    """
    generator = torch.Generator(device).manual_seed(seed)
    h, i = problem.hidden_size, problem.intermediate_size
    w13, s13 = _random_blocks(problem, (2 * i, h), h**-0.5, device, generator)
    w2, s2 = _random_blocks(problem, (h, i), 8 * i**-0.5, device, generator)
    return LayerWeights(w13, s13, w2, s2)


def _random_blocks(
    problem: MoEProblem, shape: tuple[int, int], std: float, device: torch.device | str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    e, b = problem.all_routed.num_local_experts, problem.block
    values = torch.empty((e, *shape), dtype=FP8, device=device)
    scale = torch.empty((e, shape[0] // b, shape[1] // b), dtype=torch.float32, device=device)
    for expert in range(e):
        blocks = torch.randn(
            (shape[0] // b, b, shape[1] // b, b), dtype=torch.float32, device=device, generator=generator
        )
        scale[expert] = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
        values[expert] = (blocks / scale[expert][:, None, :, None]).reshape(shape).to(FP8)
        # Blocks of a trained layer differ in size: vary the scales, or a wrong block index would go unseen.
        spread = torch.rand(scale[expert].shape, dtype=torch.float32, device=device, generator=generator) + 0.5
        scale[expert] *= std * spread
    return values, scale


def _normal(shape: tuple[int, ...], device: torch.device | str, generator: torch.Generator) -> torch.Tensor:
    # The dtype is said outright: models are loaded under other default dtypes.
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator)


def make_inputs(
    workload: Workload, problem: MoEProblem, weights: LayerWeights, device: torch.device | str | None = None
) -> MoEInputs:
    """The ten inputs of a workload, on the weights' device unless told otherwise.

    Routing is drawn on the CPU: the same on every device. Hidden states are N(0, 1) in e4m3 with scales between
    0.5/448 and 1.5/448 of their amax, drawn on the device.
    """
    device = weights.gemm1_weights.device if device is None else torch.device(device)
    logits, bias = make_routing(workload, problem)
    generator = torch.Generator(device).manual_seed(workload.seed + 1)
    tokens, blocks = workload.num_tokens, problem.hidden_size // problem.block
    pieces = _normal((tokens, blocks, problem.block), device, generator)
    scale = pieces.abs().amax(dim=2) / FP8_MAX
    hidden = (pieces / scale.unsqueeze(2)).to(FP8).reshape(tokens, problem.hidden_size)
    spread = torch.rand((tokens, blocks), dtype=torch.float32, device=device, generator=generator) + 0.5
    return MoEInputs(
        routing_logits=logits.to(device),
        routing_bias=bias.to(device),
        hidden_states=hidden,
        hidden_states_scale=(scale * spread).t().contiguous(),
        gemm1_weights=weights.gemm1_weights,
        gemm1_weights_scale=weights.gemm1_weights_scale,
        gemm2_weights=weights.gemm2_weights,
        gemm2_weights_scale=weights.gemm2_weights_scale,
        local_expert_offset=workload.local_expert_offset,
        routed_scaling_factor=ROUTED_SCALING_FACTOR,
    )


def make_routing(workload: Workload, problem: MoEProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[T, num_experts]`` float32 and bias ``[num_experts]`` bfloat16 of a workload, on the CPU.

    Raises
    ------
    ValueError
        If the routing load can't be made for this problem (as ``none`` where all experts are local).
    """
    if workload.routing not in ROUTING_LOADS:
        raise ValueError(f"routing: expected one of {', '.join(ROUTING_LOADS)}, got {workload.routing!r}")
    if workload.num_tokens < 0:
        raise ValueError(f"num_tokens: expected 0 or more, got {workload.num_tokens}")
    first, count = workload.local_expert_offset, problem.num_local_experts
    if not 0 <= first <= problem.num_experts - count:
        raise ValueError(f"local_expert_offset: expected 0 to {problem.num_experts - count}, got {first}")
    make = {"uniform": _drawn, "zipf": _drawn, "concentrated": _concentrated, "none": _elsewhere}
    return make.get(workload.routing, _with_share)(workload, problem)


def mean_rows(num_tokens: int, problem: MoEProblem) -> float:
    """Rows of a rank where all ranks have the same."""
    return num_tokens * problem.top_k * problem.num_local_experts / problem.num_experts


def _drawn(workload: Workload, problem: MoEProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """``uniform`` and ``zipf``: the first seed with local work, at T = 1 with three local rows if one of 300 has so."""
    first, count = workload.local_expert_offset, problem.num_local_experts
    wanted = min(3, problem.max_local_rows_per_token)
    fallback = None
    for seed in range(workload.seed * 10_000, workload.seed * 10_000 + 300):
        logits, bias = _normal_routing(workload.num_tokens, problem, seed)
        if workload.routing == "zipf":
            # A shift by log(popularity) of the logit multiplies the odds.
            popularity = torch.log(torch.arange(1, count + 1, dtype=torch.float32))
            logits[:, first : first + count] += 2.0 - popularity
        if workload.num_tokens == 0:
            return logits, bias
        rows = int(_is_local(logits, bias, workload, problem).sum())
        if rows == wanted or (rows and workload.num_tokens > 1):
            return logits, bias
        if rows and fallback is None:
            fallback = logits, bias
    if fallback is None:
        raise ValueError(f"no seed gives local work at {workload}; give more tokens, or another load")
    return fallback


def _concentrated(workload: Workload, problem: MoEProblem) -> tuple[torch.Tensor, torch.Tensor]:
    first, count = workload.local_expert_offset, problem.num_local_experts
    logits, bias = _normal_routing(workload.num_tokens, problem, workload.seed)
    # Groups are ranked by their two best: the hot experts are those local ones that lie in one group, so that it is
    # always kept.
    local = torch.arange(first, first + count)
    groups = local // problem.group_size
    hot = local[groups == groups.mode().values][: min(4, problem.top_k)]
    others = torch.ones(problem.num_experts, dtype=torch.bool)
    others[local] = False
    logits[:, others] += 3.0
    others[: groups.mode().values * problem.group_size] = False
    others[(groups.mode().values + 1) * problem.group_size :] = False
    logits[:, others] += 9.0
    logits[:, hot] = 30.0  # a score of exactly one; no other reaches it
    bias.zero_()
    if int(_is_local(logits, bias, workload, problem).sum()) < workload.num_tokens * len(hot):
        raise ValueError(f"routing 'concentrated' can't be made for {problem} at offset {first}: its group isn't kept")
    return logits, bias


def _with_share(workload: Workload, problem: MoEProblem) -> tuple[torch.Tensor, torch.Tensor]:
    local = slice(workload.local_expert_offset, workload.local_expert_offset + problem.num_local_experts)
    logits, bias = _normal_routing(workload.num_tokens, problem, workload.seed * 10_000)
    if workload.num_tokens == 0:
        return logits, bias
    wanted = max(1.0, RANK_SHARES[workload.routing] * mean_rows(workload.num_tokens, problem))
    tried: dict[float, float] = {}  # by how far the rows are off
    low, high = -16.0, 16.0
    for _ in range(24):
        shift = (low + high) / 2
        shifted = logits.clone()
        shifted[:, local] += shift
        rows = int(_is_local(shifted, bias, workload, problem).sum())
        tried[abs(rows - wanted) if rows else math.inf] = shift
        low, high = (shift, high) if rows < wanted else (low, shift)
        if abs(rows - wanted) < max(1.0, 0.002 * wanted) and rows:
            break
    off = min(tried)
    if off > max(2.0, 0.02 * wanted):
        raise ValueError(f"routing {workload.routing!r} can't be made for {problem} at T = {workload.num_tokens}")
    logits[:, local] += tried[off]
    return logits, bias


def _elsewhere(workload: Workload, problem: MoEProblem) -> tuple[torch.Tensor, torch.Tensor]:
    local = slice(workload.local_expert_offset, workload.local_expert_offset + problem.num_local_experts)
    logits, bias = _normal_routing(workload.num_tokens, problem, workload.seed)
    logits[:, local] -= 30.0
    bias.zero_()
    bias[local] = -1.0
    if bool(_is_local(logits, bias, workload, problem).any()):
        raise ValueError(f"routing 'none' can't be made for {problem}: too few experts are elsewhere")
    return logits, bias


def _is_local(logits: torch.Tensor, bias: torch.Tensor, workload: Workload, problem: MoEProblem) -> torch.Tensor:
    ids, _ = route(logits, bias, 1.0, problem)
    first = workload.local_expert_offset
    return (ids >= first) & (ids < first + problem.num_local_experts)


def _normal_routing(num_tokens: int, problem: MoEProblem, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bias = 0.1 * torch.randn(problem.num_experts, dtype=torch.float32, generator=generator)
    if problem.softmax:
        bias.zero_()  # it would outweigh the scores, which are 1/num_experts on average
    logits = torch.randn((num_tokens, problem.num_experts), dtype=torch.float32, generator=generator)
    return logits, bias.bfloat16()
