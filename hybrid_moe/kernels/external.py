"""What a library's whole MoE layer wants that neither routes nor takes quantised activations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..inputs import Inputs, RoutedInputs
from ..problem import MoEProblem
from .dequantize import dequantize_kernel
from .launch import Constants, Kernel
from .pipeline import Launch, pow2, selection_constants
from .plan import addresses_of, all_aligned
from .routing import renumber_kernel, select_kernel

SELECT, RENUMBER, DEQUANTIZE = Kernel(select_kernel), Kernel(renumber_kernel), Kernel(dequantize_kernel)


class External(NamedTuple):
    """A call's activations and its routing.

    Attributes
    ----------
    hidden_states
        ``[T, H]`` bfloat16.
    experts
        ``[T, top_k]`` int32, in the order of their scores. The local experts are 0 to E - 1 and the others follow,
        modulo the number of experts: to the library this rank is the first, wherever its experts start. Where there
        is none, the number of experts.
    weights
        ``[T, top_k]`` float32, with the scaling factor.
    """

    hidden_states: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


def external_inputs(inputs: Inputs, problem: MoEProblem, launch: Launch) -> External:
    """Launch the routing, or the renumbering of given experts, and the dequantisation, which run side by side."""
    tokens, device = inputs.num_tokens, inputs.hidden_states.device
    aligned = all_aligned(addresses_of(inputs))
    external = External(
        torch.empty((tokens, problem.hidden_size), dtype=torch.bfloat16, device=device),
        torch.empty((tokens, problem.top_k), dtype=torch.int32, device=device),
        torch.empty((tokens, problem.top_k), dtype=torch.float32, device=device),
    )
    results, offset = (external.experts, external.weights), int(inputs.local_expert_offset)
    if isinstance(inputs, RoutedInputs):
        ids, weights = inputs.topk_ids, inputs.topk_weights
        given = (ids, weights, *results, offset, ids.stride(0), weights.stride(0))
        RENUMBER.launch((tokens,), given, _renumber_constants(problem, launch), device, aligned)
    else:
        select = _select_constants(problem, launch, inputs.routing_logits.stride(0), inputs.routing_bias.dtype)
        chosen = (inputs.routing_logits, inputs.routing_bias, *results, offset, float(inputs.routed_scaling_factor))
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
    dequantize = _dequantize_constants(problem, launch, inputs.hidden_states.stride(0))
    DEQUANTIZE.launch((tokens, blocks), widened, dequantize, device, aligned)
    return external


def _block_n(problem: MoEProblem) -> int:
    """The largest power of two that divides the hidden size, up to eight elements for each thread."""
    return min(1024, problem.hidden_size & -problem.hidden_size)


@functools.lru_cache(maxsize=256)
def _select_constants(problem: MoEProblem, launch: Launch, stride_logits: int, bias_dtype: torch.dtype) -> Constants:
    # One for each dtype of the bias: see `pipeline`.
    arguments = {"STRIDE_LOGITS": stride_logits, **selection_constants(problem), "PDL": launch.pdl}
    return Constants(arguments, {**launch.options, "num_warps": 1})


@functools.lru_cache(maxsize=256)
def _renumber_constants(problem: MoEProblem, launch: Launch) -> Constants:
    arguments = {
        "NUM_EXPERTS": problem.num_experts,
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 1})


@functools.lru_cache(maxsize=256)
def _dequantize_constants(problem: MoEProblem, launch: Launch, stride_hidden: int) -> Constants:
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "BLOCK_N": _block_n(problem),
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 4})
