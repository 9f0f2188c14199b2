"""Measure a candidate on a workload: the correctness gate first, then its latency with a cold L2."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata

import torch

from .api import HybridMoE
from .choice import BackendUnsupportedError, Choice
from .numerics import DEFAULT_TOLERANCE, Correctness, Tolerance, check
from .problem import FP8, DeviceKey, MoEInputs, MoEProblem
from .records import BenchRecord, EnvironmentValue, RecordCorrectness
from .reference import has_local_work, moe_reference
from .timing import Call, Ceilings, Work, time_eager, time_graph
from .workloads import LayerWeights, Workload, make_inputs

# A graph holds so many calls, on as many weight copies in turn as are given.
CALLS_PER_GRAPH = 12
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang-kernel", "sgl-deep-gemm", "hybrid-moe")


@dataclass(slots=True)
class Case:
    """A workload made ready to measure: inputs on each weight copy, and what the first should give.

    Attributes
    ----------
    inputs
        One for each copy of the weights; same routing, other hidden states.
    reference, has_work
        For the first of them: ``[T, H]`` float32 and ``[T]`` bool.
    work
        Rows, active experts, bytes and operations.
    """

    workload: Workload
    problem: MoEProblem
    inputs: list[MoEInputs]
    reference: torch.Tensor
    has_work: torch.Tensor
    work: Work

    @classmethod
    def make(cls, workload: Workload, problem: MoEProblem, copies: Sequence[LayerWeights]) -> Case:
        """Draw the inputs and compute the reference, on the weights' device."""
        inputs = [make_inputs(workload, problem, copies[0])]
        for number, weights in enumerate(copies[1:], start=1):
            other = make_inputs(workload, problem, weights)
            # Other hidden states for the same routing: shifted tokens.
            inputs.append(
                other._replace(
                    routing_logits=inputs[0].routing_logits.clone(),
                    hidden_states=other.hidden_states.view(torch.uint8).roll(number, dims=1).view(FP8),
                )
            )
        return cls(
            workload,
            problem,
            inputs,
            moe_reference(inputs[0], problem),
            has_local_work(inputs[0], problem),
            Work.of(inputs[0], problem),
        )


def layer(inputs: MoEInputs, problem: MoEProblem, choice: Choice) -> HybridMoE:
    """A prepared layer of a case's weights, with an explicit backend."""
    return HybridMoE(
        inputs.gemm1_weights,
        inputs.gemm1_weights_scale,
        inputs.gemm2_weights,
        inputs.gemm2_weights_scale,
        inputs.routing_bias,
        local_expert_offset=inputs.local_expert_offset,
        routed_scaling_factor=inputs.routed_scaling_factor,
        top_k=problem.top_k,
        n_group=problem.n_group,
        topk_group=problem.topk_group,
        gate_first=problem.gate_first,
        backend=choice,
    )


def check_call(case: Case, run: Callable[[MoEInputs, torch.Tensor], object], tolerance: Tolerance) -> Correctness:
    """Run once on a poisoned output and compare with the reference."""
    output = torch.full(case.reference.shape, float("nan"), dtype=torch.bfloat16, device=case.reference.device)
    run(case.inputs[0], output)
    return check(output, case.reference, case.has_work, tolerance)


def calls_of(case: Case, choice: Choice) -> list[Call]:
    """The calls that one graph or loop holds, in rotation over the weight copies."""
    problem = case.problem
    prepared = [(layer(i, problem, choice), i, torch.empty_like(case.reference, dtype=torch.bfloat16)) for i in case.inputs]
    calls: list[Call] = []
    for number in range(CALLS_PER_GRAPH):
        moe, i, out = prepared[number % len(prepared)]
        calls.append(
            lambda moe=moe, i=i, out=out: moe(i.routing_logits, i.hidden_states, i.hidden_states_scale, output=out)
        )
    return calls


def measure(
    case: Case,
    choice: Choice,
    ceilings: Ceilings,
    environment: dict[str, EnvironmentValue],
    *,
    timings: Sequence[str] = ("cuda_graph", "eager"),
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    runs: int = 15,
) -> Iterator[BenchRecord]:
    """Yield one record for each way of timing; a candidate that is refused or wrong gets its reason and no speed."""
    workload, problem = case.workload, case.problem
    common = {
        "device": DeviceKey.of(case.reference.device).name,
        "problem": problem.definition,
        "backend": choice.backend,
        "config": dict(choice.config),
        "num_tokens": workload.num_tokens,
        "local_expert_offset": workload.local_expert_offset,
        "routing": workload.routing,
        "seed": workload.seed,
        "workload": workload.uuid,
        "num_experts": problem.num_experts,
        "local_rows": case.work.local_rows,
        "active_experts": case.work.active_experts,
        "floor_us": round(case.work.floor_us(ceilings), 3),
        "environment": environment,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        moe = layer(case.inputs[0], problem, choice)
    except BackendUnsupportedError as error:
        for timing in timings:
            yield BenchRecord(**common, timing=timing, status="unsupported", reason="; ".join(error.reasons))
        return
    correctness = check_call(
        case,
        lambda i, out: moe(i.routing_logits, i.hidden_states, i.hidden_states_scale, output=out),
        tolerance,
    )
    common["correctness"] = RecordCorrectness(**correctness.to_dict())
    if not correctness.passed:
        for timing in timings:
            yield BenchRecord(**common, timing=timing, status="failed", reason="; ".join(correctness.failures))
        return
    calls = calls_of(case, choice)
    for call in calls:
        call()
    torch.cuda.synchronize()
    for timing in timings:
        if timing == "cuda_graph":
            yield BenchRecord(**common, timing="cuda_graph", status="passed", latency_us=time_graph(calls, runs))
        else:
            device, host = time_eager(calls, runs)
            yield BenchRecord(
                **common, timing="eager", status="passed", latency_us=device, host_us=host.model_dump(mode="json")
            )


def environment_of(ceilings: Ceilings) -> dict[str, EnvironmentValue]:
    """Versions, driver and the measured ceilings: what a figure is worthless without."""
    versions: dict[str, EnvironmentValue] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    return versions | {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": driver.stdout.split()[0],
        "gpu": torch.cuda.get_device_name(),
        "read_tb_per_s": round(ceilings.read_bytes_per_s / 1e12, 3),
        "fp8_tflop_per_s": round(ceilings.fp8_flop_per_s / 1e12, 1),
    }
