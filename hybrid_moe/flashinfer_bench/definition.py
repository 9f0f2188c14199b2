"""The Definition of the layer for flashinfer-bench: axes, tensors, and a reference in torch that stands alone.

Its name, axes, inputs and outputs are those of the flashinfer-trace data set's, so that its workloads and Solutions go
with either. The text and the reference are this package's own: routing and order of ties as in `hybrid_moe.reference`,
one expert's weights expanded at a time, where the data set's expands all 32 at once (about 20 GB).
"""

from __future__ import annotations

from typing import Any

from ..problem import MoEProblem

_REFERENCE = """\
import torch

TOP_K, N_GROUP, TOPK_GROUP, BLOCK = {top_k}, {n_group}, {topk_group}, {block}
INTERMEDIATE = {intermediate_size}


def best(values, k):
    # Equal values go to the lower index.
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def expand(values, scale):
    return values.float() * scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)


@torch.no_grad()
def run(
    routing_logits,
    routing_bias,
    hidden_states,
    hidden_states_scale,
    gemm1_weights,
    gemm1_weights_scale,
    gemm2_weights,
    gemm2_weights_scale,
    local_expert_offset,
    routed_scaling_factor,
):
    tokens, experts = routing_logits.shape
    scores = {scores}
    biased = scores + routing_bias.float()
    if TOPK_GROUP < N_GROUP:
        # A group ranks by the sum of its two best; only the experts of the kept groups can be chosen.
        groups = biased.view(tokens, N_GROUP, experts // N_GROUP).topk(2, dim=2).values.sum(dim=2)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best(groups, TOPK_GROUP), True)
        biased = biased.masked_fill(~kept.repeat_interleave(experts // N_GROUP, dim=1), -torch.inf)
    chosen = best(biased, TOP_K)
    weights = scores.gather(1, chosen)
    weights = weights{normalised} * routed_scaling_factor

    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for local in range(gemm1_weights.shape[0]):
        token, position = (chosen == local_expert_offset + local).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        scale = hidden_states_scale[:, token].t().repeat_interleave(BLOCK, dim=1)
        x = hidden_states[token].float() * scale
        both = x @ expand(gemm1_weights[local], gemm1_weights_scale[local]).t()
        {halves} = both[:, :INTERMEDIATE], both[:, INTERMEDIATE:]
        inner = gate * torch.sigmoid(gate) * up
        part = inner @ expand(gemm2_weights[local], gemm2_weights_scale[local]).t()
        output.index_add_(0, token, part * weights[token, position].unsqueeze(1))
    return output.to(torch.bfloat16)
"""

# Input -> axes and dtype; no axes for a number.
_INPUTS: dict[str, tuple[list[str] | None, str, str]] = {
    "routing_logits": (["seq_len", "num_experts"], "float32", "The router's logits."),
    "routing_bias": (
        ["num_experts"],
        "bfloat16",
        "Added to the scores for the choice alone; zeros for none.",
    ),
    "hidden_states": (["seq_len", "hidden_size"], "float8_e4m3fn", "Activations."),
    "hidden_states_scale": (["num_hidden_blocks", "seq_len"], "float32", "One scale for each 1 x 128 piece of them."),
    "gemm1_weights": (
        ["num_local_experts", "gemm1_out_size", "hidden_size"],
        "float8_e4m3fn",
        "Up and gate projections of the local experts.",
    ),
    "gemm1_weights_scale": (
        ["num_local_experts", "num_gemm1_out_blocks", "num_hidden_blocks"],
        "float32",
        "One scale for each 128 x 128 block of them.",
    ),
    "gemm2_weights": (
        ["num_local_experts", "hidden_size", "intermediate_size"],
        "float8_e4m3fn",
        "Down projections of the local experts.",
    ),
    "gemm2_weights_scale": (
        ["num_local_experts", "num_hidden_blocks", "num_intermediate_blocks"],
        "float32",
        "One scale for each 128 x 128 block of them.",
    ),
    "local_expert_offset": (None, "int32", "Global index of the first local expert."),
    "routed_scaling_factor": (None, "float32", "Factor on the routing weights, which sum to one before it."),
}


def definition_of(problem: MoEProblem) -> dict[str, Any]:
    """The Definition of a problem as a JSON object, as ``flashinfer_bench.data.Definition`` (0.1.2) reads it.

    Raises
    ------
    ValueError
        The problem has shared experts, or weights on its input.
    """
    for name in ("num_shared_experts", "weight_on_input"):
        if value := getattr(problem, name):
            raise ValueError(f"{name}: expected {type(value)()} in a Definition, got {value}")
    sizes = {
        "num_experts": (problem.num_experts, "Experts of the whole model."),
        "num_local_experts": (problem.num_local_experts, "Experts of this rank."),
        "hidden_size": (problem.hidden_size, "Width of the layer's input and output."),
        "intermediate_size": (problem.intermediate_size, "Width of an expert's inner activation."),
        "gemm1_out_size": (2 * problem.intermediate_size, "Up and gate projections together."),
        "num_hidden_blocks": (problem.hidden_size // problem.block, "Blocks of 128 in hidden_size."),
        "num_intermediate_blocks": (problem.intermediate_size // problem.block, "Blocks of 128 in intermediate_size."),
        "num_gemm1_out_blocks": (2 * problem.intermediate_size // problem.block, "Blocks of 128 in gemm1_out_size."),
    }
    axes: dict[str, Any] = {"seq_len": {"type": "var", "description": "Number of tokens, T."}}
    axes |= {name: {"type": "const", "value": value, "description": text} for name, (value, text) in sizes.items()}
    halves = "gate, up" if problem.gate_first else "up, gate"
    routing, scores = {
        "deepseek_v3": ("DeepSeek-V3 routing", "torch.sigmoid(routing_logits.float())"),
        "softmax": ("softmax routing", "torch.softmax(routing_logits.float(), dim=1)"),
        "softmax_no_renorm": (
            "softmax routing without renormalisation",
            "torch.softmax(routing_logits.float(), dim=1)",
        ),
        "sigmoid_no_renorm": (
            "sigmoid routing without renormalisation",
            "torch.sigmoid(routing_logits.float())",
        ),
    }[problem.routing_method]
    output = {"shape": ["seq_len", "hidden_size"], "dtype": "bfloat16", "description": "This rank's part of the layer."}
    return {
        "name": problem.definition,
        "op_type": "moe",
        "description": "MoE layer with FP8 weights and activations in blocks, from the router's logits to the output "
        f"of the local experts: {routing}, two grouped GEMMs with SwiGLU between them.",
        "tags": ["quantization:float8_e4m3fn", "fi_api:flashinfer.fused_moe.trtllm_fp8_block_scale_moe"],
        "axes": axes,
        "inputs": {
            name: {"shape": shape, "dtype": dtype, "description": text}
            for name, (shape, dtype, text) in _INPUTS.items()
        },
        "outputs": {"output": output},
        "reference": _REFERENCE.format(
            top_k=problem.top_k,
            n_group=problem.n_group,
            topk_group=problem.topk_group,
            block=problem.block,
            intermediate_size=problem.intermediate_size,
            scores=scores,
            normalised=" / (weights.sum(dim=1, keepdim=True) + 1e-20)" if problem.renormalize else "",
            halves=halves,
        ),
    }
