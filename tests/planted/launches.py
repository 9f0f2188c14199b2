"""Bugs in the launches: plans, steps, the arena, launches by address, tiles."""

from mutations import Mutation

EMULATED = ("tests/test_emulated_kernels.py",)
DIRECT = ("tests/test_direct.py",)
LAYOUT = ("tests/test_arena.py",)
SPECIALIZED = ("tests/test_specialized.py",)
KERNELS = (
    "tests/test_kernels.py::test_problems",
    "tests/test_kernels.py::test_token_counts",
    "tests/test_kernels.py::test_the_routing_of_other_models",
)
CHUNKS = ("tests/test_emulated_kernels.py::test_chunks_of_columns", "tests/test_kernels.py::test_columns_in_pieces")
ODD = (
    "tests/test_contract.py::TestTriton::test_tensors_at_odd_addresses",
    "tests/test_contract.py::TestTriton::test_strides",
    *SPECIALIZED,
)


def planted(file: str, default: tuple[str, ...]):
    def plant(old: str, new: str, wrong: str, tests: tuple[str, ...] = default, equivalent: str = "") -> Mutation:
        return Mutation(f"kernels/{file}.py", old, new, wrong, tests, equivalent)

    return plant


routing, shapes, combine = planted("routing", KERNELS), planted("shapes", EMULATED), planted("combine", KERNELS)
pipeline, arena, steps = planted("pipeline", KERNELS), planted("arena", LAYOUT), planted("steps", KERNELS)
plan, direct, launcher = planted("plan", DIRECT), planted("direct", DIRECT), planted("launcher", DIRECT)
provider, tiles = planted("grouped_gemm/triton/provider", SPECIALIZED), planted("grouped_gemm/tiles", SPECIALIZED)
gemm1, gemm2 = planted("grouped_gemm/triton/gemm1", KERNELS), planted("grouped_gemm/triton/gemm2", KERNELS)
few, many = planted("grouped_gemm/sm90/few_rows", SPECIALIZED), planted("grouped_gemm/sm90/many_rows", SPECIALIZED)
sm90, narrow = planted("grouped_gemm/sm90/common", EMULATED), planted("grouped_gemm/sm90/narrow", SPECIALIZED)
one_token = planted("grouped_gemm/sm90/one_token", SPECIALIZED)

MUTATIONS = [
    # The routing and its memory
    routing("return [step] if alone else [clear, step]", "return [step]", "counters are not cleared", EMULATED),
    routing(
        "alone = key.num_tokens == 1", "alone = key.num_tokens <= 2", "two tokens clear one another's counts", EMULATED
    ),
    routing(
        'counters = arena.places["counters"].shape[0]',
        "counters = problem.num_local_experts",
        "only the counts are cleared",
        ("tests/test_kernels.py::test_token_counts",),
    ),
    routing("(*key.kind._fields[:2], *results", "(*key.kind._fields[1::-1], *results", "logits and bias swapped"),
    routing("length += (numbers + 3) // 4 * 4", "length += numbers", "counters that don't start at 16 bytes", LAYOUT),
    routing("length += (numbers + 3) // 4 * 4", "length += numbers // 4 * 4", "counters over one another", LAYOUT),
    routing(
        'arena.reserve("counters", (length,), torch.int32)',
        'arena.reserve("counters", (length - 4,), torch.int32)',
        "the last counters lie past those that are cleared",
        LAYOUT,
    ),
    routing('"SOFTMAX": problem.softmax', '"SOFTMAX": False', "softmax routing is the other"),
    routing(
        '"RENORMALIZE": problem.renormalize',
        '"RENORMALIZE": True',
        "weights that are to stay as they are",
        ("tests/test_kernels.py::test_problems", "tests/test_kernels.py::test_a_bias_in_float32"),
    ),
    routing('"TOPK_GROUP": problem.topk_group', '"TOPK_GROUP": problem.n_group', "all groups are kept"),
    shapes(
        "return num_tokens * problem.max_local_rows_per_token",
        "return num_tokens * problem.max_local_rows_per_token // 2",
        "half of the rows have no room",
        EMULATED,
    ),
    shapes(
        "min(active + (rows - active) // block_m,",
        "min(-(-rows // block_m),",
        "too few counters for row tiles",
        ("tests/test_specialized.py", *EMULATED),
    ),
    shapes("blocks % chunks == 0 and rows", "rows", "chunks that leave columns out", SPECIALIZED),
    shapes(
        "rows * (problem.hidden_size // chunks) * 2 <= MAX_ROWS_BYTES",
        "rows * (problem.hidden_size // chunks) <= MAX_ROWS_BYTES",
        "chunks of twice the bytes",
        ("tests/test_specialized.py", "tests/test_arena.py"),
    ),
    combine("first_column // problem.block)", "first_column)", "the combine stores past the output", CHUNKS),
    combine("1024, columns & -columns)", "1024, columns)", "blocks that don't divide the columns"),
    combine(
        "grid = (tokens, -(-blocks // blocks_each))", "grid = (tokens, blocks // blocks_each)", "columns are left out"
    ),
    combine(
        "branch = tokens >= BRANCH_TOKENS",
        "branch = tokens < BRANCH_TOKENS",
        "the other of two ways",
        ("tests/test_kernels.py::test_problems",),
        equivalent="Both give the same bits; which is faster is for measurements.",
    ),
    pipeline(
        "memory.numel() < plan.arena.bytes",
        "memory.numel() < 0",
        "too little memory is taken as enough",
        ("tests/test_kernels.py::test_too_little_memory",),
    ),
    # Keys, plans and launches by address
    plan(
        "reduce(operator.or_, addresses) % 16 == 0",
        "reduce(operator.and_, addresses) % 16 == 0",
        "one aligned tensor is enough",
        (*ODD, *DIRECT),
    ),
    plan("output.data_ptr() % 16 == 0,", "True,", "the output is always aligned", DIRECT),
    plan(
        "first.stride()[0],\n                second.stride()[0],",
        "second.stride()[0],\n                first.stride()[0],",
        "strides of the routing's inputs swapped",
        ("tests/test_contract.py::TestTriton::test_strides", "tests/test_routed.py"),
    ),
    plan("                second.dtype,\n", "                hidden.dtype,\n", "a float32 bias is read as bfloat16"),
    plan(
        "stride_scale_k, stride_scale_t = inputs[3].stride()",
        "stride_scale_t, stride_scale_k = inputs[3].stride()",
        "strides of the scales swapped",
        ("tests/test_kernels.py::test_problems",),
    ),
    plan(
        "if addressed is not None and not direct.is_hooked()", "if addressed is not None", "a profiler sees no launch"
    ),
    plan(
        "self._aligned = key.aligned and key.output_aligned",
        "self._aligned = key.aligned",
        "launches by address to an output that isn't aligned",
        DIRECT,
    ),
    plan(
        "*[memory + offset for offset in self._offsets],",
        "*[memory for offset in self._offsets],",
        "all intermediate tensors at one place",
    ),
    plan(
        "(arguments[-1], encode, self._at[operand.name])", "(arguments[-1], encode, 4)", "descriptors of another tensor"
    ),
    plan(
        "arguments += map(self._number, numbers)",
        "arguments += map(self._number, numbers[::-1])",
        "a descriptor's shape and strides in the other order",
    ),
    plan(
        "descriptors += 1\n",
        "descriptors += 0\n",
        "the second descriptor is the first",
        equivalent="The one kernel that has two has them alike, in boxes of 128 by 128.",
    ),
    plan(
        "                first = end\n",
        "",
        "kernels before a library's are launched again after it",
        DIRECT,
    ),
    plan(
        "self.libraries.append((len(self.launchers), step))",
        "self.libraries.append((0, step))",
        "libraries come before all kernels",
        DIRECT,
    ),
    direct("head = (*grid, 1, 1)[:3]", "head = (1, *grid, 1)[:3]", "the grid's dimensions swapped"),
    direct(
        "run.launch_cooperative_grid, run.launch_pdl)", "run.launch_cooperative_grid, False)", "kernels don't overlap"
    ),
    direct(
        "    if launch is None:\n        return None\n",
        "",
        "a kernel that only Triton can launch is launched by address",
    ),
    direct(
        "return not (_is_silent(runtime.launch_enter_hook) and",
        "return not (_is_silent(runtime.launch_enter_hook) or",
        "one of two hooks is not seen",
    ),
    direct("(*tiles.shape, *tiles.strides)", "(*tiles.strides, *tiles.shape)", "a descriptor's shape for its strides"),
    direct(
        "if run.global_scratch_size or run.profile_scratch_size",
        "if run.profile_scratch_size",
        "a kernel without the memory that it wants",
    ),
    launcher(
        "if aligned and isinstance(compiled, CompiledKernel)",
        "if isinstance(compiled, CompiledKernel)",
        "what is compiled for odd addresses is kept for all",
    ),
    launcher(
        "self._compiled[constants, device.index] = compiled",
        "self._compiled[constants, None] = compiled",
        "kernels of one device for another",
    ),
    arena("self.bytes = -(-end // ALIGNMENT) * ALIGNMENT", "self.bytes = end", "tensors that don't start at 256 bytes"),
    arena(
        "end = self.bytes + self.places[name].bytes",
        "end = self.bytes + self.places[name].bytes // 2",
        "tensors over one another",
    ),
    steps(
        "return self.rows * self.inner, self.inner, 1",
        "return self.rows * self.inner, self.rows, 1",
        "a descriptor's rows apart by the other length",
        ("tests/test_kernels.py::test_problems",),
    ),
    sm90(
        "return self.matrices * self.rows, self.inner",
        "return self.rows, self.inner",
        "the first expert's weights alone",
    ),
    sm90('"E_POW2": max(32, pow2(problem.num_local_experts))', '"E_POW2": 32', "experts past the 32nd", EMULATED),
    # Which kernels and tiles
    provider("if key.stride_hidden % 16:", "if key.stride_hidden % 8:", "rows at odd places by 16 bytes"),
    provider(
        "plan.specialized if key.aligned else (None, None)", "plan.specialized", "specialised kernels for odd addresses"
    ),
    provider("many_rows.signals(problem)", "few_rows.signals(problem)", "signals of the other kernel"),
    provider("and columns % many_rows.COLUMNS == 0", "", "chunks of 128 columns by tiles of 256"),
    provider(
        "arrivals = max(arrivals, few_rows.block_arrivals(problem, num_tokens))",
        "pass",
        "too few counters for narrow tiles",
        (*SPECIALIZED, *EMULATED),
    ),
    provider(
        'counters["gemm2_tile_counter"] = problem.hidden_size // chunk',
        'counters["gemm2_tile_counter"] = 1',
        "one counter for all chunks",
        (*SPECIALIZED, *CHUNKS),
    ),
    gemm1(
        "if tile.block_n == problem.block:\n        return 0",
        "if True:\n        return 0",
        "no counters for narrow tiles",
        (*EMULATED, *KERNELS),
    ),
    gemm1(
        "rows if tile.block_n < problem.block else 0",
        "0",
        "no room for what isn't quantised yet",
        (*EMULATED, *KERNELS),
    ),
    gemm1(
        "2, 1 + tile.fused, tile.block_n", "2, 1, tile.block_n", "one half of the weights where one product wants both"
    ),
    gemm1(
        "return Signals(tile.block_m, problem",
        "return Signals(2 * tile.block_m, problem",
        "GEMM2 waits for too few signals",
        (*SPECIALIZED, *EMULATED),
    ),
    gemm2(
        "block_n = tile.block_n if columns % tile.block_n == 0 else problem.block",
        "block_n = tile.block_n",
        "a chunk's columns are no multiple of the tile's",
        CHUNKS,
    ),
    gemm2(
        "box_rows = block_n if tile.fused else block_n // 2",
        "box_rows = block_n // 2",
        "half of a joined tile's weights",
    ),
    tiles("if tokens_per_expert <= bound)", "if tokens_per_expert < bound)", "the tiles of the table's next row"),
    tiles(
        "capability[0] >= 10:",
        "capability[0] > 10:",
        "Hopper's tiles on Blackwell",
        SPECIALIZED,
    ),
    tiles(
        "if capability == (9, 0) else (None, None)",
        "if capability else (None, None)",
        "specialised kernels elsewhere",
        equivalent="The tables of other GPUs name none.",
    ),
    tiles("(16.0, replace", "(2.5, replace", "plain Triton for narrow experts with a few rows"),
    tiles("second is Specialized.NARROW and num_tokens == 1", "False", "fewer units than programs for one token"),
    one_token(
        "== 0\n    return num_tokens",
        ">= 0\n    return num_tokens",
        "one token's kernels for sizes that they can't read",
    ),
    one_token(" and not problem.weight_on_input", "", "one token's weights on the output in any case"),
    tiles("if inner // block % u == 0", "if True", "unrolling that doesn't divide a sum", KERNELS),
    many(
        "return problem.hidden_size % COLUMNS == 0",
        "return True",
        "GEMM2 with columns that its tiles don't divide",
    ),
    narrow("<= MAX_INTERMEDIATE", "< MAX_INTERMEDIATE", "sums as long as its stages elsewhere"),
    narrow("max_local_rows(problem, key.num_tokens) > NARROW_UNIT_ROWS", "True", "wide units for few rows"),
]
