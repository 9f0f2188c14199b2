"""Routing and sorting in one kernel: from logits to, for each local expert, the list of its tokens.

Where the experts are chosen already, `scatter_kernel` only sorts.

No sorted order is needed, only a slot for each (token, local expert) pair: expert ``e`` owns row ``e`` of
``slot_token``, and a pair's slot is its column there. Rows of the intermediate tensors are the pairs in the order
(expert, slot), without gaps: an expert's first row is the sum of the counts before it, which every kernel adds up.

One warp routes one token, so that no reduction leaves the warp: with several tokens a program, routing 15 of them took
11 us on an H100 instead of 3. Slots are reserved by an atomic add, so a pair's slot may differ from run to run. No
result depends on it: rows don't mix, and the combine adds a token's pairs in the order of their scores.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from ..inputs import RoutedInputs
from ..problem import MoEProblem
from .arena import Arena
from .launcher import Constants, DeviceLimits, Kernel
from .pdl import let_next_kernel_start, wait_for_previous_kernel
from .plan import LaunchKey
from .quantize import larger
from .shapes import pow2
from .steps import AnyStep, Operand, Step


@triton.jit
def clear(counters_ptr, num_counters, BLOCK: tl.constexpr):
    """Set counters to zero, BLOCK at a time."""
    for first in range(0, num_counters, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(counters_ptr + at, tl.zeros((BLOCK,), tl.int32), mask=at < num_counters)


@triton.jit(do_not_specialize=["num_counters"])
def clear_kernel(counters_ptr, num_counters, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Set counters to zero. Grid: (1,). It holds back only the routing's atomic adds, not its reading of the logits."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    clear(counters_ptr, num_counters, BLOCK)


NAN_ORDER = tl.constexpr(0x7FFFFFFF)


@triton.jit
def ordered(value):
    """int32 in the order of float32 values, NaN the greatest (NAN_ORDER), as `torch.sort` has it.

    A warp reduces integers by one instruction, floats by five shuffles.
    """
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return tl.where(value == value, order, NAN_ORDER)


@triton.jit
def with_shared(expert, weight, choice, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr):
    """A token's experts and weights with the shared experts behind them, whose weight is one whatever the others'."""
    if NUM_SHARED > 0:
        shared = choice - TOP_K
        is_shared = (shared >= 0) & (shared < NUM_SHARED)
        expert = tl.where(is_shared, NUM_EXPERTS + shared, expert)
        weight = tl.where(is_shared, 1.0, weight)
    return expert, weight


@triton.jit
def select_experts(
    logits_ptr,
    bias_ptr,
    token,
    routed_scaling_factor,
    group,
    member,
    choice,
    STRIDE_LOGITS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    N_GROUP: tl.constexpr,
    N_GROUP_POW2: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_SIZE_POW2: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_SHARED: tl.constexpr,
):
    """A token's experts in the order of their scores, int32, the shared ones behind them, and their weights, float32.

    What is past all of them is void. NaN is the greatest score. All weights but those of shared experts are NaN where a
    score is, by the logits or by the bias. ``group``, ``member`` and ``choice`` are 0, 1, 2... along the axes,
    ``[N_GROUP_POW2, 1]``, ``[1, GROUP_SIZE_POW2]`` and ``[TOP_K_POW2]``.
    """
    NEG_INF: tl.constexpr = float("-inf")
    expert = group * GROUP_SIZE + member
    real = (group < N_GROUP) & (member < GROUP_SIZE)
    # Nothing was waited for: the first-level cache may hold older logits.
    logits = tl.load(logits_ptr + token * STRIDE_LOGITS + expert, mask=real, other=0.0, cache_modifier=".cg")
    bias = tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
    if SOFTMAX:
        largest = tl.max(tl.where(real, logits, NEG_INF))
        power = tl.where(real, tl.exp(logits - largest), 0.0)
        score = power / tl.sum(power)
    else:
        score = 1.0 / (1.0 + tl.exp(-logits))
    biased = tl.where(real, score + bias, NEG_INF)

    # Flat: each maximum is one reduction of the whole warp. Among equals the lower index.
    SPAN: tl.constexpr = N_GROUP_POW2 * GROUP_SIZE_POW2
    # Padding is below even an expert that a bias of -inf masks.
    LOWEST: tl.constexpr = -0x80000000
    flat_open = tl.reshape(tl.where(real, ordered(biased), LOWEST), (SPAN,))
    if TOPK_GROUP < N_GROUP:
        best = tl.reduce(biased, 1, larger)
        # Only the first place of the best is left out: an equal one is the second best.
        first = tl.min(tl.where(biased == best[:, None], member, GROUP_SIZE_POW2), axis=1)
        second = tl.max(tl.where(member == first[:, None], NEG_INF, biased), axis=1)
        group_score = ordered(best + second)[:, None]
        flat_score = tl.reshape(tl.where(real, group_score, LOWEST), (SPAN,))
        flat_group = tl.reshape(tl.where(real, group, N_GROUP), (SPAN,))
        kept = flat_group < 0
        for _ in tl.static_range(TOPK_GROUP):
            best_score = tl.max(flat_score, axis=0)
            hit = flat_group == tl.min(tl.where(flat_score == best_score, flat_group, N_GROUP), axis=0)
            kept = kept | hit
            flat_score = tl.where(hit, LOWEST, flat_score)
        flat_open = tl.where(kept, flat_open, LOWEST)

    place = tl.reshape(group * GROUP_SIZE_POW2 + member, (SPAN,))
    flat_bits = tl.reshape(score.to(tl.int32, bitcast=True), (SPAN,))
    topk_expert = choice * 0 - 1
    topk_score = choice.to(tl.float32) * 0.0
    for k in tl.static_range(TOP_K):
        best_score = tl.max(flat_open, axis=0)
        if k == 0:
            has_nan = best_score == NAN_ORDER
        at = tl.min(tl.where(flat_open == best_score, place, SPAN - 1), axis=0)
        hit = place == at
        chosen_bits = tl.sum(tl.where(hit, flat_bits, 0), axis=0)
        topk_expert = tl.where(choice == k, at // GROUP_SIZE_POW2 * GROUP_SIZE + at % GROUP_SIZE_POW2, topk_expert)
        topk_score = tl.where(choice == k, chosen_bits.to(tl.float32, bitcast=True), topk_score)
        flat_open = tl.where(hit, LOWEST, flat_open)
    if RENORMALIZE:
        weight = topk_score / (tl.sum(topk_score, axis=0) + 1e-20) * routed_scaling_factor
    else:
        weight = topk_score * routed_scaling_factor
    weight = tl.where(has_nan, float("nan"), weight)
    return with_shared(topk_expert, weight, choice, N_GROUP * GROUP_SIZE, TOP_K, NUM_SHARED)


@triton.jit
def select_by_one_warp(
    logits_ptr,
    bias_ptr,
    token,
    routed_scaling_factor,
    STRIDE_LOGITS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    N_GROUP: tl.constexpr,
    N_GROUP_POW2: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_SIZE_POW2: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_SHARED: tl.constexpr,
):
    """`select_experts` in plain Triton."""
    return select_experts(
        logits_ptr,
        bias_ptr,
        token,
        routed_scaling_factor,
        tl.arange(0, N_GROUP_POW2)[:, None],
        tl.arange(0, GROUP_SIZE_POW2)[None, :],
        tl.arange(0, TOP_K_POW2),
        STRIDE_LOGITS,
        TOP_K,
        TOP_K_POW2,
        N_GROUP,
        N_GROUP_POW2,
        TOPK_GROUP,
        GROUP_SIZE,
        GROUP_SIZE_POW2,
        SOFTMAX,
        RENORMALIZE,
        NUM_SHARED,
    )


@triton.jit
def given_experts(
    ids_ptr,
    weights_ptr,
    token,
    stride_ids,
    stride_weights,
    choice,
    other,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
):
    """As `select_experts`, of a token whose experts were chosen before the call; -1, with weight zero, for none.

    An expert that is named twice comes once, with the sum of the weights: it has room for each token once. ``choice``
    and ``other`` are 0, 1, 2..., of a matrix's rows and columns.
    """
    expert = chosen_before(ids_ptr + token * stride_ids, choice, NUM_EXPERTS, TOP_K)
    other_expert = chosen_before(ids_ptr + token * stride_ids, other, NUM_EXPERTS, TOP_K)
    weights_at = weights_ptr + token * stride_weights + other
    weight = tl.load(weights_at, mask=other < TOP_K, other=0.0, cache_modifier=".cg")
    # The weight of no expert may be no number.
    weight = tl.where(other_expert >= 0, weight, 0.0)
    same = expert[:, None] == other_expert[None, :]
    total = tl.sum(tl.where(same, weight[None, :], 0.0), axis=1)
    named_before = tl.sum((same & (other[None, :] < choice[:, None])).to(tl.int32), axis=1) > 0
    expert, weight = tl.where(named_before, -1, expert), tl.where(named_before, 0.0, total)
    return with_shared(expert, weight, choice, NUM_EXPERTS, TOP_K, NUM_SHARED)


@triton.jit
def chosen_before(ids_ptr, choice, NUM_EXPERTS: tl.constexpr, TOP_K):
    """A token's experts, or -1 where an id is no expert's."""
    # As in `select_experts`.
    expert = tl.load(ids_ptr + choice, mask=choice < TOP_K, other=-1, cache_modifier=".cg")
    return tl.where((expert >= 0) & (expert < NUM_EXPERTS), expert, -1)


@triton.jit
def place_pairs(
    expert,
    weight,
    token,
    tokens_per_expert_ptr,
    slot_token_ptr,
    pair_ptr,
    pair_weight_ptr,
    num_tokens,
    num_counters,
    local_expert_offset,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    ALONE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Give each of a token's pairs with a local expert a slot, once the counters are cleared; see `route_kernel`."""
    choice = tl.arange(0, TOP_K_POW2)
    local = expert - local_expert_offset
    chosen = choice < TOP_K
    is_local = chosen & (local >= 0) & (local < E)
    wait_for_previous_kernel(PDL)
    if ALONE:
        clear(tokens_per_expert_ptr, num_counters, 128)
        tl.debug_barrier()
    slot = tl.atomic_add(tokens_per_expert_ptr + local, 1, mask=is_local)
    if ALONE:
        slot = tl.zeros((TOP_K_POW2,), tl.int32)  # the first, without waiting to be told so
    pair_at = token * TOP_K + choice
    tl.store(pair_ptr + pair_at, tl.where(is_local, slot * E + local, -1), mask=chosen)
    # The combine multiplies zeros by the weights of other ranks' experts, which may be no numbers.
    tl.store(pair_weight_ptr + pair_at, tl.where(is_local, weight, 0.0), mask=chosen)
    slot_at = local.to(tl.int64) * num_tokens + slot
    tl.store(slot_token_ptr + slot_at, tl.full((TOP_K_POW2,), 0, tl.int32) + tl.program_id(0), mask=is_local)


@triton.jit(do_not_specialize=["num_tokens", "num_counters", "local_expert_offset"])
def route_kernel(
    logits_ptr,  # [T, NUM_EXPERTS] float32, rows STRIDE_LOGITS apart
    bias_ptr,  # [NUM_EXPERTS] bfloat16 or float32
    tokens_per_expert_ptr,  # [E] int32, out; zeros on entry, unless ALONE
    slot_token_ptr,  # [E, T] int32, out
    pair_ptr,  # [T, TOP_K] int32, out: slot * E + local expert, or -1 where the expert is elsewhere
    pair_weight_ptr,  # [T, TOP_K] float32, out: 0 where the expert is elsewhere
    num_tokens,
    num_counters,  # from the counts on, all to be cleared if ALONE
    local_expert_offset,
    routed_scaling_factor,
    STRIDE_LOGITS: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    N_GROUP: tl.constexpr,
    N_GROUP_POW2: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_SIZE_POW2: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    ALONE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T,), one warp each. Must follow `clear_kernel`, which lets it start once all before that has finished.

    With ALONE, for T = 1, it clears the counters itself: one launch less.
    """
    if ALONE:
        wait_for_previous_kernel(PDL)  # whoever computes the logits may let this one start before they are there
    let_next_kernel_start(PDL)

    token = tl.program_id(0).to(tl.int64)
    topk_expert, weight = select_by_one_warp(
        logits_ptr,
        bias_ptr,
        token,
        routed_scaling_factor,
        STRIDE_LOGITS,
        TOP_K,
        TOP_K_POW2,
        N_GROUP,
        N_GROUP_POW2,
        TOPK_GROUP,
        GROUP_SIZE,
        GROUP_SIZE_POW2,
        SOFTMAX,
        RENORMALIZE,
        NUM_SHARED,
    )
    place_pairs(
        topk_expert,
        weight,
        token,
        tokens_per_expert_ptr,
        slot_token_ptr,
        pair_ptr,
        pair_weight_ptr,
        num_tokens,
        num_counters,
        local_expert_offset,
        E,
        TOP_K + NUM_SHARED,
        TOP_K_POW2,
        ALONE,
        PDL,
    )


@triton.jit(do_not_specialize=["num_tokens", "num_counters", "local_expert_offset", "stride_ids", "stride_weights"])
def scatter_kernel(
    ids_ptr,  # [T, TOP_K] int32 global experts, rows stride_ids apart; what is no expert's number is none
    weights_ptr,  # [T, TOP_K] float32, rows stride_weights apart
    tokens_per_expert_ptr,  # these four as `route_kernel` has them
    slot_token_ptr,
    pair_ptr,
    pair_weight_ptr,
    num_tokens,
    num_counters,  # from the counts on, all to be cleared if ALONE
    local_expert_offset,
    stride_ids,
    stride_weights,
    NUM_EXPERTS: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    ALONE: tl.constexpr,
    PDL: tl.constexpr,
):
    """`route_kernel` where the experts are chosen already. Grid and order as there."""
    if ALONE:
        wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, TOP_K_POW2)
    expert, weight = given_experts(
        ids_ptr, weights_ptr, token, stride_ids, stride_weights, choice, choice, NUM_EXPERTS, TOP_K, NUM_SHARED
    )
    place_pairs(
        expert,
        weight,
        token,
        tokens_per_expert_ptr,
        slot_token_ptr,
        pair_ptr,
        pair_weight_ptr,
        num_tokens,
        num_counters,
        local_expert_offset,
        E,
        TOP_K + NUM_SHARED,
        TOP_K_POW2,
        ALONE,
        PDL,
    )


@triton.jit(do_not_specialize=["local_expert_offset"])
def select_kernel(
    logits_ptr,  # [T, NUM_EXPERTS] float32, rows STRIDE_LOGITS apart
    bias_ptr,  # [NUM_EXPERTS] bfloat16 or float32
    expert_ptr,  # [T, TOP_K] int32, out: counted from the first local expert, and after the last from expert 0
    weight_ptr,  # [T, TOP_K] float32, out
    local_expert_offset,
    routed_scaling_factor,
    STRIDE_LOGITS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    N_GROUP: tl.constexpr,
    N_GROUP_POW2: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_SIZE_POW2: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T,), one warp each. For a library that sorts by itself: all experts, the local ones first: 0 to E - 1.

    It lets the next kernel start when all before that has finished.
    """
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    topk_expert, weight = select_by_one_warp(
        logits_ptr,
        bias_ptr,
        token,
        routed_scaling_factor,
        STRIDE_LOGITS,
        TOP_K,
        TOP_K_POW2,
        N_GROUP,
        N_GROUP_POW2,
        TOPK_GROUP,
        GROUP_SIZE,
        GROUP_SIZE_POW2,
        SOFTMAX,
        RENORMALIZE,
        NUM_SHARED,
    )
    every: tl.constexpr = N_GROUP * GROUP_SIZE + NUM_SHARED
    store_experts(topk_expert, weight, token, expert_ptr, weight_ptr, local_expert_offset, every, TOP_K + NUM_SHARED)


@triton.jit
def store_experts(
    expert, weight, token, expert_ptr, weight_ptr, local_expert_offset, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr
):
    """As a library that sorts by itself wants it: local experts first, and for none the number of experts."""
    choice = tl.arange(0, expert.shape[0])
    local = expert - local_expert_offset
    number = tl.where(expert < 0, NUM_EXPERTS, tl.where(local < 0, local + NUM_EXPERTS, local))
    at = token * TOP_K + choice
    tl.store(expert_ptr + at, number, mask=choice < TOP_K)
    tl.store(weight_ptr + at, weight, mask=choice < TOP_K)


@triton.jit(do_not_specialize=["local_expert_offset", "stride_ids", "stride_weights"])
def renumber_kernel(
    ids_ptr,  # these two as `scatter_kernel` has them
    weights_ptr,
    expert_ptr,  # these two as `select_kernel` has them; NUM_EXPERTS where there is none
    weight_ptr,
    local_expert_offset,
    stride_ids,
    stride_weights,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    """`select_kernel` where the experts are chosen already. Grid and order as there."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, TOP_K_POW2)
    expert, weight = given_experts(
        ids_ptr, weights_ptr, token, stride_ids, stride_weights, choice, choice, NUM_EXPERTS, TOP_K, NUM_SHARED
    )
    every: tl.constexpr = NUM_EXPERTS + NUM_SHARED
    store_experts(expert, weight, token, expert_ptr, weight_ptr, local_expert_offset, every, TOP_K + NUM_SHARED)


CLEAR, ROUTE, SCATTER = Kernel(clear_kernel), Kernel(route_kernel), Kernel(scatter_kernel)


def reserve_routing(
    arena: Arena, problem: MoEProblem, num_tokens: int, counters: Mapping[str, int] | None = None
) -> None:
    """Add the result of `route`: for each local expert its tokens, for each token its pairs.

    ``counters`` are int32 in one piece, which is cleared: ``tokens_per_expert`` ``[E]``, ``finished`` ``[E + 1]``, and
    by name what the grouped GEMM counts with; each starts at a multiple of 16 bytes. ``slot_token`` is ``[E, T]``,
    ``pair`` and ``pair_weight`` are ``[T, top_k]``.
    """
    e = problem.num_local_experts
    lengths = {"tokens_per_expert": e, "finished": e + 1, **(counters or {})}
    start, length = arena.bytes, 0
    for name, numbers in lengths.items():
        arena.overlay(name, start + 4 * length, (numbers,), torch.int32)
        length += (numbers + 3) // 4 * 4
    arena.reserve("counters", (length,), torch.int32)
    arena.reserve("slot_token", (e, num_tokens), torch.int32)
    arena.reserve("pair", (num_tokens, problem.top_k), torch.int32)
    arena.reserve("pair_weight", (num_tokens, problem.top_k), torch.float32)


def route(problem: MoEProblem, limits: DeviceLimits, key: LaunchKey, arena: Arena) -> list[AnyStep]:
    """The routing, and before it the clearing of the counters; one kernel for one token.

    Where the experts are chosen already, it only sorts.
    """
    counters = arena.places["counters"].shape[0]
    alone = key.num_tokens == 1
    results = ("tokens_per_expert", "slot_token", "pair", "pair_weight")
    numbers: tuple[Operand, ...] = (key.num_tokens, counters, "local_expert_offset")
    if key.kind is RoutedInputs:
        kernel, constants = SCATTER, _scatter_constants(problem, limits, alone)
        numbers += (key.stride_routing, key.stride_weights)
    else:
        kernel, constants = ROUTE, _route_constants(problem, limits, key.stride_routing, key.dtype_routing, alone)
        numbers += ("routed_scaling_factor",)
    operands = (*key.kind._fields[:2], *results, *numbers)
    clear = Step(CLEAR, (1,), ("counters", counters), _clear_constants(limits))
    step = Step(kernel, (key.num_tokens,), operands, constants)
    return [step] if alone else [clear, step]


@functools.lru_cache(maxsize=256)
def _clear_constants(limits: DeviceLimits) -> Constants:
    return Constants({"BLOCK": 1024, "PDL": limits.pdl}, {**limits.options, "num_warps": 4})


@functools.lru_cache(maxsize=256)
def _scatter_constants(problem: MoEProblem, limits: DeviceLimits, alone: bool) -> Constants:
    arguments = {
        "NUM_EXPERTS": problem.num_experts,
        "E": problem.all_routed.num_local_experts,
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.all_routed.top_k),
        "NUM_SHARED": problem.num_shared_experts,
        "ALONE": alone,
        "PDL": limits.pdl,
    }
    return Constants(arguments, {**limits.options, "num_warps": 1})


@functools.lru_cache(maxsize=256)
def _route_constants(
    problem: MoEProblem, limits: DeviceLimits, stride_logits: int, bias_dtype: torch.dtype, alone: bool
) -> Constants:
    # One for each dtype of the bias, as each has its own binary.
    arguments = {
        "STRIDE_LOGITS": stride_logits,
        "E": problem.all_routed.num_local_experts,
        **selection_constants(problem),
        "ALONE": alone,
        "PDL": limits.pdl,
    }
    return Constants(arguments, {**limits.options, "num_warps": 1})


def selection_constants(problem: MoEProblem) -> dict[str, int | bool]:
    """How experts are selected: the last compile-time arguments of `routing.select_experts`, in its order."""
    return {
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.all_routed.top_k),
        "N_GROUP": problem.n_group,
        "N_GROUP_POW2": pow2(problem.n_group),
        "TOPK_GROUP": problem.topk_group,
        "GROUP_SIZE": problem.group_size,
        "GROUP_SIZE_POW2": pow2(problem.group_size),
        "SOFTMAX": problem.softmax,
        "RENORMALIZE": problem.renormalize,
        "NUM_SHARED": problem.num_shared_experts,
    }
