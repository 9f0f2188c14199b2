"""Expert parallelism: every rank holds its part of the experts, and the ranks' partial outputs are summed.

Every rank has the same tokens, as behind tensor-parallel attention. Each runs the layer on its own experts alone, which
``local_expert_offset`` says, and one collective of NCCL adds the parts up: an all-reduce, or a reduce-scatter where the
layers after this one want their share of the tokens only.

    torchrun --nproc-per-node 2 examples/expert_parallel.py                # DeepSeek-V3: 32 of 256 experts on each GPU
    torchrun --nproc-per-node 2 examples/expert_parallel.py --reduce scatter --tokens 4096
    torchrun --nproc-per-node 2 examples/expert_parallel.py --device cpu   # gloo, a small layer, the reference

Prints the time of a step, of the rank's own layer in it, and of one device that holds all the ranks' experts; and
checks the sum against the parts run on one device, one after the other. Exit code 1 if it is wrong.

**Where tokens are not the same on every rank** (data-parallel attention, many nodes), DeepEP goes here: its
``Buffer.dispatch`` in front of the layer, which sends a token's e4m3 row and scales only to the ranks that hold one of
its experts, and its ``Buffer.combine`` in place of the reduction, which brings the partial rows back and adds them up.
It sends experts and weights that are chosen before, by the router on the token's own rank. This layer chooses by itself
from the logits, so these would have to go along as well: with the same logits every rank chooses the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist

from hybrid_moe import HybridMoE, MoEInputs, MoEProblem
from hybrid_moe.device import DeviceKey
from hybrid_moe.measure.workloads import DEEPSEEK_V3, LayerWeights, Workload, make_inputs, random_weights
from hybrid_moe.numerics import Correctness, Tolerance, check
from hybrid_moe.reference import has_local_work

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
# The parts are the same on one device and on many; the sum of them is in bfloat16, rounded once for each rank.
SUM_TOLERANCE = Tolerance(max_relative_l2=0.01)

Reduce = Literal["all", "scatter"]


class ExpertParallelStep:
    """One step of this rank: its own experts' part of the output, then the sum over the ranks.

    The buffer stays where it is, so that a CUDA graph can hold the step; each call overwrites the result before.

    Parameters
    ----------
    layer
        This rank's.
    inputs
        The tokens, the same on every rank.
    reduce
        ``"all"``: every rank gets all tokens. ``"scatter"``: rank r gets the r-th share of them, ``ceil(T / ranks)``
        each, the last ones filled up with zeros.
    """

    def __init__(self, layer: HybridMoE, inputs: MoEInputs, reduce: Reduce) -> None:
        self._layer, self._inputs, self._reduce = layer, inputs, reduce
        tokens, ranks = inputs.num_tokens, dist.get_world_size()
        share = -(-tokens // ranks)
        rows = share * ranks if reduce == "scatter" else tokens
        self._buffer = inputs.hidden_states.new_zeros((rows, layer.problem.hidden_size), dtype=torch.bfloat16)
        self._partial = self._buffer[:tokens]
        self._share = torch.empty_like(self._buffer[:share])
        first = min(dist.get_rank() * share, tokens)
        #: Which tokens the result is of.
        self.tokens = slice(first, min(first + share, tokens)) if reduce == "scatter" else slice(0, tokens)
        #: The layer's output for ``tokens``, bfloat16.
        self.result = self._share[: self.tokens.stop - first] if reduce == "scatter" else self._partial

    def partial(self) -> None:
        """The part of this rank's experts alone."""
        inputs = self._inputs
        self._layer(inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale, output=self._partial)

    def __call__(self) -> None:
        """Compute ``result``."""
        self.partial()
        if self._reduce == "scatter":
            dist.reduce_scatter_tensor(self._share, self._buffer)
        else:
            dist.all_reduce(self._partial)


def part_of(whole: LayerWeights, rank: int, problem: MoEProblem) -> LayerWeights:
    """A rank's experts out of those of all ranks; a view."""
    experts = slice(rank * problem.num_local_experts, (rank + 1) * problem.num_local_experts)
    return LayerWeights(
        whole.gemm1_weights[experts],
        whole.gemm1_weights_scale[experts],
        whole.gemm2_weights[experts],
        whole.gemm2_weights_scale[experts],
    )


def weights_of_all(problem: MoEProblem, ranks: int, device: torch.device) -> LayerWeights:
    """The experts of all ranks, one after the other: each rank makes its own of its number as the seed."""
    parts = [random_weights(problem, device, seed=rank) for rank in range(ranks)]
    return LayerWeights(
        torch.cat([part.gemm1_weights for part in parts]),
        torch.cat([part.gemm1_weights_scale for part in parts]),
        torch.cat([part.gemm2_weights for part in parts]),
        torch.cat([part.gemm2_weights_scale for part in parts]),
    )


def with_weights(inputs: MoEInputs, weights: LayerWeights, offset: int) -> MoEInputs:
    """The same tokens with other experts."""
    return inputs._replace(
        gemm1_weights=weights.gemm1_weights,
        gemm1_weights_scale=weights.gemm1_weights_scale,
        gemm2_weights=weights.gemm2_weights,
        gemm2_weights_scale=weights.gemm2_weights_scale,
        local_expert_offset=offset,
    )


def sum_of_parts(
    inputs: MoEInputs, whole: LayerWeights, problem: MoEProblem, ranks: int, backend: str | None
) -> torch.Tensor:
    """What the ranks' layers give on this one device, added up in float32: ``[T, H]``."""
    total = torch.zeros((inputs.num_tokens, problem.hidden_size), dtype=torch.float32, device=inputs[0].device)
    for rank in range(ranks):
        part = with_weights(inputs, part_of(whole, rank, problem), rank * problem.num_local_experts)
        layer = HybridMoE.from_inputs(part, problem, backend=backend)
        total += layer(part.routing_logits, part.hidden_states, part.hidden_states_scale)
    return total


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph, its collective with it; replaying it is the step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # communicators and kernels are set up outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events in its own thread meanwhile, which a capture of the whole process would forbid.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def microseconds(call: Callable[[], object], device: torch.device, steps: int) -> float:
    """Time of one call out of ``steps`` in a row, the median of five such rows, on the slowest rank."""
    rows = []
    for _ in range(6):
        dist.barrier()
        wait_for(device)
        begin = time.perf_counter()
        for _ in range(steps):
            call()
        wait_for(device)
        rows.append((time.perf_counter() - begin) / steps * 1e6)
    slowest = torch.tensor(statistics.median(rows[1:]), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def wait_for(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_words(result: Correctness, rank: int, tokens: slice) -> str:
    """One line for a rank's result."""
    verdict = "right" if result.passed else f"WRONG: {'; '.join(result.failures)}"
    return (
        f"rank {rank}: tokens {tokens.start}-{tokens.stop - 1} {verdict}, relative L2 {result.relative_l2:.5f}, "
        f"largest error {result.max_abs_error:.4f}"
    )


def run(options: argparse.Namespace, device: torch.device) -> bool:
    """Make the layer, time the step and check it; whether it is right."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    on_gpu = device.type == "cuda"
    problem = DEEPSEEK_V3 if on_gpu else SMALL
    last = problem.num_experts // problem.num_local_experts
    if ranks > last:
        raise ValueError(f"--nproc-per-node is {ranks}; at most {last} is wanted, which hold all the experts")
    if options.tokens < 1:
        raise ValueError(f"--tokens is {options.tokens}; 1 or more is wanted")
    backend = options.backend or (None if on_gpu else "torch_reference")
    offset = rank * problem.num_local_experts

    # One workload on all ranks: the same seed makes the same tokens. The weights are each rank's own.
    own = random_weights(problem, device, seed=rank)
    tokens = make_inputs(Workload(options.tokens), problem, own)
    inputs = with_weights(tokens, own, offset)
    layer = HybridMoE.from_inputs(inputs, problem, backend=backend)
    layer.warm_up([options.tokens])
    step = ExpertParallelStep(layer, inputs, options.reduce)
    call, partial = (captured(step), captured(step.partial)) if options.graph else (step, step.partial)
    step.result.fill_(float("nan"))
    call()
    result = step.result.clone()
    step_us = microseconds(call, device, options.steps)
    partial_us = microseconds(partial, device, options.steps)

    # What a deployment doesn't do: everyone's weights on this device, to compare with.
    whole = weights_of_all(problem, ranks, device)
    all_here = replace(problem, num_local_experts=ranks * problem.num_local_experts)
    together = with_weights(tokens, whole, 0)
    one = HybridMoE.from_inputs(together, all_here, backend=backend)
    one.warm_up([options.tokens])
    output = torch.empty((options.tokens, problem.hidden_size), dtype=torch.bfloat16, device=device)

    def on_one_device() -> None:
        one(together.routing_logits, together.hidden_states, together.hidden_states_scale, output=output)

    one_us = microseconds(captured(on_one_device) if options.graph else on_one_device, device, options.steps)
    if rank == 0:
        how = "one CUDA graph" if options.graph else "eager"
        print(
            f"{ranks} x {DeviceKey.of(device).name}, {all_here.num_local_experts} of {problem.num_experts} experts, "
            f"T = {options.tokens}, reduce {options.reduce}, {how}: {layer.choice(options.tokens)}\n"
            f"step          {step_us:9.1f} us\n"
            f"its layer     {partial_us:9.1f} us, on {problem.num_local_experts} experts\n"
            f"one device    {one_us:9.1f} us, on {all_here.num_local_experts} experts by {one.choice(options.tokens)}"
        )

    wanted = sum_of_parts(tokens, whole, problem, ranks, backend)[step.tokens]
    work = has_local_work(together, all_here)[step.tokens]
    correctness = check(result, wanted, work, SUM_TOLERANCE)
    results: list[tuple[bool, str]] = [(False, "")] * ranks
    dist.all_gather_object(results, (correctness.passed, in_words(correctness, rank, step.tokens)))
    if rank == 0:
        print("\n".join(line for _, line in results))
    return all(passed for passed, _ in results)


def main() -> None:
    """Join the other ranks, run, and leave together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="T, the same tokens on every rank")
    parser.add_argument("--reduce", choices=("all", "scatter"), default="all")
    parser.add_argument("--steps", type=int, default=50, help="in a row, for one time")
    parser.add_argument("--graph", action="store_true", help="the step as one CUDA graph, NCCL's part with it")
    parser.add_argument("--backend", help="instead of the policy's choice; the CPU takes the reference by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/expert_parallel.py")
    if options.graph and options.device != "cuda":
        parser.error("--graph wants --device cuda")

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
