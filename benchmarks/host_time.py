"""Host time of one eager call of `triton_fused[gemm=triton]` on DeepSeek-V3's layer, whole and piece by piece.

    python benchmarks/host_time.py [--tokens 1 16 80] [--turns 200] [--calls 50]

Calls are made in batches without waiting for the GPU, few enough that its queue never fills up (five launches each;
1024 fit in), and the GPU is waited for between batches, outside of the time. The variants take turns, so that a slow
moment of the machine falls on all of them; what is printed is the median over the batches, and the 10th and 90th
percentile, in microseconds a call. Each piece is timed alone in the same way, so they need not add up to the whole.

    new output        HybridMoE: checks, output, reservation, launches
    output=           the same with an output that is given
    planned           HybridMoE(max_num_tokens=...) with output=: no memory is reserved
    by Triton         output=, with a launch hook that does nothing: Triton's own launches, as under a profiler
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import triton

from hybrid_moe import DeviceKey, HybridMoE, backends
from hybrid_moe.inputs import plain_num_tokens
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import limits_of
from hybrid_moe.kernels.pipeline import Pipeline
from hybrid_moe.kernels.plan import LaunchKey, Plan, addresses_of
from hybrid_moe.measure.workloads import DEEPSEEK_V3 as PROBLEM
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.policy import resolve

CHOICE = resolve.as_candidate("triton_fused[gemm=triton]")


def median(times: list[float]) -> str:
    """Of the batches, with the 10th and 90th percentile."""
    low, *_, high = statistics.quantiles(times, n=10)
    return f"{statistics.median(times):7.1f}  ({low:.1f} to {high:.1f})"


def measure(calls: Mapping[str, Callable[[], object]], turns: int, batch: int) -> dict[str, list[float]]:
    """Microseconds a call of each batch, by name."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            for _ in range(batch):
                call()
            taken = (time.perf_counter_ns() - begin) / batch / 1e3
            if turn:  # the first one warms up
                times[name].append(taken)
    torch.cuda.synchronize()
    return times


def hooked(call: Callable[[], object]) -> Callable[[], object]:
    """The call with a launch hook; the hook's own time is that of an empty function."""
    hook = triton.knobs.runtime.launch_enter_hook

    def nothing(metadata: object) -> None:
        pass

    def run() -> None:
        hook.add(nothing)
        call()
        hook.remove(nothing)

    return run


def pieces(inputs, output: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What a call is made of."""
    tokens, device = inputs.num_tokens, output.device
    addresses = addresses_of(inputs)
    plan = plan_of(inputs, output)
    memory = torch.empty(plan.arena.bytes, dtype=torch.uint8, device=device)
    logits, hidden, scale = inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale

    return {
        "checks": lambda: plain_num_tokens(PROBLEM, hidden, logits, scale, output, device),
        "output": lambda: torch.empty((tokens, PROBLEM.hidden_size), dtype=torch.bfloat16, device=device),
        "reservation": lambda: torch.empty(plan.arena.bytes, dtype=torch.uint8, device=device),
        "addresses, form": lambda: LaunchKey.of(inputs, addresses_of(inputs), output, 1),
        "arguments": lambda: plan.addressed.values(inputs, addresses, output.data_ptr(), memory.data_ptr()),
        "all launches": lambda: plan.addressed.run(inputs, addresses, output.data_ptr(), memory.data_ptr()),
    }


def launches(inputs, output: torch.Tensor, turns: int) -> dict[str, list[float]]:
    """Microseconds of each launch, by kernel: in their order, as each takes what the ones before it left."""
    device, addresses = output.device, addresses_of(inputs)
    plan = plan_of(inputs, output)
    memory = torch.empty(plan.arena.bytes, dtype=torch.uint8, device=device)
    values = plan.addressed.values(inputs, addresses, output.data_ptr(), memory.data_ptr())
    stream = triton.runtime.driver.active.get_current_stream(device.index)
    times: dict[str, list[float]] = {step.kernel.function.__name__: [] for step in plan.steps}
    for _ in range(turns):
        torch.cuda.synchronize()
        for name, launcher in zip(times, plan.addressed.launchers, strict=True):
            begin = time.perf_counter_ns()
            launcher(stream, values)
            times[name].append((time.perf_counter_ns() - begin) / 1e3)
    return times


def plan_of(inputs, output: torch.Tensor) -> Plan:
    """The plan of a call whose kernels are compiled."""
    key = LaunchKey.of(inputs, addresses_of(inputs), output, 1)
    flow = Pipeline(PROBLEM, TritonGroupedGemm(DeviceKey.of(output.device).capability))
    plan = flow.plan(key, output.device, limits_of(output.device))
    if plan.addressed is None:
        raise SystemExit(f"Triton {triton.__version__} isn't known to hybrid_moe.kernels.direct: no direct launches")
    return plan


def main() -> None:
    """Measure, and print a table for each T."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 80])
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--calls", type=int, default=50, help="in a batch")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")
    if reasons := backends.not_supported_reasons(PROBLEM, DeviceKey.of("cuda"), CHOICE):
        parser.error("; ".join(reasons))

    print(
        f"{torch.cuda.get_device_name()}, python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {options.turns} batches of {options.calls} calls; microseconds a call"
    )
    weights = random_weights(PROBLEM, "cuda")
    for tokens in options.tokens:
        inputs = make_inputs(Workload(tokens, 96), PROBLEM, weights)
        layer = HybridMoE.from_inputs(inputs, PROBLEM, backend=CHOICE)
        planned = HybridMoE.from_inputs(inputs, PROBLEM, backend=CHOICE, max_num_tokens=tokens)
        activations = (inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale)
        output = torch.empty((tokens, PROBLEM.hidden_size), dtype=torch.bfloat16, device="cuda")
        ways: dict[str, Callable[[], object]] = {
            "new output": lambda layer=layer, a=activations: layer(*a),
            "output=": lambda layer=layer, a=activations, o=output: layer(*a, output=o),
            "planned": lambda layer=planned, a=activations, o=output: layer(*a, output=o),
        }
        ways["by Triton"] = hooked(ways["output="])
        for call in ways.values():
            call()
        print(f"\nT = {tokens}")
        for name, times in measure(ways, options.turns, options.calls).items():
            print(f"  {name:20} {median(times)}")
        for name, times in measure(pieces(inputs, output), options.turns, options.calls).items():
            print(f"    {name:18} {median(times)}")
        for name, times in launches(inputs, output, options.turns).items():
            print(f"    {name:18} {median(times)}")


if __name__ == "__main__":
    main()
