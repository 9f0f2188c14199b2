"""Benchmark records: what one of them says, and how it is added to a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..candidate import PEER_PREFIX, Candidate, ConfigValue
from ..files import RECORDS, append_line
from ..numerics import describe_rule
from ..policy.schema import LARGEST_COUNT, LARGEST_TIME, SLUG, Timing
from ..problem import MoEProblem, problem_of_definition

Status = Literal["passed", "failed", "unsupported", "timeout"]
EnvironmentValue = str | int | float | bool | None

_Positive = Annotated[float, Field(ge=1e-9, le=LARGEST_TIME)]
# A result that isn't finite has figures that JSON can't hold: they are left out, and the reason says why.
_Figure = Annotated[
    float | None, BeforeValidator(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
]


# Anybody may edit a file: what is no duration must neither end a sweep nor let it go on for ever.
_Duration = Annotated[
    float | None,
    BeforeValidator(lambda x: float(x) if type(x) in (int, float) and 0 <= x < 1e9 else None),
]


class _Model(BaseModel):
    # extra="allow": others may add fields, the names of these stay.
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Latency(_Model):
    """Latency of one call in microseconds: median and percentiles over ``runs`` timed calls."""

    median: _Positive
    p10: _Positive | None = None
    p90: _Positive | None = None
    runs: int | None = Field(default=None, ge=1)


class RecordCorrectness(_Model):
    """The figures of the correctness gate and the bounds that were applied; ``None`` where it isn't known.

    ``rule`` says by which rule it was judged (`numerics.RULE`). Records without one were judged as a whole alone, by
    `numerics.Tolerance`: nothing is known of single tokens, blocks and columns.
    """

    relative_l2: _Figure = None
    cosine: _Figure = None
    matched_ratio: _Figure = None
    max_abs_error: _Figure = None
    token_relative_l2: _Figure = None
    block_relative_l2: _Figure = None
    column_relative_l2: _Figure = None
    slope: _Figure = None
    rtol: float | None = None
    atol: float | None = None
    required_matched_ratio: float | None = None
    max_relative_l2: float | None = None
    max_token_relative_l2: float | None = None
    max_block_relative_l2: float | None = None
    max_column_relative_l2: float | None = None
    max_slope_error: float | None = None
    rule: int | None = Field(default=None, ge=1)
    tokens: int | None = None

    @property
    def judged_by(self) -> str:
        """The rule, for people."""
        return describe_rule(str(self.rule or 1))


class GpuState(_Model):
    """Clocks in MHz, temperature in degrees Celsius, power in watts, and what slowed the GPU down."""

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    slowed_by: list[str] | None = None


class WorkloadKey(NamedTuple):
    """What tells one workload from another; ``workload`` is empty where it has no id."""

    num_tokens: int
    local_expert_offset: int
    routing: str
    seed: int
    workload: str = ""


class MeasurementKey(NamedTuple):
    """What was measured and how: two records with one key are two measurements of the same."""

    device: str
    problem: str
    num_experts: int
    gate_first: bool
    candidate: Candidate
    at: WorkloadKey
    timing: Timing

    @classmethod
    def of(
        cls, device: str, problem: MoEProblem, candidate: Candidate, at: WorkloadKey, timing: Timing
    ) -> MeasurementKey:
        """That of a record of this problem."""
        return cls(device, problem.definition, problem.num_experts, problem.gate_first, candidate, at, timing)


class BenchRecord(_Model):
    """One candidate on one workload.

    Attributes
    ----------
    device
        Slug of the device's product name.
    problem
        Definition name.
    backend, config
        The candidate. ``peer:<name>`` is a pipeline that isn't one of ours: kept for comparison, never learned from.
    num_tokens, local_expert_offset, routing, seed, workload
        The workload; ``workload`` is its id where it comes from a set that has them.
    solution
        What the candidate is called in a trace of flashinfer-bench; ``None`` if the record is from no trace.
    num_experts, gate_first
        Of the problem, as the definition name leaves them out; 256 and ``False`` if ``None``.
    local_rows, active_experts
        (token, local expert) pairs, and local experts that got any; ``None`` where it isn't known.
    status, reason
        What came of it; the reason is wanted for all but ``passed``.
    timing
        How it was, or would have been, timed.
    latency_us, speedup_vs_reference
        Exactly one of them if passed: no speed is kept for a wrong answer.
    floor_us
        Least time in microseconds that the device's bandwidth and arithmetic allow.
    cache
        Whether what a call reads was still in the L2 cache: ``warm`` where the calls in rotation touch too little to
        fill it, as without local work. Older records don't say.
    code
        What measured: version, digest of the sources, and commit and dirty in a git checkout. Older records don't say.
    equal_bits
        Whether the calls before timing and the timed ones wrote the same bits. Older records don't say.
    correctness, environment, timestamp
        The gate's figures, versions and measured device rates, and ISO 8601 time.
    host_us
        Time on the host of an eager call.
    gpu_before, gpu_after
        The GPU around the measurement.
    seconds
        What a sweep spent on it, making its workload ready with it; what is no duration counts as unknown.
    crashed
        The process that measured it was lost.
    """

    # Where it was read, for messages and to know the later of two records. Not of the record itself, so no field.
    __slots__ = ("_place",)

    schema_version: Literal[1] = 1
    device: str = Field(pattern=SLUG)
    problem: str = Field(min_length=1)
    backend: str = Field(min_length=1)
    config: dict[str, ConfigValue] = {}
    num_tokens: int = Field(ge=1, le=LARGEST_COUNT)
    local_expert_offset: int = Field(ge=0, le=LARGEST_COUNT)
    routing: str
    seed: int
    workload: str | None = None
    solution: str | None = None
    num_experts: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    gate_first: bool | None = None
    local_rows: int | None = Field(default=None, ge=0, le=LARGEST_COUNT)
    active_experts: int | None = Field(default=None, ge=0, le=LARGEST_COUNT)
    status: Status
    reason: str | None = None
    timing: Timing
    latency_us: Latency | None = None
    speedup_vs_reference: _Positive | None = None
    floor_us: float | None = Field(default=None, ge=0, le=LARGEST_TIME)
    cache: Literal["cold", "warm"] | None = None
    code: dict[str, str | bool] | None = None
    equal_bits: bool | None = None
    correctness: RecordCorrectness | None = None
    environment: dict[str, EnvironmentValue] = {}
    timestamp: str | None = None
    host_us: Latency | None = None
    gpu_before: GpuState | None = None
    gpu_after: GpuState | None = None
    seconds: _Duration = None
    crashed: bool | None = None

    @model_validator(mode="after")
    def _speed_only_if_right(self) -> BenchRecord:
        speeds = [name for name in ("latency_us", "speedup_vs_reference") if getattr(self, name) is not None]
        if self.status == "passed" and len(speeds) != 1:
            raise ValueError(
                "a passed record: expected one of latency_us and speedup_vs_reference, got "
                f"{' and '.join(speeds) or 'neither'}"
            )
        if self.status != "passed" and speeds:
            raise ValueError(f"a record that {self.status} has {' and '.join(speeds)}; no speed is kept for it")
        if self.status != "passed" and not self.reason:
            raise ValueError(f"reason: expected one for a record that {self.status}, got none")
        return self

    @property
    def place(self) -> tuple[str, int] | None:
        """File and line that it was read from; ``None`` if it wasn't read from a file."""
        return getattr(self, "_place", None)

    def set_place(self, file: str, line: int) -> None:
        """Note where it was read."""
        object.__setattr__(self, "_place", (file, line))

    @property
    def choice(self) -> Candidate:
        """The candidate."""
        config = self.config
        return _candidate(self.backend, tuple(config.items()), tuple(map(type, config.values())))

    @property
    def is_peer(self) -> bool:
        """Whether it is of a pipeline that isn't one of ours."""
        return self.backend.startswith(PEER_PREFIX)

    @property
    def relative_time(self) -> float:
        """Median latency in us of a passed record, or else the inverse of its speedup: the same but for a factor."""
        if self.latency_us is not None:
            return self.latency_us.median
        if self.speedup_vs_reference is None:
            raise ValueError(f"a record that {self.status} has no time")
        return 1.0 / self.speedup_vs_reference

    @property
    def spread(self) -> float | None:
        """Measured noise: half of p90 - p10, as a share of the median; ``None`` where it wasn't measured."""
        latency = self.latency_us
        if latency is None or latency.p10 is None or latency.p90 is None:
            return None
        return max(0.0, latency.p90 - latency.p10) / (2 * latency.median)

    @property
    def by_speedup(self) -> bool:
        """Whether it has a speedup over the reference and no latency."""
        return self.latency_us is None

    @property
    def at(self) -> WorkloadKey:
        """Its workload."""
        return WorkloadKey(self.num_tokens, self.local_expert_offset, self.routing, self.seed, self.workload or "")

    @property
    def key(self) -> MeasurementKey:
        """What was measured and how."""
        problem = (self.problem, self.num_experts or 256, bool(self.gate_first))
        return MeasurementKey(self.device, *problem, self.choice, self.at, self.timing)


@functools.lru_cache(maxsize=4096)  # many records have the same; by type as well, as 1 and True are equal
def _candidate(backend: str, config: tuple[tuple[str, ConfigValue], ...], types: tuple[type, ...]) -> Candidate:
    return Candidate(backend, dict(config))


@dataclass(slots=True)
class Measurement:
    """What may be compared of a record, in a tenth of its memory; the fields are those of `BenchRecord`.

    Of the figures of the gate it has the bounds alone.
    """

    device: str
    problem: str
    num_experts: int | None
    gate_first: bool | None
    solution: str | None
    choice: Candidate
    is_peer: bool
    at: WorkloadKey
    status: Status
    timing: Timing
    relative_time: float
    by_speedup: bool
    spread: float | None
    correctness: RecordCorrectness | None
    environment: Mapping[str, EnvironmentValue]
    timestamp: str | None
    place: tuple[str, int] | None

    @property
    def num_tokens(self) -> int:
        """T of its workload."""
        return self.at.num_tokens

    @property
    def local_expert_offset(self) -> int:
        """Offset of its workload."""
        return self.at.local_expert_offset


# What the learner and the comparison take.
Measured = BenchRecord | Measurement


def append_record(path: str | Path, record: BenchRecord) -> None:
    """Add one line to a file of records, see `files.append_line`."""
    append_line(path, record.model_dump_json(exclude_none=True).encode() + b"\n", RECORDS)


def problem_of_record(record: Measured, *, num_experts: int | None = None, gate_first: bool = False) -> MoEProblem:
    """The problem that a record is about; the keyword arguments hold where the record itself doesn't say.

    Raises
    ------
    ValueError
        Nothing says of how many experts the model of a trace is. Without them, a record of our own is of 256.
    """
    if record.num_experts is not None:
        num_experts = record.num_experts
    elif num_experts is None:
        if record.solution is not None:
            raise ValueError(
                f"traces of {record.problem} leave open how many experts the whole model has: say so as --num-experts, "
                "or name the Definition's file as --definition"
            )
        num_experts = 256
    return problem_of_definition(
        record.problem,
        num_experts=num_experts,
        gate_first=gate_first if record.gate_first is None else record.gate_first,
    )


def check_offset(record: Measured, problem: MoEProblem) -> None:
    """Refuse a record at an offset that its problem can't have: then it is about another one."""
    last = problem.num_experts - problem.num_local_experts
    if record.local_expert_offset > last:
        raise ValueError(
            f"local_expert_offset: expected 0 to {last}, got {record.local_expert_offset}, as "
            f"{problem.num_local_experts} of {problem.num_experts} experts are local: if the model has more, say how "
            "many as --num-experts"
        )
