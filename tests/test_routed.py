"""Experts that are chosen before the call: what sorts them, the whole layer, what is refused, and what is prepared."""

import copy
import dataclasses

import pytest
import torch
from given_routing import random_choice, routed_of
from test_api import PROBLEM, REFERENCE, ROUTING, forget, inputs_of, layer_of, make_policy, nothing_remembered, spies  # noqa: F401
from test_kernels import (
    CHOICE,
    DEVICE,
    SMALL,
    TWIN_TOLERANCE,
    forget_plans,
    limits_for,
    problem_named,
    uninitialised_memory_filled,
)
from test_kernels import inputs_of as kernel_inputs_of
from test_kernels import pytestmark as needs_kernels
from test_kernels import routed as tensors_after_routing

from hybrid_moe import (
    BackendUnsupportedError,
    Candidate,
    DeviceKey,
    HybridMoE,
    MoEProblem,
    RoutedInputs,
    backends,
    fused_moe,
)
from hybrid_moe.kernels import combine
from hybrid_moe.kernels.external import external_inputs
from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.numerics import check
from hybrid_moe.policy import resolve
from hybrid_moe.reference import chosen_experts, has_local_work, local_rows_per_expert_and_token, moe_reference

pytestmark = needs_kernels


def given(inputs, ids, weights):
    return RoutedInputs(ids.to(DEVICE), weights.to(DEVICE), *inputs[2:])


def run(problem, routed, backend=CHOICE):
    """The result, written between guard rows."""
    tokens = routed.num_tokens
    guarded = torch.full((tokens + 2, problem.hidden_size), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    options = {name: getattr(problem, name) for name in ("top_k", "n_group", "topk_group", "num_experts", "gate_first")}
    with uninitialised_memory_filled():
        fused_moe(
            None,
            None,
            *routed[2:],
            topk_ids=routed.topk_ids,
            topk_weights=routed.topk_weights,
            output=guarded[1:-1],
            routing_method=problem.routing_method,
            backend=backend,
            **options,
        )
    assert bool(guarded[[0, -1]].isnan().all())
    return guarded[1:-1]


def chosen_by_our_kernel(inputs, problem):
    """Ids and weights as the routing kernel has them: the reference's, but for the weights' last bits."""
    backends.prepare(problem, DeviceKey.of(DEVICE), CHOICE)  # repairs the interpreter
    external = external_inputs(inputs, problem, limits_for(problem))
    ids = (external.experts + inputs.local_expert_offset) % problem.num_experts
    return RoutedInputs(ids, external.weights, *inputs[2:])


# ---- The sorting alone ----


def assert_sorted(problem, routed):
    """Each local pair has a place of its own, and all others none and weight zero."""
    found = tensors_after_routing(problem, routed)
    ids, weights = (tensor.cpu() for tensor in chosen_experts(routed, problem))
    e, tokens = problem.all_routed.num_local_experts, routed.num_tokens
    ids = ids.long()
    local = ids - routed.local_expert_offset
    is_local = (local >= 0) & (local < e)
    pair = found["pair"].cpu().long()
    assert torch.equal(torch.where(pair >= 0, pair % e, -1), torch.where(is_local, local, -1))
    assert torch.equal(found["pair_weight"].cpu(), torch.where(is_local, weights, 0.0))
    counts = torch.bincount(local[is_local], minlength=e)
    assert torch.equal(found["tokens_per_expert"].cpu().long(), counts)
    slots = found["slot_token"].cpu()
    assert slots.shape == (e, tokens)
    for expert in range(e):
        token, choice = ((pair >= 0) & (pair % e == expert)).nonzero(as_tuple=True)
        slot = pair[token, choice] // e
        assert sorted(slot.tolist()) == list(range(int(counts[expert])))
        assert torch.equal(slots[expert, slot].long(), token)


@pytest.mark.parametrize("tokens", [1, 2, 7, 65])
@pytest.mark.parametrize(
    "name", ["odd lengths", "more choices than local experts", "all experts local", "a shared expert"]
)
def test_any_choice_is_sorted(name, tokens):
    problem = problem_named(name)
    offset = (problem.num_experts - problem.num_local_experts) // 2
    inputs = kernel_inputs_of(problem, tokens, offset)
    for seed in range(2):
        assert_sorted(problem, given(inputs, *random_choice(problem, tokens, seed)))


@pytest.mark.parametrize("tokens", [1, 19])
def test_all_on_one_expert_and_none_local(tokens):
    inputs = kernel_inputs_of(SMALL, tokens, 4)
    weights = torch.rand(tokens, 4)
    for ids in ([7, 0, 15, 3], [0, 1, 2, 3], [-1, -1, -1, -1], [-1, 4, -1, -1]):
        assert_sorted(SMALL, given(inputs, torch.tensor(ids, dtype=torch.int32).repeat(tokens, 1), weights))


def test_rows_apart_and_at_odd_addresses():
    inputs = kernel_inputs_of(SMALL, 9, 4)
    ids, weights = random_choice(SMALL, 9)
    wanted = run(SMALL, given(inputs, ids, weights))

    def apart(tensor):
        wide = torch.full((9, 7), 5, dtype=tensor.dtype, device=DEVICE)
        wide[:, 1:5] = tensor
        return wide[:, 1:5]

    for strided in (
        given(inputs, ids, weights)._replace(topk_ids=apart(ids)),
        given(inputs, apart(ids), apart(weights)),
    ):
        assert strided.topk_ids.data_ptr() % 16 and not strided.topk_ids.is_contiguous()
        assert torch.equal(run(SMALL, strided), wanted)


# ---- The layer ----


def assert_right(problem, routed):
    output, work = run(problem, routed), has_local_work(routed, problem)
    reference = moe_reference(routed, problem, quantize_intermediate=True)
    assert check(output, reference, work, TWIN_TOLERANCE).failures == ()
    return output


@pytest.mark.parametrize("name", ["24 experts", "odd lengths", "gate first", "softmax", "smallest"])
def test_the_choice_of_the_routing_gives_the_call_with_logits_bit_for_bit(name):
    problem = problem_named(name)
    for tokens, offset in ((9, (problem.num_experts - problem.num_local_experts) // 2), (1, 0)):
        inputs = kernel_inputs_of(problem, tokens, offset)
        options = {name: getattr(problem, name) for name in ("top_k", "n_group", "topk_group", "gate_first")}
        wanted = fused_moe(*inputs, **options, routing_method=problem.routing_method, backend=CHOICE)
        routed = chosen_by_our_kernel(inputs, problem)
        assert torch.equal(routed.topk_ids, routed_of(inputs, problem).topk_ids)
        assert torch.equal(run(problem, routed), wanted)
        reference = moe_reference(inputs, problem)
        assert torch.equal(moe_reference(routed_of(inputs, problem), problem), reference)


@pytest.mark.parametrize("tokens", [1, 5, 26])
def test_any_choice(tokens):
    assert_right(SMALL, given(kernel_inputs_of(SMALL, tokens, 4), *random_choice(SMALL, tokens, tokens)))


def test_weights_are_final():
    inputs = kernel_inputs_of(SMALL, 11, 4)
    routed = given(inputs, *random_choice(SMALL, 11))
    wanted = run(SMALL, routed)
    assert torch.equal(run(SMALL, routed._replace(routed_scaling_factor=17.0)), wanted)
    assert torch.equal(run(SMALL, routed._replace(topk_weights=routed.topk_weights * 2)), wanted * 2)


@pytest.mark.parametrize("branch", [False, True], ids=["all loaded", "local loaded"])
def test_what_stands_beside_no_local_expert_is_never_used(monkeypatch, branch):
    monkeypatch.setattr(combine, "BRANCH_TOKENS", 1 if branch else 512)
    forget_plans()
    tokens = 6
    problem = dataclasses.replace(SMALL, hidden_size=128, intermediate_size=128)
    inputs = kernel_inputs_of(problem, tokens, 4)
    ids, weights = random_choice(problem, tokens)
    is_local = (ids >= 4) & (ids < 8)
    for value in (float("nan"), float("inf")):
        spoilt = given(inputs, ids, torch.where(is_local, weights, value))
        output = run(problem, spoilt)
        assert torch.equal(output, run(problem, given(inputs, ids, weights)))
        assert torch.equal(moe_reference(spoilt, problem), moe_reference(given(inputs, ids, weights), problem))
        assert not output[~has_local_work(spoilt, problem)].any()
    forget_plans()


def test_an_expert_that_a_token_names_twice_gets_the_sum_of_the_weights():
    """More rows than an expert has room for would be written over others."""
    for problem in (problem_named("all experts local"), dataclasses.replace(SMALL, num_local_experts=1)):
        for tokens in (1, 5):
            inputs = kernel_inputs_of(problem, tokens, 0)
            rows = [[0, 0, 0, 0], [0, 5, 0, -1], [1, 0, 1, 0], [-1, 3, 3, 3]]
            ids = torch.tensor((rows * 5)[:tokens], dtype=torch.int32)
            weights = torch.rand(tokens, 4, generator=torch.Generator().manual_seed(tokens))
            routed = given(inputs, ids, weights)
            output = assert_right(problem, routed)
            found = tensors_after_routing(problem, routed)
            assert torch.equal(
                found["tokens_per_expert"], local_rows_per_expert_and_token(routed, problem).sum(dim=0).int()
            )
            if tokens == 1:
                once = given(
                    inputs, torch.tensor([[0, -1, -1, -1]]).int(), weights.sum(dim=1, keepdim=True).repeat(1, 4)
                )
                torch.testing.assert_close(output, run(problem, once), rtol=0.01, atol=1e-6)


def test_a_prepared_layer():
    inputs = kernel_inputs_of(SMALL, 20, 4)
    routed = given(inputs, *random_choice(SMALL, 20))
    layer = HybridMoE.from_inputs(routed, SMALL, backend=CHOICE)
    assert layer.problem == SMALL
    wanted, chosen = run(SMALL, routed), dict(topk_ids=routed.topk_ids, topk_weights=routed.topk_weights)
    assert torch.equal(layer(None, routed.hidden_states, routed.hidden_states_scale, **chosen), wanted)
    assert [w.num_tokens for w in layer.warm_up([1, 3])] == [1, 3]
    few = {name: tensor[:0] for name, tensor in chosen.items()}
    assert layer(None, routed.hidden_states[:0], routed.hidden_states_scale[:, :0], **few).shape == (0, 256)
    # As DeepEP has it: bfloat16 received, experts of other ranks as -1.
    hidden = torch.randn(20, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    kept = torch.where((routed.topk_ids >= 4) & (routed.topk_ids < 8), routed.topk_ids, -1)
    output = layer(None, hidden, topk_ids=kept, topk_weights=routed.topk_weights)
    assert torch.equal(output, layer(None, hidden, **chosen)) and bool(output.any())


# ---- What is prepared ----


class Choosing:
    """Makes a spy one that can't take experts chosen before."""

    def __init__(self, spy, monkeypatch):
        monkeypatch.setattr(
            spy, "routed_reasons", lambda problem, config: [f"{spy.name} chooses by itself"], raising=False
        )


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


@pytest.fixture
def routed(weights):
    return routed_of(inputs_of(weights, 7), PROBLEM)


def call(layer, routed, **options):
    chosen = dict(topk_ids=routed.topk_ids, topk_weights=routed.topk_weights)
    return layer(None, routed.hidden_states, routed.hidden_states_scale, **(chosen | options))


def call_function(routed, **options):
    chosen = dict(topk_ids=routed.topk_ids, topk_weights=routed.topk_weights, num_experts=16)
    return fused_moe(None, None, *routed[2:], **(ROUTING | chosen | options))


def test_the_policy_is_that_of_calls_with_logits(spies, weights, routed):  # noqa: F811
    layer = layer_of(routed, policy=make_policy())
    for tokens, value in ((2, 1.0), (7, 2.0)):
        inputs = routed_of(inputs_of(weights, tokens), PROBLEM)
        assert bool((call(layer, inputs) == value).all())
        assert bool((call_function(inputs, policy=make_policy()) == value).all())
    assert layer.explain(7) == layer_of(inputs_of(weights, 7), policy=make_policy()).explain(7)


def test_what_chooses_by_itself_is_passed_over_when_prepared(spies, monkeypatch, weights, routed):  # noqa: F811
    Choosing(spies[1], monkeypatch)
    policy = make_policy(default=Candidate("one"))
    layer = layer_of(routed, policy=policy)
    decision = layer.explain(7)
    assert (decision.choice, decision.source, decision.regime) == (Candidate("one"), "default", (5, 9))
    assert any("two passed over" in r and "two chooses by itself" in r for r in decision.reasons)
    assert bool((call(layer, routed) == 1.0).all()) and bool((call_function(routed, policy=policy) == 1.0).all())
    # With logits it runs, before and after.
    with_logits = layer_of(inputs_of(weights, 7), policy=policy)
    assert with_logits.choice(7) == Candidate("two")
    assert bool((fused_moe(*inputs_of(weights, 7), **ROUTING, policy=policy) == 2.0).all())
    layer.reload_policy(make_policy(default=REFERENCE))
    assert layer.choice(7) == REFERENCE


def test_what_chooses_by_itself_is_an_error_where_it_is_named(spies, monkeypatch, weights, routed):  # noqa: F811
    Choosing(spies[0], monkeypatch)
    for make in (lambda: layer_of(routed, backend="one"), lambda: call_function(routed, backend="one")):
        with pytest.raises(BackendUnsupportedError, match="one can't run here: one chooses by itself"):
            make()
    forget()
    spies[0].reasons = ["no such card"]
    with pytest.raises(BackendUnsupportedError) as caught:
        layer_of(routed, backend="one")
    assert caught.value.reasons == ["no such card", "one chooses by itself"]


def test_flashinfer_trtllm_chooses_by_itself():
    device = DeviceKey("nvidia_x", (10, 0))
    with pytest.warns(UserWarning):
        table = resolve.decision_table(MoEProblem(), device, routed=True)
    reasons = table.decision(1).reasons
    assert table.choice(1).backend != "flashinfer_trtllm"
    assert any("flashinfer_trtllm" in r and "topk_ids and topk_weights aren't taken" in r for r in reasons)
    for choice in resolve.DEFAULT_ORDER:
        assert bool(backends.routed_reasons(MoEProblem(), choice)) == (choice.backend == "flashinfer_trtllm")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_takes_the_same(weights, routed, copied):
    layer = layer_of(routed, backend=REFERENCE)
    assert torch.equal(call(copied(layer), routed), call(layer, routed))


# ---- What is refused ----


def both(routed, **changes):
    """The call of a prepared layer and of the function with these arguments changed."""
    inputs = routed._replace(**{name: value for name, value in changes.items() if name in routed._fields})
    return (
        lambda: call(layer_of(routed, backend=REFERENCE), inputs),
        lambda: call_function(inputs, backend=REFERENCE),
    )


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        (
            "topk_ids",
            lambda t: t.long(),
            TypeError,
            "topk_ids: expected dtype torch.int32, got torch.int64: call .int()",
        ),
        ("topk_ids", lambda t: t.float(), TypeError, "topk_ids: expected dtype torch.int32, got torch.float32"),
        ("topk_ids", lambda t: t[:-1], ValueError, r"topk_ids: expected shape \[7, 3\], got \[6, 3\]"),
        ("topk_ids", lambda t: t[:, :2], ValueError, r"topk_ids: expected shape \[7, 3\], got \[7, 2\]"),
        (
            "topk_ids",
            lambda t: t.t().contiguous().t(),
            ValueError,
            "topk_ids: expected contiguous rows, got strides",
        ),
        (
            "topk_ids",
            lambda t: t.to("meta"),
            ValueError,
            "topk_ids: expected it on cpu, where gemm1_weights is, got meta",
        ),
        ("topk_ids", lambda t: None, TypeError, "topk_ids: expected a torch.Tensor, got a NoneType"),
        ("topk_ids", lambda t: t.tolist(), TypeError, "topk_ids: expected a torch.Tensor, got a list"),
        (
            "topk_weights",
            lambda t: t.bfloat16(),
            TypeError,
            "topk_weights: expected dtype torch.float32, got torch.bfloat16",
        ),
        ("topk_weights", lambda t: t[0], ValueError, r"topk_weights: expected shape \[7, 3\], got \[3\]"),
        ("topk_weights", lambda t: None, TypeError, "topk_weights: expected a torch.Tensor, got a NoneType"),
        ("hidden_states", lambda t: t.float(), TypeError, "hidden_states: expected dtype .*, got torch.float32"),
    ],
)
def test_what_is_wrong_is_named(routed, name, change, error, words):
    for run_it in both(routed, **{name: change(getattr(routed, name))}):
        with pytest.raises(error, match=words):
            run_it()


def test_arguments_that_contradict_one_another(weights, routed):
    inputs = inputs_of(weights, 7)
    chosen = dict(topk_ids=routed.topk_ids, topk_weights=routed.topk_weights)
    options = ROUTING | {"backend": REFERENCE}
    for name, logits, bias in (
        ("routing_logits", inputs.routing_logits, None),
        ("routing_bias", None, inputs.routing_bias),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected None with topk_ids and topk_weights"):
            fused_moe(logits, bias, *inputs[2:], **options, **chosen, num_experts=16)
    with pytest.raises(TypeError, match="num_experts: expected the number of the model's experts"):
        fused_moe(None, None, *inputs[2:], **options, **chosen)
    with pytest.raises(ValueError, match="num_experts: expected 16, the width of routing_logits, got 32"):
        fused_moe(*inputs, **options, num_experts=32)
    assert torch.equal(fused_moe(*inputs, **options, num_experts=16), fused_moe(*inputs, **options))
    with pytest.raises(TypeError, match="routing_logits: expected a torch.Tensor, got a NoneType"):
        fused_moe(None, None, *inputs[2:], **options)
    with pytest.raises(ValueError, match="local_expert_offset: expected 0 to 4, got 5"):
        fused_moe(None, None, *inputs[2:], **options, **chosen, num_experts=8)


def test_a_layer_is_called_in_its_own_way(weights, routed):
    inputs = inputs_of(weights, 7)
    with_bias, without = layer_of(inputs, backend=REFERENCE), layer_of(routed, backend=REFERENCE)
    with pytest.raises(TypeError, match="topk_ids, topk_weights: expected None and routing_logits"):
        call(with_bias, routed)
    with pytest.raises(TypeError, match="routing_logits: expected None, and topk_ids and topk_weights"):
        without(inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale)
    with pytest.raises(TypeError, match="topk_ids: expected a torch.Tensor, got a NoneType"):
        without(None, inputs.hidden_states, inputs.hidden_states_scale)
    with pytest.raises(TypeError, match="routing_bias: expected a tensor, zeros for no bias, got None"):
        HybridMoE(*inputs[4:8], None, local_expert_offset=5, routed_scaling_factor=1.0, **ROUTING)
    with pytest.raises(ValueError, match="num_experts: expected 16, the width of routing_logits, got 12"):
        HybridMoE(
            *inputs[4:8],
            inputs.routing_bias,
            num_experts=12,
            local_expert_offset=5,
            routed_scaling_factor=1.0,
            **ROUTING,
        )
