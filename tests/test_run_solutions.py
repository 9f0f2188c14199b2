"""The script that runs Solutions through flashinfer-bench, without a GPU: only its clock and its processes stand in."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from flashinfer_bench.bench import benchmark as fib_benchmark
from flashinfer_bench.bench.evaluators import default
from flashinfer_bench.compile import BuilderRegistry
from flashinfer_bench.data import EvaluationStatus, Solution, Trace, load_jsonl_file
from test_kernels import SMALL

from hybrid_moe.candidate import Candidate
from hybrid_moe.flashinfer_bench.solution import candidate_solution
from hybrid_moe.measure.readers import read_any
from hybrid_moe.measure.workloads import Workload
from hybrid_moe.problem import MoEProblem

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "run_solutions.py"
WORKLOADS = [Workload(6, 4, uuid="late"), Workload(1, 4)]
TRITON, REFERENCE = Candidate("triton_fused", {"gemm": "triton"}), Candidate("torch_reference")
LATENCY_MS = {"hybrid_moe_triton_fused_gemm_triton": 0.1, "hybrid_moe_torch_reference": 0.5, "other": 0.5}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_solutions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without_a_gpu(tmp_path, monkeypatch):
    """flashinfer-bench on the CPU: nothing to wait for, and a clock that says what we want."""
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "fib"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def time_runnable(runnable, arguments, warmup, iterations, device):
        runnable(*arguments)
        return LATENCY_MS[runnable.metadata.solution_name]

    monkeypatch.setattr(default, "time_runnable", time_runnable)
    yield
    BuilderRegistry.get_instance().cleanup()


def solution(choice, **changes):
    return Solution.model_validate(candidate_solution(choice, SMALL) | changes)


def solutions():
    return [solution(TRITON), solution(REFERENCE)]


def prepared(script, tmp_path):
    config = script.config_of(iterations=2, warmup=1, trials=1, baseline=False, log_dir=str(tmp_path / "logs"))
    assert (config.rtol, config.atol, config.required_matched_ratio) == (0.2, 0.1, 0.85)
    return config, script.our_trace_set(SMALL, WORKLOADS, tmp_path)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy's, in the interpreter
def test_through_the_evaluator(script, without_a_gpu, tmp_path, capsys):
    config, trace_set = prepared(script, tmp_path)
    output = tmp_path / "new" / "traces.jsonl"
    traces = script.run_all(trace_set, solutions(), script.through_evaluator(config, "cpu"), output)
    assert [t.workload.axes["seq_len"] for t in traces] == [1, 1, 6, 6]
    assert all(trace.evaluation.status is EvaluationStatus.PASSED for trace in traces)
    # flashinfer-bench's scales have both signs and are as large as 1: the kernels are right with them, not exact.
    ratios = {t.solution: t.evaluation.correctness.extra["matched_ratio"] for t in traces[-2:]}
    assert 0.9 < ratios["hybrid_moe_triton_fused_gemm_triton"] < ratios["hybrid_moe_torch_reference"] == 1.0
    assert "T = 6: hybrid_moe_triton_fused_gemm_triton: PASSED, 100.0 us, matched 0.9" in capsys.readouterr().out
    # What is written is what was returned, and records of the two candidates.
    assert load_jsonl_file(Trace, output) == traces
    records = read_any([output])
    assert [(r.choice, r.num_tokens) for r in records[:2]] == [(TRITON, 1), (REFERENCE, 1)]
    assert {r.status for r in records} == {"passed"} and records[2].workload == "late"


def test_it_goes_on_where_it_was(script, without_a_gpu, tmp_path, capsys):
    config, trace_set = prepared(script, tmp_path)
    output, run = tmp_path / "traces.jsonl", script.through_evaluator(config, "cpu")
    script.run_all(trace_set, [solution(REFERENCE)], run, output)
    first = output.read_bytes()
    both = [solution(REFERENCE), solution(REFERENCE, name="other")]
    _, trace_set = prepared(script, tmp_path)
    traces = script.run_all(trace_set, both, run, output)
    assert output.read_bytes().startswith(first)
    assert [t.solution for t in traces] == ["hybrid_moe_torch_reference"] * 2 + ["other"] * 2
    _, trace_set = prepared(script, tmp_path)
    size = output.stat().st_size
    script.run_all(trace_set, [solution(REFERENCE, name="third")], run, output, seconds=-1)
    assert output.stat().st_size == size and "T = 6: not begun" in capsys.readouterr().out


@pytest.mark.interpreter
def test_what_fails_is_a_trace_and_what_breaks_is_passed_over(script, without_a_gpu, tmp_path, capsys):
    config, trace_set = prepared(script, tmp_path)
    refused = solution(Candidate("triton_fused", {"gemm": "deep_gemm"}))
    broken = solution(TRITON, name="broken", sources=[{"path": "main.py", "content": "import nothing_such"}])
    run, output = script.through_evaluator(config, "cpu"), tmp_path / "traces.jsonl"
    calls = []

    def once_broken(trace_set):
        calls.append(trace_set)
        if len(calls) == 1:
            raise RuntimeError("the device is gone")
        return run(trace_set)

    traces = script.run_all(trace_set, [refused, broken], once_broken, output)
    assert [t.evaluation.status.value for t in traces] == ["RUNTIME_ERROR", "COMPILE_ERROR"]
    shown = capsys.readouterr()
    assert "T = 1: 2 without a trace" in shown.out and "the device is gone" in shown.err
    assert "No module named 'nothing_such'" in shown.out and "expected compute capability 9.0" in shown.err


def test_through_the_benchmark(script, without_a_gpu, tmp_path, monkeypatch):
    """`Benchmark` itself, with a runner that evaluates here in place of its worker processes."""
    config, trace_set = prepared(script, tmp_path)
    run_here = script.through_evaluator(config, "cpu")
    closed = []

    class Runner:
        def __init__(self, log_dir):
            assert log_dir == config.log_dir

        def run_workload(self, definition, workload, solutions, config, root):
            assert trace_set.solutions == {definition.name: solutions}
            return {trace.solution: trace.evaluation for trace in run_here(trace_set)}

        def close(self):
            closed.append(True)

    monkeypatch.setattr(fib_benchmark, "PersistentRunner", Runner)
    run, close = script.through_benchmark(config, trace_set)
    traces = script.run_all(trace_set, [solution(REFERENCE)], run, tmp_path / "traces.jsonl")
    close()
    assert len(traces) == 2 and closed == [True]
    assert all(trace.evaluation.status is EvaluationStatus.PASSED for trace in traces)
    assert load_jsonl_file(Trace, tmp_path / "traces.jsonl") == traces


def test_it_wants_a_gpu(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run_solutions.py", "x.json", "--output", str(tmp_path / "t.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "expected an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(script, tmp_path, monkeypatch):
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "fib"))
    config = script.config_of(iterations=5, warmup=2, trials=1, baseline=False, log_dir=str(tmp_path / "logs"))
    problem = MoEProblem()
    trace_set = script.our_trace_set(problem, [Workload(16, 224)], tmp_path)
    made = Solution.model_validate(candidate_solution(TRITON, problem))
    run = script.through_evaluator(config, "cuda:0")
    (trace,) = script.run_all(trace_set, [made], run, tmp_path / "traces.jsonl")
    BuilderRegistry.get_instance().cleanup()
    assert trace.evaluation.status is EvaluationStatus.PASSED, trace.evaluation.log
    assert 0.01 < trace.evaluation.performance.latency_ms < 10
    (record,) = read_any([tmp_path / "traces.jsonl"])
    assert record.choice == TRITON and record.num_tokens == 16
