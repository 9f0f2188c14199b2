"""Measure a candidate on a workload: the correctness gate first, then its latency with a cold L2."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from ..api import HybridMoE
from ..candidate import BackendUnsupportedError, Candidate
from ..device import DeviceKey
from ..inputs import FP8, MoEInputs
from ..numerics import DEFAULT_TOLERANCE, OWN_KERNELS_TOLERANCE, Correctness, Tolerance, check
from ..policy.schema import GraphOrEager
from ..policy.versions import LIBRARIES, installed_version
from ..problem import MoEProblem
from ..reference import has_local_work, moe_reference
from .records import BenchRecord, EnvironmentValue, RecordCorrectness
from .timing import Call, Ceilings, Work, time_eager, time_graph
from .workloads import LayerWeights, Workload, make_inputs

# A graph holds so many calls, on as many weight copies in turn as are given.
CALLS_PER_GRAPH = 12
OWN_BACKENDS = ("triton_fused", "torch_reference")
PACKAGES = (*LIBRARIES, "hybrid-moe")

# From an input on given weights to the call that writes its output: what is timed is that call alone.
Prepare = Callable[[MoEInputs], Callable[[torch.Tensor], object]]


@dataclass(slots=True)
class Case:
    """A workload made ready to measure: inputs on each weight copy, and what the first should give.

    Attributes
    ----------
    inputs
        One for each copy of the weights; same routing, other hidden states.
    checked
        ``[N]`` indices of the tokens that the reference holds.
    reference, has_work
        For those tokens of the first inputs: ``[N, H]`` float32 and ``[N]`` bool.
    work
        Rows, active experts, bytes and operations.
    """

    workload: Workload
    problem: MoEProblem
    inputs: list[MoEInputs]
    checked: torch.Tensor
    reference: torch.Tensor
    has_work: torch.Tensor
    work: Work

    @classmethod
    def make(
        cls, workload: Workload, problem: MoEProblem, copies: Sequence[LayerWeights], sample: int | None = None
    ) -> Case:
        """Draw the inputs and compute the reference, on the weights' device.

        ``sample`` limits the reference to so many tokens, drawn at random: tokens don't depend on one another, and in
        float32 all 14107 of the largest workload take half a minute.
        """
        inputs = [make_inputs(workload, problem, copies[0])]
        for number, weights in enumerate(copies[1:], start=1):
            other = make_inputs(workload, problem, weights)
            # Other hidden states for the same routing: shifted columns.
            inputs.append(
                other._replace(hidden_states=other.hidden_states.view(torch.uint8).roll(number, dims=1).view(FP8))
            )
        first, device = inputs[0], inputs[0].hidden_states.device
        checked = torch.arange(workload.num_tokens, device=device)
        if sample is not None and sample < workload.num_tokens:
            generator = torch.Generator().manual_seed(workload.seed)
            checked = torch.randperm(workload.num_tokens, generator=generator)[:sample].sort().values.to(device)
            first = first._replace(
                routing_logits=first.routing_logits[checked],
                hidden_states=first.hidden_states.view(torch.uint8)[checked].view(FP8),
                hidden_states_scale=first.hidden_states_scale[:, checked],
            )
        return cls(
            workload,
            problem,
            inputs,
            checked,
            moe_reference(first, problem),
            has_local_work(first, problem),
            Work.of(inputs[0], problem),
        )


def preparing(problem: MoEProblem, choice: Candidate) -> Prepare:
    """How one of our candidates is prepared: a `HybridMoE` with an explicit backend, called with ready inputs."""

    def prepare(inputs: MoEInputs) -> Callable[[torch.Tensor], object]:
        moe = HybridMoE.from_inputs(inputs, problem, backend=choice)
        return lambda output: moe(
            inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale, output=output
        )

    return prepare


def tolerance_of(choice: Candidate) -> Tolerance:
    """The gate's bounds for a candidate: tighter for this package's own kernels."""
    return OWN_KERNELS_TOLERANCE if choice.backend in OWN_BACKENDS else DEFAULT_TOLERANCE


def poisoned_output(inputs: MoEInputs, problem: MoEProblem) -> torch.Tensor:
    """An output full of NaN: whatever a kernel leaves unwritten fails the check."""
    shape = (inputs.num_tokens, problem.hidden_size)
    return torch.full(shape, torch.nan, dtype=torch.bfloat16, device=inputs.hidden_states.device)


def check_call(case: Case, run: Callable[[torch.Tensor], object], tolerance: Tolerance) -> Correctness:
    """Run once on a poisoned output and compare with the reference."""
    output = poisoned_output(case.inputs[0], case.problem)
    run(output)
    width = case.problem.intermediate_size
    return check(output[case.checked], case.reference, case.has_work, tolerance, width=width)


def calls_of(case: Case, prepare: Prepare) -> list[Call]:
    """The calls that one graph or loop holds, in rotation over the weight copies."""
    ready = [(prepare(inputs), poisoned_output(inputs, case.problem)) for inputs in case.inputs]
    calls: list[Call] = []
    for number in range(CALLS_PER_GRAPH):
        run, output = ready[number % len(ready)]
        calls.append(functools.partial(run, output))
    return calls


def measure(
    case: Case,
    choice: Candidate,
    ceilings: Ceilings,
    environment: dict[str, EnvironmentValue],
    *,
    prepare: Prepare | None = None,
    timings: Sequence[GraphOrEager] = ("cuda_graph", "eager"),
    runs: int = 15,
) -> Iterator[BenchRecord]:
    """Yield one record for each way of timing; a candidate that is refused or wrong gets its reason and no speed.

    ``prepare`` says how to run what isn't a registered backend; ``choice.backend`` is then ``peer:<name>``.
    """
    problem = case.problem
    where = DeviceKey.of(case.reference.device).name
    common: dict[str, Any] = record_fields(where, problem, case.workload, choice, environment) | {
        "local_rows": case.work.local_rows,
        "active_experts": case.work.active_experts,
        "floor_us": round(case.work.floor_us(ceilings), 3),
    }
    prepare = prepare or preparing(problem, choice)
    try:
        run = prepare(case.inputs[0])
    except BackendUnsupportedError as error:
        for timing in timings:
            yield BenchRecord(**common, timing=timing, status="unsupported", reason="; ".join(error.reasons))
        return
    correctness = check_call(case, run, tolerance_of(choice))
    common["correctness"] = RecordCorrectness(**correctness.to_dict(), tokens=len(case.checked))
    if not correctness.passed:
        for timing in timings:
            yield BenchRecord(**common, timing=timing, status="failed", reason="; ".join(correctness.failures))
        return
    calls = calls_of(case, prepare)
    for call in calls:
        call()
    torch.cuda.synchronize()
    for timing in timings:
        if timing == "cuda_graph":
            yield BenchRecord(**common, timing="cuda_graph", status="passed", latency_us=time_graph(calls, runs))
        else:
            device, host = time_eager(calls, runs)
            common["host_us"] = host
            yield BenchRecord(**common, timing="eager", status="passed", latency_us=device)


def record_fields(
    device: str,
    problem: MoEProblem,
    workload: Workload,
    choice: Candidate,
    environment: Mapping[str, EnvironmentValue],
) -> dict[str, Any]:
    """The fields of a record that say what was measured, where and when."""
    return {
        "device": device,
        "problem": problem.definition,
        "backend": choice.backend,
        "config": dict(choice.config),
        "num_tokens": workload.num_tokens,
        "local_expert_offset": workload.local_expert_offset,
        "routing": workload.routing,
        "seed": workload.seed,
        "workload": workload.uuid,
        "num_experts": problem.num_experts,
        "gate_first": problem.gate_first,
        "environment": dict(environment),
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def environment_of(ceilings: Ceilings) -> dict[str, EnvironmentValue]:
    """Versions, driver and the measured ceilings: what a figure is worthless without."""
    return versions() | {
        "read_tb_per_s": round(ceilings.read_bytes_per_s / 1e12, 3),
        "fp8_tflop_per_s": round(ceilings.fp8_flop_per_s / 1e12, 1),
    }


def versions() -> dict[str, EnvironmentValue]:
    """Versions of the packages that are installed, of Python, CUDA and the driver, and the GPU's product name."""
    found: dict[str, EnvironmentValue] = {
        package: version for package in PACKAGES if (version := installed_version(package)) is not None
    }
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    return found | {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": driver.stdout.split()[0],
        "gpu": torch.cuda.get_device_name(),
    }
