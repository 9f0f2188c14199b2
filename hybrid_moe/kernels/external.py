"""What a library's whole MoE layer wants that neither routes nor takes quantised activations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..inputs import Inputs, RoutedInputs
from ..problem import MoEProblem
from .arena import Arena
from .launcher import Constants, DeviceLimits, Kernel
from .pdl import wait_for_previous_kernel
from .plan import LaunchKey, Plan, addresses_of
from .routing import renumber_kernel, select_kernel, selection_constants
from .shapes import pow2
from .steps import Step


class External(NamedTuple):
    """A call's activations and its routing.

    Attributes
    ----------
    hidden_states
        ``[T, H]`` bfloat16.
    experts
        ``[T, top_k + num_shared_experts]`` int32, in the order of their scores, the shared ones last. The local experts
        are 0 to E - 1 and the others follow, modulo the number of experts: to the library this rank is the first,
        wherever its experts start. Where there is none, the number of experts.
    weights
        As many, float32, with the scaling factor.
    """

    hidden_states: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


# Strides depend on T: not specialised, one binary serves every T.
@triton.jit(do_not_specialize=["stride_scale_k", "stride_scale_t"])
def dequantize_kernel(
    hidden_ptr,  # [T, HIDDEN] e4m3, rows STRIDE_HIDDEN apart
    scale_ptr,  # [HIDDEN/128, T] float32
    x_ptr,  # [T, HIDDEN] bfloat16, out
    stride_scale_k,
    stride_scale_t,
    STRIDE_HIDDEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T, HIDDEN / BLOCK_N).

    Must follow a kernel that lets it start once all before that has finished, and whose results it doesn't need. It
    waits for that one only at its end, so that the next kernel finds the results of both.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * (BLOCK_N // 128) + tl.arange(0, BLOCK_N // 128)
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    # Nothing was waited for: the first-level cache may hold what was there before.
    value = tl.load(hidden_ptr + token * STRIDE_HIDDEN + column, cache_modifier=".cg").to(tl.float32)
    scale_at = scale_ptr + token * stride_scale_t + block.to(tl.int64) * stride_scale_k
    scale = tl.load(scale_at, cache_modifier=".cg")
    tl.store(x_ptr + token * HIDDEN + column, (value * scale[:, None]).to(tl.bfloat16))
    wait_for_previous_kernel(PDL)


SELECT, RENUMBER, DEQUANTIZE = Kernel(select_kernel), Kernel(renumber_kernel), Kernel(dequantize_kernel)


def external_inputs(inputs: Inputs, problem: MoEProblem, limits: DeviceLimits) -> External:
    """Launch the routing, or the renumbering of given experts, and the dequantisation, which run side by side."""
    device = inputs.hidden_states.device
    hidden = torch.empty((inputs.num_tokens, problem.hidden_size), dtype=torch.bfloat16, device=device)
    addresses = addresses_of(inputs)
    plan = _plan(problem, limits, LaunchKey.of(inputs, addresses, hidden, 1), device)
    memory = torch.empty(plan.arena.bytes, dtype=torch.uint8, device=device)
    plan.run(inputs, addresses, hidden, memory)
    tensors = plan.arena.tensors(memory)
    return External(hidden, tensors["experts"], tensors["weights"])


@functools.lru_cache(maxsize=1024)
def _plan(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey, device: torch.device) -> Plan:
    tokens, arena, choices = key.num_tokens, Arena(), problem.all_routed.top_k
    arena.reserve("experts", (tokens, choices), torch.int32)
    arena.reserve("weights", (tokens, choices), torch.float32)
    routing = (*key.kind._fields[:2], "experts", "weights", "local_expert_offset")
    if key.kind is RoutedInputs:
        operands = (*routing, key.stride_routing, key.stride_weights)
        first = Step(RENUMBER, (tokens,), operands, _renumber_constants(problem, limits))
    else:
        constants = _select_constants(problem, limits, key.stride_routing, key.dtype_routing)
        first = Step(SELECT, (tokens,), (*routing, "routed_scaling_factor"), constants)
    widened = ("hidden_states", "hidden_states_scale", "output", key.stride_scale_k, key.stride_scale_t)
    grid = (tokens, problem.hidden_size // _block_n(problem))
    second = Step(DEQUANTIZE, grid, widened, _dequantize_constants(problem, limits, key.stride_hidden))
    return Plan(key, arena, (first, second), device)


def _block_n(problem: MoEProblem) -> int:
    """The largest power of two that divides the hidden size, up to eight elements for each thread."""
    return min(1024, problem.hidden_size & -problem.hidden_size)


@functools.lru_cache(maxsize=256)
def _select_constants(
    problem: MoEProblem, limits: DeviceLimits, stride_logits: int, bias_dtype: torch.dtype
) -> Constants:
    # One for each dtype of the bias, as each has its own binary.
    arguments = {"STRIDE_LOGITS": stride_logits, **selection_constants(problem), "PDL": limits.pdl}
    return Constants(arguments, {**limits.options, "num_warps": 1})


@functools.lru_cache(maxsize=256)
def _renumber_constants(problem: MoEProblem, limits: DeviceLimits) -> Constants:
    arguments = {
        "NUM_EXPERTS": problem.num_experts,
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.all_routed.top_k),
        "NUM_SHARED": problem.num_shared_experts,
        "PDL": limits.pdl,
    }
    return Constants(arguments, {**limits.options, "num_warps": 1})


@functools.lru_cache(maxsize=256)
def _dequantize_constants(problem: MoEProblem, limits: DeviceLimits, stride_hidden: int) -> Constants:
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "BLOCK_N": _block_n(problem),
        "PDL": limits.pdl,
    }
    return Constants(arguments, {**limits.options, "num_warps": 4})
