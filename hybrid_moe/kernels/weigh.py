"""Routing weights on the input: a token's one expert gets its activations with scales multiplied by the weight."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..problem import MoEProblem
from .arena import Arena
from .launcher import Constants, DeviceLimits, Kernel
from .pdl import let_next_kernel_start, wait_for_previous_kernel
from .plan import LaunchKey
from .shapes import pow2
from .steps import AnyStep, Step


# Strides depend on T: not specialised, one binary serves every T.
@triton.jit(do_not_specialize=["num_tokens", "stride_scale_k", "stride_scale_t"])
def weigh_kernel(
    scale_ptr,  # [BLOCKS, T] float32
    pair_weight_ptr,  # [T, 1] float32, one afterwards
    weighted_ptr,  # [BLOCKS, T] float32, out
    num_tokens,
    stride_scale_k,
    stride_scale_t,
    BLOCKS: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T,), one warp each, so that a weight is read before it becomes one."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS_POW2).to(tl.int64)
    weight = tl.load(pair_weight_ptr + token)
    scale = tl.load(scale_ptr + token * stride_scale_t + block * stride_scale_k, mask=block < BLOCKS)
    tl.store(weighted_ptr + block * num_tokens + token, scale * weight, mask=block < BLOCKS)
    tl.store(pair_weight_ptr + token, 1.0)


WEIGH = Kernel(weigh_kernel)


def reserve_weighted(arena: Arena, problem: MoEProblem, num_tokens: int) -> None:
    """Add the result of `weigh`."""
    arena.reserve("weighted_scale", (problem.hidden_size // problem.block, num_tokens), torch.float32)


def weigh(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> tuple[Step, LaunchKey]:
    """What follows the routing, and the key of what follows it."""
    tokens = key.num_tokens
    numbers = (tokens, key.stride_scale_k, key.stride_scale_t)
    operands = ("hidden_states_scale", "pair_weight", "weighted_scale", *numbers)
    step = Step(WEIGH, (tokens,), operands, _constants(problem, limits))
    return step, key._replace(stride_scale_k=tokens, stride_scale_t=1)


def on_weighted(step: AnyStep) -> AnyStep:
    """A step of a grouped GEMM on the weighted scales."""
    if not isinstance(step, Step):
        return step
    names = {"hidden_states_scale": "weighted_scale"}
    return replace(step, operands=tuple(names.get(o, o) if isinstance(o, str) else o for o in step.operands))


@functools.lru_cache(maxsize=256)
def _constants(problem: MoEProblem, limits: DeviceLimits) -> Constants:
    blocks = problem.hidden_size // problem.block
    arguments = {"BLOCKS": blocks, "BLOCKS_POW2": pow2(blocks), "PDL": limits.pdl}
    return Constants(arguments, {**limits.options, "num_warps": 1})
