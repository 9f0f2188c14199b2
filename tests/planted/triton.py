"""Bugs in the plain Triton kernels, which run in Triton's interpreter."""

from mutations import Mutation

# Each of some seconds.
ROUTING = (
    "tests/test_kernels.py::test_problems",
    "tests/test_kernels.py::test_equal_logits",
    "tests/test_kernels.py::test_routing",
)
TIES = ("tests/test_kernels.py::test_equal_logits", "tests/test_kernels.py::test_routing_with_equal_scores")
MASKED = ("tests/test_kernels.py::test_routing_with_masked_experts", "tests/test_kernels.py::test_routing")
GIVEN = ("tests/test_routed.py::test_any_choice_is_sorted", "tests/test_routed.py")
RENUMBERED = ("tests/test_flashinfer_cutlass.py::test_given_experts_are_counted_from_the_first_local_one",)
COMBINE = ("tests/test_kernels.py::test_combine", "tests/test_kernels.py::test_problems")
QUANTIZE = ("tests/test_kernels.py::test_problems", "tests/test_activations.py")
TILES = (
    "tests/test_kernels.py::test_problems",
    "tests/test_kernels.py::test_rows_on_both_sides_of_every_m_bucket",
    "tests/test_kernels.py::test_halves_by_one_product_or_two",
)
CHUNKS = ("tests/test_emulated_kernels.py::test_chunks_of_columns", "tests/test_kernels.py::test_columns_in_pieces")
ORDER = ("tests/test_emulated_kernels.py",)
LIBRARIES = ("tests/test_library_gemms.py::test_gather", "tests/test_library_gemms.py::test_swiglu")
ODD = ("tests/test_contract.py::TestTriton::test_tensors_at_odd_addresses",)
STRIDES = ("tests/test_contract.py::TestTriton::test_strides",)
WIDE = ("tests/test_emulated_addresses.py",)
ACTIVATIONS = ("tests/test_activations.py",)
WEIGHTS = ("tests/test_contract.py::TestTriton::test_weights_on_the_input",)
EMULATED_WEIGHTS = ("tests/test_emulated_kernels.py::test_weights_on_the_input",)
SHARED = ("tests/test_kernels.py::test_routing",)
NAN = ("tests/test_kernels.py::test_routing_of_nan", "tests/test_not_a_number.py::test_one_by_one")


def routing(old: str, new: str, wrong: str, tests: tuple[str, ...] = ROUTING, equivalent: str = "") -> Mutation:
    return Mutation("kernels/routing.py", old, new, wrong, tests, equivalent)


def weigh(old: str, new: str, wrong: str, tests: tuple[str, ...] = WEIGHTS) -> Mutation:
    return Mutation("kernels/weigh.py", old, new, wrong, tests)


def gemm(name: str):
    def planted(old: str, new: str, wrong: str, tests: tuple[str, ...] = TILES, equivalent: str = "") -> Mutation:
        return Mutation(f"kernels/grouped_gemm/triton/{name}.py", old, new, wrong, tests, equivalent)

    return planted


common, gemm1, gemm2 = gemm("common"), gemm("gemm1"), gemm("gemm2")


def combine(old: str, new: str, wrong: str, tests: tuple[str, ...] = COMBINE, equivalent: str = "") -> Mutation:
    return Mutation("kernels/combine.py", old, new, wrong, tests, equivalent)


MUTATIONS = [
    # Routing
    routing("bits ^ 0x7FFFFFFF", "bits", "negative scores in the wrong order", MASKED),
    routing(
        "tl.where(flat_open == best_score, place, SPAN - 1), axis=0)",
        "tl.where(flat_open == best_score, place, 0), axis=0)",
        "the first expert for all",
    ),
    routing(
        "at = tl.min(tl.where(flat_open == best_score, place, SPAN - 1), axis=0)",
        "at = tl.max(tl.where(flat_open == best_score, place, 0), axis=0)",
        "among equals the higher expert",
        TIES,
    ),
    routing(
        "tl.min(tl.where(flat_score == best_score, flat_group, N_GROUP), axis=0)",
        "tl.max(tl.where(flat_score == best_score, flat_group, -1), axis=0)",
        "among equals the higher group",
        TIES,
    ),
    routing("hit = flat_group == tl.min(", "hit = flat_group >= tl.min(", "groups after a kept one"),
    routing("static_range(TOPK_GROUP)", "static_range(TOPK_GROUP + 1)", "one group too many"),
    routing("flat_score = tl.where(hit, LOWEST, flat_score)", "flat_score = flat_score", "one group several times"),
    routing(
        "first = tl.min(tl.where(biased == best[:, None], member, GROUP_SIZE_POW2), axis=1)",
        "first = tl.max(tl.where(biased == best[:, None], member, -1), axis=1)",
        "a group's best is taken from another place where it is there twice",
        TIES,
        equivalent="Whichever of the equal best is left out, the other is the second.",
    ),
    routing(
        "tl.where(member == first[:, None], NEG_INF, biased)",
        "tl.where(biased == best[:, None], NEG_INF, biased)",
        "a group with its best twice has another second best",
        TIES,
    ),
    routing("ordered(best + second)", "ordered(best)", "groups by their best expert alone"),
    routing("score = 1.0 / (1.0 + tl.exp(-logits))", "score = 1.0 / (1.0 + tl.exp(logits))", "the least for the best"),
    routing("biased = tl.where(real, score + bias, NEG_INF)", "biased = tl.where(real, score, NEG_INF)", "no bias"),
    routing("flat_bits = tl.reshape(score.to", "flat_bits = tl.reshape(biased.to", "weights with the bias in them"),
    routing("(tl.sum(topk_score, axis=0) + 1e-20) *", "1.0 *", "weights that are not normalised"),
    routing("+ 1e-20) * routed_scaling_factor", "+ 1e-20)", "no scaling factor"),
    routing(
        "+ 1e-20) *",
        "+ 1e-2) *",
        "weights a little too small",
        (*ROUTING, "tests/test_kernels.py::test_routing_of_extreme_logits"),
    ),
    routing("flat_open = tl.where(hit, LOWEST, flat_open)", "flat_open = flat_open", "one expert top_k times"),
    routing("at // GROUP_SIZE_POW2 * GROUP_SIZE + at % GROUP_SIZE_POW2", "at", "groups that are no power of two"),
    routing(
        "tl.exp(logits - largest)",
        "tl.exp(logits)",
        "softmax of large logits",
        ("tests/test_kernels.py::test_softmax_routing_of_extreme_logits",),
    ),
    routing(
        "score = power / tl.sum(power)",
        "score = power",
        "softmax without its sum",
        (
            "tests/test_kernels.py::test_problems",
            "tests/test_kernels.py::test_softmax_routing",
            "tests/test_kernels.py::test_a_bias_in_float32",
        ),
        equivalent="",
    ),
    routing(
        "(local >= 0) & (local < E)\n    wait", "(local >= 0) & (local <= E)\n    wait", "one expert too many is local"
    ),
    routing(
        "chosen & (local >= 0) & (local < E)",
        "(local >= 0) & (local < E)",
        "choices past the last",
        (*ROUTING, *GIVEN),
        equivalent="They name no expert: -1.",
    ),
    routing("local = expert - local_expert_offset\n    chosen", "local = expert\n    chosen", "no offset"),
    routing("slot * E + local, -1)", "slot * E + local, 0)", "another rank's expert is the first local one"),
    routing("local.to(tl.int64) * num_tokens + slot", "local.to(tl.int64) + slot", "experts' lists over one another"),
    routing("local.to(tl.int64) * num_tokens", "local * num_tokens", "an expert's list by 32 bits", WIDE),
    routing(
        "logits_ptr + token * STRIDE_LOGITS",
        "logits_ptr + token.to(tl.int32) * STRIDE_LOGITS",
        "logits by 32 bits",
        WIDE,
    ),
    routing(
        "    wait_for_previous_kernel(PDL)\n    if ALONE:",
        "    if ALONE:",
        "slots are drawn before the clearing",
        ORDER,
    ),
    routing("        tl.debug_barrier()\n    slot", "    slot", "one token's slots before its clearing", ORDER),
    routing(
        "mask=at < num_counters)",
        "mask=at < num_counters - 1)",
        "the last counter is not cleared",
        ("tests/test_kernels.py::test_problems", *ORDER),
    ),
    routing(
        "for first in range(0, num_counters, BLOCK)",
        "for first in range(0, BLOCK, BLOCK)",
        "counters past the first block are not cleared",
        ("tests/test_emulated_kernels.py::test_all_counters_are_cleared",),
    ),
    routing(
        "    wait_for_previous_kernel(PDL)\n    let_next_kernel_start(PDL)\n    clear(",
        "    let_next_kernel_start(PDL)\n    clear(",
        "counters are cleared while the call before counts",
        ORDER,
    ),
    # Shared experts
    routing(
        "    return with_shared(topk_expert, weight, choice, N_GROUP * GROUP_SIZE, TOP_K, NUM_SHARED)",
        "    weight = weight / routed_scaling_factor\n"
        "    expert, weight = with_shared(topk_expert, weight, choice, N_GROUP * GROUP_SIZE, TOP_K, NUM_SHARED)\n"
        "    return expert, weight * routed_scaling_factor",
        "a shared expert's weight has the scaling factor",
        SHARED,
    ),
    routing(
        "tl.sum(topk_score, axis=0) + 1e-20",
        "tl.sum(topk_score, axis=0) + NUM_SHARED + 1e-20",
        "shared experts count in the normalisation",
        SHARED,
    ),
    routing(
        "is_shared = (shared >= 0) & (shared < NUM_SHARED)",
        "is_shared = (shared >= 0) & (shared < NUM_SHARED) & (tl.program_id(0) < tl.num_programs(0) - 1)",
        "the last token has no shared expert",
        SHARED,
    ),
    routing("NUM_EXPERTS + shared, expert)", "NUM_EXPERTS, expert)", "each shared expert is the first", SHARED),
    routing(
        "    return with_shared(expert, weight, choice, NUM_EXPERTS, TOP_K, NUM_SHARED)",
        "    return expert, weight",
        "no shared experts beside those chosen before",
        GIVEN,
    ),
    # Weights on the input
    weigh("scale * weight, mask", "scale, mask", "an input without its weight"),
    weigh("    tl.store(pair_weight_ptr + token, 1.0)\n", "", "weights on the input and on the result"),
    weigh(
        "weighted_ptr + block * num_tokens + token", "weighted_ptr + token * BLOCKS + block", "scales in other places"
    ),
    weigh("    wait_for_previous_kernel(PDL)\n", "", "weights are read before they are there", EMULATED_WEIGHTS),
    # Experts that are chosen already
    routing(
        "return tl.where((expert >= 0) & (expert < NUM_EXPERTS), expert, -1)",
        "return tl.where(expert >= 0, expert, -1)",
        "numbers past the experts",
        RENUMBERED,
    ),
    routing(
        "weight = tl.where(other_expert >= 0, weight, 0.0)\n",
        "weight = weight\n",
        "weights beside no expert",
        RENUMBERED,
    ),
    routing(
        "(other[None, :] < choice[:, None])).to(tl.int32), axis=1) > 0",
        "(other[None, :] <= choice[:, None])).to(tl.int32), axis=1) > 0",
        "no expert at all",
        GIVEN,
    ),
    routing(
        "tl.where(same, weight[None, :], 0.0)",
        "tl.where(same, weight[:, None], 0.0)",
        "twice the first weight of an expert that comes twice",
        GIVEN,
    ),
    routing(
        "tl.where(is_local, weight, 0.0), mask=chosen",
        "weight, mask=chosen",
        "weights of other ranks' experts, which may be NaN",
        ("tests/test_kernels.py::test_routing", *NAN),
    ),
    routing('tl.where(has_nan, float("nan"), weight)', "weight", "a bias of NaN makes numbers", NAN),
    routing("tl.where(value == value, order, NAN_ORDER)", "order", "NaN is the least score", NAN),
    routing("tl.reduce(biased, 1, larger)", "tl.max(biased, axis=1)", "a group's NaN doesn't count", NAN),
    routing(
        "group_score = ordered(best + second)[:, None]",
        "group_score = (best + second)[:, None]",
        "one more group is open beside one with NaN",
        NAN,
    ),
    routing(
        "weights_ptr + token * stride_weights",
        "weights_ptr + token * stride_ids",
        "rows of weights that lie apart",
        GIVEN,
    ),
    # The arithmetic between
    Mutation(
        "kernels/quantize.py",
        "gate / (1.0 + tl.exp(-gate)) * up",
        "up / (1.0 + tl.exp(-gate)) * up",
        "silu without its factor",
        QUANTIZE,
    ),
    Mutation("kernels/quantize.py", "1.0 + tl.exp(-gate)", "1.0 + tl.exp(gate)", "silu of the other sign", QUANTIZE),
    Mutation(
        "kernels/quantize.py",
        "FP8_MAX = tl.constexpr(448.0)",
        "FP8_MAX = tl.constexpr(240.0)",
        "half of e4m3's range",
        QUANTIZE,
    ),
    Mutation(
        "kernels/quantize.py", "tl.abs(value)", "value", "the largest value, not the largest absolute one", QUANTIZE
    ),
    Mutation(
        "kernels/quantize.py",
        "MIN_AMAX = tl.constexpr(1e-10)",
        "MIN_AMAX = tl.constexpr(1e-2)",
        "small blocks lose digits",
        ("tests/test_kernels.py::test_small_activations",),
    ),
    # Triton's GEMMs
    common("(ends <= tile)", "(ends < tile)", "an expert's first tile is the one's before"),
    common(
        "inside % my_tiles, inside // my_tiles", "inside // my_tiles, inside % my_tiles", "row and column tile swapped"
    ),
    common("tl.where(expert < at, count, 0)", "tl.where(expert <= at, count, 0)", "rows start behind their expert's"),
    common("index % ROWS\n", "index\n", "weights by pointer, past the first matrix", ODD),
    common(
        "(matrix + index // ROWS).to(tl.int64) * HEIGHT",
        "(matrix + index // ROWS) * HEIGHT",
        "weights by 32 bits",
        WIDE,
    ),
    common(
        "above = (0, *(bucket.block_m for bucket in tile.m_buckets))",
        "above = (0,) * 8",
        "two buckets for the same rows",
        ORDER,
    ),
    gemm1("first, second = tl.split", "second, first = tl.split", "gate and up swapped where one product has both"),
    gemm1(
        "swiglu_of(first, second) if p.GATE_FIRST",
        "swiglu_of(second, first) if p.GATE_FIRST",
        "gate_first without effect",
    ),
    gemm1(
        "first_scale_at + p.INTERMEDIATE // 128 * K_BLOCKS", "first_scale_at + K_BLOCKS", "gate's scales beside up's"
    ),
    gemm1(
        "row_scale, first_scale, second_scale = next_row, next_first, next_second",
        "row_scale, first_scale, second_scale = next_row, next_first, next_first",
        "up's scale for gate",
    ),
    gemm1(
        "hidden_scale_at, first_scale_at, second_scale_at, block + 1, p.",
        "hidden_scale_at, first_scale_at, second_scale_at, block, p.",
        "scales of the block before",
    ),
    gemm1("2 * expert + 1, weight_row", "2 * expert, weight_row", "one half's weights for both"),
    gemm1("tl.arange(0, 2 * ROWS) < ROWS", "tl.arange(0, 2 * ROWS) <= ROWS", "one column by the other half's scale"),
    gemm1("    block = tl.minimum(block, K_BLOCKS - 1)\n", "", "scales are read past the last block's", ORDER),
    gemm1("left > M_BUCKETS[b][0] and", "left > M_BUCKETS[b][0] + 1 and", "rows between two buckets are left out"),
    gemm1("== 128 // BLOCK_N - 1:", "== 0:", "a block is quantised by the first of its tiles"),
    gemm1(
        'other=0.0, cache_modifier=".cg")',
        "other=0.0)",
        "others' columns by way of the first-level cache",
        ORDER,
        equivalent="The count acquires: what was stored before it is seen, whichever way the load goes.",
    ),
    gemm1("row_tile * (p.INTERMEDIATE // 128) + block_n) ==", "block_n) ==", "row tiles count in one place"),
    gemm1(
        "        store_quantized(p, value, row, real, block_n)\n        signal(p.finished_ptr, expert, p.E)\n",
        "        signal(p.finished_ptr, expert, p.E)\n        store_quantized(p, value, row, real, block_n)\n",
        "the signal comes before the activation",
        ORDER,
    ),
    gemm1(
        "    wait_for_previous_kernel(PDL)\n    let_next", "    let_next", "GEMM1 doesn't wait for the routing", ORDER
    ),
    gemm1(
        "tl.where(p.num_tokens > 1, rows, 0)",
        "rows",
        "one token's number is read",
        equivalent=("What is read is 0, the only token's number, which the mask spares the wait for."),
    ),
    gemm1("token.to(tl.int64)[:, None] * p.STRIDE_HIDDEN", "token[:, None] * p.STRIDE_HIDDEN", "rows by 32 bits", WIDE),
    gemm1("token.to(tl.int64) * p.stride_scale_t", "token * p.stride_scale_t", "scales by 32 bits", WIDE),
    gemm1("expert.to(tl.int64) * p.num_tokens", "expert * p.num_tokens", "tokens' numbers by 32 bits", WIDE),
    gemm1("row = (rows_before + slot).to(tl.int64)", "row = rows_before + slot", "activation by 32 bits", WIDE),
    gemm1("block_n.to(tl.int64) * p.max_rows", "block_n * p.max_rows", "activation's scales by 32 bits", WIDE),
    gemm2(
        "activated_scale_at, scale_at, scales, block + 1",
        "activated_scale_at, scale_at, scales, block",
        "scales of the block before",
    ),
    gemm2("row_scale * scale, SWAP_AB", "row_scale, SWAP_AB", "no weight scale"),
    gemm2("expert, weight_row + WIDTH,", "expert, weight_row,", "the left half's weights twice"),
    gemm2(
        "scales = 0 if WIDTH < 128 or p.FUSE_HALVES else K_BLOCKS",
        "scales = 0",
        "the left half's scale for the right one",
    ),
    gemm2("tl.store(out_at + WIDTH, right", "tl.store(out_at + WIDTH, total", "the left half's columns twice"),
    gemm2(
        "weight_row = p.first_column + tile_n", "weight_row = tile_n", "weights and scales of the first chunk", CHUNKS
    ),
    gemm2(
        "left > M_BUCKETS[b][0] and",
        "left >= M_BUCKETS[b][0] and",
        "tiles on a bucket's edge are computed twice",
        ORDER,
        equivalent="the larger tile sums in the same order and stores the same values again: it costs time alone",
    ),
    gemm2(
        "            await_expert(finished_ptr, at, rows, FIRST_M, SIGNALS)\n",
        "            pass\n",
        "GEMM2 doesn't wait for its expert",
        ORDER,
    ),
    gemm2('mask=expert < E, other=0, cache_modifier=".cg")', "mask=expert < E, other=0)", "old counts in GEMM2", ORDER),
    gemm2(
        "    # GEMM1 has to end before this kernel does: the next one may clear the counters of both.\n"
        "    wait_for_previous_kernel(PDL)\n",
        "",
        "GEMM2 may end before GEMM1",
        ORDER,
    ),
    gemm2(
        "await_signals(finished_ptr, at, SIGNALS // 2)",
        "await_signals(finished_ptr, at, 2 * SIGNALS)",
        "the prefetch waits for signals that never come",
        ORDER,
    ),
    gemm2("tl.load(activated_at + block * BLOCK_K,", "tl.load(activated_at,", "the activation's first block for all"),
    gemm2("row = (rows_before + slot).to(tl.int64)", "row = rows_before + slot", "result by 32 bits", WIDE),
    gemm2("tl.cast(block, tl.int64) *", "block *", "the sum's scales by 32 bits", WIDE),
    # The combine
    combine(
        "pair % E, extent, 0), axis=0) + pair // E",
        "pair % E, count, 0), axis=0) + pair // E",
        "rows without the gaps between experts",
        ("tests/test_library_gemms.py::test_deep_gemm", *COMBINE),
    ),
    combine("expert < pair % E", "expert <= pair % E", "the next expert's row"),
    combine("value.to(tl.float32) * weight", "value.to(tl.float32)", "no weights"),
    combine(
        "weight = tl.load(pair_weight_ptr + token * TOP_K + k)",
        "weight = tl.load(pair_weight_ptr + token * TOP_K)",
        "the first choice's weight for all",
    ),
    combine(
        "weight = tl.sum(tl.where(choice == k, weights, 0.0), axis=0)",
        "weight = tl.max(weights, axis=0)",
        "the largest weight for all, with many tokens",
        ("tests/test_kernels.py::test_combine",),
    ),
    combine("for k in tl.static_range(TOP_K)", "for k in tl.static_range(TOP_K - 1)", "the last choice is left out"),
    combine(
        "real = block < COLUMNS // BLOCK_N", "real = block < COLUMNS // BLOCK_N - 1", "the last columns are left out"
    ),
    combine("first_block * 128 + column", "column", "all chunks into the first columns", CHUNKS),
    combine(
        "    wait_for_previous_kernel(PDL)\n    let_next", "    let_next", "the combine doesn't wait for GEMM2", ORDER
    ),
    combine(
        "    wait_for_previous_kernel(PDL)\n    let_next_kernel_start(PDL)\n",
        "    let_next_kernel_start(PDL)\n    wait_for_previous_kernel(PDL)\n",
        "the kernel after the combine may start before GEMM2 has ended",
        CHUNKS,
        equivalent="before it writes, it waits for the combine, which has waited for GEMM2",
    ),
    combine("pair // E).to(tl.int64)", "pair // E)", "rows by 32 bits", WIDE),
    combine("token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)", "output by 32 bits", WIDE),
    combine(
        "wanted = real & (pair +",
        "wanted = (pair +",
        "columns past the last are read",
        ("tests/test_emulated_kernels.py::test_the_combine_reads_no_column_past_the_last",),
    ),
    # Around libraries
    Mutation(
        "kernels/grouped_gemm/gather.py",
        "start + count, mask=real)",
        "start + extent, mask=real)",
        "an expert's end with its gap",
        LIBRARIES,
    ),
    Mutation(
        "kernels/grouped_gemm/gather.py",
        "tl.where(expert[None, :] < (pair % E)",
        "tl.where(expert[None, :] <= (pair % E)",
        "rows into the next expert's place",
        LIBRARIES,
    ),
    Mutation(
        "kernels/grouped_gemm/gather.py",
        "second + 2, one * INTERMEDIATE",
        "second + 2, one * HIDDEN",
        "GEMM2's sum is GEMM1's",
        LIBRARIES,
    ),
    Mutation(
        "kernels/grouped_gemm/gather.py",
        "block.to(tl.int64) * stride_scale_k",
        "block.to(tl.int64)",
        "scales that lie apart",
        LIBRARIES,
    ),
    Mutation(
        "kernels/grouped_gemm/swiglu.py", "up = tl.load(at + UP)", "up = tl.load(at + GATE)", "gate for up", LIBRARIES
    ),
    Mutation(
        "kernels/grouped_gemm/swiglu.py",
        "tl.where(ends <= number, gap, 0)",
        "tl.where(ends < number, gap, 0)",
        "an expert's first row in the gap before it",
        LIBRARIES,
    ),
    Mutation(
        "kernels/grouped_gemm/swiglu.py",
        "(piece % PIECES) * BLOCKS",
        "(piece % PIECES)",
        "pieces over one another",
        LIBRARIES,
    ),
    Mutation(
        "kernels/quantize.py",
        "return tl.reduce(tl.abs(value), 1, larger)",
        "return tl.max(tl.abs(value), axis=1)",
        "NaN becomes a number",
        ACTIVATIONS,
    ),
    Mutation(
        "kernels/quantize.py",
        'tl.where(amax < float("inf"), scale, float("nan"))',
        "scale",
        "a block with infinity keeps numbers",
        ("tests/test_not_a_number.py::test_one_by_one",),
    ),
    Mutation(
        "kernels/activations.py",
        "exists = row < tokens",
        "exists = row <= tokens",
        "a row past the last is written",
        ACTIVATIONS,
    ),
    Mutation(
        "kernels/activations.py",
        "block.to(tl.int64) * tokens + row",
        "block.to(tl.int64) + row * (HIDDEN // 128)",
        "scales token by token",
        ACTIVATIONS,
    ),
    Mutation(
        "kernels/external.py",
        "block.to(tl.int64) * stride_scale_k",
        "block.to(tl.int64) * stride_scale_t",
        "scales in the other order",
        ("tests/test_flashinfer_cutlass.py",),
    ),
    Mutation("kernels/external.py", "scale[:, None]", "1.0", "no scales", ("tests/test_flashinfer_cutlass.py",)),
]
