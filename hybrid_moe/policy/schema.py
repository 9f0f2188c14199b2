"""Policies: which candidate runs at which number of tokens, for one device and one problem, and why.

A policy is data. It is read strictly, written atomically, and the same policy gives the same bytes. What it was
learned from (evidence, input digests, tolerance, the learner's options) is in the file.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, core_schema

from ..candidate import Candidate, ConfigValue
from ..numerics import Tolerance, describe_rule
from ..problem import MoEProblem

SCHEMA_VERSION = 1

Verdict = Literal["best", "tie", "unsure"]
# Policies of before its release say "seed_only" for the first.
Verified = Literal["published", "measured"]
SLUG = r"^[a-z0-9]+(_[a-z0-9]+)*$"
GraphOrEager = Literal["cuda_graph", "eager"]  # the ways in which this package times
Timing = Literal[GraphOrEager, "cupti"]
# Inclusive bounds of T; no upper one where that is None.
Interval = tuple[int, int | None]
# What a count and a time may be in a file, so that sums and ratios of them stay numbers: every integer up to the first
# is a float as well; the second is 30 years in microseconds.
LARGEST_COUNT, LARGEST_TIME = 2**53, 1e15


class PolicyError(ValueError):
    """A policy file can't be used; the message names the file, what is wrong and what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _CandidateData(_Model):
    backend: str = Field(min_length=1)
    config: dict[str, ConfigValue]


CandidateField = Annotated[
    Candidate,
    GetPydanticSchema(
        lambda source, handler: core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(
                lambda data: Candidate(data.backend, data.config), handler.generate_schema(_CandidateData)
            ),
            python_schema=core_schema.is_instance_schema(Candidate),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda choice: {"backend": choice.backend, "config": dict(choice.config)}
            ),
        )
    ),
]

# Key of a policy's environment.
GATE_RULE = "gate_rule"

_T = TypeVar("_T")
# Lax about the container alone, so that code may pass a list; the items stay strict.
_Sequence = Annotated[tuple[_T, ...], Field(strict=False)]
# Sorted keys: equal policies have equal bytes.
_SortedDict = Annotated[dict[str, _T], AfterValidator(lambda value: dict(sorted(value.items())))]


# Of the problem, younger than some files: left out, they are 0 and False, and so they are written.
_LATER = ("num_shared_experts", "weight_on_input")


def _whole(kind: type[Any]) -> BeforeValidator:
    # A field left out would take the dataclass's default silently: a guess about the very key that policies match on.
    names = [field.name for field in dataclasses.fields(kind) if field.name not in _LATER]

    def check(value: object) -> object:
        if isinstance(value, dict):
            missing = [name for name in names if name not in value]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}")
        return value

    return BeforeValidator(check)


def _as_written(problem: MoEProblem) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(problem).items() if value or name not in _LATER}


class Evidence(_Model):
    """How the candidates compared at one number of tokens.

    Attributes
    ----------
    num_tokens
        T of the measurements.
    workloads
        Number of workloads at this T.
    slowdown
        ``str(choice)`` of each candidate right at all of these workloads -> geometric mean of its latency over that of
        the fastest candidate of the workload; 1.0 is best.
    """

    num_tokens: int = Field(ge=0, le=LARGEST_COUNT)
    workloads: int = Field(ge=1, le=LARGEST_COUNT)
    slowdown: _SortedDict[Annotated[float, Field(gt=0, le=LARGEST_TIME)]]


def expected_regret(choice: Candidate, evidence: Sequence[Evidence]) -> float | None:
    """Mean over the evidence of a choice's slowdown - 1; ``None`` where it isn't in all of it, or there is none."""
    slowdowns = [e.slowdown[str(choice)] for e in evidence if str(choice) in e.slowdown]
    if not slowdowns or len(slowdowns) != len(evidence):
        return None
    return six_digits(math.fsum(slowdowns) / len(slowdowns) - 1)


def six_digits(value: float) -> float:
    """Six significant digits, so that another mathematics library's last bits don't change a policy's file."""
    value = float(f"{value:.6g}")
    return 0.0 if abs(value) < 1e-12 else value


def label(interval: Interval) -> str:
    """An interval of T for people: ``14-32``, ``901`` or ``10001-``."""
    low, high = interval
    return str(low) if low == high else f"{low}-{'' if high is None else high}"


class Regime(_Model):
    """An interval of T and what runs in it.

    Attributes
    ----------
    min_tokens, max_tokens
        Inclusive bounds; ``max_tokens`` is ``None`` where there is no upper one.
    choice
        What runs.
    verdict
        ``best``: the fastest over the evidence. ``tie``: within the tie margin of the fastest, and preferred.
        ``unsure``: within the margin, with nothing preferred, so the default.
    verified
        ``published``: learned from speedups over a reference alone, as a published table has them. ``measured``:
        learned from latencies.
    reason
        The verdict in words, with its figures.
    expected_regret
        Mean over the evidence of the choice's slowdown - 1; ``None`` without evidence.
    evidence
        One entry for each T measured in the regime.
    """

    min_tokens: int = Field(ge=0, le=LARGEST_COUNT)
    max_tokens: int | None = Field(le=LARGEST_COUNT)
    choice: CandidateField
    verdict: Verdict
    verified: Annotated[Verified, BeforeValidator(lambda said: "published" if said == "seed_only" else said)]
    reason: str
    expected_regret: float | None
    evidence: _Sequence[Evidence]

    @model_validator(mode="after")
    def _ordered(self) -> Regime:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens: expected at least min_tokens={self.min_tokens}, got {self.max_tokens}")
        return self

    @property
    def bounds(self) -> Interval:
        """``(min_tokens, max_tokens)``."""
        return self.min_tokens, self.max_tokens

    @property
    def label(self) -> str:
        """The interval for people: ``14-32``, ``901`` or ``10001-``."""
        return label(self.bounds)

    def __contains__(self, num_tokens: int) -> bool:
        return self.min_tokens <= num_tokens and (self.max_tokens is None or num_tokens <= self.max_tokens)


class RegretSummary(_Model):
    """Slowdown - 1 of a policy's choices against the fastest candidate, over measured T.

    Attributes
    ----------
    mean, worst
        Over the T, each counted once.
    worst_num_tokens
        T of the worst; ``None`` if there is no regret anywhere.
    num_tokens
        How many distinct T were evaluated.
    """

    mean: float
    worst: float
    worst_num_tokens: int | None
    num_tokens: int = Field(ge=1)


class LearnerOptions(_Model):
    """What the learner was told.

    Attributes
    ----------
    regimes
        ``"auto"``, or the intervals of T: ``"1-7,14-32,901,10001-"``.
    tie_margin
        Share of the speed that a tie may cost: 0.05 calls 0.95 of the best speed a tie.
    prefer
        Backend or candidate that ties go to.
    max_gap
        For ``auto``: neighbouring measured T whose ratio is larger have no evidence between them.
    timing
        The only timing to learn from, where records of several are given.
    where
        The only versions to learn from, where records of several are given: ``{"triton": "3.6"}``.
    solutions
        Which candidates solutions of flashinfer-bench's traces are, where their names don't say so.
    """

    regimes: str = "auto"
    tie_margin: float = Field(default=0.05, ge=0, lt=1)
    prefer: str | None = None
    max_gap: float = Field(default=1.5, ge=1)
    timing: Timing | None = None
    where: _SortedDict[str] | None = None
    solutions: _SortedDict[str] | None = None

    @model_serializer(mode="wrap")
    def _without_what_was_not_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Files from before these two options stay as they are, to the byte.
        data: dict[str, Any] = handler(self)
        return {name: value for name, value in data.items() if value or name not in ("where", "solutions")}


class InputDigest(_Model):
    """A file learned from: its name without folders, its SHA-256 and the number of its records."""

    name: str = Field(pattern=r"^[^/\\]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    records: int = Field(ge=0)


class Policy(_Model):
    """Which candidate runs at which T, for one device and one problem.

    Attributes
    ----------
    device
        Slug of the device's product name, as ``nvidia_b200``.
    problem, definition
        What the policy is for, and its definition name for people.
    candidates
        Every candidate that may run, in the order of preference, the default first.
    default, default_reason, default_evidence
        What runs outside the regimes, why, and the evidence at measured T that are in none.
    regimes
        Sorted by T, without overlaps.
    training_regret
        Of this policy over the T that it was learned from.
    leave_one_out_regret
        At each T, of the policy learned from the other T; ``None`` for fewer than three. Of more than 256
        measured T, at some of them, evenly spread.
    learner, tolerance, inputs, environment
        How it was learned: options, the rule of correctness (records that passed by looser bounds are refused; a bound
        that they don't state can't be checked), files, and where they were measured.
    """

    schema_version: Literal[1] = 1
    device: str = Field(pattern=SLUG)
    problem: Annotated[MoEProblem, _whole(MoEProblem), PlainSerializer(_as_written)]
    definition: str
    candidates: _Sequence[CandidateField]
    default: CandidateField
    default_reason: str
    default_evidence: _Sequence[Evidence]
    regimes: _Sequence[Regime]
    training_regret: RegretSummary
    leave_one_out_regret: RegretSummary | None
    learner: LearnerOptions
    tolerance: Annotated[Tolerance, _whole(Tolerance)]
    inputs: _Sequence[InputDigest]
    environment: _SortedDict[str]

    @property
    def gate_rule(self) -> str:
        """By which of `numerics.RULES` the records that it was learned from passed, and what it judges."""
        return describe_rule(self.environment.get(GATE_RULE, "1"))

    @property
    def timing(self) -> str | None:
        """How the records that it was learned from were timed; ``None`` where the file doesn't say."""
        # Where all records were of one timing, it isn't among the options but in what they have in common.
        return self.learner.timing or self.environment.get("timing")

    def regime_of(self, num_tokens: int) -> Regime | None:
        """The regime that holds ``num_tokens``, if any does."""
        at = bisect_right(self.regimes, num_tokens, key=lambda regime: regime.min_tokens) - 1
        return self.regimes[at] if at >= 0 and num_tokens in self.regimes[at] else None

    @property
    def first_outside(self) -> int:
        """The least T above 0 that is in no regime; 0 if the regimes hold all others."""
        after = 1
        for regime in self.regimes:
            if after in regime:
                if regime.max_tokens is None:
                    return 0
                after = regime.max_tokens + 1
        return after

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if self.definition != self.problem.definition:
            raise ValueError(f"definition: expected the problem's {self.problem.definition}, got {self.definition}")
        # By their text, as the evidence names them.
        if len({str(choice) for choice in self.candidates}) != len(self.candidates):
            raise ValueError(f"candidates has one twice: {', '.join(map(str, self.candidates))}")
        if self.default not in self.candidates:
            raise ValueError(f"default: expected one of the candidates, got {self.default}")
        for regime in self.regimes:
            if regime.choice not in self.candidates:
                raise ValueError(f"regime {regime.label}: expected a choice of the candidates, got {regime.choice}")
        for lower, upper in zip(self.regimes, self.regimes[1:], strict=False):
            if lower.max_tokens is None or lower.max_tokens >= upper.min_tokens:
                raise ValueError(f"regimes {lower.label} and {upper.label} overlap or aren't sorted by min_tokens")
        return self


def describe(error: ValidationError, most: int = 5) -> str:
    """A validation error in one line: field path and reason for each of the first ``most`` fields."""
    details = error.errors(include_url=False, include_input=False)
    rest = f"; and {len(details) - most} more" if len(details) > most else ""
    return "; ".join(_describe_one(detail) for detail in details[:most]) + rest


def _describe_one(detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    what = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
