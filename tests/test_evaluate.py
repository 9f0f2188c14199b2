"""A policy on records that it wasn't learned from: its regret, the bound, every candidate alone, and the noise."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from test_learn import PROBLEM, learned, measurements, record, table

from hybrid_moe.candidate import Candidate
from hybrid_moe.learn.evaluate import evaluate
from hybrid_moe.learn.learner import learn
from hybrid_moe.measure.readers import read_records
from hybrid_moe.policy.schema import LearnerOptions

ROOT = Path(__file__).parents[1]
A, B, C = Candidate("a"), Candidate("b"), Candidate("c")
# a up to T = 10, b from 11 on.
POLICY = learned(table(a={1: 1, 10: 1, 11: 2, 20: 2}, b={1: 2, 10: 2, 11: 1, 20: 1}), tie_margin=0.0)
LOADS = ("uniform", "zipf", "concentrated")


def loads(num_tokens, **latencies):
    """Records of each candidate at the three loads."""
    return [
        record(name, num_tokens, float(us), routing=routing)
        for name, each in latencies.items()
        for routing, us in zip(LOADS, each, strict=True)
    ]


def test_a_policy_of_two_regimes():
    assert [(r.label, r.choice) for r in POLICY.regimes] == [("1-10", A), ("11-", B)]


def test_regret_bound_and_gain():
    # At T = 5 the policy runs a, and b is best for two of the three loads; at T = 15 it runs b, the best for all.
    found = evaluate(POLICY, [*loads(5, a=(100, 150, 100), b=(100, 100, 120)), *loads(15, a=(3, 3, 3), b=(2, 2, 2))])
    assert [(j.at.num_tokens, j.choice, j.regret) for j in found.judged] == [
        (5, A, 0.0),  # sorted by load: concentrated, uniform, zipf
        (5, A, 0.0),
        (5, A, 0.5),
        (15, B, 0.0),
        (15, B, 0.0),
        (15, B, 0.0),
    ]
    # Each T counts once: (0.5 / 3 + 0) / 2.
    assert found.policy.mean == pytest.approx(0.5 / 6)
    assert (found.policy.worst, found.policy.worst_at.num_tokens, found.policy.worst_at.routing) == (0.5, 5, "zipf")
    assert {j.bound for j in found.judged} == {B}
    assert found.bound.mean == pytest.approx(0.2 / 6) and found.bound.worst == pytest.approx(0.2)
    gains = {s.choice: s.policy_gain for s in found.singles}
    assert gains[A] == pytest.approx(math.exp((0 + math.log(1.5)) / 2) - 1)
    assert gains[B] == pytest.approx(math.exp(math.log(1.2 / 1.5) / 3 / 2) - 1)  # better than the policy
    assert [s.choice for s in found.singles] == [B, A]
    assert found.noise is None and found.not_judged == ()
    # What isn't known hides nothing.
    assert [j.within_noise for j in found.judged] == [j.regret == 0 for j in found.judged]
    assert found.to_dict()["beyond_noise"] == 1


def test_a_t_with_more_workloads_counts_no_more_than_another():
    """Mean of the workloads at each T, then of the T: 0.3 at T = 5 of three loads, 1.0 at T = 15 of one."""
    records = [*loads(5, a=(100, 150, 140), b=(100, 100, 100)), record("a", 15, 2.0), record("b", 15, 4.0)]
    found = evaluate(POLICY, records)
    assert [j.regret for j in found.judged] == pytest.approx([0.4, 0.0, 0.5, 1.0])
    assert found.policy.mean == pytest.approx((0.3 + 1.0) / 2)  # over the workloads it would be 0.475
    gains = {s.choice: s.policy_gain for s in found.singles}
    at_5 = math.log(1 / 1.5) + math.log(1 / 1.4)
    assert gains[B] == pytest.approx(math.exp(at_5 / 3 / 2) - 1)
    assert {s.choice: s.score.mean for s in found.singles}[A] == pytest.approx(0.15)


def test_the_bound_is_best_on_the_mean_of_the_logarithms():
    slowdowns = {A: (1, 1, 2.1), B: (1.5, 1.5, 1)}
    assert sum(slowdowns[B]) < sum(slowdowns[A]) and math.prod(slowdowns[A]) < math.prod(slowdowns[B])
    found = evaluate(POLICY, loads(5, a=(100, 100, 210), b=(150, 150, 100)))
    assert {j.bound for j in found.judged} == {A}


def test_the_oracle_may_be_a_candidate_that_the_policy_does_not_know():
    found = evaluate(POLICY, table(a={5: 4}, b={5: 8}, c={5: 2}))
    assert (found.judged[0].oracle, found.judged[0].bound, found.policy.mean) == (C, C, 1.0)
    assert [(s.choice, s.score.mean) for s in found.singles] == [(C, 0.0), (A, 1.0), (B, 3.0)]


def test_repeated_records_count_by_their_median():
    records = [record("a", 5, us) for us in (1.0, 90.0, 3.0)] + [record("b", 5, 2.0)]
    assert evaluate(POLICY, records).policy.mean == pytest.approx(0.5)


def test_noise_stands_beside_the_regret():
    def noisy(spread):
        return evaluate(POLICY, [record("a", 5, 110.0, spread=0.01), record("b", 5, 100.0, spread=spread)])

    assert noisy(0.02).noise == pytest.approx(0.02)
    assert not noisy(0.02).judged[0].within_noise  # 10% slower at 2% of noise
    assert noisy(0.2).judged[0].within_noise
    assert noisy(0.02).to_dict()["beyond_noise"] == 1


def test_what_was_not_right_is_not_judged_by():
    records = loads(5, a=(1, 1, 1), b=(2, 2, 2))
    wrong = record("a", 5, 0, "failed", routing="zipf")
    found = evaluate(POLICY, [r for r in records if (r.backend, r.routing) != ("a", "zipf")] + [wrong])
    assert found.policy.workloads == 2
    ((at, reason),) = found.not_judged
    assert at.routing == "zipf" and "a, which the policy runs at T = 5, has no right result" in reason
    assert [j.bound for j in found.judged] == [B, B]  # a isn't right at all workloads of this T
    # Neither at all workloads of the T: there is no bound.
    split = [record("a", 6, 1.0), record("b", 6, 1.0, routing="zipf"), *records]
    assert [(at.num_tokens, why) for at, why in evaluate(POLICY, split).not_judged] == [
        (6, "no candidate is right at all workloads of T = 6")
    ] * 2
    with pytest.raises(ValueError, match="at no workload: a, which the policy runs at T = 5, has no right result"):
        evaluate(POLICY, table(b={5: 1}))


def test_records_are_split_or_refused():
    records = table(a={5: 1}, b={5: 2})
    elsewhere = [record("b", 5, 0.1, device="gpu_y"), record("peer:fast", 5, 0.1), record("b", 5, 0.1, timing="eager")]
    assert evaluate(POLICY, [*records, *elsewhere]).policy.mean == 0  # the policy was learned from cuda_graph
    assert evaluate(POLICY, [*elsewhere, record("a", 5, 0.2, timing="eager")], timing="eager").timing == "eager"
    with pytest.raises(ValueError, match=r"policy is for gpu_x .*; the records are of gpu_y with moe_fp8"):
        evaluate(POLICY, elsewhere[:1])
    with pytest.raises(ValueError, match="expected some timed with cuda_graph, got eager: name another as timing="):
        evaluate(POLICY, elsewhere)
    with pytest.raises(ValueError, match="none of the 1 records passed"):
        evaluate(POLICY, [record("a", 5, 0, "failed")])
    versions = [record(n, 5, 1.0, environment={"torch": v}) for n in "ab" for v in ("2.10.0", "2.11.0")]
    with pytest.raises(ValueError, match="several versions: torch 2.10.0 .*2.11.0"):
        evaluate(POLICY, versions)
    assert evaluate(POLICY, versions, where={"torch": "2.11"}).policy.workloads == 1
    undecided = POLICY.model_copy(update={"environment": {}})
    with pytest.raises(ValueError, match="several ways: cuda_graph, eager"):
        evaluate(undecided, [*records, *elsewhere])


def test_json():
    data = json.loads(json.dumps(evaluate(POLICY, loads(5, a=(1, 2, 1), b=(2, 1, 2))).to_dict(), allow_nan=False))
    assert data["policy"]["worst_at"] == dict(num_tokens=5, local_expert_offset=0, routing="zipf", seed=0, workload="")
    assert [s["candidate"] for s in data["singles"]] == ["a", "b"]
    assert data["judged"][0]["slowdown"] == {"a": 1.0, "b": 2.0}


@given(measurements())
@settings(max_examples=60, deadline=None)
def test_nothing_beats_the_bound_and_the_bound_not_the_oracle(case):
    records, options = case
    policy = learned(records, **options)
    try:
        found = evaluate(policy, records)
    except ValueError as error:
        assert "at no workload" in str(error)
        return
    assert 0 <= found.bound.mean and 0 <= found.policy.mean
    broken = {at.num_tokens for at, _ in found.not_judged}
    for num_tokens in {j.at.num_tokens for j in found.judged} - broken:
        there = [j for j in found.judged if j.at.num_tokens == num_tokens]
        logs = {
            c: sum(math.log(j.slowdown[c]) for j in there) for c in set.intersection(*(set(j.slowdown) for j in there))
        }
        (bound,) = {j.bound for j in there}
        assert logs[bound] == pytest.approx(min(logs.values()), abs=1e-9)
    assert len(found.judged) + len(found.not_judged) == len(
        {(r.num_tokens, r.routing) for r in records if r.status == "passed"}
    )


# From T = 901 on the H100's records have other ranks too.
ONE_A_T = ("uniform", "mean_rank")


@pytest.mark.parametrize(("device", "worst"), [("nvidia_h100_80gb_hbm3", 0.04), ("nvidia_h200", 0.08)])
def test_a_policy_of_half_of_the_measured_tokens_on_the_other_half(device, worst):
    records = [
        r
        for r in read_records(ROOT / "benchmarks" / "results" / device / "definition.jsonl")
        if r.timing == "cuda_graph" and r.routing in ONE_A_T
    ]
    half = set(sorted({r.num_tokens for r in records})[::2])
    options = LearnerOptions(tie_margin=0.03, max_gap=2.5, prefer="triton_fused[gemm=triton]")
    policy = learn([r for r in records if r.num_tokens in half], options, problem=PROBLEM, inputs=[])
    held_out = [r for r in records if r.num_tokens not in half]
    found = evaluate(policy, held_out)
    assert found.policy.workloads == 13 and found.not_judged == ()
    # One workload a T: the best by T alone is the oracle.
    assert found.bound.worst == 0
    # On the H100 one candidate is the fastest at every T.
    assert (found.policy.mean > 0) == (device == "nvidia_h200")
    assert found.policy.mean < 0.02 and found.policy.worst < worst
    assert 0 < found.noise < 0.01
    gains = {str(single.choice): single.policy_gain for single in found.singles}
    # flashinfer's has no records on the H100.
    assert len(gains) == (4 if device == "nvidia_h200" else 3) and gains.pop("triton_fused[gemm=triton]") >= 0
    assert all(gain > 0.02 for gain in gains.values())


@pytest.mark.parametrize("device", ["nvidia_h100_80gb_hbm3", "nvidia_h200"])
def test_on_what_it_was_learned_from_it_has_the_training_regret(device):
    """Where each T has one workload, judging workloads is judging T."""
    path = ROOT / "benchmarks" / "results" / device / "definition.jsonl"
    records = [r for r in read_records(path) if r.timing == "cuda_graph" and r.routing in ONE_A_T]
    policy = learn(records, LearnerOptions(tie_margin=0.03, max_gap=2.5), problem=PROBLEM, inputs=[])
    found = evaluate(policy, records)
    assert found.policy.workloads == policy.training_regret.num_tokens == 26
    assert found.policy.mean == pytest.approx(policy.training_regret.mean, abs=1e-6)
    assert found.policy.worst == pytest.approx(policy.training_regret.worst, abs=1e-6)
