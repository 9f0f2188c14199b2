"""Bugs in the Gluon kernels."""

from mutations import Mutation

ANY = ("tests/test_emulated_kernels.py",)
TILES = ("tests/test_tile_scheduler.py", *ANY)
FEW = ("tests/test_emulated_kernels.py::test_few_rows", *ANY)
MANY = ("tests/test_emulated_kernels.py::test_many_rows", *ANY)
NARROW = ("tests/test_emulated_kernels.py::test_narrow_experts",)
SPREAD = ("tests/test_emulated_kernels.py::test_light_experts_among_others",)
ONE_TOKEN = ("tests/test_emulated_kernels.py::test_one_token_by_a_stream_of_weights",)
HALVES = ("tests/test_emulated_kernels.py::test_tiles_of_half_the_rows",)
BY_ROWS = ("tests/test_emulated_kernels.py::test_experts_by_their_rows",)
LATE = ("tests/test_emulated_kernels.py::test_whatever_comes_late_is_waited_for", *ANY)
CHUNKS = ("tests/test_emulated_kernels.py::test_chunks_of_columns", *ANY)
TWICE = ("tests/test_emulated_kernels.py::test_memory_is_free_when_the_call_ends", *ANY)
WIDE = ("tests/test_emulated_addresses.py",)


def common(old: str, new: str, wrong: str, tests: tuple[str, ...] = ANY, equivalent: str = "") -> Mutation:
    return Mutation("kernels/grouped_gemm/sm90/common.py", old, new, wrong, tests, equivalent)


def scheduler(old: str, new: str, wrong: str, tests: tuple[str, ...] = TILES, equivalent: str = "") -> Mutation:
    return Mutation("kernels/grouped_gemm/sm90/tile_scheduler.py", old, new, wrong, tests, equivalent)


def share(old: str, new: str, wrong: str, tests: tuple[str, ...] = ANY, equivalent: str = "") -> Mutation:
    return Mutation("kernels/grouped_gemm/sm90/share.py", old, new, wrong, tests, equivalent)


def few(old: str, new: str, wrong: str, tests: tuple[str, ...] = FEW, equivalent: str = "") -> Mutation:
    return Mutation("kernels/grouped_gemm/sm90/few_rows.py", old, new, wrong, tests, equivalent)


def many(old: str, new: str, wrong: str, tests: tuple[str, ...] = MANY, equivalent: str = "") -> Mutation:
    return Mutation("kernels/grouped_gemm/sm90/many_rows.py", old, new, wrong, tests, equivalent)


def narrow(old: str, new: str, wrong: str, tests: tuple[str, ...] = NARROW, equivalent: str = "") -> Mutation:
    return Mutation("kernels/grouped_gemm/sm90/narrow.py", old, new, wrong, tests, equivalent)


def one_token(old: str, new: str, wrong: str, tests: tuple[str, ...] = ONE_TOKEN, equivalent: str = "") -> Mutation:
    return Mutation("kernels/grouped_gemm/sm90/one_token.py", old, new, wrong, tests, equivalent)


def completion(old: str, new: str, wrong: str, tests: tuple[str, ...] = LATE, equivalent: str = "") -> Mutation:
    return Mutation("kernels/grouped_gemm/completion.py", old, new, wrong, tests, equivalent)


MUTATIONS = [
    # The tile scheduler
    scheduler(
        "at = gl.sum((ends <= number)", "at = gl.sum((ends < number)", "an expert's first tile is the one's before"
    ),
    scheduler(
        "self.look_up(TOKENS_END, there) - expert_rows + slot",
        "self.look_up(TOKENS_END, there) + slot",
        "rows start behind their expert's",
    ),
    scheduler(
        "n=inside // above_another",
        "n=inside % above_another",
        "the row tile for the column tile",
    ),
    scheduler(
        "tiles = (rows + (self.BLOCK_M - 1)) // self.BLOCK_M",
        "tiles = rows // self.BLOCK_M",
        "an expert's last rows have no tile",
    ),
    scheduler(
        "self.look_up(line, there) - above_another",
        "self.look_up(line, there)",
        "tiles counted from behind the expert",
    ),
    scheduler(
        "self.look_up(line, there) - above",
        "self.look_up(TILES_END, there) - above",
        "tiles of an expert with one counted among the others'",
        SPREAD,
    ),
    scheduler(
        "row_tiles = gl.where(is_light, 0, row_tiles)",
        "pass",
        "experts with one row tile are in both orders",
        SPREAD,
    ),
    scheduler(
        "self.table.index(TOKENS_END).store(gl.associative_scan(tokens, 0, _add))",
        "self.table.index(TOKENS_END).store(gl.associative_scan(self.own(tokens), 0, _add))",
        "rows of the other launch's experts aren't there",
        BY_ROWS,
    ),
    scheduler(
        "row_tiles = self.row_tiles(self.own(tokens), halved)",
        "row_tiles = self.row_tiles(tokens, halved)",
        "the other launch's experts have tiles too",
        BY_ROWS,
    ),
    scheduler(
        "gl.num_programs(0) + gl.atomic_add",
        "gl.num_programs(0) - 1 + gl.atomic_add",
        "a tile is computed twice and the last left out",
    ),
    scheduler("first = turn % self.SLOTS * FIELDS\n        zero", "first = 0 * turn\n        zero", "one slot for all"),
    scheduler(
        "(turn // self.SLOTS) & 1)\n        first",
        "turn & 1)\n        first",
        "the scheduler's phase flips each turn",
    ),
    scheduler(
        "        mbarrier.wait(self.published.index(turn % self.SLOTS), (turn // self.SLOTS) & 1)\n",
        "",
        "the next tile is read before it is there",
    ),
    scheduler(
        "n=_number(self.tiles.index(first + 6))",
        "n=_number(self.tiles.index(first + 5))",
        "the row tile for the column tile",
    ),
    scheduler(
        "            rows=_number(self.tiles.index(first + 3))",
        "            rows=_number(self.tiles.index(first + 1))",
        "an expert's rows for the tile's",
    ),
    scheduler("(HALF - 1)) // HALF", "(HALF - 1)) // self.BLOCK_M", "tiles of half the rows are half as many", HALVES),
    scheduler(
        "gl.where(halved, self.BLOCK_M // 2, self.BLOCK_M)",
        "self.BLOCK_M",
        "halves begin at whole tiles",
        HALVES,
        equivalent="Those tiles have all rows then, and what is past the expert none: it only takes longer.",
    ),
    scheduler(
        "minimum(expert_rows - slot, rows)",
        "minimum(expert_rows - slot, self.BLOCK_M)",
        "a tile of half the rows has all",
        HALVES,
    ),
    scheduler(
        "tokens, 0), axis=0) >= BUSY_ROWS",
        "tokens, 0), axis=0) > BUSY_ROWS",
        "rows that are just enough",
        BY_ROWS,
    ),
    scheduler(
        "(is_busy & enough) == (self.busy != 0)",
        "is_busy == (self.busy != 0)",
        "few busy rows are taken",
        BY_ROWS,
    ),
    scheduler(
        "return max(4, -(-(STAGES + 2) // K_BLOCKS))",
        "return 1",
        "one slot for the next tile: written again before it is read",
    ),
    # The pipeline
    common(
        "mbarrier.wait(self.empty.index(stage), ((step // self.STAGES) & 1) ^ 1)",
        "mbarrier.wait(self.empty.index(stage), (step // self.STAGES) & 1)",
        "the producer waits for the other phase",
    ),
    common(
        "        mbarrier.wait(self.empty.index(stage), ((step // self.STAGES) & 1) ^ 1)\n",
        "",
        "a stage is filled while it is read",
    ),
    common(
        "(step // self.STAGES) & 1, pred=pred)",
        "((step // self.STAGES) & 1) ^ 1, pred=pred)",
        "the consumers wait for the other phase",
    ),
    common(
        "        mbarrier.wait(self.full.index(step % self.STAGES), (step // self.STAGES) & 1, pred=pred)\n",
        "        pass\n",
        "a stage is read before it is full",
    ),
    common("count=129)", "count=128)", "a stage is full before its last copies"),
    common("count=READERS)", "count=1)", "one consumer's release is enough", MANY),
    common("increment_count=False", "increment_count=True", "copies arrive once more than is waited for"),
    # Few rows
    few("(self.GATE if part else self.UP)", "(self.UP if part else self.GATE)", "gate and up swapped"),
    few("value = swiglu_of(gate, up)", "value = swiglu_of(up, gate)", "silu of up"),
    few(
        "return first + self.UP // 128 * K_BLOCKS, first + self.GATE // 128 * K_BLOCKS",
        "return first + self.GATE // 128 * K_BLOCKS, first + self.UP // 128 * K_BLOCKS",
        "scales of gate and up swapped",
    ),
    few("tile.n // 4) * K_BLOCKS", "tile.n // 8) * K_BLOCKS", "GEMM1's scale of the wrong block of columns"),
    few("self.first_column // 128 + tile.n // 2", "tile.n // 2", "GEMM2's scales of the first chunk", CHUNKS),
    few("+ tile.n // 2\n", "+ (tile.n + 1) // 2\n", "GEMM2's scale of the block after"),
    few("p.first_column + tile.n * BLOCK_N", "tile.n * BLOCK_N", "GEMM2's weights of the first chunk", CHUNKS),
    few(
        "sums.store(total + sums.load(SUM))\n        store_", "sums.store(total)\n        store_", "GEMM1 drops a half"
    ),
    few("sums.store(total + sums.load(SUM))\n        slot", "sums.store(total)\n        slot", "GEMM2 drops a half"),
    few("first = (step + WG) & 1", "first = WG", "blocks of the wrong parity where a sum has an odd number"),
    few("        left, right = next_left, next_right\n", "", "the scales of the first block for all"),
    few("right_at, block + 4, K_BLOCKS", "right_at, block + 3, K_BLOCKS", "the scale of the block before"),
    few("block = gl.minimum(block, K_BLOCKS - 1)", "block = block", "scales are read past the last block's"),
    few(
        "        fence_async_shared()  # rows that were not written by TMA\n",
        "",
        "no fence between the copies of rows and the product",
    ),
    few(
        "        product = warpgroup_mma_wait(0, deps=[product])\n        pipeline.consumer_release(step + block)\n",
        "        pipeline.consumer_release(step + block)\n        product = warpgroup_mma_wait(0, deps=[product])\n",
        "a stage is released while it is read",
    ),
    few("use_acc=False", "use_acc=True", "each block's product has those before in it"),
    few(
        "mbarrier.wait(accumulator.acc_empty.index(0), (turn & 1) ^ 1)\n        sums.store(total)\n"
        "        mbarrier.arrive(accumulator.acc_full.index(0), count=1)\n    else:\n"
        "        mbarrier.wait(accumulator.acc_full.index(0), turn & 1)\n        sums.store(total + sums.load(SUM))\n"
        "        store_activation",
        "sums.store(total)\n"
        "        mbarrier.arrive(accumulator.acc_full.index(0), count=1)\n    else:\n"
        "        mbarrier.wait(accumulator.acc_full.index(0), turn & 1)\n        sums.store(total + sums.load(SUM))\n"
        "        store_activation",
        "GEMM1's half of the next sum over the one that is stored",
    ),
    few(
        "        store_activation(p, sums, tile, ROWS)\n"
        "        mbarrier.arrive(accumulator.acc_empty.index(0), count=1)\n",
        "        mbarrier.arrive(accumulator.acc_empty.index(0), count=1)\n"
        "        store_activation(p, sums, tile, ROWS)\n",
        "the sum is given back before it is read",
    ),
    few("+ block) == 3:", "+ block) == 2:", "a block is quantised by the third of its four tiles"),
    few("block = tile.n // 4\n", "block = tile.n // 2\n", "a block's tiles draw from two counters"),
    few(
        ', cache_modifier=".cg")\n        quantized',
        ")\n        quantized",
        "others' columns by way of the first-level cache",
        FEW,
        equivalent="The ticket acquires: what was stored before it is seen, whichever way the load goes.",
    ),
    few("row_tile * (p.INTERMEDIATE // 128) + block", "block", "row tiles draw from one counter"),
    few("        signal(p.finished_ptr, tile.expert, p.E)\n", "", "GEMM1 never signals"),
    few(
        "        gl.store(p.out_scale_ptr + block.to(gl.int64) * p.max_rows + row, scale, mask=real)\n"
        "        signal(p.finished_ptr, tile.expert, p.E)\n",
        "        signal(p.finished_ptr, tile.expert, p.E)\n"
        "        gl.store(p.out_scale_ptr + block.to(gl.int64) * p.max_rows + row, scale, mask=real)\n",
        "the signal comes before the scales",
        LATE,
    ),
    few(
        "            await_expert(p.finished_ptr, tile.expert, tile.expert_rows, p.FIRST_M, p.SIGNALS)\n",
        "",
        "GEMM2 doesn't wait for its expert",
    ),
    few("if block >= ready:", "if block > ready:", "a block's weights are not loaded"),
    few("            ready = AHEAD\n", "            ready = 0\n", "the first weights are loaded twice"),
    few("if K_BLOCKS % GROUP > 0:", "if K_BLOCKS % GROUP > 1:", "the last block of an odd number is left out"),
    few("scale_at += GROUP * stride_scale_k", "scale_at += stride_scale_k", "row scales of the wrong block"),
    few(
        "gl.where(p.num_tokens > 1, tile.rows, 0)",
        "tile.rows",
        "one token's number is read",
        FEW,
        equivalent=("What is read is 0, the only token's number, which the mask spares the wait for."),
    ),
    few("x_row.to(gl.int64) * p.STRIDE_HIDDEN", "x_row * p.STRIDE_HIDDEN", "GEMM1's rows by 32 bits", WIDE),
    few("x_row.to(gl.int64) * p.INTERMEDIATE", "x_row * p.INTERMEDIATE", "GEMM2's rows by 32 bits", WIDE),
    few("row.to(gl.int64) * p.stride_scale_t", "row * p.stride_scale_t", "scales by 32 bits", WIDE),
    few("tile.expert.to(gl.int64) * p.num_tokens", "tile.expert * p.num_tokens", "tokens' numbers by 32 bits", WIDE),
    few(
        "(tile.first_row + slot).to(gl.int64) * p.COLUMNS",
        "(tile.first_row + slot) * p.COLUMNS",
        "result by 32 bits",
        WIDE,
    ),
    few(
        "row_at = p.unquantized_ptr + (tile.first_row + slot).to(gl.int64) * p.INTERMEDIATE",
        "row_at = p.unquantized_ptr + (tile.first_row + slot) * p.INTERMEDIATE",
        "activation by 32 bits",
        WIDE,
    ),
    few(
        "row = (tile.first_row + whole_slot).to(gl.int64)",
        "row = tile.first_row + whole_slot",
        "whole rows by 32 bits",
        WIDE,
    ),
    few("block.to(gl.int64) * p.max_rows", "block * p.max_rows", "activation's scales by 32 bits", WIDE),
    few(
        "    # GEMM1 has to end before this kernel does: the next one may clear the counters of both.\n"
        "    wait_for_previous_kernel(PDL)\n",
        "",
        "GEMM2 may end before GEMM1: what it still counts with is somebody else's",
        TWICE,
    ),
    few("    wait_for_previous_kernel(PDL)\n    let_next", "    let_next", "GEMM1 doesn't wait for the routing"),
    few('fill_table(".cg")', 'fill_table("")', "old counts in GEMM2"),
    few("slot_token_ptr=slot_token_ptr", "slot_token_ptr=tokens_per_expert_ptr", "tokens' numbers from elsewhere"),
    few("UP=INTERMEDIATE if GATE_FIRST else 0", "UP=0", "up is gate where gate comes first"),
    few(
        "tile_counter_ptr + first_column // COLUMNS",
        "tile_counter_ptr",
        "two chunks draw their tiles from one counter",
        CHUNKS,
    ),
    few(
        "Signals(gemm1_rows(num_tokens),",
        "Signals(2 * gemm1_rows(num_tokens),",
        "GEMM2 waits for too few signals",
        LATE,
    ),
    scheduler(
        "is_light = is_fewer == (light <= heavy)",
        "is_light = is_fewer == (light < heavy)",
        "as many light tiles as others are taken for them",
        SPREAD,
        equivalent="Either order has as many tiles then: they change places.",
    ),
    scheduler(
        "gl.where(past_all, number,",
        "gl.where(number < 0, number,",
        "what is past all is looked for among one kind",
        SPREAD,
        equivalent="Of the kind of which there are more: it is past these too.",
    ),
    scheduler("fewer_before = gl.minimum(", "fewer_before = gl.maximum(", "the fewer are counted on", SPREAD),
    share("return name + self.suffix", "return name", "two pairs count by the same counters", BY_ROWS),
    few(
        'counter("gemm1_tile_counter"),',
        'counter("gemm2_tile_counter"),',
        "both GEMMs draw their tiles from one counter",
    ),
    # Many rows
    many("[weight_row + p.UP, block", "[weight_row + p.GATE, block", "gate's weights for up"),
    many("up0, up1, gate0, gate1, step", "gate0, gate1, up0, up1, step", "gate and up swapped"),
    many("larger(amax_of(left), amax_of(right))", "amax_of(left)", "the largest values of the left half alone"),
    many(
        "amax = larger(",
        "amax = gl.maximum(",
        "NaN of one half becomes a number",
        ("tests/test_not_a_number.py::test_gluon",),
    ),
    many("+ tile.n) * K_BLOCKS", "+ tile.n // 2) * K_BLOCKS", "GEMM1's scale of the wrong block of columns"),
    many(
        "self.first_column // 128 + tile.n * 2",
        "tile.n * 2",
        "GEMM2's scales of the first chunk",
        CHUNKS,
    ),
    many("return first, first + K_BLOCKS", "return first, first", "both halves of GEMM2 have the left one's scales"),
    many("p.first_column + tile.n * BLOCK_N", "tile.n * BLOCK_N", "GEMM2's weights of the first chunk", CHUNKS),
    many("sum1, first_row, rows, column + PART_N", "sum0, first_row, rows, column + PART_N", "a half for the other"),
    many("rows, block * PART_N + GROUP_N", "rows, block * PART_N", "right at the left"),
    many("max(0, K_BLOCKS - 3)", "K_BLOCKS", "no tile is drawn"),
    many("signal(p.finished_ptr, expert, p.E)", "signal(p.finished_ptr, tile.expert, p.E)", "the next tile's expert"),
    many("scale, mask=slot < rows)", "scale, mask=slot < 0)", "the activation's scales are not stored"),
    many("slice(WG * CHUNK, CHUNK, dim=0).load", "slice(0, CHUNK, dim=0).load", "GEMM1's upper rows for the lower"),
    many("slice(WG * CHUNK, CHUNK, dim=0)\n", "slice(0, CHUNK, dim=0)\n", "GEMM2's upper rows for the lower"),
    many("slice(WG * CHUNK, CHUNK).load(BY", "slice(0, CHUNK).load(BY", "GEMM1's upper rows' scales for the lower"),
    many("slice(WG * CHUNK, CHUNK).load(gl", "slice(0, CHUNK).load(gl", "GEMM2's upper rows' scales for the lower"),
    many("slice(GROUP % 2 * GROUP_N", "slice(0 * GROUP_N", "the left group of 128 weight rows for the right one"),
    many(
        "use_acc, 0)\n        ahead = gl.minimum(block + 1, K_BLOCKS - 1)",
        "use_acc, 0)\n        ahead = block",
        "scales of before",
    ),
    many(
        "WIDE))\n        ahead = gl.minimum(block + 1, K_BLOCKS - 1)",
        "WIDE))\n        ahead = block",
        "the same in GEMM2",
    ),
    many(
        "odd * right_scale\n        left, right = next_left, next_right\n",
        "odd * right_scale\n",
        "the first block's scales",
    ),
    many(
        "product * right_scale\n        left, right = next_left, next_right\n",
        "product * right_scale\n",
        "in GEMM2 too",
    ),
    many("product * right_scale", "product * left_scale", "the left half's scale for the right one"),
    many(
        "        product = warpgroup_mma_wait(0, deps=[product])\n        pipeline.consumer_release(step)\n",
        "        pipeline.consumer_release(step)\n        product = warpgroup_mma_wait(0, deps=[product])\n",
        "GEMM2 releases a stage while it is read",
    ),
    many("sum2 = sum2 + even * right_scale", "sum2 = sum2 + even * left_scale", "up's scale for gate"),
    many(
        "        odd = warpgroup_mma_wait(0, deps=[odd])\n        pipeline.consumer_release(step)\n",
        "        pipeline.consumer_release(step)\n        odd = warpgroup_mma_wait(0, deps=[odd])\n",
        "a stage is released while it is read",
    ),
    many(
        "        even = warpgroup_mma_wait(1, deps=[even])\n        sum0",
        "        sum0",
        "a product is promoted while it runs",
    ),
    many(
        "use_acc = p.max_rows < 0\n    tile, up_at",
        "use_acc = p.max_rows > 0\n    tile, up_at",
        "a product has one before in it",
    ),
    many("block + 1 < K_BLOCKS)\n        odd", "True)\n        odd", "the next tile's first block is waited for"),
    many(
        "block + 1 < K_BLOCKS)\n        product",
        "True)\n        product",
        "GEMM2 waits for the next tile's first block",
    ),
    many(
        "step + 1, block + 1 < K_BLOCKS)\n        odd",
        "step, block + 1 < K_BLOCKS)\n        odd",
        "no wait for the next block",
    ),
    many(
        "            step = leave_out(p.pipeline, step, K_BLOCKS)\n            tile, up_at",
        "            step += K_BLOCKS\n            tile, up_at",
        "a consumer without rows keeps the stages",
    ),
    many(
        "range(K_BLOCKS):\n        pipeline.consumer_wait(step)\n",
        "range(K_BLOCKS):\n",
        "a consumer without rows releases stages that are not full",
    ),
    many("            let_async_copies_see(p.PDL)\n", "", "TMA may read the activation as it was before", LATE),
    many(
        "            await_expert(p.finished_ptr, tile.expert, tile.expert_rows, p.FIRST_M, p.SIGNALS)\n",
        "",
        "GEMM2 doesn't wait for its expert",
    ),
    many("scale_at += p.max_rows", "scale_at += 0", "the first block's row scales for all"),
    many(
        "if rows > 0:\n            sum0",
        "if rows >= 0:\n            sum0",
        "an empty half is computed",
        MANY,
        equivalent="Its mask is empty: nothing is stored.",
    ),
    many("if rows > 0:\n            up0", "if rows > 1:\n            up0", "a 65th row is left out in GEMM1"),
    many(
        "= tile.rows - WG * CHUNK, tile.first_row + WG * CHUNK, tile.n, tile.expert",
        "= tile.rows, tile.first_row + WG * CHUNK, tile.n, tile.expert",
        "rows behind the tile's are stored",
    ),
    many("(BLOCK_M + BLOCK_N) * 128", "BLOCK_N * 128", "the rows' bytes are not waited for"),
    many("return Signals(CHUNK.value,", "return Signals(BLOCK_M.value,", "half of the signals are enough", LATE),
    many(
        "tile_counter_ptr + first_column // COLUMNS",
        "tile_counter_ptr",
        "two chunks draw their tiles from one counter",
        CHUNKS,
    ),
    many("row.to(gl.int64) * p.stride_scale_t", "row * p.stride_scale_t", "scales by 32 bits", WIDE),
    many("x_row.to(gl.int64) * p.STRIDE_HIDDEN", "x_row * p.STRIDE_HIDDEN", "GEMM1's rows by 32 bits", WIDE),
    many("tile.expert.to(gl.int64) * p.num_tokens", "tile.expert * p.num_tokens", "tokens' numbers by 32 bits", WIDE),
    many(
        "(first_row + slot).to(gl.int64)[:, None] * p.INTERMEDIATE",
        "(first_row + slot)[:, None] * p.INTERMEDIATE",
        "activation by 32 bits",
        WIDE,
    ),
    many(
        "(first_row + slot).to(gl.int64)[:, None] * p.COLUMNS",
        "(first_row + slot)[:, None] * p.COLUMNS",
        "result by 32 bits",
        WIDE,
    ),
    many("block.to(gl.int64) * p.max_rows", "block * p.max_rows", "activation's scales by 32 bits", WIDE),
    many(
        "    # GEMM1 has to end before this kernel does: the next one may clear the counters of both.\n"
        "    wait_for_previous_kernel(PDL)\n",
        "",
        "GEMM2 may end before GEMM1: what it still counts with is somebody else's",
        TWICE,
    ),
    many("    wait_for_previous_kernel(PDL)\n    let_next", "    let_next", "GEMM1 doesn't wait for the routing"),
    many('fill_table(".cg")', 'fill_table("")', "old counts in GEMM2"),
    # What GEMM2 waits for
    completion(
        "    tl.debug_barrier()\n    tl.atomic_add(finished_ptr + expert",
        "    tl.atomic_add(finished_ptr + expert",
        "one thread signals before the others have stored",
    ),
    completion(
        'tl.atomic_add(finished_ptr + expert, 1, sem="release"',
        'tl.atomic_add(finished_ptr + expert, 1, sem="relaxed"',
        "an expert's signal publishes nothing",
    ),
    completion(
        'tl.atomic_add(finished_ptr + E, 1, sem="release"',
        'tl.atomic_add(finished_ptr + E, 1, sem="relaxed"',
        "the signal of all publishes nothing",
        LATE,
        equivalent="It follows the expert's by the same thread, and who sees it waits for the end of GEMM1.",
    ),
    completion(
        'tl.atomic_add(finished_ptr + at, 0, sem="acquire"',
        'tl.atomic_add(finished_ptr + at, 0, sem="relaxed"',
        "GEMM2 may see what was there before",
    ),
    completion("    tl.debug_barrier()\n    return", "    return", "a ticket is drawn before the stores are joined"),
    completion('1, sem="acq_rel"', '1, sem="relaxed"', "a ticket neither publishes nor acquires"),
    completion(">= tl.sum(", "> 0 * tl.sum(", "all are finished with the first signal"),
    completion(
        "seen(finished_ptr, at) < wanted", "seen(finished_ptr, at) < wanted - 1", "the last signal is not waited for"
    ),
    completion("FIRST_M * SIGNALS)\n", "FIRST_M * SIGNALS - SIGNALS)\n", "the last row tile is not waited for"),
    # GEMM2 of narrow experts
    narrow(
        "return WG * self.STAGES + step % self.STAGES", "return step % self.STAGES", "both consumers' stages in one"
    ),
    narrow("step += PAIRS * p.K_BLOCKS", "step += p.K_BLOCKS", "the producer's stages fall behind"),
    narrow("weight_row + wg * BLOCK_N", "weight_row", "both consumers have the same weights"),
    narrow("buffer * SCALES + pair * p.K_BLOCKS + block", "buffer * SCALES + block", "the first 128 columns' scales"),
    narrow("unit_empty.index(buffer), count=2", "unit_empty.index(buffer), count=1", "rows are loaded too soon"),
    narrow("(pair * 2 + WG) * BLOCK_N + gl", "pair * 2 * BLOCK_N + gl", "both consumers store the same columns"),
    # One token
    one_token(
        "(other[None, :] < choice[:, None])",
        "(other[None, :] <= choice[:, None])",
        "the first local expert is left out",
    ),
    one_token("((step // self.STAGES) & 1) ^ 1", "(step // self.STAGES) & 1", "a stage is filled before it is empty"),
    one_token("    mbarrier.arrive(ring.empty.index(stage), count=1)\n", "", "no stage is ever empty"),
    one_token(
        "its_row[:, None] == wanted[None, :]", "its_row[:, None] <= wanted[None, :]", "a row has the ones before it too"
    ),
    one_token("(first + (p.GATE if half else p.UP))", "(first + p.UP)", "the gate is the up half"),
    one_token(
        "scale_at + p.GATE // 128 * p.K_BLOCKS", "scale_at + p.UP // 128 * p.K_BLOCKS", "the gate has up's scales"
    ),
    one_token("(place < HALF)[:, None]", "(place >= 0)[:, None]", "the gate has up's factors"),
    one_token("place // BLOCKS, ROWS, ROWS)", "place // BLOCKS, 0, ROWS)", "up for the gate"),
    one_token("p.out_ptr + tile * ROWS", "p.out_ptr + tile % TILES * ROWS", "all experts' rows in the first one's"),
    one_token("x.index(window), product", "x.index(0), product", "the first experts' blocks for all"),
    one_token("number * p.EACH % p.BLOCKS + flat", "flat", "the first expert of a window for all of it"),
    one_token("flat % p.K_BLOCKS)[:, None]", "flat % p.EACH)[:, None]", "blocks by the places that they have"),
    one_token("scale * weight)", "scale)", "all choices weigh the same"),
    one_token("slot * chosen.count, p.SLOT", "slot, p.SLOT", "stages are filled twice"),
    one_token(
        "    wait_for_previous_kernel(PDL)\n    let_next_kernel_start(PDL)\n    choose(\n",
        "    let_next_kernel_start(PDL)\n    choose(\n",
        "the inputs are read before they are there",
        ("tests/test_emulated_kernels.py::test_the_inputs_are_there_just_before_the_call",),
    ),
    one_token("    wait_for_previous_kernel(p.PDL)\n", "", "GEMM2 doesn't wait for GEMM1"),
]
