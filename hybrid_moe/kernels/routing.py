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
SINGLE_PROGRAM_TOKENS = 64


@triton.jit
def route_kernel(
    logits_ptr,  # [T, NUM_EXPERTS] float32, rows stride_logits apart
    bias_ptr,  # [NUM_EXPERTS] bfloat16
    counts_ptr,  # [E] int32, out; zeros on entry unless SINGLE
    slot_token_ptr,  # [E, T] int32, out
    pair_ptr,  # [T, TOP_K] int32, out: slot * E + local expert, or -1 where the expert is elsewhere
    pair_weight_ptr,  # [T, TOP_K] float32, out
    tickets_ptr,  # [num_tickets] int32, out: zeros
    stride_logits,
    num_tokens,
    num_tickets,
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
    NUM_EXPERTS: tl.constexpr = N_GROUP * GROUP_SIZE
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)

    for first in range(tl.program_id(0) * 512, num_tickets, tl.num_programs(0) * 512):
        ticket = first + tl.arange(0, 512)
        tl.store(tickets_ptr + ticket, tl.zeros((512,), tl.int32), mask=ticket < num_tickets)

    # Scores are laid out [group, token, member]: the members over a warp's lanes and the tokens over the warps, so that
    # each maximum stays inside one warp.
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.arange(0, N_GROUP_POW2)[:, None, None]
    member = tl.arange(0, GROUP_SIZE_POW2)[None, None, :]
    expert = group * GROUP_SIZE + member
    real = (group < N_GROUP) & (member < GROUP_SIZE)
    row = token.to(tl.int64)[None, :, None] * stride_logits
    logits = tl.load(logits_ptr + row + expert, mask=real & (token < num_tokens)[None, :, None], other=0.0)
    bias = tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
    score = 1.0 / (1.0 + tl.exp(-logits))
    open_score = tl.where(real, score + bias, NEG_INF)

    if TOPK_GROUP < N_GROUP:
        best = tl.max(open_score, axis=2)
        # The first place that holds the best: its value once more elsewhere is the second best.
        first = tl.min(tl.where(open_score == best[:, :, None], member, GROUP_SIZE_POW2), axis=2)
        second = tl.max(tl.where(member == first[:, :, None], NEG_INF, open_score), axis=2)
        group_number = tl.arange(0, N_GROUP_POW2)
        group_score = tl.where((group_number < N_GROUP)[:, None], best + second, NEG_INF)
        # A group's rank: how many are better, or equal and before it.
        mine, other = group_score[:, None, :], group_score[None, :, :]
        earlier = group_number[None, :, None] < group_number[:, None, None]
        rank = tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), axis=1)
        open_score = tl.where((rank < TOPK_GROUP)[:, :, None], open_score, NEG_INF)

    # The k best by k maxima; among equals the lower index.
    choice = tl.arange(0, TOP_K_POW2)
    topk_expert = tl.full((BLOCK_T, TOP_K_POW2), -1, tl.int32)
    topk_score = tl.zeros((BLOCK_T, TOP_K_POW2), tl.float32)
    for k in tl.static_range(TOP_K):
        best_score = tl.max(tl.max(open_score, axis=0), axis=1)
        candidate = tl.where(open_score == best_score[None, :, None], expert, NUM_EXPERTS - 1)
        at = tl.min(tl.min(candidate, axis=0), axis=1)
        hit = real & (expert == at[None, :, None])
        chosen_score = tl.sum(tl.sum(tl.where(hit, score, 0.0), axis=0), axis=1)
        topk_expert = tl.where(choice[None, :] == k, at[:, None], topk_expert)
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
