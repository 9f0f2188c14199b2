"""Calls with a bound on their memory: how they are cut into chunks of tokens, and that results stay the same."""

import copy

import pytest
import torch

from hybrid_moe import HybridMoE, fused_moe
from hybrid_moe.backends.torch_reference import TorchReference
from hybrid_moe.backends.triton_fused import TritonFused
from hybrid_moe.device import DeviceKey
from hybrid_moe.inputs import RoutedInputs
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import chosen_experts, quantize_rows
from hybrid_moe.serving import chunks, quantize_input

PROBLEM = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=256
)
CPU = DeviceKey("cpu")


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


def runner_of(problem=PROBLEM):
    return TorchReference().prepare(problem, CPU, {})


def bound_for(tokens, problem=PROBLEM):
    """Bytes that so many tokens take, and not one more."""
    return runner_of(problem).workspace_bytes(tokens) + quantize_input.bytes_of(problem, tokens)


@pytest.fixture
def calls(monkeypatch):
    """T of each call of the runner."""
    seen = []
    kind = type(runner_of())
    run = kind.run

    def spy(self, inputs, output):
        seen.append(inputs.num_tokens)
        assert self.workspace_bytes(inputs.num_tokens) <= bound_for(5)
        run(self, inputs, output)

    monkeypatch.setattr(kind, "run", spy)
    return seen


def activations(x):
    return x.routing_logits, x.hidden_states, x.hidden_states_scale


@pytest.mark.parametrize(("tokens", "sizes"), [(5, [5]), (6, [3, 3]), (13, [5, 5, 3])])
def test_chunks_are_even_and_give_the_same_bits(weights, calls, tokens, sizes):
    x = make_inputs(Workload(tokens, 4), PROBLEM, weights)
    layer = HybridMoE.from_inputs(x, PROBLEM, backend="torch_reference", max_workspace_bytes=bound_for(5))
    output = torch.full((tokens, 256), torch.nan, dtype=torch.bfloat16)
    layer(*activations(x), output=output)
    assert calls == sizes
    pieces = zip(
        x.routing_logits.split(sizes), x.hidden_states.split(sizes), x.hidden_states_scale.split(sizes, 1), strict=True
    )
    unbounded = HybridMoE.from_inputs(x, PROBLEM, backend="torch_reference")
    assert torch.equal(output, torch.cat([unbounded(*piece) for piece in pieces]))


def test_experts_chosen_before_and_unquantised_states(weights, calls):
    """Every tensor that belongs to a token is cut along."""
    x = make_inputs(Workload(11, 4), PROBLEM, weights)
    ids, scores = chosen_experts(x, PROBLEM)
    routed = RoutedInputs(ids.int(), scores.float(), *x[2:])
    whole = {"problem": PROBLEM, "backend": "torch_reference"}
    bound = {"max_workspace_bytes": bound_for(5)}
    layer = HybridMoE.from_inputs(routed, backend="torch_reference", problem=PROBLEM, **bound)
    output = layer(None, *x[2:4], topk_ids=routed.topk_ids, topk_weights=routed.topk_weights)
    assert calls == [4, 4, 3]
    assert torch.equal(output, fused_moe(*x, **whole, **bound))
    assert calls[3:] == [4, 4, 3]
    states = torch.randn(11, 256, dtype=torch.bfloat16)
    arguments = x._replace(hidden_states=states, hidden_states_scale=None)
    quantized = x._replace(**dict(zip(("hidden_states", "hidden_states_scale"), quantize_rows(states), strict=True)))
    assert torch.equal(fused_moe(*arguments, **whole, **bound), fused_moe(*quantized, **whole, **bound))


def test_a_bound_below_one_token_names_the_least(weights):
    x = make_inputs(Workload(2, 4), PROBLEM, weights)
    least = bound_for(1)
    for call in (
        lambda bound: HybridMoE.from_inputs(x, PROBLEM, backend="torch_reference", max_workspace_bytes=bound),
        lambda bound: fused_moe(*x, problem=PROBLEM, backend="torch_reference", max_workspace_bytes=bound),
    ):
        with pytest.raises(ValueError, match=f"max_workspace_bytes: expected {least} or more.*got {least - 1}"):
            call(least - 1)
        with pytest.raises((TypeError, ValueError), match="max_workspace_bytes"):
            call(0)
        call(least)


@pytest.mark.parametrize("gigabytes", [0.1, 0.25, 0.5, 1.0, 2.0])
def test_no_chunk_of_the_definition_takes_more_than_the_bound(gigabytes):
    """Through every change of its tiles; and not in more chunks than needed."""
    pytest.importorskip("triton")
    bound = int(gigabytes * 2**30)
    runner = TritonFused().prepare(DEEPSEEK_V3, DeviceKey("cpu"), {"gemm": "triton"})
    most = chunks.most_tokens(runner, DEEPSEEK_V3, bound)
    assert most % 128 == 0

    def taken(tokens):
        return runner.workspace_bytes(tokens) + quantize_input.bytes_of(DEEPSEEK_V3, tokens)

    assert max(map(taken, (1, 80, 256, 257, most - 1, most))) <= bound < taken(most + 128)
    bounded = chunks.bounded(runner, DEEPSEEK_V3, bound)
    for tokens in (most - 1, most, most + 1, 5 * most // 2, 32768):
        size = chunks.chunk(tokens, most)
        assert size <= most and -(-tokens // size) == -(-tokens // most)
        assert bounded.workspace_bytes(tokens) == runner.workspace_bytes(size)
    assert chunks.bounded(runner, DEEPSEEK_V3, 2**50) is runner


def test_a_layer_reserves_no_more_and_keeps_its_bound_in_copies(weights):
    x = make_inputs(Workload(9, 4), PROBLEM, weights)
    pytest.importorskip("triton")
    runner = TritonFused().prepare(PROBLEM, CPU, {"gemm": "triton"})
    bound = runner.workspace_bytes(4) + quantize_input.bytes_of(PROBLEM, 4)
    layer = HybridMoE.from_inputs(
        x, PROBLEM, backend="triton_fused[gemm=triton]", max_num_tokens=9, max_workspace_bytes=bound
    )
    assert 0 < layer.planned_bytes <= bound
    assert copy.deepcopy(layer).planned_bytes == layer.planned_bytes
    assert copy.deepcopy(layer).max_workspace_bytes == bound
    unbounded = HybridMoE.from_inputs(x, PROBLEM, backend="triton_fused[gemm=triton]")
    assert torch.equal(layer(*activations(x)), unbounded(*activations(x)))
