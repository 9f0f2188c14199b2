"""Measuring on a device whose times are known: what is checked, when, on which copy, and what is timed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_clock import KnownClock

from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.measure import bench, provenance
from hybrid_moe.measure.bench import Case, measure, poisoned_output, record_fields, tolerance_of
from hybrid_moe.measure.sample import sampled_tokens
from hybrid_moe.measure.timing import PeakRates
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import RULE
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work, local_rows_per_expert_and_token, moe_reference
from hybrid_moe.version import __version__

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import definition_workloads

PROBLEM = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
COPIES = [random_weights(PROBLEM, "cpu", seed) for seed in range(3)]
TOKENS = 12
OWN = Candidate("triton_fused")
PEAK = PeakRates(1e12, 1e15)
# A token with local work.
BUSY = int(has_local_work(make_inputs(Workload(TOKENS, 4), PROBLEM, COPIES[0]), PROBLEM).nonzero()[0])


@pytest.fixture(scope="module")
def case():
    return Case.make(Workload(TOKENS, 4), PROBLEM, COPIES)


class Kernels:
    """Right results on each copy, in a known time; ``spoil(output, copy, call)`` makes one wrong."""

    def __init__(self, case, clock, spoil=None, us=lambda kernels, copy: 10.0):
        self.clock, self.spoil, self.us = clock, spoil, us
        self.right = [moe_reference(inputs, PROBLEM, quantize_intermediate=True) for inputs in case.inputs]
        self.copies = []  # of the calls, in their order
        self.recorded = []
        self.seen = []  # whether an output was poisoned

    def prepare(self, inputs):
        copy = [COPIES[n].gemm1_weights.data_ptr() for n in range(3)].index(inputs.gemm1_weights.data_ptr())

        def run(output):
            cost = self.us(self, copy)
            if not self.clock.work(2.0, cost):
                self.recorded.append(copy)
                return
            self.copies.append(copy)
            self.seen.append(bool(output.isnan().all()))
            output.copy_(self.right[copy])
            if self.spoil is not None:
                self.spoil(output, copy, len(self.copies) - 1)

        return run


def measured(case, spoil=None, us=lambda kernels, copy: 10.0, clock=None, **options):
    clock = clock or KnownClock()
    kernels = Kernels(case, clock, spoil, us)
    found = list(measure(case, OWN, PEAK, {"torch": "1"}, prepare=kernels.prepare, clock=clock, **options))
    return kernels, found


def test_a_candidate_that_is_right(case):
    kernels, (graph, eager) = measured(case, runs=4)
    assert (graph.status, graph.timing, graph.latency_us.median, graph.latency_us.runs) == (
        "passed",
        "cuda_graph",
        10.0,
        4,
    )
    assert (eager.status, eager.timing) == ("passed", "eager")
    assert eager.latency_us.median == pytest.approx(10 + 2 / 12, abs=1e-3)
    assert eager.host_us.median == pytest.approx(2.0)
    for record in (graph, eager):
        assert record.correctness.rule == RULE and record.correctness.max_relative_l2 == 0.026
        assert 0 < record.correctness.token_relative_l2 < 0.03 and record.correctness.tokens == TOKENS
        assert (record.local_rows, record.active_experts) == (case.work.local_rows, case.work.active_experts)
        assert record.floor_us == round(case.work.floor_us(PEAK), 3)


def test_calls_rotate_over_the_copies(case):
    """In the graph, in the eager loops, and over their seams: no call finds the weights of the one before."""
    kernels, _ = measured(case, runs=3)
    assert kernels.recorded == [0, 1, 2] * 4
    assert kernels.copies == [0, 1, 2] * (len(kernels.copies) // 3)
    assert len(kernels.copies) == 3 + 12 + (2 + 3) * 12 + (1 + 3) * 12


def test_a_warm_cache_would_show(case):
    """Where the copy of the call before is read again it costs a tenth."""

    def us(kernels, copy):
        return 1.0 if kernels.copies[-1:] == [copy] else 10.0

    for record in measured(case, us=us, runs=3)[1]:
        assert record.latency_us.p10 >= 10.0


def test_more_copies_than_calls_are_all_used(monkeypatch, case):
    monkeypatch.setattr(bench, "CALLS_PER_GRAPH", 2)
    kernels, (graph, _) = measured(case, runs=1)
    assert kernels.recorded == [0, 1, 2] and graph.latency_us.median == 10.0


def test_outputs_are_poisoned_before_the_check_and_before_each_timing(case):
    kernels, _ = measured(case, runs=1)
    first_of = [0, 15, 15 + 36]  # the check; after the warm-up calls, the graph's replays; the eager loops
    for first in first_of:
        assert all(kernels.seen[first : first + 3])


def test_what_isn_t_written_fails(case):
    def spoil(output, copy, call):
        output[BUSY] = torch.nan

    _, found = measured(case, spoil)
    assert {r.status for r in found} == {"failed"} and {r.timing for r in found} == {"cuda_graph", "eager"}
    assert all("not finite" in r.reason and r.latency_us is None for r in found)
    assert found[0].correctness.relative_l2 is None and found[0].correctness.slope is None


@pytest.mark.parametrize("copy", [0, 1, 2])
def test_every_copy_is_checked(case, copy):
    def spoil(output, of_copy, call):
        if of_copy == copy:
            output[BUSY] = 0

    kernels, found = measured(case, spoil)
    assert {r.status for r in found} == {"failed"}
    assert all("1 of" in r.reason and ("weight copy" in r.reason) == (copy > 0) for r in found)
    assert copy == 0 or all(f"weight copy {copy}" in r.reason for r in found)
    assert kernels.copies == [0, 1, 2]  # it isn't timed


@pytest.mark.parametrize("copy", [0, 1, 2])
def test_what_the_timed_calls_wrote_is_checked(case, copy):
    """Right until it is replayed: as kernels that count on a state which only the first call finds."""

    def spoil(output, of_copy, call):
        if of_copy == copy and 15 <= call < 15 + 12 * 5:
            output[BUSY] = 0

    _, (graph, eager) = measured(case, spoil, runs=3)
    assert graph.status == "failed" and graph.latency_us is None
    assert graph.reason.startswith(f"after 3 timed runs, on weight copy {copy}: ")
    assert eager.status == "passed"

    def later(output, of_copy, call):
        if of_copy == copy and call >= 15 + 12 * 5:
            output[BUSY] = 0

    _, (graph, eager) = measured(case, later, runs=3)
    assert (graph.status, eager.status) == ("passed", "failed")
    assert eager.correctness.token_relative_l2 == pytest.approx(1)


def test_calls_that_write_nothing_when_they_are_timed(case):
    kernels = Kernels(case, clock := KnownClock())
    right = kernels.prepare

    def prepare(inputs):
        run = right(inputs)
        return lambda output: run(output) if len(kernels.copies) < 15 else clock.work(2.0, 1.0)

    found = list(measure(case, OWN, PEAK, {}, prepare=prepare, clock=clock))
    assert [r.status for r in found] == ["failed", "failed"]
    assert all("not finite" in r.reason and "timed runs" in r.reason for r in found)


def test_whether_a_call_repeats_its_bits(case):
    assert all(record.equal_bits for record in measured(case)[1])

    def spoil(output, copy, call):
        if copy == 1 and call >= 3:
            output[BUSY, 0] *= 1.01

    assert [(r.status, r.equal_bits) for r in measured(case, spoil)[1]] == [("passed", False)] * 2


def test_a_candidate_that_is_refused(case):
    def prepare(inputs):
        raise BackendUnsupportedError("x", ("no such GPU", "no such library"))

    found = list(measure(case, OWN, PEAK, {}, prepare=prepare, clock=KnownClock()))
    assert [(r.status, r.timing, r.reason) for r in found] == [
        ("unsupported", timing, "no such GPU; no such library") for timing in ("cuda_graph", "eager")
    ]


def test_the_tighter_gate_is_for_our_own_kernels(case):
    bounds = {
        name: tolerance_of(Candidate(name)).max_relative_l2 for name in ("triton_fused", "flashinfer_trtllm", "peer:x")
    }
    assert bounds == {"triton_fused": 0.026, "flashinfer_trtllm": 0.05, "peer:x": 0.05}

    def spoil(output, copy, call):
        output.mul_(1 + 0.04 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)))

    assert measured(case, spoil)[1][0].status == "failed"
    kernels = Kernels(case, clock := KnownClock(), spoil)
    peer = measure(case, Candidate("peer:x"), PEAK, {}, prepare=kernels.prepare, clock=clock)
    assert next(peer).status == "passed"


def test_a_poisoned_output_has_no_number(case):
    output = poisoned_output(case.inputs[0], PROBLEM)
    assert output.shape == (TOKENS, 256) and output.dtype == torch.bfloat16 and bool(output.isnan().all())


# ---- What a record says -------------------------------------------------------------------------------------------


def test_whether_the_cache_was_cold(case):
    touched = 3 * case.work.bytes
    for cache, wanted in ((touched // 2, "cold"), (touched // 2 + 1, "warm")):
        assert measured(case, clock=KnownClock(cache=cache))[1][0].cache == wanted
    nothing = Case.make(Workload(TOKENS, 4, "none"), PROBLEM, COPIES)
    (graph, _) = measured(nothing, clock=KnownClock(cache=touched // 4))[1]
    assert nothing.work.local_rows == 0 and (graph.status, graph.cache) == ("passed", "warm")


def test_a_record_says_what_measured_it(case):
    record = measured(case)[1][0]
    assert record.code["version"] == __version__ and len(record.code["sources"]) == 16
    assert record.environment == {"torch": "1"}
    assert record_fields("cpu", PROBLEM, case.workload, OWN, {})["code"] == record.code


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_and_whether_the_tree_was_changed(tmp_path):
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "part" / "module.py").write_text("y = 1\n")
    (tmp_path / "other.py").touch()
    code = provenance.code.__wrapped__
    plain = code(package)
    assert set(plain) == {"version", "sources"}

    git(tmp_path, "init", "-q")
    assert code(package) == plain
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-qm", "somebody else's, which doesn't track the package")
    assert code(package) == plain
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = code(package)
    assert clean == plain | {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "notes.txt").write_text("beside the package")
    assert code(package) == clean
    for name, text in (("__init__.py", "x = 2\n"), ("part/module.py", "y = 2\n"), ("new.py", "")):
        before = (package / name).read_text() if (package / name).exists() else None
        (package / name).write_text(text)
        changed = code(package)
        assert changed["dirty"] is True and changed["commit"] == clean["commit"]
        assert changed["sources"] != clean["sources"]
        (package / name).unlink() if before is None else (package / name).write_text(before)
    assert code(package) == clean


def test_no_git_no_commit(monkeypatch, tmp_path):
    def missing(*arguments, **options):
        raise FileNotFoundError

    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(provenance.subprocess, "run", missing)
    assert set(provenance.code.__wrapped__(tmp_path)) == {"version", "sources"}


# ---- References and samples ---------------------------------------------------------------------------------------


def test_references_are_of_each_copys_inputs(case):
    assert len(case.inputs) == len(case.references) == 3 and case.sampled == TOKENS
    for inputs, reference in zip(case.inputs, case.references, strict=True):
        assert torch.equal(reference, moe_reference(inputs, PROBLEM))
    assert torch.equal(case.has_work, has_local_work(case.inputs[0], PROBLEM))
    hidden = [inputs.hidden_states.view(torch.uint8) for inputs in case.inputs]
    assert not torch.equal(hidden[0], hidden[1]) and not torch.equal(hidden[1], hidden[2])
    assert all(torch.equal(inputs.routing_logits, case.inputs[0].routing_logits) for inputs in case.inputs)


def test_a_sample_has_the_references_of_its_tokens():
    workload = Workload(200, 4, seed=3)
    case = Case.make(workload, PROBLEM, COPIES[:2], sample=20)
    for inputs, reference in zip(case.inputs, case.references, strict=True):
        whole = moe_reference(inputs, PROBLEM)
        torch.testing.assert_close(reference, whole[case.checked], rtol=1e-5, atol=1e-5)
    work = has_local_work(case.inputs[0], PROBLEM)
    assert torch.equal(case.has_work, work[case.checked])
    # All tokens that are known to be zero, and of the others the sample.
    assert case.sampled == int(case.has_work.sum()) == 20
    assert int((~case.has_work).sum()) == int((~work).sum()) > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_outside_of_the_sample_must_be_finite(value):
    case = Case.make(Workload(200, 4), PROBLEM, COPIES, sample=20)
    outside = next(t for t in range(200) if t not in case.checked.tolist())

    def spoil(output, copy, call):
        if copy == 1:
            output[outside, 3] = value

    (graph, _) = measured(case, spoil)[1]
    assert graph.status == "failed" and "not finite" in graph.reason and "weight copy 1" in graph.reason


def test_tokens_without_work_are_checked_outside_of_the_sample():
    case = Case.make(Workload(200, 4), PROBLEM, COPIES, sample=20)
    idle = int((~has_local_work(case.inputs[0], PROBLEM)).nonzero()[-1])

    def spoil(output, copy, call):
        output[idle, 255] = 1e-30

    (graph, _) = measured(case, spoil)[1]
    assert graph.status == "failed" and "not exactly zero" in graph.reason


@pytest.mark.parametrize("routing", ["uniform", "zipf", "concentrated"])
@pytest.mark.parametrize("count", [4, 40, 120])
def test_a_sample_has_both_ends_of_every_expert(routing, count):
    inputs = make_inputs(Workload(600, 4, routing), PROBLEM, COPIES[0])
    chosen = local_rows_per_expert_and_token(inputs, PROBLEM)
    sample = sampled_tokens(chosen, count, seed=1).tolist()
    assert sample == sorted(set(sample)) and len(sample) >= count
    for expert in range(4):
        rows = chosen[:, expert].nonzero().flatten().tolist()
        assert not rows or {rows[0], rows[-1]} <= set(sample)
    ends = {rows[at] for e in range(4) if (rows := chosen[:, e].nonzero().flatten().tolist()) for at in (0, -1)}
    assert len(sample) == max(count, len(ends))


def test_a_sample_has_both_ends_of_the_tiles():
    """Those of the largest tiles first, then of smaller ones, then others; tokens without work last."""
    chosen = torch.zeros(1000, 2, dtype=torch.bool)
    chosen[100:900, 0] = True
    ends = {100 + at for tile in range(0, 800, 128) for at in (tile - 1, tile) if 0 <= at < 800} | {899}
    assert set(sampled_tokens(chosen, len(ends), seed=0).tolist()) == ends
    smaller = {100 + at for tile in range(0, 800, 64) for at in (tile - 1, tile) if 0 <= at < 800} | {899}
    assert set(sampled_tokens(chosen, len(smaller), seed=0).tolist()) == smaller
    some = set(sampled_tokens(chosen, 300, seed=0).tolist())
    assert some >= smaller and all(100 <= token < 900 for token in some)
    assert some != set(sampled_tokens(chosen, 300, seed=1).tolist())
    assert set(sampled_tokens(chosen, 900, seed=0).tolist()) >= set(range(100, 900))
    assert (
        sampled_tokens(chosen, 1000, seed=0).tolist()
        == sampled_tokens(chosen, 5000, seed=0).tolist()
        == list(range(1000))
    )


# ---- The script ---------------------------------------------------------------------------------------------------


def test_every_seed_is_checked_and_timed_by_itself(monkeypatch):
    """And the order of the candidates rotates from workload to workload."""
    clock = KnownClock()
    seen = []

    def prepare_of(name):
        def prepare(inputs):
            right = moe_reference(inputs, PROBLEM, quantize_intermediate=True)

            def run(output):
                if clock.work(1.0, 5.0):
                    output.copy_(right)
                    if name == "peer:b" and seen[-1].seed == 2:
                        output[-1] += 1

            return run

        return prepare

    make = Case.make

    def remembered(workload, problem, copies, sample):
        seen.append(workload)
        assert (sample is None) == (workload.seed == 0)
        return make(workload, problem, copies, sample)

    monkeypatch.setattr(Case, "make", remembered)
    monkeypatch.setattr(definition_workloads.peers, "prepare_of", lambda problem, choice: prepare_of(choice.backend))
    workloads = [Workload(3, 4, uuid="u"), Workload(5, 4)]

    def measured(**options):
        return list(
            definition_workloads.measured(
                PROBLEM, workloads, [Candidate("peer:a"), Candidate("peer:b")], COPIES[:2], PEAK, {},
                seeds=lambda workload: 3, clock=clock, **options,
            )
        )  # fmt: skip

    found = measured()
    assert [(w.num_tokens, w.seed, w.uuid) for w in seen] == [
        (3, 0, "u"), (3, 1, None), (3, 2, None), (5, 0, None), (5, 1, None), (5, 2, None)
    ]  # fmt: skip
    records = [record for *_, of_one in found for record in of_one]
    assert len(records) == 2 * 3 * 2 * 2
    assert [r.backend for r in records[::2]][:2] == ["peer:a", "peer:b"]
    assert [r.backend for r in records[::2]][-2:] == ["peer:b", "peer:a"]
    for record in records:
        assert record.status == ("failed" if record.backend == "peer:b" and record.seed == 2 else "passed")
        assert (record.latency_us is None) == (record.status == "failed")
    assert {(r.seed, r.workload) for r in records if r.num_tokens == 3} == {(0, "u"), (1, None), (2, None)}
    # Killed before the last eager calls, it goes on with these alone, and makes no other inputs.
    seen.clear()
    [(_, choice, again)] = measured(done={record.key for record in records[:-1]})
    assert (choice, [r.timing for r in again]) == (Candidate("peer:a"), ["cuda_graph", "eager"])
    assert [(w.num_tokens, w.seed) for w in seen] == [(5, 2)] and not measured(done={r.key for r in records})


def test_the_case_is_of_the_workload():
    workload = replace(Workload(7, 8), routing="zipf", seed=2)
    case = Case.make(workload, PROBLEM, COPIES)
    wanted = make_inputs(workload, PROBLEM, COPIES[0])
    assert torch.equal(case.inputs[0].routing_logits, wanted.routing_logits)
    assert case.inputs[0].local_expert_offset == 8 and case.workload == workload
