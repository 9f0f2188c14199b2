"""Check and time our candidates and the peers on the layers of models, as one GPU of a server has them.

python benchmarks/layers.py --output benchmarks/results/DEVICE/layers.jsonl
python benchmarks/layers.py --output FILE --layer deepseek-v3 qwen3-235b-tp4 --tokens 1 32 1024 --compile-on 16

Each candidate writes on outputs filled with NaN and is compared with the float32 reference before it is timed and
after, and with further seeds. All of it in one process, in rotating order. A record a
line; what the file has already isn't measured again. The tiles of SGLang's kernel that are tuned here are kept as
results/DEVICE/sglang_tiles/*.json. Exit code 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import peers
import torch
from peers import sglang, sglang_triton, tiles
from triton.runtime.errors import OutOfResources

from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.measure.bench import Case, Prepare, Rotation, environment_of, measure
from hybrid_moe.measure.readers import measured_keys
from hybrid_moe.measure.records import BenchRecord, EnvironmentValue, MeasurementKey, append_record
from hybrid_moe.measure.sweep.plan import middle_rank
from hybrid_moe.measure.timing import CUDA_CLOCK, Clock, PeakRates, measure_peak_rates
from hybrid_moe.measure.workloads import MODELS, LayerWeights, Workload, make_inputs, random_weights
from hybrid_moe.policy.versions import installed_version
from hybrid_moe.problem import MoEProblem

# By name in `MODELS`, and the first local expert where it isn't that of a rank in the middle: the second rank of
# DeepSeek-V3's eight has 1.5 times the mean share of rows.
LAYERS: dict[str, int | None] = {
    "deepseek-v3": 32,
    "deepseek-v3-tp8": None,
    "kimi-k2": None,
    "qwen3-235b": None,
    "qwen3-235b-tp4": None,
    "qwen3-235b-tp8": None,
    "qwen3-30b-whole": None,
    "qwen3-30b-tp2": None,
    "glm-4.5-air": None,
    "glm-4.6": None,
    "glm-5": None,
    "minimax-m2": None,
}
TOKENS = (1, 8, 32, 128, 256, 1024, 4096, 16384)
OURS = (Candidate("triton_fused", {"gemm": "triton"}), Candidate("triton_fused", {"gemm": "deep_gemm"}))
CANDIDATES = (*OURS, Candidate("flashinfer_cutlass"), *peers.CANDIDATES)
TUNED = sglang_triton.CANDIDATES[-1]
SAMPLED_TOKENS = 256
COPIES = 3  # of the weights, in rotation
# Token counts that a process compiles for, one after the other: neighbours often have the same kernels.
TOKENS_PER_TASK = 3


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to append records to")
    parser.add_argument("--layer", nargs="*", default=[*LAYERS], choices=tuple(MODELS), help="default: all")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help=f"default: {TOKENS}")
    parser.add_argument("--offset", type=int, help="first local expert, in place of the layer's own")
    parser.add_argument("--candidate", nargs="*", help="name or name[key=value]; default: ours and all peers")
    parser.add_argument("--seeds", type=int, default=3, help="to check; the first is timed")
    parser.add_argument("--compile-on", type=int, default=0, metavar="N", help="compile on N processes before")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")
    candidates = [Candidate.parse(text) for text in options.candidate] if options.candidate else [*CANDIDATES]
    if options.compile_on:
        compile_ahead(options.layer, options.tokens, candidates, options.compile_on)

    peak = measure_peak_rates()
    environment = environment_of(peak) | {p: v for p in ("sglang", "vllm") if (v := installed_version(p))}
    print(environment, flush=True)
    done = measured_keys(options.output)
    all_right = True
    for name in options.layer:
        problem = MODELS[name]
        offset = offset_of(name) if options.offset is None else options.offset
        copies = [random_weights(problem, "cuda", seed) for seed in range(COPIES)]
        print(f"{name}, experts from {offset}", flush=True)
        for count in options.tokens:
            workload = Workload(count, offset)
            for record in measured(problem, workload, options.seeds, candidates, copies, peak, environment, done):
                append_record(options.output, record)
                print(line(record), flush=True)
                all_right &= record.status != "failed"
    if not all_right:
        sys.exit(1)


def offset_of(name: str) -> int:
    """The layer's first local expert."""
    offset = LAYERS.get(name)
    return middle_rank(MODELS[name]) if offset is None else offset


def measured(
    problem: MoEProblem,
    workload: Workload,
    seeds: int,
    candidates: Sequence[Candidate],
    copies: Sequence[LayerWeights],
    peak: PeakRates,
    environment: Mapping[str, EnvironmentValue],
    done: Set[MeasurementKey],
    clock: Clock = CUDA_CLOCK,
) -> Iterator[BenchRecord]:
    """Every candidate at one workload but for those in ``done``; which comes first rotates with T.

    A record is of the workload's own seed, and ``passed`` if the candidate was right with the following ones too.
    """
    device = DeviceKey.of(copies[0].gemm1_weights.device).name
    wanted = [c for c in candidates if MeasurementKey.of(device, problem, c, workload.key, "cuda_graph") not in done]
    if not wanted:
        return
    of_seeds = [replace(workload, seed=workload.seed + n) for n in range(seeds)]
    case, *others = [Case.make(one, problem, copies, SAMPLED_TOKENS) for one in of_seeds]
    if TUNED in wanted:
        tune(case)
    shift = workload.num_tokens.bit_length() % len(wanted)
    for choice in (*wanted[shift:], *wanted[:shift]):
        prepare = peers.prepare_of(problem, choice)
        runs = 15 if workload.num_tokens <= 4096 else 5
        how = {"prepare": prepare, "timings": ("cuda_graph",), "runs": runs, "clock": clock}
        (record,) = measure(case, choice, peak, environment, **how)
        if record.status == "passed":
            wrong = [reason for other in others if (reason := failure(other, choice, prepare))]
            changed = {"status": "failed", "reason": "; ".join(wrong), "latency_us": None} if wrong else {}
            record = BenchRecord.model_validate(record.model_dump() | changed | {"seeds": seeds})
        yield record
        torch.cuda.empty_cache()  # a graph's memory is no other candidate's


def failure(case: Case, choice: Candidate, prepare: Prepare) -> str:
    """Why a candidate is wrong on a case; empty if it isn't."""
    torch.cuda.empty_cache()  # of the graph that was timed
    rotation = Rotation.make(case, choice, prepare)
    for call in rotation.calls()[: len(rotation.runs)]:
        call()
    copy, found = rotation.check()
    return f"seed {case.workload.seed}, weight copy {copy}: " + "; ".join(found.failures) if found.failures else ""


def tune(case: Case) -> None:
    """Keep the best tile of SGLang's kernel at this T, unless it is known already."""
    tokens = case.workload.num_tokens
    if is_tuned(case.problem, tokens) or sglang.not_supported_reasons():
        return
    best = sglang_triton.tune(case)
    if best is not None:
        tiles.keep(tiles.tuned_path(case.problem), tokens, best)


def is_tuned(problem: MoEProblem, tokens: int) -> bool:
    """Whether the best tile of SGLang's kernel is known."""
    return tokens in (tiles.load(tiles.tuned_path(problem)) or {})


def line(record: BenchRecord) -> str:
    """One line of the log."""
    head = f"{record.num_tokens:6} {record.local_rows:7} {record.active_experts:4} {record.choice!s:44}"
    if record.latency_us is None or record.correctness is None or not record.floor_us:
        return f"{head} {record.status}: {record.reason}"
    return (
        f"{head} {record.correctness.relative_l2:7.4f} {'same' if record.equal_bits else 'OTHER'} bits"
        f" {record.latency_us.median:9.1f} {record.latency_us.median / record.floor_us:6.2f}"
    )


def compile_ahead(names: Sequence[str], tokens: Sequence[int], candidates: Sequence[Candidate], processes: int) -> None:
    """Call every candidate once at each T, on weights of zeros, so that its kernels are in the caches on disk."""
    some = [tokens[at : at + TOKENS_PER_TASK] for at in range(0, len(tokens), TOKENS_PER_TASK)]
    tasks = [(name, count, choice) for choice in candidates[::-1] for name in names for count in some]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(call_once, *task) for task in tasks]:
            future.result()


@functools.lru_cache(maxsize=1)
def zeros(problem: MoEProblem) -> LayerWeights:
    """Weights that take no time to make."""
    e, h, i, b = problem.num_local_experts, problem.hidden_size, problem.intermediate_size, problem.block

    def both(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.zeros((e, rows // b, columns // b), dtype=torch.float32, device="cuda")
        return torch.zeros((e, rows, columns), dtype=torch.uint8, device="cuda").view(FP8), scale

    return LayerWeights(*both(2 * i, h), *both(h, i))


def call_once(name: str, tokens: Sequence[int], choice: Candidate) -> None:
    """One call at each T; for tiles that are to be tuned, by each tile of the sweep."""
    torch.set_num_threads(1)
    problem = MODELS[name]
    weights = zeros(problem)
    for count in tokens:
        inputs = make_inputs(Workload(count, offset_of(name)), problem, weights)
        output = torch.empty((count, problem.hidden_size), dtype=torch.bfloat16, device="cuda")
        if choice == TUNED and not is_tuned(problem, count) and not sglang.not_supported_reasons():
            layer = sglang.Layer.of(inputs, problem)
            calls = [functools.partial(sglang_triton.run, layer, t) for t in tiles.worth_trying(problem, count)]
        else:
            calls = [functools.partial(prepare_and_call, problem, choice, inputs)]
        for call in calls:
            try:
                call(output)
            except (BackendUnsupportedError, OutOfResources, torch.OutOfMemoryError):
                continue  # the measurement says so
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def prepare_and_call(problem: MoEProblem, choice: Candidate, inputs: MoEInputs, output: torch.Tensor) -> None:
    """For `call_once`."""
    peers.prepare_of(problem, choice)(inputs)(output)


if __name__ == "__main__":
    main()
