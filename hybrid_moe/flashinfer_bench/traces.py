"""Traces of flashinfer-bench: one result a line, and the fields of the `records.BenchRecord` that it stands for.

Written for the layout of flashinfer-bench 0.1.2; later ones add fields, which are passed over. What a trace leaves out
(routing load, seed, spread of the times) stays open: the workload's UUID says which one it is. Latency is
``latency_ms`` alone, as the speedups are 0 where the reference wasn't timed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .. import backends
from ..candidate import PEER_PREFIX, Candidate
from ..device import device_slug
from ..files import parse_json
from ..problem import sizes_of_definition

# The axis that is T, and the input that is the offset, in the definition.
TOKENS_AXIS = "seq_len"
OFFSET_INPUT = "local_expert_offset"
# How long a log may be in a reason; its end says what went wrong.
_LOG = 200


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Workload(_Model):
    uuid: str = Field(min_length=1)
    axes: dict[str, int]
    inputs: dict[str, dict[str, Any]]


class _Environment(_Model):
    hardware: str = Field(min_length=1)
    libs: dict[str, str] = {}


class _Correctness(_Model):
    max_relative_error: float | None = None  # "NaN" and "Infinity" are read as such
    max_absolute_error: float | None = None
    extra: dict[str, Any] | None = None


class _Performance(_Model):
    latency_ms: float


class _Evaluation(_Model):
    status: str
    environment: _Environment
    timestamp: str = Field(min_length=1)
    log: str = ""
    correctness: _Correctness | None = None
    performance: _Performance | None = None


class _Trace(_Model):
    definition: str = Field(min_length=1)
    workload: _Workload
    solution: str | None = None
    evaluation: _Evaluation | None = None


def is_trace(line: bytes) -> bool:
    """Whether a line of JSON Lines is a trace rather than a record, right or wrong."""
    try:
        data = parse_json(line.decode())
    except ValueError:
        return False
    return isinstance(data, dict) and "definition" in data and "workload" in data


def record_fields(data: object, solutions: Mapping[str, str]) -> dict[str, Any] | None:
    """The fields of the record that a trace stands for; ``None`` for a workload that wasn't run.

    Only ``PASSED`` keeps its time; ``TIMEOUT`` becomes ``timeout`` and every other status ``failed``.

    Parameters
    ----------
    data
        A trace as read from JSON.
    solutions
        Candidates by the name of the solution, see `candidate_of`.

    Raises
    ------
    ValueError
        It isn't a whole trace (pydantic's ``ValidationError``), is about another layer, or lacks T, offset or time.
    """
    trace = _Trace.model_validate(data)
    if trace.solution is None and trace.evaluation is None:
        return None
    sizes_of_definition(trace.definition)
    if trace.solution is None or trace.evaluation is None:
        raise ValueError("the trace: expected both solution and evaluation or neither, got one")
    evaluation = trace.evaluation
    choice = candidate_of(trace.solution, solutions)
    fields: dict[str, Any] = {
        "device": device_slug(evaluation.environment.hardware),
        "problem": trace.definition,
        "backend": choice.backend,
        "config": dict(choice.config),
        "num_tokens": _num_tokens(trace.workload),
        "local_expert_offset": _offset(trace.workload),
        "routing": "flashinfer_bench",
        "seed": 0,
        "workload": trace.workload.uuid,
        "solution": trace.solution,
        "timing": "cupti",
        "environment": {
            **evaluation.environment.libs,
            "benchmark": "flashinfer-bench",
            "gpu": evaluation.environment.hardware,
        },
        "timestamp": evaluation.timestamp,
    }
    if evaluation.correctness is not None:
        # Some evaluators add figures of their own; the bounds that were applied are in no trace.
        ratio = (evaluation.correctness.extra or {}).get("matched_ratio")
        fields["correctness"] = {
            "max_abs_error": evaluation.correctness.max_absolute_error,
            "matched_ratio": ratio if isinstance(ratio, float) else None,
        }
    if evaluation.status != "PASSED":
        status = "timeout" if evaluation.status == "TIMEOUT" else "failed"
        return fields | {"status": status, "reason": _reason(evaluation)}
    if evaluation.performance is None or not evaluation.performance.latency_ms > 0:
        found = "no performance" if evaluation.performance is None else f"{evaluation.performance.latency_ms} ms"
        raise ValueError(f"the trace of {trace.solution!r} passed: expected a latency_ms above 0, got {found}")
    latency = {"median": 1e3 * evaluation.performance.latency_ms}
    return fields | {"status": "passed", "latency_us": latency}


def candidate_of(solution: str, solutions: Mapping[str, str]) -> Candidate:
    """Which candidate a solution is.

    What ``solutions`` says of its name, or else the candidate that is called so: ``triton_fused[gemm=triton]``, or
    `solution_name` of it. All others are pipelines that aren't ours, ``peer:<solution>``.

    Raises
    ------
    ValueError
        ``solutions`` gives it a candidate that there isn't.
    """
    candidates = backends.candidates()
    known = {name: choice for choice in candidates for name in (str(choice), solution_name(choice))}
    if solution in solutions:
        given = solutions[solution]
        found = known.get(_completed(given))
        if found is None:
            names = ", ".join(map(str, candidates))
            raise ValueError(f"solution {solution!r}: expected one of {names}, got {given!r}")
        return found
    return known.get(_completed(solution)) or Candidate(PEER_PREFIX + solution)


def solution_name(choice: Candidate) -> str:
    """What a candidate is called as a solution: ``hybrid_moe_triton_fused_gemm_triton``."""
    return "hybrid_moe_" + re.sub(r"[^a-z0-9]+", "_", str(choice).lower()).strip("_")


def _completed(text: str) -> str:
    """A candidate's full text, with the options that it leaves out; any other text as it is."""
    try:
        return str(backends.complete(Candidate.parse(text)))
    except ValueError:
        return text


def _num_tokens(workload: _Workload) -> int:
    if TOKENS_AXIS not in workload.axes:
        found = ", ".join(workload.axes) or "none"
        raise ValueError(f"workload {workload.uuid}: expected the axis {TOKENS_AXIS}, which is T, got {found}")
    return workload.axes[TOKENS_AXIS]


def _offset(workload: _Workload) -> int:
    given = workload.inputs.get(OFFSET_INPUT, {})
    value = given.get("value")
    if given.get("type") != "scalar" or not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(
            f"workload {workload.uuid}: expected {OFFSET_INPUT} as "
            f'{{"type": "scalar", "value": 32}}, with a whole number, got {json.dumps(given)}'
        )
    return value


def _reason(evaluation: _Evaluation) -> str:
    lines = [line.strip() for line in evaluation.log.splitlines() if line.strip()]
    return f"{evaluation.status}: {lines[-1][-_LOG:]}" if lines else evaluation.status
