"""The pipeline for Hopper on the CPU, in `gluon_emulation`: what its kernels compute, in whatever order things happen.

Each run is one interleaving by its seed, of kernels that overlap as programmatic dependent launch lets them.
"""

import dataclasses

import gluon_emulation
import pytest
import torch
import triton
import triton.language as tl
from emulated_calls import FEW, MANY, NARROW, SMALL, Call, Given, given_rows
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybrid_moe.kernels import external, shapes
from hybrid_moe.kernels.grouped_gemm.sm90 import many_rows
from hybrid_moe.kernels.grouped_gemm.sm90.share import BUSY_ROWS
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import DeviceLimits
from hybrid_moe.kernels.plan import LaunchKey, addresses_of, by_name
from hybrid_moe.kernels.routing import clear_kernel
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.reference import dequantize_rows, route

FEW_KERNELS = ["hopper_few_gemm1_kernel", "hopper_few_gemm2_kernel"]
MANY_KERNELS = ["hopper_gemm1_kernel", "hopper_gemm2_kernel"]
NARROW_KERNELS = ["hopper_few_gemm1_kernel", "hopper_narrow_gemm2_kernel"]
ONE_TOKEN_KERNELS = ["hopper_one_token_gemm1_kernel", "hopper_one_token_gemm2_kernel"]
# Rows of each expert: tiles of the kernels for few rows have 32 and, with no more than 16, 16; of those for many 128
# in two halves, the lower of which is left out if empty.
ROWS_FEW = {
    "one row each": [1, 1, 1, 1],
    "a tile's edges": [15, 16, 17, 0],
    "two tiles": [33, 0, 32, 5],
    "one expert has all": [0, 0, 70, 0],
    "none": [0, 0, 0, 0],
}
ROWS_MANY = {
    "one row": [0, 1, 0, 0],
    "a half's edges": [63, 64, 65, 3],
    "a tile's edges": [127, 128, 129, 0],
    "one expert has all": [0, 0, 150, 0],
    "none": [0, 0, 0, 0],
}


@pytest.mark.parametrize("gate_first", [False, True], ids=["up_first", "gate_first"])
@pytest.mark.parametrize("name", ROWS_FEW)
def test_few_rows(name, gate_first):
    problem = dataclasses.replace(SMALL, gate_first=gate_first)
    rows = ROWS_FEW[name]
    call = Call(problem, given_rows(problem, rows, max(*rows, 7)), Given(FEW, FEW))
    assert call.kernels[2:4] == FEW_KERNELS
    call.run(seed=len(name), stages=2)


@pytest.mark.parametrize("gate_first", [False, True], ids=["up_first", "gate_first"])
@pytest.mark.parametrize("name", ROWS_MANY)
def test_many_rows(name, gate_first):
    problem = dataclasses.replace(SMALL, gate_first=gate_first)
    rows = ROWS_MANY[name]
    call = Call(problem, given_rows(problem, rows, max(*rows, 7)), Given(MANY, MANY))
    assert call.kernels[2:4] == MANY_KERNELS
    call.run(seed=len(name), stages=2)


@pytest.mark.parametrize("rows", [[129, 3, 260, 5], [5, 0, 140, 7], [0, 129, 0, 140], [3, 128, 0, 1]], ids=str)
def test_light_experts_among_others(rows, monkeypatch):
    """Each tile is some program's, whichever kind there are fewer of."""
    monkeypatch.setattr(many_rows, "SPREAD_ROWS", (0, 1000))
    problem = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=256)
    Call(problem, given_rows(problem, rows), Given(MANY, MANY), num_sms=3).run(seed=len(rows), stages=2)


@pytest.mark.parametrize("intermediate", [128, 256, 384])
@pytest.mark.parametrize("name", ROWS_FEW)
def test_narrow_experts(name, intermediate):
    """GEMM2 alone: with as many stages as a tile has blocks, and behind either GEMM1."""
    problem = dataclasses.replace(SMALL, intermediate_size=intermediate)
    rows = ROWS_FEW[name]
    inputs = given_rows(problem, rows, max(*rows, 7))
    for first, stages in ((FEW, 2), (FEW, 4), (MANY, 4)):
        call = Call(problem, inputs, Given(first, NARROW))
        assert call.kernels[3] == NARROW_KERNELS[1]
        call.run(seed=len(name), stages=stages)


@pytest.mark.parametrize("rows", [[0, 150, 0, 0], [64, 0, 65, 1], [0, 0, 0, 257], [0, 0, 0, 0]], ids=str)
def test_tiles_of_half_the_rows(rows):
    """With as many programs, tiles of 64 rows are one for each at most."""
    problem = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=256)
    for seed in range(2):
        Call(problem, given_rows(problem, rows, max(*rows, 7)), Given(MANY, MANY), num_sms=20).run(seed, stages=2)


@pytest.mark.parametrize("second", [FEW, NARROW])
@pytest.mark.parametrize(
    "rows", [[80, 3, 0, 70], [72, 17, 72, 0], [72, 17, 71, 0], [0, 150, 0, 0], [0, 70, 0, 0], [0, 0, 0, 0]], ids=str
)
def test_experts_by_their_rows(rows, second):
    """Those that more than half of the tokens choose, if they have rows enough, take the kernels for many."""
    call = Call(SMALL, given_rows(SMALL, rows, max(*rows, 7)), Given(FEW, second, many_above=0.5))
    kernels = FEW_KERNELS if second is FEW else NARROW_KERNELS
    assert call.kernels[2:] == [*MANY_KERNELS, *kernels, "combine_kernel"]
    busy = sum(count for count in rows if count > max(*rows, 7) // 2)
    busy = busy if busy >= BUSY_ROWS.value else 0
    for seed in range(2):
        call.run(seed, stages=2)
        # Each tile is followed by a draw: neither launch computes the other's.
        drawn = [bool(call.operands()[f"gemm1_tile_counter{suffix}"]) for suffix in ("_many", "")]
        assert drawn == [busy > 0, sum(rows) > busy]


@pytest.mark.parametrize(
    ("tokens", "kernels", "size"),
    [
        (1, ONE_TOKEN_KERNELS, 1024),
        (2, ["clear_kernel", "route_kernel", *FEW_KERNELS, "combine_kernel"], 1024),
        (4, ["clear_kernel", "route_kernel", *FEW_KERNELS, "combine_kernel"], 1024),
        (12, ["clear_kernel", "route_kernel", *NARROW_KERNELS, "combine_kernel"], 512),
        (65, ["clear_kernel", "route_kernel", *MANY_KERNELS, "combine_kernel"], 512),
    ],
)
def test_as_serving_has_them(tokens, kernels, size):
    """All stages, the plan's own choice, and the routing from logits."""
    problem = dataclasses.replace(SMALL, n_group=4, topk_group=2, hidden_size=size, intermediate_size=size)
    inputs = make_inputs(Workload(tokens, 4), problem, random_weights(problem, "cpu"))
    call = Call(problem, inputs, TritonGroupedGemm((9, 0)))
    assert call.kernels == kernels
    call.run()


@pytest.mark.parametrize("tokens", [1, 12])
def test_weights_on_the_input(tokens):
    problem = dataclasses.replace(SMALL, top_k=1, routing_method="sigmoid_no_renorm", weight_on_input=True)
    call = Call(problem, make_inputs(Workload(tokens, 4), problem, random_weights(problem, "cpu")), Given(FEW, NARROW))
    assert call.kernels[-4:] == ["weigh_kernel", *NARROW_KERNELS, "combine_kernel"]
    for seed in range(2):
        call.run(seed, stages=2)


@pytest.mark.parametrize("gemms", [(FEW, FEW), (MANY, MANY)], ids=str)
def test_one_token(gemms):
    """One kernel clears and routes."""
    call = Call(SMALL, given_rows(SMALL, [1, 0, 1, 1]), Given(*gemms))
    assert call.kernels[0] == "scatter_kernel"
    call.run(stages=2)


@pytest.mark.parametrize(
    ("intermediate", "rows", "gate_first"),
    [
        (128, [1, 0, 1, 1], False),  # a block, of eight that a product has columns for
        (384, [1, 1, 0, 1], True),  # slots of 64 rows that aren't full
        (512, [1, 1, 1, 1], False),  # slots of 128 rows
        (1408, [0, 1, 1, 0], False),  # more blocks than eight, several slots of each expert
        (128, [0, 0, 0, 0], True),
    ],
    ids=str,
)
def test_one_token_by_a_stream_of_weights(intermediate, rows, gate_first):
    """Two kernels, which route."""
    problem = dataclasses.replace(SMALL, hidden_size=1024, intermediate_size=intermediate, gate_first=gate_first)
    call = Call(problem, given_rows(problem, rows, 1), TritonGroupedGemm((9, 0)))
    assert call.kernels == ONE_TOKEN_KERNELS
    for seed, stages in ((0, 2), (1, None)):
        call.run(seed, stages=stages)


def test_one_token_with_a_shared_expert():
    problem = dataclasses.replace(
        SMALL, n_group=4, topk_group=2, num_local_experts=16, num_shared_experts=1, hidden_size=1024
    )
    inputs = make_inputs(Workload(1), problem, random_weights(problem, "cpu"))
    call = Call(problem, inputs, TritonGroupedGemm((9, 0)))
    assert call.kernels == ONE_TOKEN_KERNELS
    call.run()


@pytest.mark.parametrize(
    ("gemms", "columns"),
    [
        *((gemms, 256) for gemms in ((FEW, FEW), (MANY, MANY), (FEW, NARROW), (None, MANY), (None, None))),
        # Tiles of 256 columns give way.
        ((None, None), 128),
    ],
    ids=str,
)
def test_chunks_of_columns(gemms, columns, monkeypatch):
    """Each chunk has its own GEMM2 and combine, which reuse the memory of the one before."""
    monkeypatch.setattr(shapes, "MAX_ROWS_BYTES", 4 * 40 * columns * 2)
    call = Call(SMALL, given_rows(SMALL, [40, 3, 0, 20]), Given(*gemms))
    assert len(call.kernels) == 3 + 2 * (512 // columns)
    call.run(stages=2)


@pytest.mark.parametrize("gemms", [(FEW, FEW), (MANY, MANY)], ids=["few", "many"])
def test_more_experts_than_a_warp_has_lanes(gemms):
    problem = dataclasses.replace(
        SMALL, num_experts=48, num_local_experts=40, top_k=40, hidden_size=256, intermediate_size=256
    )
    rows = [0] * 40
    rows[0], rows[31], rows[32], rows[39] = 1, 3, 5, 2
    Call(problem, given_rows(problem, rows), Given(*gemms)).run(stages=2)


def test_the_combine_reads_no_column_past_the_last():
    """Three blocks of columns in the place of four, and as many rows as there can be."""
    problem = dataclasses.replace(SMALL, top_k=4, hidden_size=384, intermediate_size=128)
    call = Call(problem, given_rows(problem, [24] * 4), Given(None, None))
    assert call.plan.steps[-1].constants.arguments["BLOCKS"] == 4
    call.run(stages=2)


def test_bits_do_not_hang_on_the_order():
    """Slots, tiles and signals come in another order each time; no sum does."""
    inputs = given_rows(SMALL, [20, 3, 0, 33])
    for gemms in ((FEW, FEW), (MANY, MANY), (FEW, NARROW), (FEW, FEW, 0.5), (None, None)):
        outputs = [Call(SMALL, inputs, Given(*gemms)).run(seed, stages=2) for seed in range(3)]
        assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    "gemms", [(FEW, FEW), (MANY, MANY), (FEW, NARROW), (FEW, FEW, 0.5), (None, MANY), (None, None)], ids=str
)
def test_calls_one_after_another_share_their_memory(gemms):
    """The second clears what the first counts with: not before the first is through with it."""
    calls = [
        Call(SMALL, given_rows(SMALL, rows, 33, seed=7), Given(*gemms)) for rows in ([33, 1, 0, 5], [0, 17, 33, 2])
    ]
    operands = [call.operands(calls[0].memory) for call in calls]
    gluon_emulation.run_steps(calls[0].steps(2), operands, seed=3)
    for call in calls:
        call.checked()


@triton.jit
def next_owner_kernel(counters_ptr, ELEMENTS: tl.constexpr):
    gdc_wait()
    place = tl.arange(0, ELEMENTS)
    tl.store(counters_ptr + place, tl.full((ELEMENTS,), -7, tl.int32))


@pytest.mark.parametrize(
    "gemms",
    [(FEW, FEW), (MANY, MANY), (FEW, NARROW), (FEW, FEW, 0.5), (None, FEW), (None, MANY), (None, None)],
    ids=str,
)
def test_memory_is_free_when_the_call_ends(gemms):
    """What comes after the combine waits for that alone, and may have the call's memory for something else.

    As late as possible are what GEMM2 need not wait for: GEMM1's last draws, its signals of all experts, its ends.
    """
    late = ("finished_ptr[4]", "counter_ptr", "end")
    call = Call(SMALL, given_rows(SMALL, [20, 3, 0, 33]), Given(*gemms))
    operands = call.operands()
    counters = operands["counters"]
    owner = (next_owner_kernel, (1,), dict(counters_ptr=counters, ELEMENTS=len(counters)), 1)
    gluon_emulation.launch(
        [*gluon_emulation.launches(call.steps(2), operands), owner],
        delay=lambda event, task: any(each in event for each in late) and "gemm1" in task.program.kernel.name,
    )
    call.checked()
    assert (counters == -7).all()


@pytest.mark.parametrize(
    ("gemms", "what"),
    [
        *((gemms, what) for gemms in ((FEW, FEW), (MANY, MANY)) for what in ("atomic", "copy", "arrive", "start")),
        *((gemms, what) for gemms in ((None, MANY), (None, None)) for what in ("atomic", "start")),
    ],
    ids=str,
)
def test_whatever_comes_late_is_waited_for(gemms, what):
    """As late as possible: signals, copies, arrivals, all of one program of each kernel."""
    rows = [20, 3, 0, 33] if FEW in gemms else [70, 3, 0, 33]
    call = Call(SMALL, given_rows(SMALL, rows), Given(*gemms))
    call.run(delay=lambda event, task: event.split()[0] == what and task.program.index[0] == 1, stages=2)


@triton.jit
def copy_kernel(from_ptr, to_ptr, ELEMENTS: tl.constexpr):
    """Lets the next one start before it has copied anything."""
    gdc_wait()
    gdc_launch_dependents()
    place = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    tl.store(to_ptr + place, tl.load(from_ptr + place))


@pytest.mark.parametrize("length", [1024, 1025, 2500])
def test_all_counters_are_cleared(length):
    counters = torch.ones(length + 1, dtype=torch.int32)
    arguments = dict(counters_ptr=counters, num_counters=length, BLOCK=1024, PDL=True)
    gluon_emulation.launch([(clear_kernel, (1,), arguments, 4)])
    assert not counters[:length].any() and counters[length]


@pytest.mark.parametrize("kind", ["logits", "chosen"])
@pytest.mark.parametrize(
    ("tokens", "gemm"), [(1, TritonGroupedGemm((9, 0))), (1, Given(None, None)), (33, Given(None, None))]
)
def test_the_inputs_are_there_just_before_the_call(kind, tokens, gemm):
    """The kernel before may let the call's first one start early; and caches are as they were."""
    problem = dataclasses.replace(SMALL, hidden_size=1024)
    inputs = given_rows(problem, [min(rows, tokens) for rows in (20, 3, 0, 33)])
    if kind == "logits":
        inputs = make_inputs(Workload(tokens, 4), problem, random_weights(problem, "cpu"))
    call = Call(problem, inputs, gemm)
    before = []
    for tensor in inputs[1::-1] if kind == "chosen" else (inputs[3], inputs[2], inputs[0]):
        rows = tensor.shape[0]
        copy = dict(from_ptr=tensor.clone(), to_ptr=tensor, ELEMENTS=tensor.numel() // rows)
        tensor.zero_()
        before.append((copy_kernel, (rows,), copy, 4))
    gluon_emulation.launch(
        [*before, *gluon_emulation.launches(call.steps(2), call.operands())],
        delay=lambda event, task: event == "end" and task.program.kernel.name == "copy_kernel",
    )
    call.checked()


@pytest.mark.parametrize("seed", range(3))
def test_what_other_libraries_get(seed):
    """The routing waits for what comes before, and with the widening for what comes after, which waits for that."""
    tokens = 5
    inputs = make_inputs(Workload(tokens, 4), SMALL, random_weights(SMALL, "cpu"))
    given, copied = inputs.hidden_states.clone(), torch.full((tokens, SMALL.top_k), -1, dtype=torch.int32)
    inputs.hidden_states.view(torch.uint8).fill_(0xFF)
    output = torch.full((tokens, SMALL.hidden_size), float("nan"), dtype=torch.bfloat16)
    key = LaunchKey.of(inputs, addresses_of(inputs), output, 1)
    plan = external._plan(SMALL, DeviceLimits(2, pdl=True), key, torch.device("cpu"))
    memory = torch.full((plan.arena.bytes,), 0xFF, dtype=torch.uint8)
    names = by_name(inputs, output, plan.arena, memory)
    before = dict(from_ptr=given, to_ptr=inputs.hidden_states, ELEMENTS=SMALL.hidden_size)
    after = dict(from_ptr=names["experts"], to_ptr=copied, ELEMENTS=SMALL.top_k)
    gluon_emulation.launch(
        [
            (copy_kernel, (tokens,), before, 4),
            *gluon_emulation.launches(plan.steps, names),
            (copy_kernel, (tokens,), after, 1),
        ],
        seed,
    )
    assert torch.equal(output, dequantize_rows(given, inputs.hidden_states_scale).bfloat16())
    ids, _ = route(inputs.routing_logits, inputs.routing_bias, 1.0, SMALL)
    assert torch.equal((copied + 4) % SMALL.num_experts, ids.int())
