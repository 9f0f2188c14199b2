"""Where kernels load and store in tensors of more than 2^31 elements, which the emulation need not hold.

One program of each kernel runs twice: where its rows or its token are among the first, and so far behind them that the
offsets don't fit into 32 bits. What it stores has to be the same, so much further on; an int32 that overflows raises.
"""

import dataclasses

import pytest
import torch
from emulated_calls import FEW, MANY, Given
from gluon_emulation import Huge, run_steps

from hybrid_moe import MoEProblem
from hybrid_moe.inputs import MoEInputs, RoutedInputs
from hybrid_moe.kernels import shapes
from hybrid_moe.kernels.launcher import DeviceLimits
from hybrid_moe.kernels.pipeline import Pipeline
from hybrid_moe.kernels.plan import LaunchKey

# Values repeat after 2^16 elements: both runs see the same.
PERIOD = 2**16
FAR = 9 * 2**20  # rows of the first expert
TOKENS = 2**28 + 2**20
ROWS = 3  # of the last expert, whose tile in the last columns is computed
PROBLEM = MoEProblem(
    num_experts=16, num_local_experts=9, top_k=1, n_group=1, topk_group=1, hidden_size=256, intermediate_size=9 * 128
)


@pytest.fixture(autouse=True)
def all_columns_at_once(monkeypatch):
    monkeypatch.setattr(shapes, "MAX_ROWS_BYTES", 2**62)


def key_of(kind):
    """Far apart are an expert's numbers of tokens, tokens' logits and scales, and the scales of a 128 block."""
    return LaunchKey(
        kind=kind,
        num_tokens=TOKENS,
        stride_routing=16,
        stride_weights=16 if kind is RoutedInputs else 1,
        dtype_routing=torch.float32 if kind is RoutedInputs else torch.bfloat16,
        stride_hidden=256,
        stride_scale_k=1,
        stride_scale_t=1024,
        row_alignment=1,
        aligned=True,
        output_aligned=True,
    )


def random(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) + 0.5).to(dtype)


def tensors(plan, far):
    """What the steps' names stand for, with as many rows before the last expert's and in front of its tokens."""
    elements = {name: (torch.Size(place.shape).numel(), place.dtype) for name, place in plan.arena.places.items()}
    elements |= {
        "hidden_states": (TOKENS * 256, torch.float8_e4m3fn),
        "hidden_states_scale": (TOKENS * 1024, torch.float32),
        "routing_logits": (TOKENS * 16, torch.float32),
        "topk_weights": (TOKENS * 16, torch.float32),
        "output": (TOKENS * 256, torch.bfloat16),
    }
    names = {
        name: Huge(count, random((PERIOD,), dtype, number))
        for number, (name, (count, dtype)) in enumerate(elements.items())
        if dtype != torch.int32
    }
    bias = torch.zeros(16, dtype=torch.bfloat16)
    bias[11] = 8  # chosen by all
    return names | {
        "routing_bias": bias,
        "topk_ids": Huge(TOKENS * 16, torch.tensor([11], dtype=torch.int32)),
        "slot_token": Huge(9 * TOKENS, far + torch.arange(PERIOD, dtype=torch.int32)),
        "pair": Huge(TOKENS, torch.tensor([2 * 9 + 8], dtype=torch.int32)),
        "gemm1_weights": random((9, 2 * 9 * 128, 256), torch.float8_e4m3fn, 2),
        "gemm1_weights_scale": random((9, 2 * 9, 2), torch.float32, 3),
        "gemm2_weights": random((9, 256, 9 * 128), torch.float8_e4m3fn, 4),
        "gemm2_weights_scale": random((9, 2, 9), torch.float32, 5),
        "tokens_per_expert": torch.tensor([far, *[0] * 7, ROWS], dtype=torch.int32),
        "finished": torch.full((10,), 2**30, dtype=torch.int32),  # GEMM1 is through
        "block_arrivals": torch.full((FAR // 3,), 3, dtype=torch.int32),  # those of the block's other tiles
        "gemm1_tile_counter": torch.zeros(1, dtype=torch.int32),
        "gemm2_tile_counter": torch.zeros(1, dtype=torch.int32),
        "local_expert_offset": 3,
        "routed_scaling_factor": 1.0,
    }


def stored(gemms, name, program, far, kind=RoutedInputs):
    """What a program of the kernel stores, by tensors; ``program`` gives its grid and its place in it."""
    plan = Pipeline(PROBLEM, Given(*gemms)).plan(key_of(kind), torch.device("cpu"), DeviceLimits(2, pdl=True))
    step = next(step for step in plan.steps if step.kernel.function.fn.__name__ == name)
    names = tensors(plan, far)
    grid, place = program(plan, step, far)
    run_steps([dataclasses.replace(step, grid=grid)], [names], only=[place])
    return {name: tensor.stored for name, tensor in names.items() if isinstance(tensor, Huge) and tensor.stored}


def shifted(results, by):
    return {name: {index + by[name]: value for index, value in found.items()} for name, found in results.items()}


def last_tile(rows, columns):
    """Of tiles of so many rows, so many of them beside one another."""

    def program(plan, step, far):
        count = (-(-far // rows) + 1) * columns
        return (count,), (count - 1,)

    return program


@pytest.mark.parametrize(
    ("gemms", "name", "rows", "columns"),
    [
        ((FEW, FEW), "hopper_few_gemm1_kernel", 32, 36),
        ((MANY, MANY), "hopper_gemm1_kernel", 128, 9),
        ((None, FEW), "gemm1_swiglu_kernel", None, None),
        ((None, MANY), "gemm1_swiglu_kernel", None, None),
    ],
    ids=["few", "many", "triton_few", "triton_many"],
)
def test_gemm1(gemms, name, rows, columns):
    if rows is None:
        tile = Given(*gemms).plan(PROBLEM, TOKENS).gemm1
        rows, columns = tile.block_m, 9 * 128 // tile.block_n
    near, far = (stored(gemms, name, last_tile(rows, columns), before) for before in (0, FAR))
    assert len(near["activated"]) == ROWS * 128 and len(near["activated_scale"]) == ROWS
    assert min(far["activated"]) > 2**31 and min(far["activated_scale"]) > 2**31
    assert far == shifted(near, {"activated": FAR * 9 * 128, "unquantized": FAR * 9 * 128, "activated_scale": FAR})


@pytest.mark.parametrize(
    ("gemms", "name", "rows", "columns"),
    [
        ((FEW, FEW), "hopper_few_gemm2_kernel", 32, 4),
        ((MANY, MANY), "hopper_gemm2_kernel", 128, 1),
        ((FEW, None), "gemm2_kernel", None, None),
        ((MANY, None), "gemm2_kernel", None, None),
    ],
    ids=["few", "many", "triton_few", "triton_many"],
)
def test_gemm2(gemms, name, rows, columns):
    if rows is None:
        tile = Given(*gemms).plan(PROBLEM, TOKENS).gemm2
        rows, columns = tile.block_m, 256 // tile.block_n
    near, far = (stored(gemms, name, last_tile(rows, columns), before) for before in (0, FAR))
    assert len(near["rows"]) == ROWS * 256 // columns
    assert min(far["rows"]) > 2**31
    assert far == shifted(near, {"rows": FAR * 256})


def token(number):
    def program(plan, step, far):
        return step.grid, (number, 0)[: len(step.grid)]

    return program


def test_combine():
    near, far = (stored((None, None), "combine_kernel", token(at), before) for at, before in ((5, 0), (2**28 + 5, FAR)))
    assert len(near["output"]) == 256
    assert far == shifted(near, {"output": 2**28 * 256})


@pytest.mark.parametrize("kind", [RoutedInputs, MoEInputs])
def test_routing(kind):
    name = "scatter_kernel" if kind is RoutedInputs else "route_kernel"
    near, far = (stored((None, None), name, token(at), 0, kind) for at in (5, 2**28 + 5))
    assert far["slot_token"] == {8 * TOKENS + ROWS: 2**28 + 5}
    for results in (near, far):
        del results["slot_token"]
    assert near["pair"] == {5: 9 * ROWS + 8}
    assert far == shifted(near, {"pair": 2**28, "pair_weight": 2**28})


def test_weights_by_pointer():
    """Those that TMA can't read: of the first expert and of the last, 2^31 elements behind it, with the same values."""
    problem = dataclasses.replace(PROBLEM, intermediate_size=2**19)
    key = key_of(RoutedInputs)._replace(num_tokens=ROWS, aligned=False)
    found = []
    for expert in (0, 8):
        plan = Pipeline(problem, Given(None, FEW)).plan(key, torch.device("cpu"), DeviceLimits(2, pdl=True))
        step = next(step for step in plan.steps if step.kernel.function.fn.__name__ == "gemm1_swiglu_kernel")
        names = tensors(plan, 0) | {
            "gemm1_weights": Huge(9 * 2**20 * 256, random((PERIOD,), torch.float8_e4m3fn, 2)),
            "gemm1_weights_scale": torch.ones(9, 2**13, 2),
            "tokens_per_expert": torch.tensor([ROWS if number == expert else 0 for number in range(9)]).int(),
        }
        run_steps([dataclasses.replace(step, grid=(2**19,))], [names], only=[(0,)])  # a program for each tile and more
        found.append(names["activated"].stored)
    assert len(found[0]) == ROWS * 128 and found[0] == found[1]
