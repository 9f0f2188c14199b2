"""What choosing costs the host: nanoseconds of one call, beside calling the prepared backend directly.

Four ways to make the same call, with ready tensors and a given output, on a runner that does nothing, so that only the
host's own work is left. It needs no GPU:

    runner    the prepared runner itself: no check of the inputs, no choice
    backend   HybridMoE(backend=...): checks the inputs, nothing to choose
    policy    HybridMoE(policy=...): checks the inputs, and chooses by T from a policy of many regimes
    fused_moe the one-call entry point: all checks, look-ups of the memoised table and runner

Batches of the four take turns, so that a slow moment of the machine falls on all of them; the differences are between
the batches of one turn, and of these the median, with the 10th and 90th percentile, is printed.

    python benchmarks/choice_overhead.py [--turns 200] [--calls 1000] [--regimes 16] [--tokens 64]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from hybrid_moe import HybridMoE, MoEInputs, MoEProblem, Policy, backends, fused_moe
from hybrid_moe.backends.base import Backend, ConfigValue, Runner
from hybrid_moe.candidate import Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import Tolerance
from hybrid_moe.policy.schema import LearnerOptions, Regime, RegretSummary

PROBLEM = MoEProblem(
    num_experts=32, num_local_experts=8, top_k=4, n_group=4, topk_group=2, hidden_size=512, intermediate_size=256
)


class Idle(Backend):
    """Prepares a runner that does nothing; as many configurations as a policy may have choices."""

    name = "idle"
    default_config = {"variant": 0}

    def configs(self) -> Iterator[Mapping[str, ConfigValue]]:
        yield {"variant": 0}
        yield {"variant": 1}

    def packages(self, config: Mapping[str, ConfigValue]) -> tuple[str, ...]:
        return ()

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey, config: Mapping) -> list[str]:
        return []

    def prepare(self, problem: MoEProblem, device: DeviceKey, config: Mapping) -> Runner:
        return _IdleRunner()


class _IdleRunner(Runner):
    def run(self, inputs: MoEInputs, output: torch.Tensor) -> None:
        pass

    def workspace_bytes(self, num_tokens: int) -> int:
        return 0


def make_policy(device: DeviceKey, regimes: int) -> Policy:
    """Regimes of 8 tokens each, of the two variants in turn: more bounds than any measured policy has."""
    variants = [Candidate(Idle.name, config) for config in Idle().configs()]
    return Policy(
        device=device.name,
        problem=PROBLEM,
        definition=PROBLEM.definition,
        candidates=variants,
        default=variants[0],
        default_reason="none",
        default_evidence=[],
        regimes=[
            Regime(
                min_tokens=8 * i + 1,
                max_tokens=8 * i + 8,
                choice=variants[i % 2],
                verdict="best",
                verified="measured",
                reason="none",
                expected_regret=None,
                evidence=[],
            )
            for i in range(regimes)
        ],
        training_regret=RegretSummary(mean=0.0, worst=0.0, worst_num_tokens=None, num_tokens=1),
        leave_one_out_regret=None,
        learner=LearnerOptions(),
        tolerance=Tolerance(),
        inputs=[],
        environment={},
    )


def ways(num_tokens: int, regimes: int) -> dict[str, Callable[[], object]]:
    """The calls to compare, by name."""
    backends.BACKENDS[Idle.name] = Idle()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(Workload(num_tokens, 8), PROBLEM, random_weights(PROBLEM, device))
    policy = make_policy(DeviceKey.of(device), regimes)
    chosen = HybridMoE.from_inputs(inputs, PROBLEM, policy=policy)
    explicit = HybridMoE.from_inputs(inputs, PROBLEM, backend=chosen.choice(num_tokens))
    runner = backends.prepare(PROBLEM, DeviceKey.of(device), chosen.choice(num_tokens))
    output = torch.empty((num_tokens, PROBLEM.hidden_size), dtype=torch.bfloat16, device=device)
    logits, hidden, scale = inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale
    sizes = {"top_k": PROBLEM.top_k, "n_group": PROBLEM.n_group, "topk_group": PROBLEM.topk_group}
    return {
        "runner": lambda: runner.run(inputs, output),
        "backend": lambda: explicit(logits, hidden, scale, output=output),
        "policy": lambda: chosen(logits, hidden, scale, output=output),
        "fused_moe": lambda: fused_moe(*inputs, **sizes, output=output, policy=policy),
    }


def measure(calls: Mapping[str, Callable[[], object]], turns: int, batch: int) -> dict[str, list[float]]:
    """Nanoseconds a call of each batch, by name; the batches of one turn stand at the same place."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(turns + 1):
        # Another one first in every turn.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call = calls[name]
            begin = time.perf_counter_ns()
            for _ in range(batch):
                call()
            times[name].append((time.perf_counter_ns() - begin) / batch)
    return {name: found[1:] for name, found in times.items()}  # the first turn warms up


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--calls", type=int, default=1000, help="in a batch")
    parser.add_argument("--regimes", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    times = measure(ways(options.tokens, options.regimes), options.turns, options.calls)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {options.turns} turns of {options.calls} calls"
    )
    for name, found in times.items():
        print(f"{name:10} {statistics.median(found):7.0f} ns a call")
    for one, other in (("policy", "backend"), ("policy", "runner"), ("fused_moe", "runner")):
        more = [a - b for a, b in zip(times[one], times[other], strict=True)]
        low, *_, high = statistics.quantiles(more, n=10)
        print(f"{one} over {other}: {statistics.median(more):.0f} ns a call ({low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
