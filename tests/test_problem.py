"""The problem, and every check of the ten inputs: the message names the argument, what is expected and what it got."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.device import DeviceKey, device_slug
from hybrid_moe.inputs import FP8, MoEInputs, Stated, check_output, plain_num_tokens, problem_of
from hybrid_moe.problem import MoEProblem, problem_of_definition

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=3, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
CPU = torch.device("cpu")
TENSORS = MoEInputs._fields[:8]
SIZES = (
    "num_experts",
    "num_local_experts",
    "top_k",
    "n_group",
    "topk_group",
    "hidden_size",
    "intermediate_size",
    "block",
)


def inputs_of(problem=SMALL, tokens=5, device="cpu", **changes):
    """Ten inputs of the right shapes, some of them replaced."""
    e, h, i, b = problem.num_local_experts, problem.hidden_size, problem.intermediate_size, problem.block
    shapes = dict(
        routing_logits=((tokens, problem.num_experts), torch.float32),
        routing_bias=((problem.num_experts,), torch.bfloat16),
        hidden_states=((tokens, h), FP8),
        hidden_states_scale=((h // b, tokens), torch.float32),
        gemm1_weights=((e, 2 * i, h), FP8),
        gemm1_weights_scale=((e, 2 * i // b, h // b), torch.float32),
        gemm2_weights=((e, h, i), FP8),
        gemm2_weights_scale=((e, h // b, i // b), torch.float32),
    )
    assert tuple(shapes) == TENSORS
    tensors = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in shapes.items()
        if name not in changes
    }
    numbers = dict(local_expert_offset=0, routed_scaling_factor=2.5)
    return MoEInputs(**(numbers | tensors | changes))


def derive(inputs, problem=SMALL):
    return problem_of(inputs, Stated(problem.top_k, problem.n_group, problem.topk_group, problem.gate_first))


def refused(inputs, error, *words):
    """Assert that the inputs are refused with a message that begins with the argument and holds all the words."""
    with pytest.raises(error) as caught:
        derive(inputs)
    message = str(caught.value)
    assert message.startswith(f"{words[0]}: expected ") and ", got " in message
    for word in words:
        assert str(word) in message
    return message


@st.composite
def problems(draw):
    n_group = draw(st.integers(1, 9))
    group_size = draw(st.integers(1 if n_group == 1 else 2, 40))
    topk_group = draw(st.integers(1, n_group))
    return MoEProblem(
        num_experts=n_group * group_size,
        num_local_experts=draw(st.integers(1, n_group * group_size)),
        top_k=draw(st.integers(1, topk_group * group_size)),
        n_group=n_group,
        topk_group=topk_group,
        hidden_size=128 * draw(st.integers(1, 60)),
        intermediate_size=128 * draw(st.integers(1, 20)),
        gate_first=draw(st.booleans()),
    )


def test_the_default_is_the_definition():
    problem = MoEProblem()
    assert problem.definition == "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
    assert (problem.num_experts, problem.block, problem.routing_method) == (256, 128, "deepseek_v3")
    assert problem.gate_first is False
    assert (problem.group_size, problem.max_local_rows_per_token) == (32, 8)


def test_it_is_a_frozen_value():
    assert hash(MoEProblem()) == hash(MoEProblem())
    assert MoEProblem() == MoEProblem() != MoEProblem(gate_first=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEProblem().top_k = 4


@given(problems(), st.integers(0, 2000))
def test_every_valid_problem_is_found_again_in_its_tensors(problem, tokens):
    assert problem.group_size * problem.n_group == problem.num_experts
    assert problem.max_local_rows_per_token == min(problem.top_k, problem.num_local_experts)
    for offset in (0, problem.num_experts - problem.num_local_experts):
        inputs = inputs_of(problem, tokens, "meta", local_expert_offset=offset)
        assert derive(inputs, problem) == problem
        assert inputs.num_tokens == tokens


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 8.0, "8", None, True])
def test_a_size_is_a_positive_int(name, value):
    with pytest.raises(ValueError) as caught:
        MoEProblem(**{name: value})
    assert str(caught.value) == f"{name}: expected a positive integer, got {value!r}"


def test_shared_experts_and_weights_on_the_input():
    whole = dataclasses.replace(SMALL, num_local_experts=16)
    problem = dataclasses.replace(whole, num_shared_experts=2)
    assert problem.definition == "moe_fp8_block_scale_ds_routing_topk3_ng4_kg2_e16_s2_h256_i128"
    assert problem_of_definition(problem.definition, num_experts=16) == problem
    assert "_s" not in whole.definition.removeprefix("moe_fp8_block_scale") and whole.all_routed is whole
    routed = problem.all_routed
    assert (routed.num_experts, routed.num_local_experts, routed.top_k, routed.n_group) == (18, 18, 5, 1)
    assert routed.num_shared_experts == 0 and routed.max_local_rows_per_token == 5
    inputs = inputs_of(whole)
    with pytest.raises(ValueError, match=r"gemm1_weights: expected shape \[18, 256, 256\], got \[16, 256, 256\]"):
        problem_of(inputs, problem)
    weights = inputs_of(routed)[4:8]
    assert problem_of(inputs._replace(**dict(zip(TENSORS[4:], weights, strict=True))), problem) == problem
    with pytest.raises(
        ValueError, match="num_shared_experts: expected 0 with 4 of 16 experts local, got 1: every rank"
    ):
        dataclasses.replace(SMALL, num_shared_experts=1)
    weighted = MoEProblem(16, 4, 1, 1, 1, 256, 128, routing_method="sigmoid_no_renorm", weight_on_input=True)
    assert weighted.definition == "moe_fp8_block_scale_sigmoid_routing_topk1_wi_e4_h256_i128"
    assert problem_of_definition(weighted.definition, num_experts=16) == weighted
    with pytest.raises(ValueError, match="weight_on_input: expected False with top_k=2 and num_shared_experts=0, got"):
        dataclasses.replace(weighted, top_k=2)
    for value in (-1, 1.0, True, None):
        with pytest.raises(ValueError, match="num_shared_experts: expected an integer of at least 0, got"):
            dataclasses.replace(whole, num_shared_experts=value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(block=64), ["block", "64", "128"]),
        (dict(hidden_size=7000), ["hidden_size: expected", "got 7000", "multiple of block=128"]),
        (dict(intermediate_size=64), ["intermediate_size: expected", "got 64", "multiple of block=128"]),
        (dict(routing_method="sigmoid"), ["routing_method: expected", "got 'sigmoid'", "deepseek_v3, softmax"]),
        (dict(routing_method="softmax"), ["n_group: expected", "got 8", "routing_method='softmax'"]),
        (dict(gate_first=1), ["gate_first: expected", "got 1", "True or False"]),
        (dict(num_local_experts=257), ["num_local_experts: expected", "got 257", "num_experts=256"]),
        (dict(n_group=7), ["n_group: expected", "got 7", "divisor of num_experts=256"]),
        (dict(topk_group=9), ["topk_group: expected", "got 9", "n_group=8"]),
        (dict(n_group=256, topk_group=256), ["n_group: expected", "got 256", "at least two experts"]),
        (dict(top_k=129), ["top_k: expected", "got 129", "128 experts", "topk_group=4"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradictory_fields(changes, words):
    with pytest.raises(ValueError) as caught:
        MoEProblem(**changes)
    for word in [*words, "expected" if "block" not in changes else "only"]:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_dtype(name):
    inputs = inputs_of()
    given = getattr(inputs, name)
    refused(inputs._replace(**{name: given.half()}), TypeError, name, "torch.float16", given.dtype)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("value", [None, [[0.0]], np.zeros((2, 2), np.float32)], ids=["none", "list", "numpy"])
def test_no_tensor(name, value):
    refused(inputs_of(**{name: value}), TypeError, name, type(value).__name__, "torch.Tensor")


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_number_of_dimensions(name):
    given = getattr(inputs_of(), name)
    for wrong in (given[None], given[0]):
        refused(inputs_of(**{name: wrong}), ValueError, name, list(wrong.shape))


@pytest.mark.parametrize("name", TENSORS)
def test_any_dimension_that_does_not_fit_the_others(name):
    # Which of two tensors is wrong can't be known: the message may name the other one.
    shape = getattr(inputs_of(), name).shape
    for dimension in range(len(shape)):
        for more in (1, 16, 128):
            wrong = list(shape)
            wrong[dimension] += more
            inputs = inputs_of(**{name: torch.zeros(wrong, dtype=getattr(inputs_of(), name).dtype)})
            with pytest.raises(ValueError, match="expected .*, got"):
                derive(inputs)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("routing_logits", [4, 16], [5, 16]),
        ("routing_bias", [15], [16]),
        ("routing_bias", [1, 16], [16]),
        ("hidden_states_scale", [5, 2], [2, 5]),
        ("hidden_states_scale", [2, 6], [2, 5]),
        ("gemm1_weights", [4, 128, 256], [4, 256, 256]),
        ("gemm1_weights_scale", [4, 2, 3], [4, 2, 2]),
        ("gemm2_weights", [5, 256, 128], [4, 256, 128]),
        ("gemm2_weights_scale", [4, 1, 2], [4, 2, 1]),
    ],
)
def test_wrong_shape_names_the_tensor_and_both_shapes(name, shape, wanted):
    dtype = getattr(inputs_of(), name).dtype
    message = refused(inputs_of(**{name: torch.zeros(shape, dtype=dtype)}), ValueError, name, shape, wanted)
    assert message.startswith(f"{name}: expected shape {wanted}, got {shape}")


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "gemm1_weights"])
def test_wrong_device(name):
    elsewhere = getattr(inputs_of(), name).to("meta")
    refused(inputs_of(**{name: elsewhere}), ValueError, name, "got meta", "on cpu")


def test_the_first_weights_alone_elsewhere():
    refused(inputs_of(gemm1_weights=inputs_of().gemm1_weights.to("meta")), ValueError, "gemm1_weights_scale", "meta")


@pytest.mark.parametrize("name", ["gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"])
def test_weights_that_are_views_of_transposed_memory(name):
    problem = dataclasses.replace(SMALL, intermediate_size=256)  # every dimension longer than one
    inputs = inputs_of(problem)
    strided = getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*contiguous.*, got strides \["):
        derive(inputs._replace(**{name: strided}), problem)


def test_a_strided_bias():
    refused(
        inputs_of(routing_bias=torch.zeros(32, dtype=torch.bfloat16)[::2]), ValueError, "routing_bias", [2], "contig"
    )


@pytest.mark.parametrize("name", ["hidden_states", "routing_logits"])
def test_rows_may_lie_apart_but_not_columns(name):
    given = getattr(inputs_of(), name)
    rows, columns = given.shape
    apart = torch.zeros((rows, columns + 48), dtype=given.dtype)[:, :columns]
    assert derive(inputs_of(**{name: apart})) == SMALL
    refused(
        inputs_of(**{name: torch.zeros((columns, rows), dtype=given.dtype).t()}), ValueError, name, "contiguous rows"
    )


def test_any_strides_of_the_activation_scales():
    for scale in (torch.zeros(5, 2).t(), torch.zeros(4, 10)[::2, ::2], torch.zeros(1).expand(2, 5)):
        assert derive(inputs_of(hidden_states_scale=scale)) == SMALL


def test_no_tokens():
    assert derive(inputs_of(tokens=0)) == SMALL
    refused(inputs_of(tokens=0, hidden_states_scale=torch.zeros(2, 1)), ValueError, "hidden_states_scale", [2, 0])


@pytest.mark.parametrize("offset", [0, 5, 12, np.int32(12)])
def test_offsets_in_range(offset):
    assert derive(inputs_of(local_expert_offset=offset)) == SMALL


@pytest.mark.parametrize("offset", [-1, 13, 16, 2**40])
def test_offsets_out_of_range(offset):
    refused(inputs_of(local_expert_offset=offset), ValueError, "local_expert_offset", offset, "0 to 12", "4 of 16")


@pytest.mark.parametrize("offset", [1.0, "1", None, torch.tensor(1.0)], ids=str)
def test_offsets_that_are_no_int(offset):
    refused(inputs_of(local_expert_offset=offset), TypeError, "local_expert_offset", repr(offset), "int")


@pytest.mark.parametrize(
    ("logits", "message"),
    [((5, 15), "n_group: expected a divisor of num_experts=15"), ((5, 4), "n_group: expected groups of at least two")],
)
def test_tensors_that_contradict_the_groups(logits, message):
    with pytest.raises(ValueError, match=message):
        derive(inputs_of(routing_logits=torch.zeros(logits)))


@pytest.mark.parametrize(
    ("output", "error", "words"),
    [
        (torch.zeros(5, 256), TypeError, ["torch.float32", "torch.bfloat16"]),
        (torch.zeros(4, 256, dtype=torch.bfloat16), ValueError, ["[4, 256]", "[5, 256]"]),
        (torch.zeros(5, 256, dtype=torch.bfloat16, device="meta"), ValueError, ["meta", "cpu"]),
        (torch.zeros(256, 5, dtype=torch.bfloat16).t(), ValueError, ["[1, 5]", "contiguous"]),
        (np.zeros((5, 256)), TypeError, ["ndarray", "torch.Tensor"]),
    ],
    ids=["dtype", "shape", "device", "strides", "numpy"],
)
def test_output(output, error, words):
    check_output(torch.zeros(5, 256, dtype=torch.bfloat16), inputs_of(), SMALL)
    with pytest.raises(error) as caught:
        check_output(output, inputs_of(), SMALL)
    for word in ["output", *words]:
        assert word in str(caught.value)


def memory_of(inputs, name):
    """The output's ``[5, 256]`` bfloat16 in the memory of an input, which gets more of it."""
    given = getattr(inputs, name)
    memory = torch.zeros(5 * 256 * 2 + given.nbytes, dtype=torch.uint8)
    inside = memory[: given.nbytes].view(given.dtype).view(given.shape)
    return memory, inputs._replace(**{name: inside})


@pytest.mark.parametrize("name", TENSORS)
def test_an_output_in_the_memory_of_an_input(name):
    memory, inputs = memory_of(inputs_of(), name)
    size = getattr(inputs, name).nbytes
    shared = memory[size - 2 : size - 2 + 2560].view(torch.bfloat16).view(5, 256)
    with pytest.raises(ValueError, match=f"output: expected memory of its own, as it is written, got that of {name}"):
        check_output(shared, inputs, SMALL)
    check_output(memory[size:].view(torch.bfloat16).view(5, 256), inputs, SMALL)  # right behind it
    if name in ("hidden_states", "routing_logits", "hidden_states_scale"):
        activations = (inputs.hidden_states, inputs.routing_logits, inputs.hidden_states_scale)
        assert plain_num_tokens(SMALL, *activations, None, CPU) == 5
        assert plain_num_tokens(SMALL, *activations, shared, CPU) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda output: output.requires_grad_(), "output: expected a tensor that doesn't require grad"),
        (lambda output: torch.inference_mode()(output.clone)(), "output: expected a tensor made outside"),
    ],
    ids=["requires_grad", "inference"],
)
def test_an_output_that_may_not_be_written(make, message):
    inputs, output = inputs_of(), make(torch.zeros(5, 256, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        check_output(output, inputs, SMALL)
    activations = (inputs.hidden_states, inputs.routing_logits, inputs.hidden_states_scale)
    assert plain_num_tokens(SMALL, *activations, output, CPU) is None


def test_an_inference_tensor_in_inference_mode():
    with torch.inference_mode():
        check_output(torch.zeros(5, 256, dtype=torch.bfloat16), inputs_of(), SMALL)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, 3.5e38, 1e39, 10**400, Fraction(10**50)], ids=str)
def test_factors_that_are_not_finite_in_float32(factor):
    with pytest.raises(ValueError, match="routed_scaling_factor: expected a number that is finite in float32"):
        derive(inputs_of(routed_scaling_factor=factor))


@pytest.mark.parametrize("factor", [0, -1.5, 3.4e38, np.float32(2.5), Fraction(5, 2)], ids=str)
def test_factors(factor):
    assert derive(inputs_of(routed_scaling_factor=factor)) == SMALL


def test_numpys_integers():
    fields = dataclasses.asdict(SMALL)
    problem = MoEProblem(**{k: np.int64(v) if type(v) is int else v for k, v in fields.items()})
    assert problem == SMALL and {type(v) for v in dataclasses.astuple(problem)} == {int, str, bool}
    with pytest.raises(ValueError, match="top_k: expected "):
        dataclasses.replace(SMALL, top_k=torch.tensor(2))


def test_device_keys():
    assert DeviceKey.of("cpu") == DeviceKey.of(torch.device("cpu")) == DeviceKey("cpu")
    assert DeviceKey.of("meta") == DeviceKey("meta", None)
    assert device_slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    assert device_slug(" NVIDIA GB200 (x2) ") == "nvidia_gb200_x2"
