"""The learner: what it chooses, when it doubts, what it refuses, and that the same input gives the same bytes."""

import itertools
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.candidate import Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.learn.compare import by_workload, points_of
from hybrid_moe.learn.learner import _Learner, _right_everywhere, learn, learn_from_files, parse_regimes
from hybrid_moe.measure.readers import read_any
from hybrid_moe.measure.records import BenchRecord, append_record
from hybrid_moe.numerics import Tolerance
from hybrid_moe.policy.schema import LearnerOptions
from hybrid_moe.policy.select import choose, resolve
from hybrid_moe.policy.store import dumps_policy
from hybrid_moe.problem import MoEProblem

TABLE = Path(__file__).parents[1] / "benchmarks" / "data" / "nvidia_b200_2026-02-02.md"
PROBLEM = MoEProblem()
TRITON = Candidate("triton_fused", {"gemm": "sgl_kernel"})
FLASHINFER = Candidate("flashinfer_trtllm")


def record(name, num_tokens, latency, status="passed", spread=None, **changes):
    fields = dict(
        device="gpu_x",
        problem=PROBLEM.definition,
        backend=name,
        num_tokens=num_tokens,
        local_expert_offset=0,
        routing="uniform",
        seed=0,
        status=status,
        timing="cuda_graph",
    )
    if status == "passed":
        half = None if spread is None else spread * latency
        fields["latency_us"] = {"median": latency}
        if half is not None:
            fields["latency_us"] |= {"p10": latency - half, "p90": latency + half}
    else:
        fields["reason"] = "because"
    return BenchRecord(**(fields | changes))


def table(**latencies):
    """Records from ``name={T: latency}``."""
    return [record(name, t, float(us)) for name, by_t in latencies.items() for t, us in by_t.items()]


def learned(records, **options):
    return learn(records, LearnerOptions(**options), problem=PROBLEM, inputs=[])


def runs(policy, num_tokens):
    return choose(policy, policy.problem, DeviceKey(policy.device), num_tokens).choice


def shape(policy):
    return [(r.label, r.choice.backend, r.verdict) for r in policy.regimes]


# ---- B200 ----


def test_b200_in_its_own_regimes():
    options = LearnerOptions(regimes="1-7,14-32,52-80,901,10001-", tie_margin=0.05, prefer="triton_fused")
    policy = learn_from_files([TABLE], options)
    assert {t: runs(policy, t) for t in (1, 13, 33, 53, 901, 5000, 14107)} == dict.fromkeys(
        (1, 13, 33, 53, 901, 5000, 14107), FLASHINFER
    )
    for t in (14, 15, 16, 17, 32):
        assert runs(policy, t) == TRITON
    tie = policy.regimes[1]
    assert (tie.label, tie.verdict, tie.verified) == ("14-32", "tie", "published")
    assert "0.97" in tie.reason and "5%" in tie.reason
    assert policy.default == FLASHINFER
    assert policy.candidates == (FLASHINFER, TRITON)
    assert policy.training_regret.worst_num_tokens == 16
    assert policy.training_regret.worst == pytest.approx(32.04 / 26.44 - 1, rel=1e-5)
    assert tie.expected_regret == pytest.approx((32.04 / 26.44 + 32.25 / 31.44 + 2) / 4 - 1, rel=1e-4)
    assert policy.leave_one_out_regret.num_tokens == 19


def test_b200_without_sgl_kernel_runs_the_default_and_says_so():
    options = LearnerOptions(regimes="14-32", prefer="triton_fused")
    policy = learn_from_files([TABLE], options)
    refusals = {TRITON: ["sgl_kernel is not installed"]}
    decision = choose(policy, policy.problem, DeviceKey("nvidia_b200"), 16, refusals=refusals)
    assert (decision.choice, decision.source) == (FLASHINFER, "default")
    assert "sgl_kernel is not installed" in decision.reasons[0]
    assert decision.expected_regret == pytest.approx((31.75 / 31.15 + 34.90 / 32.25 + 2) / 4 - 1, rel=1e-4)


def test_b200_auto_without_a_margin():
    policy = learn_from_files([TABLE], LearnerOptions(regimes="auto", tie_margin=0.0))
    device = DeviceKey("nvidia_b200")
    lookup = resolve(policy, policy.problem, device)
    triton = [t for t in range(20001) if lookup.choice(t) == TRITON]
    assert triton == [14, 15]
    assert set(lookup.choices) == {FLASHINFER, TRITON}
    assert policy.training_regret.mean == 0
    assert policy.training_regret.worst_num_tokens is None


def test_b200_auto_with_the_margin_is_unsure_about_14_and_15():
    policy = learn_from_files([TABLE], LearnerOptions(regimes="auto", tie_margin=0.05))
    assert all(runs(policy, t) == FLASHINFER for t in range(1, 100))
    assert any("unsure" in regime.reason for regime in policy.regimes)


# ---- Regimes that are given ----


def test_best_tie_and_unsure():
    records = table(a={1: 100, 10: 100, 100: 100}, b={1: 97, 10: 50, 100: 210}, c={1: 98, 10: 300, 100: 300})
    given_regimes = "1,10,100"
    policy = learned(records, regimes=given_regimes, tie_margin=0.0)
    assert shape(policy) == [("1", "b", "best"), ("10", "b", "best"), ("100", "a", "best")]
    assert policy.default == Candidate("a")
    policy = learned(records, regimes=given_regimes, tie_margin=0.05)
    assert shape(policy) == [("1", "a", "unsure"), ("10", "b", "best"), ("100", "a", "best")]
    policy = learned(records, regimes=given_regimes, tie_margin=0.05, prefer="c")
    assert shape(policy)[0] == ("1", "c", "tie")
    assert "0.99" in policy.regimes[0].reason


def test_the_preferred_fastest_is_no_tie():
    records = table(a={1: 99, 10: 50}, b={1: 98, 10: 100})
    policy = learned(records, regimes="1", prefer="b")
    assert policy.default == Candidate("a")
    assert shape(policy) == [("1", "b", "best")]
    assert [e.num_tokens for e in policy.default_evidence] == [10]


def test_prefer_names_a_candidate_or_a_backend():
    records = [
        record("a", 1, 100.0),
        record("b", 1, 102.0, config={"x": 1}),
        record("b", 1, 103.0, config={"x": 2}),
    ]
    assert learned(records, regimes="1", prefer="b").regimes[0].choice == Candidate("b", {"x": 1})
    assert learned(records, regimes="1", prefer="b[x=2]").regimes[0].choice == Candidate("b", {"x": 2})
    with pytest.raises(ValueError, match=r"prefer: expected .*a, b\[x=1\], b\[x=2\]"):
        learned(records, prefer="d")


def test_an_interval_without_evidence_makes_no_regime():
    policy = learned(table(a={1: 1, 50: 1}, b={1: 2, 50: 2}), regimes="1-7,10-20")
    assert shape(policy) == [("1-7", "a", "best")]
    assert [e.num_tokens for e in policy.default_evidence] == [50]


def test_each_num_tokens_weighs_once():
    # Many workloads at T = 1 say b, one each at T = 2 and 3 says a.
    records = table(a={2: 10, 3: 10}, b={2: 12, 3: 12})
    for seed in range(20):
        records += [record("a", 1, 12.0, seed=seed), record("b", 1, 10.0, seed=seed)]
    policy = learned(records, regimes="1-3", tie_margin=0.0)
    assert policy.regimes[0].choice == Candidate("a")
    assert policy.regimes[0].evidence[0].workloads == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "''"),
        ("1-7,", "''"),
        ("a", "'a'"),
        ("1-b", "'1-b'"),
        ("-7", "'-7'"),
        ("7-1", "smaller bound"),
        ("1-7,7-9", "expected disjoint intervals, got 1-7 and 7-9"),
        ("10-,20", "expected disjoint intervals, got 10- and 20"),
        ("Auto", "'Auto'"),
    ],
)
def test_malformed_regimes(text, message):
    with pytest.raises(ValueError, match=message):
        parse_regimes(text)
    with pytest.raises(ValueError, match="regimes"):
        learned(table(a={1: 1}), regimes=text)


def test_regimes_are_sorted():
    assert parse_regimes("10001-, 14-32,1-7 ,901") == [(1, 7), (14, 32), (901, 901), (10001, None)]


# ---- Regimes that are found ----


def test_bounds_between_neighbours():
    records = table(a={10: 1, 12: 1, 100: 2, 200: 1}, b={10: 2, 12: 2, 100: 1, 200: 2})
    policy = learned(records, tie_margin=0.0)
    # 12 and 100 are too far apart; so are 100 and 200 at a largest ratio of 1.5, but not at 2.
    assert [r.label for r in policy.regimes] == ["1-12", "100", "200-"]
    assert policy.default == Candidate("a")
    policy = learned(records, tie_margin=0.0, max_gap=2.0)
    assert [r.label for r in policy.regimes] == ["1-12", "100-141", "142-"]


def test_the_same_choice_fills_gaps():
    policy = learned(table(a={1: 1, 1000: 1}, b={1: 2, 1000: 2}))
    assert shape(policy) == [("1-", "a", "best")]


def test_a_switch_must_pay_for_itself():
    records = table(a={10: 100, 11: 108, 12: 100, 13: 100}, b={10: 200, 11: 100, 12: 200, 13: 200})
    assert [r.label for r in learned(records, tie_margin=0.0).regimes] == ["1-10", "11", "12-"]
    assert [r.label for r in learned(records, tie_margin=0.05).regimes] == ["1-"]  # 8% saved, two changes at 5%
    assert [r.label for r in learned(records, tie_margin=0.03).regimes] == ["1-10", "11", "12-"]


def test_joined_intervals_keep_what_was_said_of_the_parts():
    # At T = 14 and 15 alone Triton wins by just enough for its own interval; the default is still within the margin.
    (regime,) = learn_from_files([TABLE], LearnerOptions(tie_margin=0.05)).regimes
    assert regime.verdict == "best"
    assert "part of it: unsure" in regime.reason and "T = 14, 15" in regime.reason


# ---- No speed for a wrong answer ----


def test_a_candidate_is_chosen_only_where_it_was_right():
    right = table(a={10: 100, 12: 100, 14: 100}, b={10: 50, 14: 50})
    for missing in ([], [record("b", 12, 0, "failed")], [record("b", 12, 0, "unsupported")]):
        policy = learned(right + missing, regimes="10-14")
        assert shape(policy) == [("10-14", "a", "best")]
        assert "b" in policy.regimes[0].reason.partition("not right, or not measured")[2]
        policy = learned(right + missing, tie_margin=0.0)
        assert [(r.label, r.choice.backend) for r in policy.regimes] == [("1-10", "b"), ("11-12", "a"), ("13-", "b")]
        assert runs(policy, 12) == Candidate("a")
        assert "b" not in policy.regimes[1].evidence[0].slowdown


def test_what_was_wrong_somewhere_is_the_last_to_fall_back_to():
    """b is the fastest where it was right, and runs there; where the others can't run, c is asked before it."""
    records = table(a={1: 100, 100: 100}, b={1: 10}, c={1: 150, 100: 150}) + [record("b", 100, 0, "failed")]
    policy = learned(records, tie_margin=0.0)
    assert runs(policy, 1) == Candidate("b") and runs(policy, 100) == Candidate("a")
    assert [choice.backend for choice in policy.candidates] == ["a", "c", "b"]
    # One that is wrong and runs nowhere isn't among them.
    wrong = learned(records + table(d={1: 5000}) + [record("d", 100, 0, "failed")], tie_margin=0.0)
    assert [choice.backend for choice in wrong.candidates] == ["a", "c", "b"]


def test_one_wrong_workload_is_enough():
    records = [record(name, 10, us, routing=r) for name, us in (("a", 100.0), ("b", 50.0)) for r in ("uniform", "zipf")]
    policy = learned([*records, record("b", 10, 0, "failed", routing="concentrated")])
    assert runs(policy, 10) == Candidate("a")
    assert policy.candidates == (Candidate("a"),)


def test_a_wrong_answer_stands_until_a_later_record_passes():
    records = [record("a", 10, 100.0), record("b", 10, 50.0, timestamp="2026-01-02")]
    older = record("b", 10, 0, "failed", timestamp="2026-01-01")
    newer = record("b", 10, 0, "failed", timestamp="2026-01-03")
    same_time = record("b", 10, 0, "failed", timestamp="2026-01-02")
    unknown = record("b", 10, 0, "failed")
    assert runs(learned([*records, older]), 10) == Candidate("b")
    for wrong in (newer, same_time, unknown):
        assert runs(learned([*records, wrong]), 10) == Candidate("a")


def test_in_one_file_the_later_line_counts_whatever_the_clock_says(tmp_path):
    """Clocks are set back, and write the same second twice: a wrong answer must not be hidden, nor stand for ever."""
    right = record("b", 10, 50.0, timestamp="2026-01-02T00:00:00Z")
    other = record("a", 10, 100.0, timestamp="2026-01-02T00:00:00Z")

    def learned_from(*files):
        paths = [tmp_path / f"{number}.jsonl" for number in range(len(files))]
        for path, lines in zip(paths, files, strict=True):
            path.unlink(missing_ok=True)
            for line in lines:
                append_record(path, line)
        return {runs(learn_from_files(order, LearnerOptions()), 10) for order in itertools.permutations(paths)}

    times = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z", None, "yesterday")
    for time in times:
        wrong = record("b", 10, 0, "failed", timestamp=time)
        assert learned_from([other, wrong, right]) == {Candidate("b")}, time
        assert learned_from([other, right, wrong]) == {Candidate("a")}, time
        # Of two files, only the times say which is later.
        later = time == times[0]
        assert learned_from([other, right], [wrong]) == {Candidate("b" if later else "a")}, time
        assert learned_from([other, wrong, right], [wrong]) == {Candidate("b" if later else "a")}, time
    # As times, not as texts: half an hour later, though the text is smaller.
    zone = record("b", 10, 0, "failed", timestamp="2026-01-01T22:30:00-02:00")
    assert learned_from([other, right], [zone]) == {Candidate("a")}
    zone = record("b", 10, 0, "failed", timestamp="2026-01-02T01:30:00+02:00")
    assert learned_from([other, right], [zone]) == {Candidate("b")}


def test_errors_about_records_name_file_and_line(tmp_path):
    path = tmp_path / "r.jsonl"
    for line in (record("a", 1, 1.0), record("a", 2, 1.0, correctness={"rtol": 0.3})):
        append_record(path, line)
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2: a at T = 2 passed by looser bounds"):
        learn_from_files([path], LearnerOptions())
    path.unlink()
    append_record(path, record("a", 1, 1.0, local_expert_offset=225))
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1: local_expert_offset: expected 0 to 224, got 225"):
        learn_from_files([path], LearnerOptions())


def test_nothing_right_is_an_error():
    with pytest.raises(ValueError, match="no default: a lacks T = 2; b lacks T = 1"):
        learned(table(a={1: 1}, b={2: 1}))
    with pytest.raises(ValueError, match="no right one at T = 2: b"):
        learned([*table(a={1: 1}), record("b", 2, 0, "failed")])
    with pytest.raises(ValueError, match="none of the 1 records passed; found: failed"):
        learned([record("b", 2, 0, "failed")])
    with pytest.raises(ValueError, match="no record"):
        learned([])


def test_records_by_looser_bounds_are_refused():
    strict = record("a", 1, 1.0, correctness={"rtol": 0.1, "atol": 0.1, "required_matched_ratio": 0.9})
    learned([strict])
    for gate in ({"rtol": 0.3}, {"atol": 1.0}, {"required_matched_ratio": 0.5}, {"max_relative_l2": 0.1}):
        with pytest.raises(ValueError, match="looser bounds"):
            learned([record("a", 1, 1.0, correctness=gate)])
    loose = record("a", 1, 1.0, correctness={"rtol": 0.3})
    learn([loose], LearnerOptions(), problem=PROBLEM, inputs=[], tolerance=Tolerance(rtol=0.3))


# ---- Records ----


def test_mixed_records_are_refused():
    one = table(a={1: 1.0})
    with pytest.raises(ValueError, match="several devices: gpu_x, gpu_y; name one as device="):
        learned([*one, record("a", 2, 1.0, device="gpu_y")])
    with pytest.raises(ValueError, match="several ways: cuda_graph, eager; name one as timing="):
        learned([*one, record("a", 2, 1.0, timing="eager")])
    other = MoEProblem(hidden_size=128)
    with pytest.raises(ValueError, match="expected some about .*hidden_size=128"):
        learned([*one, record("a", 2, 1.0, problem=other.definition)])
    with pytest.raises(ValueError, match="expected some about .*num_experts=512"):
        learned([*one, record("a", 2, 1.0, num_experts=512)])
    speedup = record("a", 2, 1.0, latency_us=None, speedup_vs_reference=2.0)
    with pytest.raises(ValueError, match="latency_us and others speedup_vs_reference"):
        learned([*one, speedup])
    both = [*one, record("a", 1, 1.0, timing="eager"), record("b", 1, 0.5, timing="eager")]
    assert learned(both, timing="eager").candidates == (Candidate("b"), Candidate("a"))


def test_files_are_filtered_and_digested(tmp_path):
    path = tmp_path / "r.jsonl"
    other = MoEProblem(num_local_experts=64)
    for r in (record("a", 1, 1.0), record("a", 1, 1.0, device="gpu_y"), record("a", 1, 1.0, problem=other.definition)):
        append_record(path, r)
    with pytest.raises(ValueError, match="name one as problem="):
        learn_from_files([path], LearnerOptions())
    with pytest.raises(ValueError, match="name one as device="):
        learn_from_files([path], LearnerOptions(), PROBLEM)
    with pytest.raises(ValueError, match="device is 'gpu_z'; the records have gpu_x, gpu_y"):
        learn_from_files([path], LearnerOptions(), PROBLEM, "gpu_z")
    policy = learn_from_files([path], LearnerOptions(), other, "gpu_x")
    assert (policy.device, policy.problem, policy.definition) == ("gpu_x", other, other.definition)
    assert [(d.name, d.records) for d in policy.inputs] == [("r.jsonl", 3)]
    with pytest.raises(ValueError, match="none about it"):
        learn_from_files([path], LearnerOptions(), MoEProblem(gate_first=False, num_local_experts=8))


def test_peers_are_not_learned_from():
    peer = record("peer:fast", 1, 0.1, device="gpu_y", timing="eager")
    policy = learned([*table(a={1: 1.0}), peer])
    assert policy.candidates == (Candidate("a"),)


def test_repeated_records_count_by_their_median():
    records = [record("a", 1, us) for us in (1.0, 100.0, 3.0)] + [record("b", 1, 2.0)]
    assert learned(records, tie_margin=0.0).default == Candidate("b")


def test_measured_spread_widens_the_margin():
    def with_spread(spread):
        fast = [record("a", t, 90.0 if t == 1 else 100.0, spread=spread) for t in (1, 10)]
        return fast + [record("b", t, 100.0 if t == 1 else 50.0, spread=None) for t in (1, 10)]

    assert shape(learned(with_spread(None), regimes="1", tie_margin=0.05)) == [("1", "a", "best")]
    policy = learned(with_spread(0.2), regimes="1", tie_margin=0.05)
    assert shape(policy) == [("1", "b", "unsure")]
    assert "20% (the spread measured)" in policy.regimes[0].reason
    # A smaller spread doesn't narrow it.
    assert shape(learned(with_spread(0.01), regimes="1", tie_margin=0.15)) == [("1", "b", "unsure")]


def test_verified_and_environment():
    policy = learned([record("a", 1, 1.0, environment={"torch": "2", "gb_s": 1.5}), record("a", 2, 1.0)])
    assert policy.regimes[0].verified == "measured"
    assert policy.environment == {"gb_s": "1.5", "timing": "cuda_graph", "torch": "2"}
    several = [record("a", t, 1.0, environment={"t": t, "odd": t % 2}) for t in range(1, 9)]
    assert learned(several).environment == {"odd": "0 | 1", "t": "8 different values", "timing": "cuda_graph"}
    given_environment = learn(
        several, LearnerOptions(), problem=PROBLEM, inputs=[], environment={"who": "me"}
    ).environment
    assert given_environment == {"who": "me"}


def test_the_rule_that_the_records_passed_by(tmp_path):
    """Policies of records that name none stay as they are, to the byte."""

    def by_rules(*rules):
        judged = [record("a", t, 1.0, correctness={"rule": rule}) for t, rule in enumerate(rules, start=1)]
        return learned([*judged, record("b", 1, None, "failed", correctness={"rule": 3})])

    assert by_rules(2, 2).environment["gate_rule"] == "2"
    assert by_rules(2, 2).gate_rule == "rule 2 (the whole, each token, block and column, and the projection)"
    assert by_rules(2, None).gate_rule == "rule 1 | 2"
    assert "gate_rule" not in by_rules(None, 1).environment
    assert by_rules(None, 1).gate_rule == "rule 1 (the whole alone)"
    for tokens in (1, 2):
        append_record(tmp_path / "records.jsonl", record("a", tokens, 1.0, correctness={"rule": 2}))
    assert learn_from_files([tmp_path / "records.jsonl"], LearnerOptions()).environment["gate_rule"] == "2"


# ---- Regret ----


def test_leave_one_out_regret():
    records = table(a={10: 1, 11: 1, 13: 1}, b={10: 2, 11: 2, 13: 0.5})
    policy = learned(records, tie_margin=0.0)
    assert policy.training_regret.mean == 0
    # Without T = 13 everything is a, which is twice as slow there.
    assert (policy.leave_one_out_regret.worst, policy.leave_one_out_regret.worst_num_tokens) == (1.0, 13)
    assert policy.leave_one_out_regret.mean == pytest.approx(1 / 3, rel=1e-5)
    assert learned(records[:2] + records[3:5]).leave_one_out_regret is None


def test_of_equal_worst_regrets_the_smallest_t_is_named():
    """Of three T, the preferred candidate is slower by the same at two."""
    records = table(a={10: 1.0, 12: 1.02, 14: 1.02}, b={10: 1.0, 12: 1.0, 14: 1.0})
    policy = learned(records, tie_margin=0.05, prefer="a")
    assert policy.training_regret.worst == pytest.approx(0.02)
    assert policy.training_regret.worst_num_tokens == 12


def test_regret_counts_every_workload_of_a_num_tokens():
    records = [record("a", 1, 10.0), record("b", 1, 20.0)]
    records += [record("a", 1, 15.0, routing="zipf"), record("b", 1, 10.0, routing="zipf")]
    policy = learned(records, tie_margin=0.0)
    assert policy.default == Candidate("a")
    assert policy.training_regret.mean == pytest.approx(0.25)


def test_the_loads_of_a_num_tokens_decide_together():
    # b wins two loads of three, a by the mean of the logarithms: 1.5 * 1.1 * 1 < 1 * 1 * 2.
    loads = {"uniform": (150, 100), "zipf": (110, 100), "concentrated": (100, 200)}
    records = [
        record(name, 8, float(us), routing=routing)
        for routing, both in loads.items()
        for name, us in zip("ab", both, strict=True)
    ]
    policy = learned(records, regimes="8", tie_margin=0.0)
    (evidence,) = policy.regimes[0].evidence
    assert (policy.regimes[0].choice, evidence.workloads) == (Candidate("a"), 3)
    assert evidence.slowdown == {"a": pytest.approx(1.65 ** (1 / 3), 1e-5), "b": pytest.approx(2 ** (1 / 3), 1e-5)}
    # Regret is the mean over the loads; no choice by T alone has none here.
    assert policy.training_regret.mean == pytest.approx((0.5 + 0.1 + 0) / 3, rel=1e-5)
    # Each load alone would say something else.
    alone = [r for r in records if r.routing != "concentrated"]
    assert learned(alone, regimes="8", tie_margin=0.0).default == Candidate("b")


def test_noise_of_several_loads_is_their_median():
    def noisy(spreads):
        records = []
        for load, spread in enumerate(spreads):
            records.append(record("fast", 1, 92.0, spread=spread, routing=f"load{load}"))
            records.append(record("slow", 1, 100.0, spread=0.001, routing=f"load{load}"))
        return (
            learned([*records, *table(fast={9: 200}, slow={9: 100})], regimes="1", tie_margin=0.02).regimes[0].verdict
        )

    # One noisy load of three says nothing, two of three make 92 to 100 a tie.
    assert noisy([0.01, 0.01, 0.5]) == "best"
    assert noisy([0.01, 0.1, 0.1]) == "unsure"


# ---- Properties ----


@st.composite
def measurements(draw):
    tokens = draw(st.lists(st.integers(1, 300), min_size=1, max_size=6, unique=True))
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
    records = []
    for t in tokens:
        for routing in draw(st.lists(st.sampled_from(["uniform", "zipf"]), min_size=1, max_size=2, unique=True)):
            for name in names:
                # The first is always right, so that there is a default.
                kinds = ["passed"] if name == names[0] else ["passed", "passed", "passed", "failed", "unsupported"]
                status = draw(st.sampled_from(kinds))
                latency = float(draw(st.integers(90, 120)))
                records.append(record(name, t, latency, status, routing=routing))
    margin = draw(st.sampled_from([0.0, 0.02, 0.1]))
    prefer = draw(st.sampled_from([None, *names]))
    regimes = draw(st.sampled_from(["auto", "1-50,60-100,150-", "10"]))
    return records, dict(regimes=regimes, tie_margin=margin, prefer=prefer)


@given(measurements(), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_the_order_of_records_does_not_matter(case, rng):
    records, options = case
    shuffled = list(records)
    rng.shuffle(shuffled)
    assert dumps_policy(learned(records, **options)) == dumps_policy(learned(shuffled, **options))


def test_the_order_of_the_published_records_does_not_matter():
    records = read_any([TABLE])
    texts = set()
    for seed in range(5):
        random.Random(seed).shuffle(records)
        texts.add(dumps_policy(learned(records, prefer="triton_fused")))
    assert len(texts) == 1


@given(measurements())
@settings(max_examples=80, deadline=None)
def test_what_runs_was_right_and_table_agrees(case):
    records, options = case
    policy = learned(records, **options)
    device = DeviceKey(policy.device)
    lookup = resolve(policy, policy.problem, device)
    for r in records:
        choice = lookup.choice(r.num_tokens)
        assert choice == choose(policy, policy.problem, device, r.num_tokens).choice
        if r.choice == choice:
            assert r.status == "passed"


@given(measurements())
@settings(max_examples=60, deadline=None)
def test_found_regimes_without_a_margin_have_no_regret(case):
    records, options = case
    records = [r for r in records if r.routing == "uniform"]
    if not records:
        return
    policy = learned(records, **(options | dict(regimes="auto", tie_margin=0.0, prefer=None)))
    assert policy.training_regret.worst == 0


@given(
    st.lists(st.tuples(*[st.integers(90, 120)] * 3), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.05, 0.1]),
)
@settings(max_examples=60, deadline=None)
def test_found_regimes_cost_the_least(rows, margin):
    """The dynamic programme against every way of assigning candidates."""
    names = "abc"
    records = [record(n, 10 + i, float(us)) for i, row in enumerate(rows) for n, us in zip(names, row, strict=True)]
    points = points_of(by_workload(records))

    def cost(assignment):
        switches = sum(x != y for x, y in itertools.pairwise(assignment))
        regret = sum(p.log[Candidate(n)] for p, n in zip(points, assignment, strict=True))
        return regret + math.log(1 + margin) * switches

    best = min(map(cost, itertools.product(names, repeat=len(rows))))
    learner = _Learner(
        PROBLEM,
        "gpu_x",
        "measured",
        LearnerOptions(tie_margin=margin),
        None,
        frozenset(),
        frozenset(),
        [],
        {},
        Tolerance(),
    )
    parts = list(learner._partition(points, Candidate("a")))
    assert [p for part in parts for p in part] == points
    found = [learner._best(part, _right_everywhere(part)).backend for part in parts for _ in part]
    assert cost(found) == pytest.approx(best, abs=1e-9)
