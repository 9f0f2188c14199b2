"""Check and time candidates on the definition's 19 workloads and on token counts between them.

python benchmarks/definition_workloads.py --output benchmarks/results/nvidia_h100_80gb_hbm3/triton_fused.jsonl

Each candidate is checked on a poisoned output against the float32 reference before it is timed, all candidates of a
workload in one process and in rotating order. Writes one BenchRecord a line and prints a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hybrid_moe.bench import Case, environment_of, measure
from hybrid_moe.choice import Choice
from hybrid_moe.numerics import OWN_KERNELS_TOLERANCE
from hybrid_moe.records import append_record
from hybrid_moe.timing import measure_ceilings
from hybrid_moe.workloads import DEEPSEEK_V3, DEFINITION_WORKLOADS, Workload, random_weights

BETWEEN = (3, 24, 128, 200, 400, 2048, 4096)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to append records to")
    parser.add_argument("--candidate", action="append", help="name or name[key=value]; default triton_fused[gemm=triton]")
    parser.add_argument("--between", action="store_true", help=f"also T = {', '.join(map(str, BETWEEN))}")
    parser.add_argument("--routing", default="uniform", help="routing load (see hybrid_moe.workloads)")
    parser.add_argument("--tokens", type=int, nargs="*", help="only these T")
    parser.add_argument("--copies", type=int, default=3, help="weight copies in rotation, 1.4 GB each")
    parser.add_argument("--load-library", type=Path, help="a library of torch operators to load first, as sgl-kernel's")
    options = parser.parse_args()
    if options.load_library:
        torch.ops.load_library(options.load_library)

    candidates = [Choice.parse(text) for text in options.candidate or ["triton_fused[gemm=triton]"]]
    workloads = [w for w in DEFINITION_WORKLOADS if not options.tokens or w.num_tokens in options.tokens]
    if options.between or options.tokens:
        known = {w.num_tokens for w in workloads}
        wanted = options.tokens or BETWEEN
        workloads += [Workload(tokens, 96) for tokens in wanted if tokens not in known]
    workloads = [Workload(w.num_tokens, w.local_expert_offset, options.routing, w.seed, w.uuid) for w in workloads]

    ceilings = measure_ceilings()
    environment = environment_of(ceilings)
    print(environment, flush=True)
    copies = [random_weights(DEEPSEEK_V3, "cuda", seed) for seed in range(options.copies)]
    head = f"{'T':>6} {'rows':>6} {'act':>4} {'floor':>8} {'candidate':30}"
    print(f"{head} {'rel L2':>7} {'match':>7} {'us':>9} {'/floor':>6} {'eager':>8} {'host':>7}")
    for number, workload in enumerate(sorted(workloads, key=lambda w: w.num_tokens)):
        case = Case.make(workload, DEEPSEEK_V3, copies)
        shift = number % len(candidates)
        for choice in candidates[shift:] + candidates[:shift]:
            records = list(measure(case, choice, ceilings, environment, tolerance=OWN_KERNELS_TOLERANCE))
            for record in records:
                append_record(options.output, record)
            graph, eager = records
            work = case.work
            head = f"{workload.num_tokens:6} {work.local_rows:6} {work.active_experts:4} {graph.floor_us:8.1f} {choice!s:30}"
            if graph.latency_us is None or eager.latency_us is None:
                print(head, graph.status, graph.reason, flush=True)
                continue
            c = graph.correctness
            print(
                f"{head} {c.relative_l2:7.4f} {c.matched_ratio:7.4f} {graph.latency_us.median:9.1f}"
                f" {graph.latency_us.median / graph.floor_us:6.2f} {eager.latency_us.median:8.1f}"
                f" {eager.model_extra['host_us']['median']:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
