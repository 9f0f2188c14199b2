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
from ..reference import local_rows_per_expert_and_token, moe_reference
from .provenance import code
from .records import BenchRecord, EnvironmentValue, RecordCorrectness
from .sample import sampled_tokens
from .timing import CUDA_CLOCK, Call, Clock, PeakRates, Work, time_eager, time_graph
from .workloads import LayerWeights, Workload, make_inputs

# A graph holds so many calls, on as many weight copies in turn as are given, or one on each copy if those are more.
CALLS_PER_GRAPH = 12
OWN_BACKENDS = ("triton_fused", "torch_reference")
PACKAGES = (*LIBRARIES, "hybrid-moe")

# From an input on given weights to the call that writes its output: what is timed is that call alone.
Prepare = Callable[[MoEInputs], Callable[[torch.Tensor], object]]


@dataclass(slots=True)
class Case:
    """A workload made ready to measure: inputs on each weight copy, and what they should give.

    Attributes
    ----------
    inputs
        One for each copy of the weights; same routing, other hidden states.
    checked
        ``[N]`` indices of the tokens whose result is known: those that the references hold, and all without local work.
    references
        ``[N, H]`` float32 for each copy.
    has_work
        ``[N]`` bool.
    sampled
        How many tokens were computed.
    work
        Rows, active experts, bytes and operations.
    """

    workload: Workload
    problem: MoEProblem
    inputs: list[MoEInputs]
    checked: torch.Tensor
    references: list[torch.Tensor]
    has_work: torch.Tensor
    sampled: int
    work: Work

    @classmethod
    def make(
        cls, workload: Workload, problem: MoEProblem, copies: Sequence[LayerWeights], sample: int | None = None
    ) -> Case:
        """Draw the inputs and compute the references, on the weights' device.

        ``sample`` limits a reference to so many tokens, see `sampled_tokens`: tokens don't depend on one another, and
        in float32 all 14107 of the largest workload take half a minute.
        """
        inputs = [make_inputs(workload, problem, copies[0])]
        for number, weights in enumerate(copies[1:], start=1):
            other = make_inputs(workload, problem, weights)
            # Other hidden states for the same routing: shifted columns.
            inputs.append(
                other._replace(hidden_states=other.hidden_states.view(torch.uint8).roll(number, dims=1).view(FP8))
            )
        tokens, device = workload.num_tokens, inputs[0].hidden_states.device
        chosen = local_rows_per_expert_and_token(inputs[0], problem)
        has_work = chosen.any(dim=1)
        computed = sampled_tokens(chosen, tokens if sample is None else sample, workload.seed)
        is_computed = torch.zeros(tokens, dtype=torch.bool, device=device).index_fill_(0, computed, True)
        checked = (is_computed | ~has_work).nonzero().flatten()
        references = []
        for one in inputs:
            # Zeros where there is no local work.
            reference = torch.zeros((tokens, problem.hidden_size), dtype=torch.float32, device=device)
            reference[computed] = moe_reference(_of_tokens(one, computed), problem)
            references.append(reference[checked])
        work = Work.of(inputs[0], problem)
        return cls(workload, problem, inputs, checked, references, has_work[checked], len(computed), work)


def _of_tokens(inputs: MoEInputs, tokens: torch.Tensor) -> MoEInputs:
    return inputs._replace(
        routing_logits=inputs.routing_logits[tokens],
        hidden_states=inputs.hidden_states.view(torch.uint8)[tokens].view(FP8),
        hidden_states_scale=inputs.hidden_states_scale[:, tokens],
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


def check_output(case: Case, copy: int, output: torch.Tensor, tolerance: Tolerance) -> Correctness:
    """Compare what a call on a weight copy gave with its reference.

    Of the tokens that the reference doesn't hold, those that aren't finite are judged too.
    """
    broken = ~torch.isfinite(output).all(dim=1)
    broken[case.checked] = False
    rows = torch.cat([case.checked, broken.nonzero().flatten()])
    reference = output.new_zeros((len(rows), output.shape[1]), dtype=torch.float32)
    reference[: len(case.checked)] = case.references[copy]
    has_work = torch.ones(len(rows), dtype=torch.bool, device=output.device)
    has_work[: len(case.checked)] = case.has_work
    return check(output[rows], reference, has_work, tolerance, width=case.problem.intermediate_size)


@dataclass(slots=True)
class Rotation:
    """A candidate's calls in rotation over the weight copies, and what they write.

    Attributes
    ----------
    case, tolerance
        What it is judged by.
    runs, outputs
        One for each copy.
    """

    case: Case
    tolerance: Tolerance
    runs: list[Callable[[torch.Tensor], object]]
    outputs: list[torch.Tensor]

    @classmethod
    def make(cls, case: Case, choice: Candidate, prepare: Prepare) -> Rotation:
        """Prepare the candidate on each copy.

        Raises
        ------
        BackendUnsupportedError
            It can't run here.
        """
        outputs = [poisoned_output(inputs, case.problem) for inputs in case.inputs]
        return cls(case, tolerance_of(choice), [prepare(inputs) for inputs in case.inputs], outputs)

    def calls(self) -> list[Call]:
        """What one graph or loop holds: each call is on the next copy."""
        copies = [number % len(self.runs) for number in range(max(CALLS_PER_GRAPH, len(self.runs)))]
        return [functools.partial(self.runs[copy], self.outputs[copy]) for copy in copies]

    def poison(self) -> None:
        """Forget what was written."""
        for output in self.outputs:
            output.fill_(torch.nan)

    def check(self) -> tuple[int, Correctness]:
        """The copy with the worst output, and how bad it is."""
        found = [check_output(self.case, copy, out, self.tolerance) for copy, out in enumerate(self.outputs)]
        worst = max(range(len(found)), key=lambda copy: (not found[copy].passed, found[copy].relative_l2))
        return worst, found[worst]


def measure(
    case: Case,
    choice: Candidate,
    peak: PeakRates,
    environment: Mapping[str, EnvironmentValue],
    *,
    prepare: Prepare | None = None,
    timings: Sequence[GraphOrEager] = ("cuda_graph", "eager"),
    runs: int = 15,
    clock: Clock = CUDA_CLOCK,
) -> Iterator[BenchRecord]:
    """Yield one record for each way of timing; a candidate that is refused or wrong gets its reason and no speed.

    It is checked on every weight copy, before it is timed and again on what the timed calls wrote; a record says
    whether both times gave the same bits. ``prepare`` says how to run what isn't a registered backend;
    ``choice.backend`` is then ``peer:<name>``.
    """
    problem = case.problem
    where = DeviceKey.of(case.checked.device).name
    common: dict[str, Any] = record_fields(where, problem, case.workload, choice, environment) | {
        "local_rows": case.work.local_rows,
        "active_experts": case.work.active_experts,
        "floor_us": round(case.work.floor_us(peak), 3),
        # Of two calls on the same weights, what is read and written in between has to fill it twice.
        "cache": "cold" if len(case.inputs) * case.work.bytes >= 2 * clock.cache_bytes() else "warm",
    }
    try:
        rotation = Rotation.make(case, choice, prepare or preparing(problem, choice))
    except BackendUnsupportedError as error:
        for timing in timings:
            yield BenchRecord(**common, timing=timing, status="unsupported", reason="; ".join(error.reasons))
        return

    def judged(when: str) -> str:
        """Why it is wrong; empty if it isn't."""
        copy, found = rotation.check()
        common["correctness"] = RecordCorrectness.model_validate(found.to_dict() | {"tokens": case.sampled})
        where = f"{when} on weight copy {copy}: " if when or copy else ""
        return where + "; ".join(found.failures) if found.failures else ""

    calls = rotation.calls()
    for call in calls[: len(rotation.runs)]:
        call()
    if wrong := judged(""):
        for timing in timings:
            yield BenchRecord(**common, timing=timing, status="failed", reason=wrong)
        return
    first = [output.clone() for output in rotation.outputs]
    for call in calls:
        call()
    for timing in timings:
        rotation.poison()
        clock.synchronize()
        if timing == "cuda_graph":
            latency = time_graph(calls, runs, clock)
        else:
            latency, host = time_eager(calls, runs, clock)
            common["host_us"] = host
        common["equal_bits"] = all(map(torch.equal, first, rotation.outputs))
        if wrong := judged(f"after {runs} timed runs,"):
            yield BenchRecord(**common, timing=timing, status="failed", reason=wrong)
        else:
            yield BenchRecord(**common, timing=timing, status="passed", latency_us=latency)


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
        "code": code(),
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def environment_of(peak: PeakRates) -> dict[str, EnvironmentValue]:
    """Versions, driver and the measured peak rates: what a figure is worthless without."""
    return versions() | {
        "read_tb_per_s": round(peak.read_bytes_per_s / 1e12, 3),
        "fp8_tflop_per_s": round(peak.fp8_flop_per_s / 1e12, 1),
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
