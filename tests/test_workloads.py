"""Inputs to run and to measure on: the definition's workloads, and random data that is what its name says."""

import dataclasses

import pytest
import torch

from hybrid_moe.inputs import FP8, Stated, problem_of
from hybrid_moe.measure.workloads import (
    DEEPSEEK_V3,
    DEFINITION_WORKLOADS,
    GLM_4_5_AIR,
    MODELS,
    QWEN3_235B,
    RANK_SHARES,
    ROUTING_LOADS,
    Workload,
    make_inputs,
    make_routing,
    mean_rows,
    random_weights,
)
from hybrid_moe.numerics import OWN_KERNELS_TOLERANCE, check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work, moe_reference, route

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
OFFSETS = range(0, 256, 32)


def local_ids(workload, problem=DEEPSEEK_V3):
    """``[T, top_k]`` local expert of each choice, -1 where it is elsewhere."""
    ids, _ = route(*make_routing(workload, problem), 1.0, problem)
    local = ids - workload.local_expert_offset
    return local.masked_fill((local < 0) | (local >= problem.num_local_experts), -1)


@pytest.fixture(scope="module")
def weights():
    return random_weights(SMALL, "cpu", seed=3)


def same(a, b):
    """Equal values of the same type."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.float(), b.float())  # torch.equal doesn't know fp8
    return a == b


def test_the_definitions_19_workloads():
    assert [w.num_tokens for w in DEFINITION_WORKLOADS] == [
        *(1, 7, 14, 15, 16, 32, 52, 53, 54, 55, 56, 57, 58, 59, 62, 80, 901, 11948, 14107)
    ]
    assert len({w.uuid for w in DEFINITION_WORKLOADS}) == 19
    assert all(w.local_expert_offset in OFFSETS and w.routing == "uniform" for w in DEFINITION_WORKLOADS)


@pytest.mark.parametrize("workload", DEFINITION_WORKLOADS, ids=lambda w: f"T{w.num_tokens}")
def test_each_has_local_work(workload):
    local = local_ids(workload)
    assert local.shape == (workload.num_tokens, 8)
    rows = int((local >= 0).sum())
    # One choice of eight is local on average; the bias makes whole groups more or less popular.
    assert 0 < rows < 4 * workload.num_tokens


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_one_token_has_three_local_experts(offset, routing):
    for seed in range(2):
        local = local_ids(Workload(1, offset, routing, seed))
        assert int((local >= 0).sum()) == 3


def test_one_token_has_no_more_local_experts_than_there_are():
    for experts, wanted in ((1, 1), (2, 2), (3, 3), (4, 3)):
        problem = dataclasses.replace(SMALL, num_local_experts=experts)
        assert int((local_ids(Workload(1, 8), problem) >= 0).sum()) == wanted


@pytest.mark.parametrize("routing", ROUTING_LOADS)
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_the_same_workload_gives_the_same_inputs(weights, routing, tokens):
    workload = Workload(tokens, 4, routing, seed=2)
    one, two = make_inputs(workload, SMALL, weights), make_inputs(workload, SMALL, weights)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    logits, bias = make_routing(workload, SMALL)
    assert same(logits, one.routing_logits) and same(bias, one.routing_bias)
    assert problem_of(one, Stated(4, 4, 2)) == SMALL
    assert one.num_tokens == tokens
    assert one.gemm1_weights is weights.gemm1_weights


@pytest.mark.parametrize("routing", ["uniform", "zipf", "concentrated"])
def test_another_seed_gives_other_inputs(weights, routing):
    one, two = (make_inputs(Workload(6, 4, routing, seed), SMALL, weights) for seed in (0, 1))
    for name in ("routing_logits", "hidden_states", "hidden_states_scale"):
        assert not same(getattr(one, name), getattr(two, name))


def test_more_tokens_of_the_same_seed_route_alike():
    # One layer has one bias: what changes with T is the tokens.
    _, few = make_routing(Workload(5), DEEPSEEK_V3)
    _, many = make_routing(Workload(500), DEEPSEEK_V3)
    assert same(few, many)


def test_zipf():
    local = local_ids(Workload(4000, 64, "zipf"))
    counts = torch.bincount(local[local >= 0], minlength=32).view(4, 8).sum(dim=1).tolist()
    uniform = local_ids(Workload(4000, 64))
    even = torch.bincount(uniform[uniform >= 0], minlength=32).view(4, 8).sum(dim=1).tolist()
    assert counts[0] > 0.8 * sum(counts)
    assert even[0] < 0.6 * sum(even)
    assert sum(counts) > 0.5 * sum(even)


@pytest.mark.parametrize("offset", OFFSETS)
def test_concentrated(offset):
    local = local_ids(Workload(901, offset, "concentrated"))
    hot = ((local >= 0) & (local < 4)).sum(dim=1)
    others = (local >= 4).sum(dim=1)
    # A token in ten thousand draws too small a logit.
    assert int((hot == 4).sum()) >= 899
    assert int((others == 0).sum()) >= 899


def test_concentrated_on_fewer_than_four():
    for experts, top_k, wanted in ((1, 4, 1), (2, 4, 2), (4, 3, 3)):
        problem = dataclasses.replace(SMALL, num_local_experts=experts, top_k=top_k, topk_group=2)
        local = local_ids(Workload(40, 4, "concentrated"), problem)
        assert int((local >= 0).sum(dim=1).float().mean().round()) == wanted


@pytest.mark.parametrize("offset", [0, 30, 100, 224])
def test_none(offset):
    assert int((local_ids(Workload(901, offset, "none")) >= 0).sum()) == 0


@pytest.mark.parametrize(("load", "share"), RANK_SHARES.items())
@pytest.mark.parametrize(("offset", "seed"), [(32, 0), (128, 0), (32, 1)])
def test_shares_of_a_rank(load, share, offset, seed):
    """Whatever the seed's bias makes of the rank: 1.5 times and half of the mean at these offsets of seed 0."""
    local = local_ids(Workload(901, offset, load, seed))
    assert abs(int((local >= 0).sum()) / mean_rows(901, DEEPSEEK_V3) - share) < 0.01
    # Not by a few experts.
    assert torch.bincount(local[local >= 0], minlength=32).count_nonzero() >= 20


@pytest.mark.parametrize("load", ["light_rank", "busy_rank"])
def test_one_rank_alone_has_all_rows(load):
    with pytest.raises(ValueError, match=f"'{load}' can't be made"):
        make_routing(Workload(30, 0, load), dataclasses.replace(SMALL, num_local_experts=SMALL.num_experts))


@pytest.mark.parametrize("problem", [DEEPSEEK_V3, QWEN3_235B])
def test_none_by_the_logits_alone(problem):
    """For what takes no bias."""
    workload = Workload(901, problem.num_local_experts, "none")
    logits, bias = make_routing(workload, problem)
    ids, _ = route(logits, torch.zeros_like(bias), 1.0, problem)
    assert not bool(((ids // problem.num_local_experts) == 1).any())


def test_an_unknown_load():
    with pytest.raises(
        ValueError, match="routing: expected one of uniform, zipf, concentrated, none, .*, got 'normal'"
    ):
        make_routing(Workload(3, routing="normal"), SMALL)


@pytest.mark.parametrize("experts", [13, 16])
def test_none_where_too_few_experts_are_elsewhere(experts):
    with pytest.raises(ValueError, match="'none' can't be made"):
        make_routing(Workload(30, 0, "none"), dataclasses.replace(SMALL, num_local_experts=experts))


def test_weights(weights):
    again, other = random_weights(SMALL, "cpu", seed=3), random_weights(SMALL, "cpu", seed=4)
    for name in ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"):
        tensor = getattr(weights, name)
        assert same(tensor, getattr(again, name))
        assert not same(tensor, getattr(other, name))
        if name.endswith("scale"):
            # Each block has its own: a wrong index would be seen.
            assert bool((tensor > 0).all()) and tensor.unique().numel() == tensor.numel()
        else:
            assert tensor.dtype == FP8
            # All of e4m3's range is used in each block.
            blocks = tensor.float().unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
            assert bool((blocks.abs().amax(dim=(2, 4)) == 448).all())


def test_the_data_can_tell_a_wrong_kernel(weights):
    inputs = make_inputs(Workload(40, 4), SMALL, weights)
    work = has_local_work(inputs, SMALL)
    result = moe_reference(inputs, SMALL)
    # Well above the absolute tolerance, or the gate would pass anything.
    assert 0.5 < float(result[work].std()) < 10
    wrong = {
        "token scales": inputs._replace(hidden_states_scale=inputs.hidden_states_scale.roll(1, dims=1)),
        "block scales": inputs._replace(hidden_states_scale=inputs.hidden_states_scale.roll(1, dims=0)),
        "experts": inputs._replace(gemm1_weights=weights.gemm1_weights.roll(1, dims=0)),
        "scale rows": inputs._replace(gemm1_weights_scale=weights.gemm1_weights_scale.roll(1, dims=1)),
        "scale columns": inputs._replace(gemm1_weights_scale=weights.gemm1_weights_scale.roll(1, dims=2)),
        "output scales": inputs._replace(gemm2_weights_scale=weights.gemm2_weights_scale.roll(1, dims=1)),
        "offset": inputs._replace(local_expert_offset=5),
        "factor": inputs._replace(routed_scaling_factor=1.0),
        "bias": inputs._replace(routing_bias=inputs.routing_bias.flip(0)),
    }
    for name, changed in wrong.items():
        assert not check(moe_reference(changed, SMALL), result, work, OWN_KERNELS_TOLERANCE).passed, name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("load", ROUTING_LOADS)
def test_every_load_can_be_made_for_every_model(model, load):
    problem = MODELS[model]
    if load in ("none", "light_rank", "busy_rank") and problem.num_local_experts == problem.num_experts:
        pytest.skip("all experts are local")
    last = problem.num_experts - problem.num_local_experts
    for tokens, offset in ((1, 0), (40, last)):
        rows = int((local_ids(Workload(tokens, offset, load), problem) >= 0).sum())
        assert rows == 0 if load == "none" else rows > 0


def test_softmax_routing_has_no_bias():
    assert not make_routing(Workload(4), QWEN3_235B)[1].any()
    assert make_routing(Workload(4), GLM_4_5_AIR)[1].any()
