"""Routing and sorting in one kernel: from logits to, for each local expert, the list of its tokens.

No sorted order is needed, only a place for each (token, local expert) pair: expert ``e`` owns row ``e`` of
``slot_token``, and a pair's slot is its place in that row. Rows of the intermediate tensors are the pairs in the order
(expert, slot), without gaps: their start is the sum of the counts before, which every later kernel adds up for itself.

Which slot a pair gets may change from run to run where several programs route (they reserve slots by an atomic add).
Nothing that is computed depends on it: a row's arithmetic is its own, and the combine adds a token's pairs in the order
of their scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import let_next_kernel_start, wait_for_previous_kernel

# Up to so many tokens one program routes them all: it needs no zeroed counters and no second launch.
SINGLE_PROGRAM_TOKENS = 32


@triton.jit
def route_kernel(
    logits_ptr,  # [T, NUM_EXPERTS] float32, rows stride_logits apart
    bias_ptr,  # [NUM_EXPERTS] bfloat16
    counts_ptr,  # [E] int32, out; zeros on entry unless SINGLE
    slot_token_ptr,  # [E, T] int32, out
    pair_ptr,  # [T, TOP_K] int32, out: slot * E + local expert, or -1 where the expert is elsewhere
    pair_weight_ptr,  # [T, TOP_K] float32, out
    stride_logits,
    num_tokens,
    local_expert_offset,
    routed_scaling_factor,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    N_GROUP: tl.constexpr,
    N_GROUP_POW2: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_SIZE_POW2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SINGLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (1,) if SINGLE, with BLOCK_T >= T; otherwise (cdiv(T, BLOCK_T),)."""
    NEG_INF: tl.constexpr = float("-inf")
    SPAN: tl.constexpr = N_GROUP_POW2 * GROUP_SIZE_POW2
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)

    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.arange(0, N_GROUP_POW2)
    member = tl.arange(0, GROUP_SIZE_POW2)
    expert = group[:, None] * GROUP_SIZE + member[None, :]
    real = (group[:, None] < N_GROUP) & (member[None, :] < GROUP_SIZE)
    row = token.to(tl.int64) * stride_logits
    inside = (token < num_tokens)[:, None, None] & real[None, :, :]
    logits = tl.load(logits_ptr + row[:, None, None] + expert[None, :, :], mask=inside, other=0.0)
    bias = tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
    score = 1.0 / (1.0 + tl.exp(-logits))
    biased = tl.where(real[None, :, :], score + bias[None, :, :], NEG_INF)

    if TOPK_GROUP < N_GROUP:
        best = tl.max(biased, axis=2)
        # The first place that holds the best: its value once more elsewhere is the second best.
        first = tl.min(tl.where(biased == best[:, :, None], member[None, None, :], GROUP_SIZE_POW2), axis=2)
        second = tl.max(tl.where(member[None, None, :] == first[:, :, None], NEG_INF, biased), axis=2)
        group_score = tl.where((group < N_GROUP)[None, :], best + second, NEG_INF)
        # A group's rank: how many are better, or equal and before it.
        mine, other = group_score[:, :, None], group_score[:, None, :]
        before = (other > mine) | ((other == mine) & (group[None, None, :] < group[None, :, None]))
        rank = tl.sum(before.to(tl.int32), axis=2)
        biased = tl.where((rank < TOPK_GROUP)[:, :, None], biased, NEG_INF)

    # The k best by k maxima; among equals the lower index.
    place = tl.arange(0, SPAN)
    place_expert = (place // GROUP_SIZE_POW2) * GROUP_SIZE + place % GROUP_SIZE_POW2
    open_score = tl.reshape(biased, (BLOCK_T, SPAN))
    score = tl.reshape(score, (BLOCK_T, SPAN))
    choice = tl.arange(0, TOP_K_POW2)
    topk_expert = tl.full((BLOCK_T, TOP_K_POW2), -1, tl.int32)
    topk_score = tl.zeros((BLOCK_T, TOP_K_POW2), tl.float32)
    for k in tl.static_range(TOP_K):
        best_score = tl.max(open_score, axis=1)
        at = tl.min(tl.where(open_score == best_score[:, None], place[None, :], SPAN - 1), axis=1)
        hit = place[None, :] == at[:, None]
        chosen_score = tl.sum(tl.where(hit, score, 0.0), axis=1)
        chosen_expert = tl.sum(tl.where(hit, place_expert[None, :], 0), axis=1)
        topk_expert = tl.where(choice[None, :] == k, chosen_expert[:, None], topk_expert)
        topk_score = tl.where(choice[None, :] == k, chosen_score[:, None], topk_score)
        open_score = tl.where(hit, NEG_INF, open_score)
    weight = topk_score / (tl.sum(topk_score, axis=1) + 1e-20)[:, None] * routed_scaling_factor

    # Slots: how many tokens of this block chose the expert before, and how many earlier blocks did.
    local = topk_expert - local_expert_offset
    is_local = (choice < TOP_K)[None, :] & (local >= 0) & (local < E) & (token < num_tokens)[:, None]
    local_expert = tl.arange(0, E_POW2)
    chosen = is_local[:, :, None] & (local[:, :, None] == local_expert[None, None, :])
    per_token = tl.sum(chosen.to(tl.int32), axis=1)
    block_count = tl.sum(per_token, axis=0)
    slot_of_expert = tl.cumsum(per_token, axis=0) - per_token
    if SINGLE:
        tl.store(counts_ptr + local_expert, block_count, mask=local_expert < E)
    else:
        reserve = (local_expert < E) & (block_count > 0)
        base = tl.atomic_add(counts_ptr + local_expert, block_count, mask=reserve)
        slot_of_expert += tl.where(reserve, base, 0)[None, :]
    slot = tl.sum(tl.where(chosen, slot_of_expert[:, None, :], 0), axis=2)

    pair_at = token.to(tl.int64)[:, None] * TOP_K + choice[None, :]
    stored = (token < num_tokens)[:, None] & (choice < TOP_K)[None, :]
    tl.store(pair_ptr + pair_at, tl.where(is_local, slot * E + local, -1), mask=stored)
    tl.store(pair_weight_ptr + pair_at, weight, mask=stored)
    slot_at = local.to(tl.int64) * num_tokens + slot
    tl.store(slot_token_ptr + slot_at, tl.broadcast_to(token[:, None], (BLOCK_T, TOP_K_POW2)), mask=is_local)
