"""By experts (EP) or across each expert (TP): what DeepSeek-V3's layer takes over a node's ranks, and which to take.

    torchrun --nproc-per-node 2 examples/expert_parallel.py --tokens 1 16 256 4096 --records steps.jsonl
    python benchmarks/ranks.py table steps.jsonl
    python benchmarks/ranks.py layers layers.jsonl --ranks 8 --tokens 1 16 256 4096     # one GPU
    python benchmarks/ranks.py layers layers.jsonl --ranks 16 32 64 --tokens 128 --dispatched
    python benchmarks/ranks.py paper layers.jsonl

``layers`` times the layers of all ranks, or of some of them, one after the other on one GPU, each checked against the
reference first: what many GPUs would take without their communication. Every rank gets the tokens of all, as after an
all-gather, or those that chose one of its experts (``--dispatched``), as from DeepEP.

``table`` prints what was measured at each T and which split the records say to take: the learner's own rule, with EP
and TP as the candidates. As a layer is laid out once, it also says which to take for all T together.

``paper`` puts the layers of ``--dispatched`` next to what DeepEP's authors published for its part.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hybrid_moe import Candidate, HybridMoE, MoEInputs, MoEProblem, Policy
from hybrid_moe.device import DeviceKey
from hybrid_moe.inputs import FP8
from hybrid_moe.learn.learner import learn
from hybrid_moe.measure.bench import record_fields, versions
from hybrid_moe.measure.readers import read_records
from hybrid_moe.measure.records import (
    BenchRecord,
    EnvironmentValue,
    RecordCorrectness,
    append_record,
    problem_of_record,
)
from hybrid_moe.measure.timing import time_graph
from hybrid_moe.measure.workloads import (
    DEEPSEEK_V3,
    ROUTED_SCALING_FACTOR,
    ROUTING_LOADS,
    Workload,
    make_inputs,
    make_routing,
    random_weights,
)
from hybrid_moe.numerics import OWN_KERNELS_TOLERANCE, check
from hybrid_moe.policy.schema import LearnerOptions
from hybrid_moe.policy.select import choose
from hybrid_moe.reference import has_local_work, local_rows_per_expert_and_token, moe_reference, route
from hybrid_moe.shards import expert_parallel_shard, tensor_parallel_shard

EP, TP = "expert_parallel", "tensor_parallel"
WHOLE = replace(DEEPSEEK_V3, num_local_experts=DEEPSEEK_V3.num_experts)
CHECKED = 16  # tokens of a call that are compared with the reference
# DeepEP V1 as published (docs/legacy.md of its repository): H800, a 400 Gb/s CX7 for each, hidden size 7168, top-8 of
# 4 groups, FP8 dispatch and bfloat16 combine. By the number of ranks: microseconds of dispatch and combine of the
# low-latency kernels at 128 tokens a rank, and GB/s of the normal ones, through NVLink for 8 ranks and RDMA for more.
LOW_LATENCY_TOKENS, LOW_LATENCY_US = 128, {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314)}
BANDWIDTH = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
GPUS_OF_A_NODE = 8


def of_tokens(inputs: MoEInputs, tokens: torch.Tensor) -> MoEInputs:
    """Some of the tokens."""
    return inputs._replace(
        routing_logits=inputs.routing_logits[tokens],
        hidden_states=inputs.hidden_states.view(torch.uint8)[tokens].view(FP8),
        hidden_states_scale=inputs.hidden_states_scale[:, tokens].contiguous(),
    )


def parts(everything: MoEInputs, split: str, ranks: int, dispatched: bool) -> Iterator[tuple[MoEInputs, MoEProblem]]:
    """Inputs and problem of each rank; of TP those of one, as all do the same."""
    weights = everything[MoEInputs._fields.index("gemm1_weights") :][:4]
    if split == TP:
        shard = tensor_parallel_shard(*weights, rank=0, tp=ranks)
        yield everything._replace(**shard._asdict()), replace(WHOLE, intermediate_size=shard.gemm2_weights.shape[2])
        return
    problem = replace(WHOLE, num_local_experts=WHOLE.num_experts // ranks)
    # Of more than 8 ranks, 8 that are spread evenly.
    for rank in range(0, ranks, max(1, ranks // 8)):
        shard = expert_parallel_shard(*weights, rank=rank, ep=ranks)
        own = everything._replace(**shard._asdict(), local_expert_offset=rank * problem.num_local_experts)
        yield (of_tokens(own, has_local_work(own, problem).nonzero().flatten()) if dispatched else own), problem


def layers(
    everything: MoEInputs,
    workload: Workload,
    split: str,
    ranks: int,
    dispatched: bool,
    environment: Mapping[str, EnvironmentValue],
) -> BenchRecord:
    """The layers of the ranks, one after the other."""
    config: dict[str, str | int | bool] = {"dispatched": dispatched, "layers_only": True, "ranks": ranks}
    common = record_fields(
        DeviceKey.of(everything.hidden_states.device).name, WHOLE, workload, Candidate(split, config), environment
    ) | {"timing": "cuda_graph"}
    times, rows, found, runs_by = [], [], [], set()
    for inputs, problem in parts(everything, split, ranks, dispatched):
        rows.append(int(local_rows_per_expert_and_token(inputs, problem).sum()))
        if not inputs.num_tokens:
            continue  # nobody sent it a token
        layer = HybridMoE.from_inputs(inputs, problem)
        shape = (inputs.num_tokens, problem.hidden_size)
        output = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=inputs.hidden_states.device)

        def call(layer: HybridMoE = layer, inputs: MoEInputs = inputs, output: torch.Tensor = output) -> None:
            layer(inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale, output=output)

        call()
        some = torch.linspace(0, inputs.num_tokens - 1, min(CHECKED, inputs.num_tokens), device=output.device).long()
        checked = of_tokens(inputs, some)
        found.append(
            check(
                output[some],
                moe_reference(checked, problem),
                has_local_work(checked, problem),
                OWN_KERNELS_TOLERANCE,
                width=problem.intermediate_size,
            )
        )
        if found[-1].failures:
            return BenchRecord(**common, status="failed", reason="; ".join(found[-1].failures))
        runs_by.add(str(layer.choice(inputs.num_tokens)))
        times.append(time_graph([call] * 10, runs=10))
    worst = max(found, key=lambda each: each.relative_l2)
    return BenchRecord(
        **common,
        status="passed",
        latency_us=max(times, key=lambda time: time.median),
        correctness=RecordCorrectness.model_validate(worst.to_dict()),
        fastest_layer_us=min(time.median for time in times) if len(times) == len(rows) else 0.0,  # type: ignore[call-arg]
        rows_of_ranks=rows,
        runs_by=", ".join(sorted(runs_by)),
    )


def measure_layers(options: argparse.Namespace) -> bool:
    """Measure and add the records; whether all were right."""
    environment = versions()
    weights = random_weights(WHOLE, "cuda")
    right = True
    for ranks in options.ranks:
        for tokens in options.tokens:
            drawn = Workload(tokens * ranks, routing=options.routing)
            everything = make_inputs(drawn, WHOLE, weights)
            for split in (EP,) if options.dispatched else (EP, TP):
                workload = replace(drawn, num_tokens=tokens)
                record = layers(everything, workload, split, ranks, options.dispatched, environment)
                append_record(options.records, record)
                right &= record.status == "passed"
                extra, latency = record.model_extra or {}, record.latency_us
                said = record.reason if latency is None else f"{latency.median:.1f} us, {extra}"
                print(f"T = {tokens} a rank, {record.choice}: {said}", flush=True)
    return right


def learned(records: Sequence[BenchRecord], regimes: str = "auto") -> Policy:
    """A policy whose candidates are the splits; T is that of a rank."""
    options = LearnerOptions(regimes=regimes, max_gap=2.5)
    return learn(records, options, problem=problem_of_record(records[0]), inputs=())


Column = Callable[[BenchRecord, BenchRecord], str]  # of the records of EP and TP
LAYER_COLUMNS: dict[str, Column] = {
    "EP layer, slowest rank (fastest)": lambda ep, tp: layer_of(ep),
    "TP layer": lambda ep, tp: layer_of(tp),
}
STEP_COLUMNS: dict[str, Column] = {
    "EP step": lambda ep, tp: step_of(ep),
    "TP step": lambda ep, tp: step_of(tp),
    **LAYER_COLUMNS,
    "communication": lambda ep, tp: " / ".join(f"{extra(each, 'communication_us'):.1f}" for each in (ep, tp)),
    "EP tokens/s": lambda ep, tp: f"{extra(ep, 'tokens_per_s'):,.0f}",
    "TP tokens/s": lambda ep, tp: f"{extra(tp, 'tokens_per_s'):,.0f}",
}


def extra(record: BenchRecord, name: str) -> float:
    """A field of these records alone."""
    return float((record.model_extra or {})[name])


def step_of(record: BenchRecord) -> str:
    """Microseconds of what was measured as a whole."""
    return f"{record.relative_time:.1f}"


def layer_of(record: BenchRecord) -> str:
    """Microseconds of the layer on the slowest rank and on the fastest one; one figure where all do the same."""
    time = (record.model_extra or {}).get("layer_us", record.relative_time)
    return f"{time:.1f}" if record.backend == TP else f"{time:.1f} ({extra(record, 'fastest_layer_us'):.1f})"


def table(records: Sequence[BenchRecord]) -> str:
    """Markdown: one row a T, for records of one way of timing, one number of ranks and one routing."""
    at: dict[int, dict[str, BenchRecord]] = defaultdict(dict)
    for record in records:
        at[record.num_tokens][record.backend] = record
    first = records[0]
    layers_only = bool(first.config.get("layers_only"))
    columns = LAYER_COLUMNS if layers_only else STEP_COLUMNS
    policy, whole = learned(records), learned(records, f"1-{max(at)}")
    lines = [
        f"{first.config['ranks']} ranks, {first.problem}, {first.device}, {first.timing}, routing {first.routing}"
        + (", layers alone, one after the other on one GPU" if layers_only else "")
        + ", microseconds",
        "",
        f"| T a rank | {' | '.join(columns)} | TP / EP | the records say |",
        "|" + "---:|" * (len(columns) + 2) + "---|",
    ]
    for tokens, found in sorted(at.items()):
        ep, tp = found[EP], found[TP]
        if wrong := [each.backend for each in (ep, tp) if each.status != "passed"]:
            lines.append(f"| {tokens} |{' |' * (len(columns) + 1)} {' and '.join(wrong)} wrong |")
            continue
        choice = choose(policy, policy.problem, DeviceKey(policy.device), tokens).choice.backend
        regime = policy.regime_of(tokens)
        cells = [str(tokens), *(column(ep, tp) for column in columns.values())]
        cells += [f"{tp.relative_time / ep.relative_time:.2f}", choice + (f" ({regime.verdict})" if regime else "")]
        lines.append(f"| {' | '.join(cells)} |")
    regime = whole.regimes[0]
    lines += ["", f"For all T together: {regime.choice.backend} ({regime.verdict}), {regime.reason}."]
    if (left_out := policy.leave_one_out_regret) is not None:
        lines.append(f"Leaving one T out, what the others say of it is {left_out.mean:.1%} slower than the faster one.")
    return "\n".join(lines)


def deep_ep_us(ranks: int, tokens: int) -> tuple[float, float]:
    """Dispatch and combine in microseconds: as published for its low-latency kernels, else by published bandwidth.

    The bandwidth counts, as DeepEP's own tests do, every copy of a token: one a rank in a node, one a node beyond it.
    """
    if tokens == LOW_LATENCY_TOKENS:
        return LOW_LATENCY_US[ranks]
    logits, bias = make_routing(Workload(tokens), WHOLE)
    chosen, _ = route(logits, bias, ROUTED_SCALING_FACTOR, WHOLE)
    places = ranks if ranks <= GPUS_OF_A_NODE else ranks // GPUS_OF_A_NODE
    place = chosen // (WHOLE.num_experts // places)
    copies = sum(int((place == each).any(dim=1).sum()) for each in range(places))
    dispatched, combined = (copies * WHOLE.hidden_size * size for size in (1 + 4 / 128, 2))
    dispatch, combine = BANDWIDTH[ranks]
    return dispatched / dispatch / 1e3, combined / combine / 1e3


def paper(records: Sequence[BenchRecord]) -> str:
    """Markdown: the layer measured on one rank after the other, and DeepEP's part."""
    lines = [
        "| ranks | T a rank | layer, slowest rank (fastest) | DeepEP's dispatch | its combine | share of the layer |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for record in sorted(records, key=lambda each: (each.num_tokens, each.config["ranks"])):
        ranks, layer = int(record.config["ranks"]), record.relative_time
        dispatch, combine = deep_ep_us(ranks, record.num_tokens)
        lines.append(
            f"| {ranks} | {record.num_tokens} | {layer_of(record)} | {dispatch:.0f} | {combine:.0f} | "
            f"{layer / (layer + dispatch + combine):.0%} |"
        )
    return "\n".join(lines)


def tables(paths: Sequence[Path]) -> Iterator[str]:
    """One for each way of timing, number of ranks, layer and routing."""
    groups: dict[tuple[object, ...], list[BenchRecord]] = defaultdict(list)
    for path in paths:
        for record in read_records(path):
            if not record.config.get("dispatched"):
                key = (record.problem, record.config["ranks"], record.routing, record.timing)
                groups[(*key, bool(record.config.get("layers_only")))].append(record)
    for records in groups.values():
        if {record.backend for record in records} == {EP, TP}:
            yield table(records)


def main() -> None:
    """Measure, or print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    of_records = commands.add_parser("table", help="print what records say")
    of_records.add_argument("records", type=Path, nargs="+")
    of_paper = commands.add_parser("paper", help="print layers of --dispatched with DeepEP's published figures")
    of_paper.add_argument("records", type=Path, nargs="+")
    of_layers = commands.add_parser("layers", help="time the layers of many ranks on one GPU")
    of_layers.add_argument("records", type=Path)
    of_layers.add_argument("--ranks", type=int, nargs="+", default=[8])
    of_layers.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 4096], help="of each rank")
    of_layers.add_argument("--routing", choices=ROUTING_LOADS, default="uniform")
    of_layers.add_argument("--dispatched", action="store_true", help="a rank gets only tokens that chose its experts")
    options = parser.parse_args()
    if options.command == "table":
        print("\n\n".join(tables(options.records)))
        return
    if options.command == "paper":
        found = [record for path in options.records for record in read_records(path)]
        print(paper([record for record in found if record.config.get("dispatched")]))
        return
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")
    with torch.inference_mode():
        if not measure_layers(options):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
