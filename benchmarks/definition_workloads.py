"""Check and time candidates and peers on the definition's 19 workloads and on token counts between them.

python benchmarks/definition_workloads.py --output benchmarks/results/DEVICE/definition.jsonl --all --between
python benchmarks/definition_workloads.py --output benchmarks/results/DEVICE/kimi-k2.jsonl --all --model kimi-k2

From T = 901 on a rank is measured at its mean share of the rows, at 1.5 times that and at half of it; the table says
which. Each is checked on poisoned outputs against the float32 reference before it is timed and again on what the timed
calls wrote, on every weight copy and with every seed; all of them at one workload in one process and in rotating order.
Writes one BenchRecord a line and prints a table; what the file has already isn't measured again. Exit code 1 if a
result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import peers
import torch

from hybrid_moe import backends
from hybrid_moe.candidate import Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.measure.bench import Case, environment_of, measure
from hybrid_moe.measure.readers import measured_keys
from hybrid_moe.measure.records import BenchRecord, EnvironmentValue, MeasurementKey, append_record
from hybrid_moe.measure.sweep.plan import SHARED_TOKENS, loads_of_ranks, middle_rank
from hybrid_moe.measure.timing import CUDA_CLOCK, Clock, PeakRates, measure_peak_rates
from hybrid_moe.measure.workloads import (
    DEEPSEEK_V3,
    DEFINITION_WORKLOADS,
    MODELS,
    ROUTING_LOADS,
    LayerWeights,
    RoutingLoad,
    Workload,
    mean_rows,
    random_weights,
)
from hybrid_moe.problem import MoEProblem

# Of other models' layers, which the definition's workloads are not for.
MODEL_TOKENS = (1, 16, 80, 901, 4096)
BETWEEN = (3, 24, 128, 200, 400, 2048, 4096)
SKEWED = (32, 901, 4096)
OURS = tuple(Candidate("triton_fused", {"gemm": gemm}) for gemm in ("triton", "sgl_kernel", "deep_gemm"))
FLASHINFER = (Candidate("flashinfer_trtllm"), Candidate("flashinfer_cutlass"))
SAMPLED_TOKENS = 1024


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to append records to")
    parser.add_argument(
        "--candidate", action="append", help="name or name[key=value]; default triton_fused[gemm=triton]"
    )
    parser.add_argument("--all", action="store_true", help="all three grouped GEMMs, flashinfer and the peers")
    parser.add_argument("--between", action="store_true", help=f"also T = {', '.join(map(str, BETWEEN))}")
    parser.add_argument(
        "--model",
        default="deepseek-v3",
        choices=tuple(MODELS),
        help=f"another model's layer, at T = {', '.join(map(str, MODEL_TOKENS))}",
    )
    parser.add_argument("--routing", default="uniform", choices=ROUTING_LOADS, help="routing load")
    parser.add_argument(
        "--skewed", action="store_true", help=f"also skewed loads at T = {', '.join(map(str, SKEWED))}, ours alone"
    )
    parser.add_argument("--tokens", type=int, nargs="*", help="only these T")
    parser.add_argument("--seeds", type=int, default=1, help="seeds measured, each checked and timed by itself")
    parser.add_argument(
        "--sample", action="store_true", help=f"check {SAMPLED_TOKENS} tokens of the first seed, not all"
    )
    parser.add_argument("--copies", type=int, default=3, help="weight copies in rotation, 1.4 GB each")
    parser.add_argument("--load-library", type=Path, help="a library of torch operators to load first, as sgl-kernel's")
    parser.add_argument("--version-of-library", default="", help="its package and version, as sglang-kernel=0.4.5")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")

    problem = MODELS[options.model]
    if problem == DEEPSEEK_V3:
        definitions, between = DEFINITION_WORKLOADS, BETWEEN if options.between else ()
    else:
        definitions, between = (), MODEL_TOKENS
    workloads = [w for w in definitions if not options.tokens or w.num_tokens in options.tokens]
    known = {w.num_tokens for w in workloads}
    offset = middle_rank(problem)
    workloads += [Workload(tokens, offset) for tokens in options.tokens or between if tokens not in known]
    workloads = [
        of_load
        for w in sorted(workloads, key=lambda w: w.num_tokens)
        for of_load in of_loads(w, options.routing, problem)
    ]
    if options.skewed:
        offsets = {w.num_tokens: w.local_expert_offset for w in definitions}
        workloads += [Workload(t, offsets.get(t, offset), load) for load in ("zipf", "concentrated") for t in SKEWED]

    peak = measure_peak_rates()
    environment = environment_of(peak)
    if options.load_library:
        torch.ops.load_library(options.load_library)
        package, _, version = options.version_of_library.partition("=")
        environment[package] = version
    candidates = [Candidate.parse(text) for text in options.candidate or ["triton_fused[gemm=triton]"]]
    if options.all:
        device = DeviceKey.of("cuda")
        supported = [c for c in FLASHINFER if not backends.not_supported_reasons(problem, device, c)]
        candidates = [*OURS, *supported, *peers.CANDIDATES]
    print(environment, flush=True)
    copies = [random_weights(problem, "cuda", seed) for seed in range(options.copies)]
    head = f"{'T':>6} {'rows':>6} {'share':>5} {'act':>4} {'floor':>8} {'candidate':30}"
    print(f"{head} {'rel L2':>7} {'match':>7} {'us':>9} {'/floor':>6} {'eager':>8} {'host':>7}")
    all_right = True

    def is_main(workload: Workload) -> bool:
        return workload.routing in (options.routing, *loads_of_ranks(problem, options.routing))

    for case, choice, records in measured(
        problem,
        workloads,
        candidates,
        copies,
        peak,
        environment,
        seeds=lambda workload: options.seeds if is_main(workload) else 1,
        sample=options.sample,
        skip=lambda workload, choice: choice in peers.CANDIDATES and not is_main(workload),
        done=measured_keys(options.output),
    ):
        for record in records:
            append_record(options.output, record)
        show(case, choice, *records)
        all_right &= all(record.status != "failed" for record in records)
    if not all_right:
        sys.exit(1)


def of_loads(workload: Workload, load: RoutingLoad, problem: MoEProblem) -> list[Workload]:
    """A workload by a routing load: from SHARED_TOKENS on, in place of ``uniform``, by each share that a rank may have.

    A workload of the definition's stays one by its own load alone.
    """
    if workload.num_tokens < SHARED_TOKENS:
        return [replace(workload, routing=load)]
    return [
        replace(workload, routing=found, uuid=workload.uuid if found == load else None)
        for found in loads_of_ranks(problem, load)
    ]


def measured(
    problem: MoEProblem,
    workloads: Sequence[Workload],
    candidates: Sequence[Candidate],
    copies: Sequence[LayerWeights],
    peak: PeakRates,
    environment: Mapping[str, EnvironmentValue],
    *,
    seeds: Callable[[Workload], int],
    sample: bool = False,
    skip: Callable[[Workload, Candidate], bool] = lambda workload, choice: False,
    done: Set[MeasurementKey] = frozenset(),
    clock: Clock = CUDA_CLOCK,
) -> Iterator[tuple[Case, Candidate, list[BenchRecord]]]:
    """Measure every candidate on every workload with every seed but for what is ``done``; their order rotates.

    Seeds after the first are checked on a sample of the tokens, the first one too if ``sample`` says so.
    """
    device = DeviceKey.of(copies[0].gemm1_weights.device).name
    for number, workload in enumerate(workloads):
        shift = number % len(candidates)
        for seed in range(seeds(workload)):
            of_seed = workload if seed == 0 else replace(workload, seed=seed, uuid=None)
            wanted = [
                choice
                for choice in (*candidates[shift:], *candidates[:shift])
                # Eager calls are timed last.
                if not skip(workload, choice)
                and MeasurementKey.of(device, problem, choice, of_seed.key, "eager") not in done
            ]
            if not wanted:
                continue
            case = Case.make(of_seed, problem, copies, SAMPLED_TOKENS if sample or seed else None)
            for choice in wanted:
                runs, prepare = 15 if workload.num_tokens <= 4096 else 5, peers.prepare_of(problem, choice)
                records = measure(case, choice, peak, environment, prepare=prepare, runs=runs, clock=clock)
                yield case, choice, list(records)
            del case


def show(case: Case, choice: Candidate, graph: BenchRecord, eager: BenchRecord) -> None:
    """Print one row of the table."""
    work, tokens = case.work, case.workload.num_tokens
    share = work.local_rows / mean_rows(tokens, case.problem)
    head = f"{tokens:6} {work.local_rows:6} {share:5.2f} {work.active_experts:4} {graph.floor_us:8.1f} {choice!s:30}"
    if None in (graph.latency_us, eager.latency_us, eager.host_us, graph.correctness) or not graph.floor_us:
        print(head, graph.status, graph.reason, flush=True)
        return
    median = graph.latency_us.median
    print(
        f"{head} {graph.correctness.relative_l2:7.4f} {graph.correctness.matched_ratio:7.4f} {median:9.1f}"
        f" {median / graph.floor_us:6.2f} {eager.latency_us.median:8.1f} {eager.host_us.median:7.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
