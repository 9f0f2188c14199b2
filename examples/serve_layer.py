"""One MoE layer in a serving loop: decode steps from CUDA graphs, prefill steps as they come.

Decode steps have few tokens and many launches for them, so each batch size is captured once and replayed with new data.
Prefill steps have any number of tokens and are called directly. Every tenth step is a prefill. Warmed up first, so that
nothing compiles in a step.

    python examples/serve_layer.py                 # the DeepSeek-V3 layer of one of eight ranks, on a GPU
    python examples/serve_layer.py --steps 20      # without a GPU: a small layer, the reference, no graphs

Prints tokens a second by what ran, and how often.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from hybrid_moe import HybridMoE, MoEProblem
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
DECODE = (1, 4, 16, 64)
PREFILL = (300, 1000, 2000)
SMALL_PREFILL = (40, 100)


@dataclass
class Request:
    """What the layers before this one hand on: router logits and bfloat16 hidden states."""

    logits: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def random(cls, tokens: int, problem: MoEProblem, device: torch.device) -> Request:
        """Stands for the layers before."""
        return cls(
            torch.randn((tokens, problem.num_experts), dtype=torch.float32, device=device),
            torch.randn((tokens, problem.hidden_size), dtype=torch.bfloat16, device=device),
        )


class DecodeGraph:
    """The layer captured at one batch size: its inputs and output stay where they are."""

    def __init__(self, layer: HybridMoE, tokens: int, device: torch.device) -> None:
        self.request = Request.random(tokens, layer.problem, device)
        self.output = torch.empty((tokens, layer.problem.hidden_size), dtype=torch.bfloat16, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            layer(self.request.logits, self.request.hidden, output=self.output)

    def __call__(self, request: Request) -> torch.Tensor:
        """Replay with the request's data; the output is overwritten by the next replay."""
        self.request.logits.copy_(request.logits)
        self.request.hidden.copy_(request.hidden)
        self.graph.replay()
        return self.output


@dataclass
class Tally:
    """Steps, tokens and seconds of one choice."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    sizes: set[int] = field(default_factory=set)

    def add(self, tokens: int, seconds: float) -> None:
        """Take a step in."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.sizes.add(tokens)


def serve(layer: HybridMoE, device: torch.device, steps: int, prefill: tuple[int, ...]) -> dict[str, Tally]:
    """Run ``steps`` steps; the tallies by mode, regime and choice."""
    on_gpu = device.type == "cuda"
    graphs = {tokens: DecodeGraph(layer, tokens, device) for tokens in DECODE} if on_gpu else {}
    tallies: dict[str, Tally] = defaultdict(Tally)
    for step in range(steps):
        is_prefill = step % 10 == 9
        sizes = prefill if is_prefill else DECODE
        tokens = sizes[step // 10 % len(sizes)] if is_prefill else sizes[step % len(sizes)]
        request = Request.random(tokens, layer.problem, device)
        wait_for(device)
        begin = time.perf_counter()
        if tokens in graphs:
            output = graphs[tokens](request)
        else:
            output = layer(request.logits, request.hidden)
        wait_for(device)
        seconds = time.perf_counter() - begin
        assert output.shape == request.hidden.shape
        decision = layer.explain(tokens)
        mode = "graph" if tokens in graphs else "eager"
        tallies[f"{mode:6} {regime_of(decision.regime):12} {decision.choice}"].add(tokens, seconds)
    return dict(tallies)


def regime_of(bounds: tuple[int, int | None] | None) -> str:
    """The bounds for people."""
    if bounds is None:
        return "no regime"
    return f"T {bounds[0]}-{'' if bounds[1] is None else bounds[1]}"


def wait_for(device: torch.device) -> None:
    """Let the device finish, so that a step's time is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Make the layer, warm it up, serve, and print the tallies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--backend", help="instead of the policy's choice; the CPU takes the reference by default")
    parser.add_argument("--log", action="store_true", help="show the first decision of each regime")
    options = parser.parse_args()
    if options.log:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    problem, prefill = (DEEPSEEK_V3, PREFILL) if on_gpu else (SMALL, SMALL_PREFILL)
    weights = random_weights(problem, device)
    inputs = make_inputs(Workload(1, 0), problem, weights)
    backend = options.backend or (None if on_gpu else "torch_reference")
    layer = HybridMoE.from_inputs(inputs, problem, backend=backend)
    warmed = layer.warm_up([*DECODE, *prefill])
    print(f"warmed up {len(warmed)} token counts in {sum(w.seconds for w in warmed):.1f} s on {layer.device.name}")

    for name, tally in serve(layer, device, options.steps, prefill).items():
        sizes = ", ".join(map(str, sorted(tally.sizes)))
        print(f"{name}: {tally.tokens / tally.seconds:,.0f} tokens/s ({tally.steps} steps, T = {sizes})")
    for sample in layer.stats():
        print(f"called in Python: {sample.label.choice} {sample.calls} times, {sample.tokens} tokens")


if __name__ == "__main__":
    main()
