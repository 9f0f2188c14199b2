"""Policies: which candidate runs at which number of tokens, for one device and one problem, and why.

A policy is data. It is read strictly, written atomically, and the same policy gives the same bytes. What it was
learned from (evidence, input digests, tolerance, the learner's options) is in the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import platformdirs
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, core_schema

from ..candidate import Choice, ConfigValue
from ..files import write_whole
from ..numerics import Tolerance
from ..problem import MoEProblem

SCHEMA_VERSION = 1
# Both ways to a policy, for messages.
_ANEW = "`hybrid-moe regenerate` on that GPU, or from its records by `hybrid-moe learn`"

Verdict = Literal["best", "tie", "unsure"]
Verified = Literal["seed_only", "measured"]
SLUG = r"^[a-z0-9]+(_[a-z0-9]+)*$"
GraphOrEager = Literal["cuda_graph", "eager"]  # the ways in which this package times
Timing = Literal[GraphOrEager, "cupti"]
# Inclusive bounds of T; no upper one where that is None.
Interval = tuple[int, int | None]


class PolicyError(ValueError):
    """A policy file can't be used; the message names the file, what is wrong and what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _ChoiceData(_Model):
    backend: str = Field(min_length=1)
    config: dict[str, ConfigValue]


ChoiceField = Annotated[
    Choice,
    GetPydanticSchema(
        lambda source, handler: core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(
                lambda data: Choice(data.backend, data.config), handler.generate_schema(_ChoiceData)
            ),
            python_schema=core_schema.is_instance_schema(Choice),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda choice: {"backend": choice.backend, "config": dict(choice.config)}
            ),
        )
    ),
]

_T = TypeVar("_T")
# Lax about the container alone, so that code may pass a list; the items stay strict.
_Sequence = Annotated[tuple[_T, ...], Field(strict=False)]
# Sorted keys: equal policies have equal bytes.
_SortedDict = Annotated[dict[str, _T], AfterValidator(lambda value: dict(sorted(value.items())))]


def _whole(kind: type[Any]) -> BeforeValidator:
    # A field left out would take the dataclass's default silently: a guess about the very key that policies match on.
    names = [field.name for field in dataclasses.fields(kind)]

    def check(value: object) -> object:
        if isinstance(value, dict):
            missing = [name for name in names if name not in value]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}")
        return value

    return BeforeValidator(check)


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

    num_tokens: int = Field(ge=0)
    workloads: int = Field(ge=1)
    slowdown: _SortedDict[Annotated[float, Field(gt=0)]]


def expected_regret(choice: Choice, evidence: Sequence[Evidence]) -> float | None:
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
        ``seed_only``: learned from speedups over a reference alone, as a published table has them. ``measured``:
        learned from latencies.
    reason
        The verdict in words, with its figures.
    expected_regret
        Mean over the evidence of the choice's slowdown - 1; ``None`` without evidence.
    evidence
        One entry for each T measured in the regime.
    """

    min_tokens: int = Field(ge=0)
    max_tokens: int | None
    choice: ChoiceField
    verdict: Verdict
    verified: Verified
    reason: str
    expected_regret: float | None
    evidence: _Sequence[Evidence]

    @model_validator(mode="after")
    def _ordered(self) -> Regime:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens is {self.max_tokens}; at least min_tokens={self.min_tokens} is wanted")
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
        At each T, of the policy learned from the other T; ``None`` for fewer than three.
    learner, tolerance, inputs, environment
        How it was learned: options, the rule of correctness (records that passed by looser bounds are refused; a bound
        that they don't state can't be checked), files, and where they were measured.
    """

    schema_version: Literal[1] = 1
    device: str = Field(pattern=SLUG)
    problem: Annotated[MoEProblem, _whole(MoEProblem)]
    definition: str
    candidates: _Sequence[ChoiceField]
    default: ChoiceField
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
    def timing(self) -> str | None:
        """How the records that it was learned from were timed; ``None`` where the file doesn't say."""
        # Where all records were of one timing, it isn't among the options but in what they have in common.
        return self.learner.timing or self.environment.get("timing")

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if self.definition != self.problem.definition:
            raise ValueError(f"definition is {self.definition}; {self.problem.definition} is wanted, the problem's")
        # By their text, as the evidence names them.
        if len({str(choice) for choice in self.candidates}) != len(self.candidates):
            raise ValueError(f"candidates has one twice: {', '.join(map(str, self.candidates))}")
        if self.default not in self.candidates:
            raise ValueError(f"default is {self.default}; one of the candidates is wanted")
        for regime in self.regimes:
            if regime.choice not in self.candidates:
                raise ValueError(f"regime {regime.label} has {regime.choice}; one of the candidates is wanted")
        for lower, upper in zip(self.regimes, self.regimes[1:], strict=False):
            if lower.max_tokens is None or lower.max_tokens >= upper.min_tokens:
                raise ValueError(f"regimes {lower.label} and {upper.label} overlap or aren't sorted by min_tokens")
        return self


def dumps_policy(policy: Policy) -> str:
    """The policy as JSON text: fixed order of keys, indented by 2, newline at the end. Equal policies, equal text."""
    return json.dumps(policy.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_policy(path: str | Path) -> Policy:
    """Read a policy file.

    Raises
    ------
    PolicyError
        The file is missing, unreadable, cut short, of another schema version, or has a field that is wrong, missing or
        unknown. Nothing is guessed in its place.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise PolicyError(
            f"policy file {path} doesn't exist; make it with `hybrid-moe regenerate -o {path}` on the GPU that it is "
            f"for, or from records with `hybrid-moe learn RECORDS -o {path}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"policy file {path} can't be read: {error}") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PolicyError(
            f"policy file {path} isn't whole JSON ({error.msg}, line {error.lineno} column {error.colno} of "
            f"{len(text)} characters): it may have been cut short when it was copied; "
            f"copy it again, or make it anew with {_ANEW}"
        ) from error
    if not isinstance(data, dict):
        raise PolicyError(f"policy file {path} holds a JSON {type(data).__name__}; a policy's object is wanted")
    # Before the fields: another version has other fields, and a list of those would hide the cause.
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        found = f"schema_version {version!r}" if "schema_version" in data else "no schema_version"
        raise PolicyError(
            f"policy file {path} has {found}; {SCHEMA_VERSION} is wanted: make it anew with {_ANEW}, "
            "or use the release of hybrid_moe that wrote it"
        )
    try:
        return Policy.model_validate_json(text)
    except ValidationError as error:
        raise PolicyError(f"policy file {path} is wrong: {describe(error)}") from error


def describe(error: ValidationError, most: int = 5) -> str:
    """A validation error in one line: field path and reason for each of the first ``most`` fields."""
    details = error.errors(include_url=False, include_input=False)
    rest = f"; and {len(details) - most} more" if len(details) > most else ""
    return "; ".join(_describe_one(detail) for detail in details[:most]) + rest


def _describe_one(detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    what = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy file, whole or not at all; makes the folders that are missing."""
    write_whole(path, dumps_policy(policy).encode())


def user_policy_dir() -> Path:
    """Where policies learned on this machine are kept."""
    return platformdirs.user_data_path("hybrid_moe") / "policies"


def shipped_policy_dir() -> Path:
    """Where the policies of the package are: inside it in a wheel, beside it in an editable install."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_policies"
    return inside if inside.is_dir() else package.parent / "policies"


def policy_path(root: str | Path, device: str, problem: MoEProblem) -> Path:
    """Where the policy for a device and a problem is written under ``root``."""
    return Path(root) / device / f"{problem.definition}.json"


def policies_in(root: str | Path) -> Iterator[tuple[Path, Policy]]:
    """Every policy of ``root/*.json`` and ``root/*/*.json``, sorted by path; none if ``root`` doesn't exist.

    Raises
    ------
    PolicyError
        One of the files can't be used: it might be the one that is wanted.
    """
    root = Path(root)
    for path in sorted([*root.glob("*.json"), *root.glob("*/*.json")]):
        yield path, load_policy(path)


def find_policy(
    problem: MoEProblem, device: str, policy: Policy | str | Path | None = None
) -> tuple[Policy | None, str]:
    """The policy for a problem on a device.

    Looks at the argument alone if there is one; else in the user's folder (`user_policy_dir`), then among the shipped
    ones (`shipped_policy_dir`). The device and the full problem inside a file decide, never its name.

    Parameters
    ----------
    problem
        What is to be computed.
    device
        Slug of the device's product name.
    policy
        A policy, a policy file, or a folder of them (``*.json`` or ``<device>/*.json``).

    Returns
    -------
    policy
        ``None`` if none was given and none is found.
    where
        For people: where it came from, or where it was looked for and what to do.

    Raises
    ------
    PolicyError
        The policy given is for another problem or device, the folder given has none that matches, two files of one
        folder match, or a file can't be used.
    """
    if isinstance(policy, Policy):
        return _matching(policy, problem, device, "the policy given"), "the policy given"
    if policy is not None:
        path = Path(policy)
        if not path.is_dir():
            return _matching(load_policy(path), problem, device, f"policy file {path}"), f"policy file {path}"
        found = _find_in(path, problem, device)
        if found is None:
            known = sorted({f"{p.device} with {_describe_problem(p.problem)}" for _, p in policies_in(path)})
            raise PolicyError(
                f"no policy in {path} is for {device} with {_describe_problem(problem)}; it has: "
                f"{'; '.join(known) or 'none'}. {how_to_make_one(problem)}"
            )
        return found[1], f"policy file {found[0]}"
    user, shipped = user_policy_dir(), shipped_policy_dir()
    for folder, kind in ((user, "your policy"), (shipped, "shipped policy")):
        found = _find_in(folder, problem, device)
        if found is not None:
            return found[1], f"{kind} {found[0]}"
    return None, (
        f"no policy for {device} with {_describe_problem(problem)} in {user} or {shipped}. {how_to_make_one(problem)}"
    )


def how_to_make_one(problem: MoEProblem) -> str:
    """How to come by a policy for a problem, for people: the command with its options."""
    options = []
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        if value != field.default:
            option = f"--{field.name.replace('_', '-')}"
            options.append(option if value is True else f"{option} {value}")
    command = " ".join(["hybrid-moe regenerate", *options])
    return f"`{command}` makes one for the GPU that it runs on, `hybrid-moe learn` one from records"


def known_policies() -> list[tuple[Path, Policy]]:
    """Every policy that is looked up, of any device and problem: the user's own, then the shipped ones."""
    return [*policies_in(user_policy_dir()), *policies_in(shipped_policy_dir())]


def _find_in(root: Path, problem: MoEProblem, device: str) -> tuple[Path, Policy] | None:
    found = [(path, p) for path, p in policies_in(root) if p.device == device and p.problem == problem]
    if len(found) > 1:
        raise PolicyError(
            f"{' and '.join(str(path) for path, _ in found)} are for the same device and problem: delete all but one"
        )
    return found[0] if found else None


def _matching(policy: Policy, problem: MoEProblem, device: str, what: str) -> Policy:
    if policy.device != device or policy.problem != problem:
        raise PolicyError(
            f"{what} is for {policy.device} with {_describe_problem(policy.problem)}; "
            f"{device} with {_describe_problem(problem)} is wanted: leave the policy out to look one up. "
            f"{how_to_make_one(problem)}"
        )
    return policy


def _describe_problem(problem: MoEProblem) -> str:
    # The definition name leaves out what policies match on as well.
    values: Mapping[str, object] = dataclasses.asdict(problem)
    rest = ", ".join(f"{name}={values[name]}" for name in ("num_experts", "routing_method", "gate_first"))
    return f"{problem.definition} ({rest})"
