"""A problem without a policy: whose regimes it gets, at which T, and that nothing of it is silent."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_api import PROBLEM, REFERENCE, forget, inputs_of, layer_of, make_policy, spies  # noqa: F401

from hybrid_moe import Candidate, DeviceKey, MoEProblem, NoBackendError, save_policy
from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.policy import resolve as lookup
from hybrid_moe.policy.nearest import distance, nearest, scaled
from hybrid_moe.policy.select import resolve
from hybrid_moe.policy.store import dumps_policy, load_policy, policy_path, shipped_policy_dir, user_policy_dir

CPU = DeviceKey("cpu")


def changed(**sizes):
    return dataclasses.replace(PROBLEM, **sizes)


@pytest.fixture(autouse=True)
def afresh():
    forget()
    yield
    forget()


def test_the_nearest_is_the_one_whose_sizes_differ_least():
    near, far = changed(num_experts=32), changed(num_experts=64, hidden_size=512)
    assert distance(PROBLEM, PROBLEM) == 0 and distance(PROBLEM, near) == 1 and distance(PROBLEM, far) == 3
    assert distance(far, PROBLEM) == 3
    policies = [make_policy(far), make_policy(near), make_policy(changed(num_experts=32, gate_first=True))]
    assert nearest(PROBLEM, policies) is policies[1]
    assert nearest(PROBLEM, []) is None


def test_another_routing_is_better_than_no_policy():
    softmax = changed(n_group=1, topk_group=1, routing_method="softmax")
    near, far = make_policy(PROBLEM), make_policy(dataclasses.replace(softmax, num_experts=64))
    assert nearest(softmax, [near]) is near
    assert nearest(softmax, [near, far]) is far
    assert nearest(PROBLEM, [far, near]) is near


def test_regimes_lie_at_the_same_rows_for_each_expert():
    """Twice the experts: half the rows for each of them, so twice the T. 5-9 becomes 10-19: T = 19 is as 9.5."""
    found = scaled(make_policy(), changed(num_experts=32))
    assert [r.bounds for r in found.regimes] == [(0, 9), (10, 19)]
    halved = scaled(make_policy(), changed(top_k=6))
    assert [r.bounds for r in halved.regimes] == [(0, 2), (3, 4)]


def test_a_regime_between_two_t_is_left_out():
    policy = make_policy()
    one = policy.regimes[0].model_copy(update=dict(min_tokens=3, max_tokens=3))
    last = policy.regimes[1].model_copy(update=dict(min_tokens=4, max_tokens=None))
    found = scaled(policy.model_copy(update={"regimes": [one, last]}), changed(num_experts=8, num_local_experts=4))
    assert [(r.bounds, r.choice) for r in found.regimes] == [((2, None), last.choice)]


@given(
    experts=st.sampled_from([8, 16, 24, 32, 256]),
    top_k=st.integers(1, 4),
    bounds=st.lists(st.integers(0, 60), min_size=2, max_size=8, unique=True).map(sorted),
    tokens=st.integers(0, 3000),
)
def test_every_t_is_decided_as_the_t_with_its_rows(experts, top_k, bounds, tokens):
    policy = make_policy()
    template = policy.regimes[0]
    pairs = list(zip(bounds[::2], bounds[1::2], strict=False))
    regimes = [template.model_copy(update=dict(min_tokens=a, max_tokens=b)) for a, b in pairs]
    policy = make_policy(regimes=regimes)
    problem = changed(num_experts=experts, top_k=top_k)
    there = tokens * problem.top_k * PROBLEM.num_experts // (problem.num_experts * PROBLEM.top_k)
    wanted = next((r.label for r in policy.regimes if there in r), None)
    found = next((r for r in scaled(policy, problem).regimes if tokens in r), None)
    assert (found is None) == (wanted is None)
    assert found is None or f"at T = {wanted}:" in found.reason


def test_it_says_that_nothing_was_measured():
    problem = changed(num_experts=32)
    found = scaled(make_policy(), problem)
    assert found.problem == problem and found.definition == problem.definition
    assert found.candidates == (Candidate("one"), Candidate("two"), REFERENCE)
    table = resolve(found, problem, CPU, note="scaled")
    for tokens, choice in ((3, "one"), (12, "two"), (20, "torch_reference")):
        decision = table.decision(tokens)
        assert str(decision.choice) == choice and decision.evidence == () and decision.expected_regret is None
        assert decision.reasons[0] == "scaled" and f"of {PROBLEM.definition}" in decision.reasons[-1]
    assert table.decision(12).reasons[1] == f"policy regime 10-19: two taken: of {PROBLEM.definition} at T = 5-9: r"
    assert resolve(make_policy(), PROBLEM, CPU).decision(7).reasons[0].startswith("policy regime 5-9")


def test_the_shipped_policies_can_be_scaled(tmp_path):
    for path in shipped_policy_dir().glob("*/*.json"):
        policy = load_policy(path)
        same = scaled(policy, policy.problem)
        assert [r.bounds for r in same.regimes] == [r.bounds for r in policy.regimes]
        assert [r.choice for r in same.regimes] == [r.choice for r in policy.regimes]
        other = scaled(policy, MoEProblem(num_experts=128, num_local_experts=16, hidden_size=4096))
        save_policy(other, tmp_path / "other.json")  # whole: it is what it says
        assert dumps_policy(load_policy(tmp_path / "other.json")) == dumps_policy(other)


@pytest.mark.usefixtures("spies")
def test_a_layer_takes_the_nearest_problems_regimes():
    other = changed(num_experts=32)
    save_policy(make_policy(other), policy_path(user_policy_dir(), "cpu", other))
    inputs = inputs_of(random_weights(PROBLEM, "cpu"), 2)
    layer = layer_of(inputs)
    # Half the experts, so half the T: 0-4 and 5-9 become 0-2 and 3-4.
    assert [str(layer.choice(t)) for t in (1, 2, 3, 4, 5)] == ["one", "one", "two", "two", "torch_reference"]
    said = f"nothing was measured for {PROBLEM.definition}: it takes the regimes of the nearest problem, "
    for tokens in (2, 5):
        assert layer.explain(tokens).reasons[0].startswith(said + other.definition)
    assert layer.explain(2).source == "regime"
    # One of its own is taken as soon as there is one.
    save_policy(make_policy(), policy_path(user_policy_dir(), "cpu", PROBLEM).with_name("own.json"))
    layer.reload_policy()
    assert str(layer.choice(4)) == "one" and "nothing was measured" not in layer.explain(4).reasons[0]


def test_what_cannot_run_is_passed_over_for_what_can(spies):  # noqa: F811
    for spy in spies:
        spy.reasons = ["asleep"]
    other = changed(num_experts=32)
    policy = make_policy(other, candidates=[Candidate("one"), Candidate("two")], default=Candidate("two"))
    save_policy(policy, policy_path(user_policy_dir(), "cpu", other))
    decision = layer_of(inputs_of(random_weights(PROBLEM, "cpu"), 2)).explain(2)
    assert (decision.choice, decision.source) == (REFERENCE, "unmeasured")
    assert any("one passed over" in reason and "asleep" in reason for reason in decision.reasons)


def test_a_policy_that_is_given_must_match(spies):  # noqa: F811
    with pytest.raises(ValueError, match="num_experts=32"):
        layer_of(inputs_of(random_weights(PROBLEM, "cpu"), 2), policy=make_policy(changed(num_experts=32)))


def test_a_gpu_says_whose_regimes_it_takes():
    problem = MoEProblem(num_experts=128, num_local_experts=16)
    with pytest.warns(UserWarning, match="no policy for device nvidia_h200 .*nearest problem") as caught:
        table = lookup.decision_table(problem, DeviceKey("nvidia_h200", (9, 0)))
    message = str(next(w.message for w in caught if "no policy" in str(w.message)))
    assert (
        MoEProblem().definition in message
        and "hybrid-moe regenerate --num-experts 128 --num-local-experts 16`" in message
    )
    for tokens in (1, 64, 20000):
        assert f"nothing was measured for {problem.definition}" in table.decision(tokens).reasons[0]


def test_the_gpu_without_any_policy_runs_the_first_that_can():
    with pytest.warns(UserWarning, match="the first supported of"):
        table = lookup.decision_table(PROBLEM, DeviceKey("nvidia_x", (9, 0)))
    assert table.decision(3).source == "no_policy"
    with pytest.raises(NoBackendError):
        resolve(None, PROBLEM, CPU)
