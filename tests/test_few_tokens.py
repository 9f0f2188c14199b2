"""The kernels that a shadow check compares with, against the specification."""

import dataclasses

import pytest
import torch
from given_routing import random_choice

from hybrid_moe import MoEProblem, RoutedInputs
from hybrid_moe.kernels import interpreter
from hybrid_moe.kernels.few_tokens import few_tokens
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights
from hybrid_moe.reference import chosen_experts, moe_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEM = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=256
)


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    if interpreter.interpreting():
        interpreter.repair()


def difference(inputs, problem):
    """Of the kernels' result from the reference, relative to the largest value."""
    ids, weights = chosen_experts(inputs, problem)
    output = few_tokens(inputs, ids.int().contiguous(), weights.contiguous(), problem)
    reference = moe_reference(inputs, problem)
    assert output.shape == reference.shape and output.dtype == torch.float32
    idle = (reference == 0).all(dim=1)
    assert torch.equal(output[idle], reference[idle])
    return float((output - reference).abs().max() / reference.abs().max()), idle


@pytest.mark.parametrize("gate_first", [False, True])
def test_the_reference_for_a_few_tokens(gate_first):
    # Widths that aren't multiples of what is computed at a time.
    problem = dataclasses.replace(PROBLEM, gate_first=gate_first, hidden_size=640, intermediate_size=384)
    inputs = make_inputs(Workload(5, 4), problem, random_weights(problem, DEVICE))
    error, idle = difference(inputs, problem)
    assert error < 1e-5
    assert not idle.all()


def test_given_experts_some_of_them_none_and_some_twice():
    drawn = make_inputs(Workload(5, 4), PROBLEM, random_weights(PROBLEM, DEVICE))
    ids, weights = (tensor.to(DEVICE) for tensor in random_choice(PROBLEM, 5))
    ids[0] = -1
    ids[1] = torch.tensor([4, 4, 5, 99])
    inputs = RoutedInputs(ids.int(), weights, *drawn[2:])
    error, idle = difference(inputs, PROBLEM)
    assert error < 1e-5 and bool(idle[0])


def test_shared_experts():
    problem = dataclasses.replace(PROBLEM, num_local_experts=16, num_shared_experts=2)
    inputs = make_inputs(Workload(3), problem, random_weights(problem, DEVICE))
    assert difference(inputs, problem)[0] < 1e-5


@pytest.mark.gpu
def test_deepseek_v3():
    inputs = make_inputs(Workload(16, 96), DEEPSEEK_V3, random_weights(DEEPSEEK_V3, DEVICE))
    error, idle = difference(inputs, DEEPSEEK_V3)
    assert error < 1e-4 and not idle.all()
