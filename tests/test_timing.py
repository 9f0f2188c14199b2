"""What a call must do at the least, the figures of samples, and which samples count; the clock itself needs a GPU."""

import itertools

import pytest
import torch

from hybrid_moe.candidate import Candidate
from hybrid_moe.measure import timing
from hybrid_moe.measure.bench import poisoned_output, tolerance_of
from hybrid_moe.measure.timing import Ceilings, Work, summarize
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.problem import MoEProblem

PROBLEM = MoEProblem(32, 8, 4, 4, 2, 256, 128)


@pytest.mark.parametrize("routing", ["concentrated", "none"])
def test_work_counts_active_experts_once(routing):
    inputs = make_inputs(Workload(5, 8, routing), PROBLEM, random_weights(PROBLEM, "cpu"))
    work = Work.of(inputs, PROBLEM)
    rows, active = (20, 4) if routing == "concentrated" else (0, 0)
    weights = (256 * 256 + 256 * 128) + 4 * (2 * 2 + 2 * 1)
    call = 5 * (32 * 4 + 256 + 2 * 4 + 256 * 2) + 32 * 2
    assert (work.local_rows, work.active_experts) == (rows, active)
    assert work.bytes == active * weights + call
    assert work.flop == rows * 2 * (256 * 256 + 256 * 128)
    assert work.floor_us(Ceilings(1e6, 1e18)) == pytest.approx(work.bytes)
    assert work.floor_us(Ceilings(1e18, 1e6)) == pytest.approx(max(work.flop, work.bytes / 1e12))


def test_samples_are_summarised():
    latency = summarize([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert (latency.median, latency.p10, latency.p90, latency.runs) == (6.0, 2.0, 10.0, 11)


def test_the_first_two_runs_do_not_count(monkeypatch):
    clock = itertools.chain([900.0, 800.0], [3.0, 1.0, 2.0])
    monkeypatch.setattr(timing, "event_us", lambda call: next(clock))
    assert timing._median_us(lambda: None, 3) == 2.0


def test_the_tighter_gate_is_for_our_own_kernels():
    bounds = {
        name: tolerance_of(Candidate(name)).max_relative_l2 for name in ("triton_fused", "flashinfer_trtllm", "peer:x")
    }
    assert bounds == {"triton_fused": 0.026, "flashinfer_trtllm": 0.05, "peer:x": 0.05}


def test_a_poisoned_output_has_no_number():
    inputs = make_inputs(Workload(3, 8), PROBLEM, random_weights(PROBLEM, "cpu"))
    output = poisoned_output(inputs, PROBLEM)
    assert output.shape == (3, 256) and output.dtype == torch.bfloat16 and bool(output.isnan().all())
