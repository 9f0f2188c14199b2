"""DeepSeek-V3's layer over any number of ranks, split by experts (EP) or across each expert (TP), timed and checked.

Attention is data-parallel: every rank has T tokens of its own. A step gathers the tokens of all ranks, runs this rank's
part of the layer on them, and adds the parts up so that each rank gets its own tokens back. EP and TP move the same
bytes and read the same weights: by EP a rank has whole experts, as busy as the routing makes them; by TP all ranks do
the same, on narrower experts.

    torchrun --nproc-per-node 2 examples/expert_parallel.py                     # 64 of the 256 experts on two GPUs
    torchrun --nproc-per-node 8 examples/expert_parallel.py --tokens 1 16 256 4096 --records ranks.jsonl
    torchrun --nproc-per-node 2 examples/expert_parallel.py --device cpu        # gloo, a small layer, the reference

Prints for each T, split and way of launching: the step on the slowest rank, the layer on the slowest and the fastest
one, communication alone, tokens per second of all ranks, and the check against the sum of the parts that this one
device computes one after the other. Exit code 1 if one is wrong. `benchmarks/ranks.py table` makes a table of records.

Behind tensor-parallel attention every rank has all tokens already: nothing is gathered, and the sum is an all-reduce.
All-to-all dispatchers (DeepEP) send a token only to the ranks that hold one of its experts, with the experts and
weights that its own rank chose: made with ``routing_bias=None``, a layer takes those.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from hybrid_moe import Candidate, HybridMoE, MoEInputs, MoEProblem
from hybrid_moe.device import DeviceKey
from hybrid_moe.hf_config import padded_width
from hybrid_moe.inputs import FP8
from hybrid_moe.measure.bench import record_fields, versions
from hybrid_moe.measure.records import BenchRecord, EnvironmentValue, RecordCorrectness, append_record
from hybrid_moe.measure.timing import summarize
from hybrid_moe.measure.workloads import DEEPSEEK_V3, ROUTING_LOADS, Workload, make_inputs, random_weights
from hybrid_moe.numerics import Correctness, Tolerance, check
from hybrid_moe.reference import has_local_work, local_rows_per_expert_and_token
from hybrid_moe.shards import expert_parallel_shard, tensor_parallel_shard

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=512
)
# The parts are the same on one device and on many; the sum of them is in bfloat16, rounded once for each rank.
SUM_TOLERANCE = Tolerance(max_relative_l2=0.01)

# torch 2.13 has new names for these two.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Split = Literal["ep", "tp"]
NAMES: dict[Split, str] = {"ep": "expert_parallel", "tp": "tensor_parallel"}


def part_of(tokens: MoEInputs, whole: MoEProblem, split: Split, rank: int, ranks: int) -> tuple[MoEInputs, MoEProblem]:
    """The whole layer's inputs with the weights of one rank alone, and the problem that it computes."""
    weights = tokens[MoEInputs._fields.index("gemm1_weights") :][:4]
    if split == "ep":
        shard = expert_parallel_shard(*weights, rank=rank, ep=ranks)
        problem = replace(whole, num_local_experts=whole.num_local_experts // ranks)
        return tokens._replace(**shard._asdict(), local_expert_offset=rank * problem.num_local_experts), problem
    shard = tensor_parallel_shard(*weights, rank=rank, tp=ranks)
    return tokens._replace(**shard._asdict()), replace(
        whole, intermediate_size=padded_width(whole.intermediate_size, ranks)
    )


class Step:
    """One step of this rank. Its buffers stay where they are, so that a CUDA graph can hold it.

    Parameters
    ----------
    layer
        This rank's part.
    own
        This rank's tokens, as many as on every other rank.
    """

    def __init__(self, layer: HybridMoE, own: MoEInputs) -> None:
        self._layer = layer
        tokens, everyone = own.num_tokens, own.num_tokens * dist.get_world_size()
        # Two collectives: rows in FP8, and scales with logits, which are both float32.
        self._hidden = own.hidden_states.view(torch.uint8)
        self._rest = torch.cat([own.hidden_states_scale.t(), own.routing_logits], dim=1)
        self._all_hidden = self._hidden.new_empty((everyone, self._hidden.shape[1]))
        self._all_rest = self._rest.new_empty((everyone, self._rest.shape[1]))
        blocks = own.hidden_states_scale.shape[0]
        self._scale = self._rest.new_empty((blocks, everyone))
        self._logits = self._rest.new_empty((everyone, own.routing_logits.shape[1]))
        self._blocks = blocks
        self._partial = self._rest.new_empty((everyone, layer.problem.hidden_size), dtype=torch.bfloat16)
        #: The whole layer's output for this rank's tokens, ``[T, H]`` bfloat16.
        self.result = self._partial.new_empty((tokens, layer.problem.hidden_size))

    def gather(self) -> None:
        """The tokens of all ranks."""
        all_gather(self._all_hidden, self._hidden)
        all_gather(self._all_rest, self._rest)
        self._scale.copy_(self._all_rest[:, : self._blocks].t())
        self._logits.copy_(self._all_rest[:, self._blocks :])

    def layer(self) -> None:
        """The part of the output that is this rank's, for all tokens."""
        self._layer(self._logits, self._all_hidden.view(FP8), self._scale, output=self._partial)

    def reduce(self) -> None:
        """The sum of the parts, for this rank's tokens."""
        reduce_scatter(self.result, self._partial)

    def communication(self) -> None:
        """A step without its layer."""
        self.gather()
        self.reduce()

    def __call__(self) -> None:
        """Compute `result`."""
        self.gather()
        self.layer()
        self.reduce()


def sum_of_parts(tokens: MoEInputs, whole: MoEProblem, split: Split, ranks: int, backend: str | None) -> torch.Tensor:
    """What all ranks' layers give on this one device, added up in float32: ``[T * ranks, H]``."""
    total = torch.zeros(tokens.hidden_states.shape, dtype=torch.float32, device=tokens.hidden_states.device)
    for rank in range(ranks):
        part, problem = part_of(tokens, whole, split, rank, ranks)
        layer = HybridMoE.from_inputs(part, problem, backend=backend)
        total += layer(part.routing_logits, part.hidden_states, part.hidden_states_scale)
    return total


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of the call, its collectives with it; replaying it is the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # communicators and kernels are set up outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events in its own thread meanwhile, which a capture of the whole process would forbid.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call()
    return graph.replay


@dataclass(frozen=True)
class Times:
    """Microseconds of one call in each of several rows of calls, on the slowest and on the fastest rank of each row."""

    slowest: list[float]
    fastest: list[float]


def time_rows(call: Callable[[], object], device: torch.device, steps: int, rows: int = 10) -> Times:
    """Time ``rows`` rows of ``steps`` calls, begun on all ranks at once; one row before them doesn't count."""
    times = []
    for _ in range(rows + 1):
        wait_for(device)
        dist.barrier()
        wait_for(device)
        begin = time.perf_counter()
        for _ in range(steps):
            call()
        wait_for(device)
        times.append((time.perf_counter() - begin) / steps * 1e6)
    slowest = torch.tensor(times[1:], device=device)
    fastest = slowest.clone()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(fastest, op=dist.ReduceOp.MIN)
    return Times(slowest.tolist(), fastest.tolist())


def wait_for(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def worst_of_all(own: Correctness) -> Correctness:
    """The worst of all ranks' results."""
    found: list[Correctness] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return max(found, key=lambda result: (not result.passed, result.relative_l2))


def measure(
    tokens: MoEInputs,
    whole: MoEProblem,
    split: Split,
    workload: Workload,
    environment: Mapping[str, EnvironmentValue],
    options: argparse.Namespace,
) -> bool:
    """Check and time the layer at one T; whether it is right."""
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), tokens.hidden_states.device
    part, problem = part_of(tokens, whole, split, rank, ranks)
    # With the group, so that all ranks choose alike.
    layer = HybridMoE.from_inputs(part, problem, backend=options.backend, group=dist.group.WORLD)
    layer.warm_up([tokens.num_tokens])
    mine = slice(rank * workload.num_tokens, (rank + 1) * workload.num_tokens)
    step = Step(
        layer,
        part._replace(
            hidden_states=part.hidden_states[mine].contiguous(),
            hidden_states_scale=part.hidden_states_scale[:, mine].contiguous(),
            routing_logits=part.routing_logits[mine].contiguous(),
        ),
    )
    wanted = sum_of_parts(tokens, whole, split, ranks, options.backend)[mine]
    work = has_local_work(tokens, whole)[mine]
    rows = local_rows_per_expert_and_token(tokens, whole).sum(dim=0)
    rows_of_ranks = rows.view(ranks, -1).sum(dim=1).tolist() if split == "ep" else [int(rows.sum())] * ranks
    right = True
    for how in options.how:
        ways: list[Callable[[], object]] = [step, step.layer, step.communication]
        step()  # what the layer alone reads
        if how == "cuda_graph":
            ways = [captured(way) for way in ways]
        step.result.fill_(torch.nan)
        ways[0]()
        found = worst_of_all(check(step.result, wanted, work, SUM_TOLERANCE))
        right = right and found.passed
        if not found.passed:
            if rank == 0:
                print(f"T = {workload.num_tokens}, {split}, {how}: WRONG: {'; '.join(found.failures)}")
            continue
        whole_step, alone, communication = (time_rows(way, device, options.steps) for way in ways)
        latency = summarize(whole_step.slowest)
        record = BenchRecord(
            **record_fields(
                DeviceKey.of(device).name,
                whole,
                workload,
                Candidate(NAMES[split], {"ranks": ranks}),
                environment,
            ),
            timing=how,
            status="passed",
            latency_us=latency,
            correctness=RecordCorrectness.model_validate(found.to_dict()),
            layer_us=summarize(alone.slowest).median,  # type: ignore[call-arg]  # fields of this record alone
            fastest_layer_us=summarize(alone.fastest).median,
            communication_us=summarize(communication.slowest).median,
            tokens_per_s=round(tokens.num_tokens / latency.median * 1e6),
            rows_of_ranks=rows_of_ranks,
            runs_by=str(layer.choice(tokens.num_tokens)),
        )
        if rank == 0:
            print(in_words(record), flush=True)
            if options.records is not None:
                append_record(options.records, record)
    return right


def in_words(record: BenchRecord) -> str:
    """One line for a record."""
    extra, latency, correctness = record.model_extra, record.latency_us, record.correctness
    assert extra is not None and latency is not None and correctness is not None
    return (
        f"T = {record.num_tokens:5} a rank, {record.choice} {record.timing:10} step {latency.median:8.1f} us, "
        f"layer {extra['layer_us']:8.1f} (fastest rank {extra['fastest_layer_us']:8.1f}), "
        f"communication {extra['communication_us']:7.1f}, {extra['tokens_per_s']:9} tokens/s, "
        f"rows {extra['rows_of_ranks']}, {extra['runs_by']}, right: relative L2 {correctness.relative_l2:.5f}"
    )


def run(options: argparse.Namespace, device: torch.device) -> bool:
    """Make the layer and measure it at each T; whether all is right."""
    ranks, on_gpu = dist.get_world_size(), device.type == "cuda"
    model = DEEPSEEK_V3 if on_gpu else SMALL
    experts = options.experts or min(ranks * model.num_local_experts, model.num_experts)
    if experts % ranks or not 0 < experts <= model.num_experts:
        raise ValueError(f"--experts: expected a multiple of {ranks} ranks up to {model.num_experts}, got {experts}")
    if min(options.tokens) < 1:
        raise ValueError(f"--tokens: expected 1 or more, got {min(options.tokens)}")
    whole = replace(model, num_local_experts=experts)
    # The same on all ranks, as the seeds are. A deployment loads its own part alone; here all parts are compared with.
    weights = random_weights(whole, device)
    if dist.get_rank() == 0:
        print(
            f"{ranks} x {DeviceKey.of(device).name}, {experts} of {model.num_experts} experts, {whole.hidden_size} x "
            f"{whole.intermediate_size}, routing {options.routing}, {options.steps} steps in a row, median of 10 rows"
        )
    right, environment = True, versions() if on_gpu else {}
    for count in options.tokens:
        # Drawn for the tokens of all ranks; the record's T is that of one.
        drawn = Workload(count * ranks, routing=options.routing, seed=options.seed)
        tokens = make_inputs(drawn, whole, weights)
        for split in options.split:
            right &= measure(tokens, whole, split, replace(drawn, num_tokens=count), environment, options)
    return right


def options_of(arguments: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="T: tokens of each rank")
    parser.add_argument("--split", choices=("ep", "tp"), nargs="+", default=["ep", "tp"])
    parser.add_argument("--how", choices=("cuda_graph", "eager"), nargs="+", help="[default: both; eager on the CPU]")
    parser.add_argument("--experts", type=int, help="on all ranks together [default: 32 a rank]")
    parser.add_argument("--routing", choices=ROUTING_LOADS, default="uniform", help="how busy which experts are")
    parser.add_argument("--seed", type=int, default=0, help="of tokens and routing")
    parser.add_argument("--steps", type=int, default=30, help="in a row, for one time")
    parser.add_argument("--records", type=Path, help="JSON Lines to add a record of each measurement to")
    parser.add_argument("--backend", help="instead of the policy's choice; the CPU takes the reference by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.how is None:
        options.how = ["cuda_graph", "eager"] if options.device == "cuda" else ["eager"]
    if options.backend is None and options.device == "cpu":
        options.backend = "torch_reference"
    return parser, options


def main() -> None:
    """Join the other ranks, run, and leave together."""
    parser, options = options_of()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/expert_parallel.py")
    if "cuda_graph" in options.how and options.device != "cuda":
        parser.error("--how cuda_graph: expected --device cuda")

    device = torch.device(options.device)
    if device.type == "cuda":
        number = int(os.environ["LOCAL_RANK"])
        if number >= torch.cuda.device_count():
            parser.error(f"rank {number} of this node has no GPU; there are {torch.cuda.device_count()}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        with torch.inference_mode():
            right = run(options, device)
    finally:
        dist.destroy_process_group()
    if not right:
        sys.exit(1)


if __name__ == "__main__":
    main()
