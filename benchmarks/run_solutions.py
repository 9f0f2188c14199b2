"""Run Solutions through flashinfer-bench 0.1.2 on the definition's 19 workloads; its traces feed `hybrid-moe learn`.

    hybrid-moe solution --device nvidia_h100_80gb_hbm3 -o h100.json
    hybrid-moe solution --candidate 'triton_fused[gemm=triton]' -o triton.json
    python benchmarks/run_solutions.py h100.json triton.json --output traces.jsonl

On one GPU. Each workload's traces are written as soon as they are there, and with the same ``--output`` what has one
already isn't run again. By default flashinfer-bench's ``Benchmark`` runs them, in a process of its own that gets the
inputs by CUDA IPC; ``--through evaluator`` runs the same evaluator in this process, where that isn't to be had.

Right is what its evaluator calls so by our bounds: rtol 0.2, atol 0.1, 0.85 of the elements. Logits and bias are those
of `measure.workloads` (``uniform``), which go into safetensors files as in the data set; activations, weights and
scales are flashinfer-bench's random ones (scales N(0, 1)), the reference is `hybrid_moe.definition`'s. ``--dataset``
takes a flashinfer-trace data set's own instead. Latency is flashinfer-bench's: CUDA events around an eager call with
a cold L2, so it has the host's time in it. The reference isn't timed (``speedup_factor`` 0) without ``--baseline``.

Needs beside this package and torch: flashinfer-bench, and of its dependencies only safetensors, docstring-parser and
filelock (comes with torch); and the libraries that the Solutions name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from flashinfer_bench.bench import Benchmark, BenchmarkConfig
from flashinfer_bench.bench.evaluators import resolve_evaluator
from flashinfer_bench.bench.utils import make_eval
from flashinfer_bench.compile import BuilderRegistry, BuildError
from flashinfer_bench.data import (
    Definition,
    Evaluation,
    EvaluationStatus,
    RandomInput,
    SafetensorsInput,
    ScalarInput,
    Solution,
    Trace,
    TraceSet,
    append_jsonl_file,
    load_json_file,
    load_jsonl_file,
)
from flashinfer_bench.data import Workload as BenchWorkload
from safetensors.torch import save_file

from hybrid_moe.flashinfer_bench.definition import definition_of
from hybrid_moe.inputs import MoEInputs
from hybrid_moe.measure.workloads import DEFINITION_WORKLOADS, ROUTED_SCALING_FACTOR, Workload, make_routing
from hybrid_moe.numerics import Tolerance
from hybrid_moe.problem import MoEProblem, problem_of_definition

# Runs Solutions on one workload of a trace set that has no other.
Run = Callable[[TraceSet], list[Trace]]


def config_of(iterations: int, warmup: int, trials: int, baseline: bool, log_dir: str) -> BenchmarkConfig:
    """flashinfer-bench's configuration with our bounds; its own default bounds fail every FP8 kernel."""
    bounds = Tolerance()
    return BenchmarkConfig(
        warmup_runs=warmup,
        iterations=iterations,
        num_trials=trials,
        rtol=bounds.rtol,
        atol=bounds.atol,
        required_matched_ratio=bounds.required_matched_ratio,
        profile_baseline=baseline,
        log_dir=log_dir,
    )


def our_trace_set(problem: MoEProblem, workloads: Iterable[Workload], root: Path) -> TraceSet:
    """Definition and workloads, logits and bias written under ``root``."""
    definition = Definition.model_validate(definition_of(problem))
    traces = []
    for workload in workloads:
        logits, bias = make_routing(workload, problem)
        path = f"blob/workloads/{definition.op_type}/{definition.name}/{workload.num_tokens}.safetensors"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        save_file({"routing_logits": logits.contiguous(), "routing_bias": bias.contiguous()}, root / path)
        inputs: dict[str, object] = {name: RandomInput() for name in MoEInputs._fields}
        for name in ("routing_logits", "routing_bias"):
            inputs[name] = SafetensorsInput(path=f"./{path}", tensor_key=name)
        inputs["local_expert_offset"] = ScalarInput(value=workload.local_expert_offset)
        inputs["routed_scaling_factor"] = ScalarInput(value=ROUTED_SCALING_FACTOR)
        uuid = workload.uuid or f"{definition.name}_t{workload.num_tokens}"
        made = BenchWorkload(axes={"seq_len": workload.num_tokens}, inputs=inputs, uuid=uuid)
        traces.append(Trace(definition=definition.name, workload=made))
    return TraceSet(root=root, definitions={definition.name: definition}, workloads={definition.name: traces})


def through_benchmark(config: BenchmarkConfig, trace_set: TraceSet) -> tuple[Run, Callable[[], None]]:
    """Its `Benchmark`, whose worker stays for all workloads; and what closes it."""
    benchmark = Benchmark(trace_set, config)

    def run(_: TraceSet) -> list[Trace]:
        found = benchmark.run_all(dump_traces=False)
        return [trace for traces in found.traces.values() for trace in traces]

    return run, benchmark.close


def through_evaluator(config: BenchmarkConfig, device: str) -> Run:
    """Its builder and evaluator in this process; a failure is a trace, as it is in the benchmark."""

    def evaluate(definition: Definition, solution: Solution, baseline) -> Evaluation:
        try:
            runnable = BuilderRegistry.get_instance().build(definition, solution)
        except BuildError as error:
            return make_eval(EvaluationStatus.COMPILE_ERROR, device, None, extra_msg=str(error))
        return resolve_evaluator(definition).evaluate(
            definition=definition,
            sol_runnable=runnable,
            inputs=baseline.inputs,
            ref_outputs=baseline.outputs,
            ref_mean_latency_ms=baseline.mean_latency_ms,
            cfg=config,
            log_path="",
            device=device,
        )

    def run(trace_set: TraceSet) -> list[Trace]:
        ((name, (workload_trace,)),) = trace_set.workloads.items()
        definition, workload = trace_set.definitions[name], workload_trace.workload
        baseline = resolve_evaluator(definition).build_baseline(definition, workload, config, device, trace_set.root)
        return [
            Trace(
                definition=name,
                workload=workload,
                solution=solution.name,
                evaluation=evaluate(definition, solution, baseline),
            )
            for solution in trace_set.solutions[name]
        ]

    return run


def run_all(
    trace_set: TraceSet, solutions: Sequence[Solution], run: Run, output: Path, seconds: float = float("inf")
) -> list[Trace]:
    """Run what ``output`` has no trace of, T by T, and append each workload's traces to it.

    A workload that breaks is shown and passed over. None is begun when ``seconds`` are over.

    Returns
    -------
    list
        All traces of these Solutions and workloads in ``output``, the old ones first.
    """
    (name,) = trace_set.definitions
    names = {solution.name for solution in solutions}
    workloads = sorted(trace_set.workloads[name], key=lambda trace: trace.workload.axes["seq_len"])
    wanted = {trace.workload.uuid for trace in workloads}
    before = load_jsonl_file(Trace, output) if output.exists() else []
    done = [t for t in before if t.solution in names and t.workload.uuid in wanted]
    known = {(trace.solution, trace.workload.uuid) for trace in done}
    started = time.monotonic()
    for workload in workloads:
        missing = [s for s in solutions if (s.name, workload.workload.uuid) not in known]
        tokens = workload.workload.axes["seq_len"]
        if not missing:
            continue
        if time.monotonic() - started > seconds:
            print(f"T = {tokens}: not begun, the time is over", flush=True)
            continue
        # `Benchmark` runs what is in its trace set: this one workload.
        trace_set.workloads = {name: [workload]}
        trace_set.solutions = {name: missing}
        try:
            found = run(trace_set)
        except Exception:  # whatever a library or the device raises: the others may still run
            traceback.print_exc()
            found = []
        output.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl_file(found, output)
        done += found
        for trace in found:
            print(f"T = {tokens}: {trace.solution}: {shown(trace.evaluation)}", flush=True)
        if len(found) < len(missing):
            print(f"T = {tokens}: {len(missing) - len(found)} without a trace", flush=True)
    return done


def shown(evaluation: Evaluation) -> str:
    """Status, latency, share of matched elements; the end of the log where it didn't pass."""
    parts = [evaluation.status.value]
    if evaluation.performance is not None:
        parts.append(f"{1e3 * evaluation.performance.latency_ms:.1f} us")
    if evaluation.correctness is not None and evaluation.correctness.extra:
        parts.append(f"matched {evaluation.correctness.extra['matched_ratio']:.4f}")
    if evaluation.status is not EvaluationStatus.PASSED:
        parts.append(evaluation.log.strip()[-2000:])
    elif evaluation.log.strip():
        parts.append(evaluation.log.strip().splitlines()[-1][:300])
    return ", ".join(parts)


def main() -> int:
    """Run what the command line names; 0 if every Solution passed at every workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solutions", nargs="+", type=Path, help="Solution files of one definition")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to append traces to")
    parser.add_argument("--through", choices=("benchmark", "evaluator"), default="benchmark")
    parser.add_argument("--tokens", type=int, nargs="*", help="only these of the workloads' T")
    parser.add_argument("--iterations", type=int, default=50, help="timed calls")
    parser.add_argument("--warmup", type=int, default=10, help="calls before them")
    parser.add_argument("--trials", type=int, default=1, help="sets of inputs; all are checked and timed")
    parser.add_argument("--baseline", action="store_true", help="time the reference too, for speedup_factor")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no workload after so long")
    parser.add_argument("--dataset", type=Path, help="a flashinfer-trace data set, for its definition and workloads")
    parser.add_argument("--load-library", type=Path, help="a library of torch operators to load first, as sgl-kernel's")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")
    if options.load_library and options.through != "evaluator":
        parser.error("--load-library goes with --through evaluator: the benchmark's worker is another process")
    solutions = [load_json_file(Solution, path) for path in options.solutions]
    definitions = {solution.definition for solution in solutions}
    if len(definitions) > 1:
        parser.error(f"expected Solutions of one definition, got {', '.join(sorted(definitions))}")
    (name,) = definitions
    if options.load_library:
        torch.ops.load_library(options.load_library)

    with tempfile.TemporaryDirectory() as folder:
        if options.dataset is None:
            trace_set = our_trace_set(problem_of_definition(name), DEFINITION_WORKLOADS, Path(folder))
        else:
            whole = TraceSet.from_path(str(options.dataset))
            if name not in whole.definitions:
                parser.error(f"{options.dataset} has no definition {name}")
            trace_set = TraceSet(
                root=whole.root,
                definitions={name: whole.definitions[name]},
                workloads={name: whole.workloads.get(name, [])},
            )
        if options.tokens:
            kept = [t for t in trace_set.workloads[name] if t.workload.axes["seq_len"] in options.tokens]
            trace_set.workloads = {name: kept}
        count = len(trace_set.workloads[name])
        config = config_of(options.iterations, options.warmup, options.trials, options.baseline, f"{folder}/logs")
        close: Callable[[], None] = BuilderRegistry.get_instance().cleanup
        if options.through == "benchmark":
            run, close = through_benchmark(config, trace_set)
        else:
            run = through_evaluator(config, "cuda:0")
        try:
            traces = run_all(trace_set, solutions, run, options.output, options.seconds)
        finally:
            close()
    passed = sum(trace.evaluation.status is EvaluationStatus.PASSED for trace in traces)
    print(f"{passed} of {count * len(solutions)} passed; traces in {options.output}")
    return 0 if passed == count * len(solutions) else 1


if __name__ == "__main__":
    sys.exit(main())
