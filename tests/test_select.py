"""The order of choice, its trace, and the table that a layer keeps."""

import json
import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.numerics import Tolerance
from hybrid_moe.policy.schema import Evidence, LearnerOptions, Policy, Regime, RegretSummary
from hybrid_moe.policy.select import NoBackendError, choose, explicit, resolve
from hybrid_moe.problem import MoEProblem

A, B, C = Candidate("a"), Candidate("b", {"x": 1}), Candidate("c")
PROBLEM, DEVICE = MoEProblem(), DeviceKey("gpu_x", (9, 0))


def make_policy(bounds=((4, 8, B), (9, 9, A), (20, None, C)), candidates=(A, B, C), default=A):
    evidence = [Evidence(num_tokens=5, workloads=1, slowdown={str(A): 1.5, str(B): 1.0})]
    regimes = [
        Regime(
            min_tokens=low,
            max_tokens=high,
            choice=choice,
            verdict="best",
            verified="measured",
            reason=f"why {low}",
            expected_regret=0.125,
            evidence=evidence,
        )
        for low, high, choice in bounds
    ]
    return Policy(
        device=DEVICE.name,
        problem=PROBLEM,
        definition=PROBLEM.definition,
        candidates=candidates,
        default=default,
        default_reason="why default",
        default_evidence=[],
        regimes=regimes,
        training_regret=RegretSummary(mean=0, worst=0, worst_num_tokens=None, num_tokens=1),
        leave_one_out_regret=None,
        learner=LearnerOptions(),
        tolerance=Tolerance(),
        inputs=[],
        environment={},
    )


def test_the_regime_comes_first():
    decision = choose(make_policy(), PROBLEM, DEVICE, 8)
    assert (decision.choice, decision.source, decision.regime) == (B, "regime", (4, 8))
    assert decision.expected_regret == 0.125
    assert decision.reasons == ("policy regime 4-8: b[x=1] taken: why 4",)


def test_then_the_default():
    decision = choose(make_policy(), PROBLEM, DEVICE, 10)
    assert (decision.choice, decision.source, decision.regime) == (A, "default", None)
    assert decision.reasons == ("policy regimes: none holds this T", "policy default: a taken: why default")
    assert decision.expected_regret is None


def test_a_refused_regime_runs_the_default_and_says_so():
    decision = choose(make_policy(), PROBLEM, DEVICE, 8, refusals={B: ["needs x", "needs y"]})
    assert (decision.choice, decision.source, decision.regime) == (A, "default", (4, 8))
    assert decision.reasons[0] == "policy regime 4-8: b[x=1] passed over, as it can't run here: needs x; needs y"
    assert decision.expected_regret == 0.5  # measured in this regime for the default too


def test_then_the_next_candidate():
    decision = choose(make_policy(), PROBLEM, DEVICE, 8, refusals={A: ["no"], B: ["never"], C: []})
    assert (decision.choice, decision.source) == (C, "fallback")
    assert len(decision.reasons) == 3
    assert decision.expected_regret is None


def test_the_next_candidates_come_in_the_policys_order():
    d = Candidate("d")
    policy = make_policy(candidates=(A, d, C, B))
    for refused, wanted in (((A, B), d), ((A, B, d), C)):
        assert choose(policy, PROBLEM, DEVICE, 8, refusals={c: ["no"] for c in refused}).choice == wanted


def test_spans_hold_every_t_from_1_on():
    """Cut where a regime begins or has ended, whoever runs there."""
    for bounds in ((), ((1, 8, B),), ((4, 8, B), (9, 9, A), (20, None, C))):
        policy = make_policy(bounds)
        table = resolve(policy, PROBLEM, DEVICE)
        spans = table.spans()
        starts = {1, *(low for low, _, _ in bounds), *(high + 1 for _, high, _ in bounds if high is not None)}
        assert [span.first for span in spans] == sorted(starts)
        assert [span.last for span in spans] == [*(start - 1 for start in sorted(starts)[1:]), None]
        for span in spans:
            for tokens in (span.first, span.last or span.first + 1000):
                assert choose(policy, PROBLEM, DEVICE, tokens).choice == span.decision.choice
            assert span.decision == table.decision(span.first)


def test_then_what_was_never_measured_here():
    refusals = {A: ["no"], B: ["no"], C: ["no"], Candidate("d"): ["no"]}
    order = [A, Candidate("d"), Candidate("e"), Candidate("f")]
    for num_tokens, regime in ((8, (4, 8)), (10, None)):
        decision = choose(make_policy(), PROBLEM, DEVICE, num_tokens, refusals=refusals, fallback_order=order)
        assert (decision.choice, decision.source) == (Candidate("e"), "unmeasured")
        assert decision.regime == regime and decision.expected_regret is None
        assert decision.reasons[-1] == "beyond the policy: e taken: the first that can run, never measured here"
        assert "beyond the policy: d passed over, as it can't run here: no" in decision.reasons
    # What was measured comes first, wherever it stands in the order.
    refusals[C] = []
    assert choose(make_policy(), PROBLEM, DEVICE, 8, refusals=refusals, fallback_order=order).choice == C


def test_then_an_error_with_every_reason():
    refusals = {A: ["no1", "no2"], B: ["no3"], C: ["no4"], Candidate("d"): ["no5"]}
    with pytest.raises(NoBackendError) as error:
        choose(make_policy(), PROBLEM, DEVICE, 8, refusals=refusals, fallback_order=[Candidate("d")])
    for text in ("gpu_x", "a: no1; no2", "b[x=1]: no3", "c: no4", "d: no5"):
        assert text in str(error.value)
    with pytest.raises(NoBackendError):
        resolve(make_policy(), PROBLEM, DEVICE, refusals)


def test_without_a_policy():
    decision = choose(None, PROBLEM, DEVICE, 8, refusals={A: ["no"]}, fallback_order=[A, B])
    assert (decision.choice, decision.source, decision.regime) == (B, "no_policy", None)
    assert "none for gpu_x" in decision.reasons[0] and "no" in decision.reasons[1]
    with pytest.raises(NoBackendError, match="a: no"):
        choose(None, PROBLEM, DEVICE, 8, refusals={A: ["no"]}, fallback_order=[A])
    with pytest.raises(NoBackendError, match="no candidates"):
        choose(None, PROBLEM, DEVICE, 8)


def test_explicit_never_falls_back():
    assert explicit(A, 3).source == "explicit"
    with pytest.raises(BackendUnsupportedError, match="no1; no2"):
        explicit(A, 3, {A: ("no1", "no2")})


def test_wrong_arguments():
    table = resolve(make_policy(), PROBLEM, DEVICE)
    for call in (
        lambda: choose(make_policy(), PROBLEM, DEVICE, -1),
        lambda: choose(None, PROBLEM, DEVICE, -1, fallback_order=[A]),
        lambda: explicit(A, -1),
        lambda: table.choice(-1),
        lambda: table.decision(-1),
    ):
        with pytest.raises(ValueError, match="num_tokens: expected an integer of at least 0, got -1"):
            call()
    for wrong in (2.5, True, "3", None):
        with pytest.raises(ValueError, match="num_tokens: expected an integer of at least 0, got"):
            table.choice(wrong)
    with pytest.raises(ValueError, match="policy: expected one for gpu_y .*, got one for gpu_x"):
        choose(make_policy(), PROBLEM, DeviceKey("gpu_y"), 1)
    with pytest.raises(ValueError, match="gate_first=True"):
        choose(make_policy(), MoEProblem(gate_first=True), DEVICE, 1)


def test_to_dict_is_json():
    keys = ["backend", "config", "regime", "source", "num_tokens", "reasons", "evidence", "expected_regret"]
    for num_tokens, regime in ((5, {"min_tokens": 4, "max_tokens": 8}), (30, {"min_tokens": 20, "max_tokens": None})):
        data = json.loads(json.dumps(choose(make_policy(), PROBLEM, DEVICE, num_tokens).to_dict()))
        assert list(data) == keys
        assert data["regime"] == regime
        assert data["evidence"] == [{"num_tokens": 5, "workloads": 1, "slowdown": {"a": 1.5, "b[x=1]": 1.0}}]
    data = choose(make_policy(), PROBLEM, DEVICE, 5).to_dict()
    assert (data["backend"], data["config"], data["num_tokens"]) == ("b", {"x": 1}, 5)
    assert choose(make_policy(), PROBLEM, DEVICE, 0).to_dict()["regime"] is None


@st.composite
def cases(draw):
    edges = sorted(draw(st.sets(st.integers(0, 60), max_size=10)))
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    choices = st.sampled_from([A, B, C])
    bounds = [(low, high, draw(choices)) for low, high in pairs]
    if draw(st.booleans()):
        bounds.append((70, None, draw(choices)))
    policy = make_policy(bounds, draw(st.permutations([A, B, C])), draw(choices))
    if draw(st.integers(0, 4)) == 0:
        policy = None
    refusals = draw(st.dictionaries(st.sampled_from([A, B, C]), st.lists(st.just("no"), max_size=1)))
    return policy, refusals


@given(cases())
@settings(deadline=None)
def test_table_and_choose_agree(case):
    policy, refusals = case
    if all(refusals.get(choice) for choice in (A, B, C)):
        with pytest.raises(NoBackendError):
            resolve(policy, PROBLEM, DEVICE, refusals, [A, B, C])
        return
    table = resolve(policy, PROBLEM, DEVICE, refusals, [A, B, C])
    seen = set()
    for num_tokens in range(80):
        decision = choose(policy, PROBLEM, DEVICE, num_tokens, refusals=refusals, fallback_order=[A, B, C])
        assert table.choice(num_tokens) == decision.choice
        assert table.decision(num_tokens) == decision
        assert not refusals.get(decision.choice)
        seen.add(decision.choice)
    assert seen == set(table.choices)


def test_the_table_is_fast_and_makes_no_objects():
    table = resolve(make_policy(), PROBLEM, DEVICE)
    assert table.choice(5) is table.choice(6)
    per_call = min(timeit.repeat(lambda: table.choice(14107), number=10_000, repeat=5)) / 10_000
    assert per_call < 5e-6  # 0.1 us where nothing else runs


def test_the_table_does_not_follow_its_arguments():
    refusals = {}
    table = resolve(make_policy(), PROBLEM, DEVICE, refusals)
    refusals[B] = ["no"]
    assert table.decision(5).choice == table.choice(5) == B
