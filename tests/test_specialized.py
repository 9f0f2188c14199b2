"""Which calls the warp-specialised kernels get. That they compile is in test_compile.py; a GPU says if they work."""

import dataclasses
import itertools

import pytest
import torch

from hybrid_moe.inputs import MoEInputs, RoutedInputs
from hybrid_moe.kernels import shapes
from hybrid_moe.kernels.grouped_gemm.tiles import TILES_99_KB, TILES_SM90, TILES_SM100, describe, tile_plan
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import DeviceLimits
from hybrid_moe.kernels.pipeline import Pipeline
from hybrid_moe.kernels.plan import LaunchKey
from hybrid_moe.kernels.shapes import column_chunk, max_local_rows
from hybrid_moe.measure.workloads import DEEPSEEK_V3, MODELS

FEW = ["hopper_few_gemm1_kernel", "hopper_few_gemm2_kernel"]
HOPPER = ["hopper_gemm1_kernel", "hopper_gemm2_kernel"]
TRITON = ["gemm1_swiglu_kernel", "gemm2_kernel"]
NARROW = "hopper_narrow_gemm2_kernel"
ONE_TOKEN = ["hopper_one_token_gemm1_kernel", "hopper_one_token_gemm2_kernel"]


def key_of(num_tokens, **changes):
    key = LaunchKey(
        kind=MoEInputs,
        num_tokens=num_tokens,
        stride_routing=256,
        stride_weights=1,
        dtype_routing=torch.bfloat16,
        stride_hidden=7168,
        stride_scale_k=num_tokens,
        stride_scale_t=1,
        row_alignment=1,
        aligned=True,
        output_aligned=True,
    )
    return key._replace(**changes)


def gemms(num_tokens, capability=(9, 0), problem=DEEPSEEK_V3, **changes):
    """Names of both GEMMs' kernels."""
    steps = TritonGroupedGemm(capability).steps(problem, DeviceLimits(132, pdl=True), key_of(num_tokens, **changes))
    names = dict.fromkeys(step.kernel.function.__name__ for step in steps)
    return [name for name in names if "gemm" in name]


def test_up_to_two_and_a_half_tokens_an_expert():
    for num_tokens in (2, 16, 17, 80):
        assert gemms(num_tokens) == FEW
    qwen = MODELS["qwen3-235b"]
    assert gemms(40, problem=qwen) == FEW


def test_experts_that_most_tokens_choose():
    """From 2.5 to 6.5 tokens an expert they have launches of their own, before the others'."""
    for num_tokens in (81, 128, 208):
        assert gemms(num_tokens) == [*HOPPER, *FEW]
    assert gemms(209) == HOPPER
    steps = TritonGroupedGemm((9, 0)).steps(DEEPSEEK_V3, DeviceLimits(132, pdl=True), key_of(128))
    shares = [step.operands[-2:] for step in steps if "gemm" in step.kernel.function.__name__]
    assert shares == [(96, 1)] * 2 + [(96, 0)] * 2
    counters = [{operand for operand in step.operands if str(operand).endswith("_many")} for step in steps]
    assert counters == [
        {"finished_many", "gemm1_tile_counter_many"},
        {"finished_many", "gemm2_tile_counter_many"},
        *[set()] * 3,
    ]
    places = Pipeline(DEEPSEEK_V3, TritonGroupedGemm((9, 0))).arena(128).places
    assert places["finished_many"].shape == (33,)
    assert gemms(128, aligned=False) == TRITON and gemms(128, stride_hidden=7168 + 8) == [TRITON[0], FEW[1]]
    qwen = MODELS["qwen3-235b"]
    assert gemms(41, problem=qwen) == [*HOPPER, *FEW] and gemms(105, problem=qwen) == HOPPER
    # A hidden size that GEMM2 for many rows can't take.
    assert gemms(128, problem=dataclasses.replace(DEEPSEEK_V3, hidden_size=7168 + 128)) == FEW


def test_from_more_than_six_and_a_half_tokens_an_expert_on():
    for num_tokens in (256, 901, 14107):
        assert gemms(num_tokens) == HOPPER
    assert gemms(313, problem=MODELS["kimi-k2"]) == HOPPER


def test_light_experts_are_spread_from_45_to_128_rows_an_expert():
    """If routing is even, and in both GEMMs."""
    for num_tokens, wanted in ((256, False), (1439, False), (1440, True), (4096, True), (4097, False)):
        steps = TritonGroupedGemm((9, 0)).steps(DEEPSEEK_V3, DeviceLimits(132, pdl=True), key_of(num_tokens))
        assert [step.constants.arguments["SPREAD"] for step in steps[:2]] == [wanted] * 2


@pytest.mark.parametrize("capability", [None, (8, 9), (10, 0), (10, 3), (12, 0)], ids=str)
def test_on_hopper_alone(capability):
    assert gemms(4096, capability) == gemms(16, capability) == gemms(1, capability) == TRITON


@pytest.mark.parametrize(
    ("capability", "table"),
    [
        (None, TILES_SM90),
        ((8, 9), TILES_99_KB),
        ((9, 0), TILES_SM90),
        ((10, 0), TILES_SM100),
        ((10, 3), TILES_SM100),
        ((12, 0), TILES_99_KB),
        ((12, 1), TILES_99_KB),
    ],
)
def test_each_architecture_has_its_own_tiles(capability, table):
    """On both sides of each bound."""
    for (bound, plan), (_, following) in itertools.pairwise(table):
        tokens = int(bound * DEEPSEEK_V3.num_experts / DEEPSEEK_V3.top_k)
        for num_tokens, wanted in ((tokens, plan), (tokens + 1, following)):
            found = tile_plan(DEEPSEEK_V3, num_tokens, capability)
            assert (found.gemm1, found.gemm2) == (wanted.gemm1, wanted.gemm2)


def test_what_they_cannot_read_goes_to_the_others():
    assert gemms(4096, aligned=False) == gemms(16, aligned=False) == TRITON
    # Rows that start at odd places: their tokens alone are gathered by pieces of 16 bytes.
    assert gemms(4096, stride_hidden=7168 + 8) == [TRITON[0], HOPPER[1]]
    assert gemms(4096, stride_hidden=2 * 7168) == HOPPER
    assert gemms(16, stride_hidden=7168 + 8) == [TRITON[0], FEW[1]]


def test_sizes_they_are_not_made_for():
    """A tile of many rows' GEMM2 has 256 columns; there is no other size that they can't take."""
    small = dataclasses.replace(DEEPSEEK_V3, hidden_size=512, intermediate_size=128)
    assert gemms(4096, problem=small) == HOPPER and gemms(16, problem=small) == [FEW[0], NARROW]
    assert gemms(4096, problem=dataclasses.replace(small, hidden_size=640)) == [HOPPER[0], TRITON[1]]
    assert gemms(16, problem=dataclasses.replace(small, hidden_size=128)) == [FEW[0], NARROW]


def test_narrow_experts():
    """Up to 512 columns, and from two tokens on; to 16 tokens for each expert, where others have 2.5."""
    narrow = MODELS["deepseek-v3-tp8"]
    for num_tokens in (2, 16, 256, 512):
        assert gemms(num_tokens, problem=narrow) == [FEW[0], NARROW]
    assert gemms(513, problem=narrow) == HOPPER
    assert gemms(16, problem=dataclasses.replace(narrow, intermediate_size=512)) == [FEW[0], NARROW]
    assert gemms(16, problem=dataclasses.replace(narrow, intermediate_size=640)) == FEW
    assert gemms(16, problem=narrow, aligned=False) == TRITON
    assert gemms(16, problem=narrow, stride_hidden=7168 + 8) == [TRITON[0], NARROW]


def test_one_token():
    """Two launches, whatever the layer; but for addresses and sizes that they can't read."""

    def kernels(problem, **changes):
        key = key_of(1, **changes)
        plan = Pipeline(problem, TritonGroupedGemm((9, 0))).plan(key, torch.device("cpu"), DeviceLimits(132, pdl=True))
        return [step.kernel.function.__name__ for step in plan.steps]

    for problem in MODELS.values():
        assert kernels(problem) == kernels(problem, kind=RoutedInputs) == ONE_TOKEN
        assert kernels(problem, stride_hidden=problem.hidden_size + 8) == ONE_TOKEN
        assert kernels(problem, aligned=False) == ["route_kernel", *TRITON, "combine_kernel"]
    other = dataclasses.replace(DEEPSEEK_V3, hidden_size=7168 + 512)
    assert kernels(other) == ["route_kernel", *FEW, "combine_kernel"]
    on_input = dataclasses.replace(DEEPSEEK_V3, top_k=1, n_group=1, topk_group=1, weight_on_input=True)
    assert kernels(on_input) == ["route_kernel", "weigh_kernel", *FEW, "combine_kernel"]
    # Its GEMM2 for few rows has hardly any.
    narrow = dataclasses.replace(other, intermediate_size=256)
    assert (
        kernels(dataclasses.replace(narrow, num_local_experts=256, num_shared_experts=1, hidden_size=7168)) == ONE_TOKEN
    )
    assert kernels(narrow) == ["route_kernel", FEW[0], TRITON[1], "combine_kernel"]


def test_every_kernel_has_a_name_for_people():
    assert describe(DEEPSEEK_V3, 128, (9, 0)).startswith(
        "GEMM1 sm90/few_rows.py, GEMM2 sm90/few_rows.py, "
        "sm90/many_rows.py for experts that more than 75% of the tokens choose, for "
    )
    narrow = MODELS["deepseek-v3-tp8"]
    assert describe(narrow, 1, (9, 0)) == "both GEMMs sm90/one_token.py, for one token"
    assert describe(narrow, 16, (9, 0)).startswith("GEMM1 sm90/few_rows.py, GEMM2 sm90/narrow.py, ")
    assert describe(narrow, 4096, (9, 0)).startswith("GEMM1 sm90/many_rows.py, GEMM2 sm90/many_rows.py, ")
    undivided = dataclasses.replace(narrow, hidden_size=640)
    assert describe(undivided, 4096, (9, 0)).startswith("GEMM1 sm90/many_rows.py, GEMM2 triton/gemm2.py, ")


@pytest.mark.parametrize("num_tokens, unit_n", [(2, 128), (16, 128), (17, 256), (512, 256)])
def test_units_of_narrow_experts(num_tokens, unit_n):
    """With few rows, units are half as wide: there are twice as many for the programs."""
    narrow = MODELS["deepseek-v3-tp8"]
    _, second, _ = TritonGroupedGemm((9, 0)).steps(narrow, DeviceLimits(132, pdl=True), key_of(num_tokens))
    assert second.constants.arguments["UNIT_N"] == unit_n
    assert second.grid[0] <= 264


def test_a_tile_counter_for_each_launch():
    """GEMM1's, and GEMM2's for each chunk of columns, by its number: two would draw the same tiles from one."""
    gemm, num_tokens = TritonGroupedGemm((9, 0)), 20000
    columns = column_chunk(DEEPSEEK_V3, max_local_rows(DEEPSEEK_V3, num_tokens))
    assert columns == DEEPSEEK_V3.hidden_size // 2
    steps = gemm.steps(DEEPSEEK_V3, DeviceLimits(132, pdl=True), key_of(num_tokens))
    counters = [operand for step in steps for operand in step.operands if str(operand).endswith("tile_counter")]
    assert counters == ["gemm1_tile_counter", "gemm2_tile_counter", "gemm2_tile_counter"]
    assert [step.operands[-4] for step in steps if "gemm2_tile_counter" in step.operands] == [0, columns]
    places = Pipeline(DEEPSEEK_V3, gemm).arena(num_tokens).places
    assert (places["gemm1_tile_counter"].shape, places["gemm2_tile_counter"].shape) == ((1,), (2,))


@pytest.mark.parametrize("num_tokens, row_tiles", [(2, 16), (4, 32), (80, 32 + (640 - 32) // 32)])
def test_counters_of_few_rows(num_tokens, row_tiles):
    """Tiles are drawn by one for each launch, and GEMM1 quantises by one for each row tile's 128 block."""
    gemm = TritonGroupedGemm((9, 0))
    first, second, _ = gemm.steps(DEEPSEEK_V3, DeviceLimits(132, pdl=True), key_of(num_tokens))
    assert {"gemm1_tile_counter", "block_arrivals"} <= {*first.operands}
    assert "gemm2_tile_counter" in second.operands and "block_arrivals" not in second.operands
    places = Pipeline(DEEPSEEK_V3, gemm).arena(num_tokens).places
    assert places["block_arrivals"].shape[0] >= row_tiles * 16
    assert places["unquantized"].shape == (8 * num_tokens, 2048)


@pytest.mark.parametrize("num_tokens", [16, 80, 200, 901])
def test_gemm2_wants_the_signals_that_gemm1_gives(num_tokens):
    """Rows of a tile, and what a tile's 128 block signals: each consumer of `sm90.many_rows` does for its rows."""
    for problem, changes in itertools.product(
        (DEEPSEEK_V3, MODELS["deepseek-v3-tp8"]), ({}, {"stride_hidden": 7168 + 8}, {"aligned": False})
    ):
        key = key_of(num_tokens, **changes)
        *_, first, second, _ = TritonGroupedGemm((9, 0)).steps(problem, DeviceLimits(132, pdl=True), key)
        name, constants = first.kernel.function.__name__, first.constants.arguments
        rows = constants.get("ROWS") or (64 if name == HOPPER[0] else constants["BLOCK_M"])
        blocks = problem.intermediate_size // 128
        wanted = second.constants.arguments
        assert (wanted["FIRST_M"], wanted["SIGNALS"]) == (rows, blocks)


@pytest.mark.parametrize("blocks", [1, 2, 5, 6, 7, 56])
def test_chunks_have_whole_blocks_and_leave_no_column_out(blocks):
    problem = dataclasses.replace(DEEPSEEK_V3, hidden_size=128 * blocks)
    for rows in (1, 2**20, 2**22, 3 * 2**22, 2**24, 2**26):
        columns = column_chunk(problem, rows)
        assert columns % 128 == 0 and problem.hidden_size % columns == 0
        assert columns == 128 or rows * columns * 2 <= shapes.MAX_ROWS_BYTES


def test_chunks_that_tiles_of_256_columns_do_not_divide(monkeypatch):
    monkeypatch.setattr(shapes, "MAX_ROWS_BYTES", 1)
    assert gemms(4096) == [HOPPER[0], TRITON[1]]
