"""What a library's whole MoE layer wants that neither routes nor takes quantised activations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..problem import MoEInputs, MoEProblem
from .dequantize import dequantize_kernel
from .launch import Constants, Kernel
from .pipeline import Launch, selection_constants
from .plan import addresses_of, all_aligned
from .routing import select_kernel

SELECT, DEQUANTIZE = Kernel(select_kernel), Kernel(dequantize_kernel)


class External(NamedTuple):
    """A call's activations and its routing.

    Attributes
    ----------
    hidden_states
        ``[T, H]`` bfloat16.
    experts
        ``[T, top_k]`` int32, in the order of their scores. The local experts are 0 to E - 1 and the others follow,
        modulo the number of experts: to the library this rank is the first, wherever its experts start.
    weights
        ``[T, top_k]`` float32, with the scaling factor.
    """

    hidden_states: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


def external_inputs(inputs: MoEInputs, problem: MoEProblem, launch: Launch) -> External:
    """Launch the routing and the dequantisation, which run side by side."""
    tokens, device = inputs.num_tokens, inputs.hidden_states.device
    aligned = all_aligned(addresses_of(inputs))
    external = External(
        torch.empty((tokens, problem.hidden_size), dtype=torch.bfloat16, device=device),
        torch.empty((tokens, problem.top_k), dtype=torch.int32, device=device),
        torch.empty((tokens, problem.top_k), dtype=torch.float32, device=device),
    )
    select, dequantize = _constants(problem, launch, inputs.routing_logits.stride(0), inputs.hidden_states.stride(0))
    chosen = (
        inputs.routing_logits,
        inputs.routing_bias,
        external.experts,
        external.weights,
        int(inputs.local_expert_offset),
        float(inputs.routed_scaling_factor),
    )
    SELECT.launch((tokens,), chosen, select, device, aligned)
    stride_scale_k, stride_scale_t = inputs.hidden_states_scale.stride()
    widened = (
        inputs.hidden_states,
        inputs.hidden_states_scale,
        external.hidden_states,
        stride_scale_k,
        stride_scale_t,
    )
    blocks = problem.hidden_size // _block_n(problem)
    DEQUANTIZE.launch((tokens, blocks), widened, dequantize, device, aligned)
    return external


def _block_n(problem: MoEProblem) -> int:
    """The largest power of two that divides the hidden size, up to eight elements for each thread."""
    return min(1024, problem.hidden_size & -problem.hidden_size)


@functools.lru_cache(maxsize=256)
def _constants(
    problem: MoEProblem, launch: Launch, stride_logits: int, stride_hidden: int
) -> tuple[Constants, Constants]:
    select = {"STRIDE_LOGITS": stride_logits, **selection_constants(problem), "PDL": launch.pdl}
    dequantize = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "BLOCK_N": _block_n(problem),
        "PDL": launch.pdl,
    }
    return (
        Constants(select, {**launch.options, "num_warps": 1}),
        Constants(dequantize, {**launch.options, "num_warps": 4}),
    )
