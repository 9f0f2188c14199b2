"""What a shadow check costs serving: the time of calls with `ShadowCheck(every=N)` beside that of calls without.

    python benchmarks/shadow_check_cost.py [--tokens 1 16 80 901] [--turns 20] [--output FOLDER]

Batches of calls without waiting in between, as a server makes them, of layers that share their weights: without checks
and with one every N calls, for each N. They take turns, so that a slow moment of the machine falls on all. A batch ends
when the device is through, checks and all. For each T and N this prints the median over the turns of the slowdown
against the batch without checks of the same turn, with the 10th and 90th percentile, and the slowdown of all batches
together. Where `max_overhead` bounds what checks take of the host, few batches have one, and the latter is the cost.
N = 1000 is what `ShadowCheck` has by default.

``graph`` are replays of a captured call, with `HybridMoE.check_replay` after each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybrid_moe import HybridMoE, MoEProblem, ShadowCheck
from hybrid_moe.files import write_whole
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights
from hybrid_moe.policy.versions import installed_versions

SMALL = MoEProblem(
    num_experts=32, num_local_experts=8, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Way:
    """Calls of one layer, or replays of its graph, in batches."""

    def __init__(self, layer: HybridMoE, call: Callable[[], object]) -> None:
        self.layer, self.call = layer, call

    def batch(self, calls: int) -> float:
        """Seconds of so many calls, until the device is through."""
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            self.call()
        synchronize()
        return time.perf_counter() - begin


def ways(
    inputs: Any, problem: MoEProblem, backend: str | None, cadences: list[int], graphs: bool, max_overhead: float
) -> dict[str, Way]:
    """Without checks, with one every N calls, and the same for replays."""
    tokens = inputs.num_tokens
    tensors = inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale
    found: dict[str, Way] = {}
    for every in (0, *cadences):
        options = ShadowCheck(every=every, max_overhead=max_overhead) if every else None
        layer = HybridMoE.from_inputs(inputs, problem, backend=backend, max_num_tokens=tokens, shadow_check=options)
        layer.warm_up([tokens])
        output = torch.empty((tokens, problem.hidden_size), dtype=torch.bfloat16, device=inputs.hidden_states.device)
        found[f"eager {every}"] = Way(layer, lambda layer=layer, output=output: layer(*tensors, output=output))
        if graphs:
            replayed = torch.empty_like(output)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layer(*tensors, output=replayed)

            def replay(layer=layer, graph=graph, output=replayed, every=every) -> None:
                graph.replay()
                if every:
                    layer.check_replay(*tensors, output=output)

            found[f"graph {every}"] = Way(layer, replay)
    return found


def measure(found: dict[str, Way], turns: int, calls: int) -> dict[str, list[float]]:
    """Microseconds a call of each batch, by way."""
    times: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = found[name].batch(calls)
            if turn:  # the first one warms up
                times[name].append(taken / calls * 1e6)
    return times


def rows(times: dict[str, list[float]], found: dict[str, Way], tokens: int) -> list[dict[str, Any]]:
    """One for each mode and N."""
    result = []
    for name, taken in times.items():
        mode, every = name.split()
        if every == "0":
            continue
        plain = times[f"{mode} 0"]
        slowdown = [100 * (a / b - 1) for a, b in zip(taken, plain, strict=True)]
        low, *_, high = statistics.quantiles(slowdown, n=10) if len(slowdown) > 1 else [slowdown[0]] * 2
        found[name].layer.finish_shadow_checks()
        status = found[name].layer.shadow
        assert status is not None
        result.append(
            {
                "tokens": tokens,
                "mode": mode,
                "every": int(every),
                "call_us": statistics.median(plain),
                "slowdown_percent": statistics.median(slowdown),
                "p10": low,
                "p90": high,
                "total_percent": 100 * (sum(taken) / sum(plain) - 1),
                "checks": status.checks,
                "skipped": status.skipped,
                "breaches": status.breaches,
            }
        )
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 80, 901])
    parser.add_argument("--every", type=int, nargs="+", default=[1000])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch-seconds", type=float, default=0.15, help="of calls in a batch, at least 1000 calls")
    parser.add_argument("--calls", type=int, help="in a batch, in place of --batch-seconds")
    parser.add_argument("--backend", default="triton_fused")
    parser.add_argument(
        "--max-overhead",
        type=float,
        default=ShadowCheck().max_overhead,
        help="of ShadowCheck; inf shows what checks cost without a bound",
    )
    parser.add_argument("--small", action="store_true", help="a small layer, on the CPU where there is no GPU")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT"), help="folder for shadow_check_cost.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.small:
        parser.error("expected an NVIDIA GPU that torch can use, got none; --small runs a small layer on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = SMALL if options.small else DEEPSEEK_V3
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    versions = {package: version for package, version in installed_versions().items() if version}
    print(f"{name}, {', '.join(f'{p} {v}' for p, v in versions.items())}, {options.turns} turns")
    print(
        f"{'T':>6} {'mode':6} {'every':>6} {'call (us)':>10} {'slower (%)':>11} {'p10 to p90':>16} "
        f"{'in all (%)':>11} {'checks':>7} {'skipped':>8}"
    )
    weights, result = random_weights(problem, device), []
    for tokens in options.tokens:
        inputs = make_inputs(Workload(tokens, problem.num_local_experts), problem, weights)
        found = ways(inputs, problem, options.backend, options.every, device == "cuda", options.max_overhead)
        call = found["eager 0"].batch(20) / 20
        calls = options.calls or max(1000, int(options.batch_seconds / call) // 1000 * 1000)
        for row in rows(measure(found, options.turns, calls), found, tokens):
            result.append(row)
            spread = f"{row['p10']:.2f} to {row['p90']:.2f}"
            print(
                f"{tokens:6} {row['mode']:6} {row['every']:6} {row['call_us']:10.1f} {row['slowdown_percent']:11.3f} "
                f"{spread:>16} {row['total_percent']:11.3f} {row['checks']:7} {row['skipped']:8}",
                flush=True,
            )
            if row["breaches"]:
                raise SystemExit(f"{row['breaches']} checks found a wrong result")
    if options.output is not None:
        content = {"device": name, "environment": versions, "turns": options.turns, "rows": result}
        write_whole(Path(options.output) / "shadow_check_cost.json", (json.dumps(content, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
