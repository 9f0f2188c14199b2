"""Which records may be compared, and what they say of the candidates at a workload and at a T.

A wrong answer stands until a later record of the same candidate and workload passed: a later line of the same file, as
clocks are set back, or one with a later timestamp in another file.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np

from ..candidate import Candidate
from ..measure.records import Measured, WorkloadKey, check_offset, problem_of_record
from ..numerics import Tolerance
from ..policy.schema import Evidence, LearnerOptions, Verified, six_digits
from ..policy.versions import COMMON, LIBRARIES, packages_of, release
from ..problem import MoEProblem

_M = TypeVar("_M", bound=Measured)


@dataclass(frozen=True)
class Comparison:
    """How the candidates did at one workload, by the median of each one's records.

    Attributes
    ----------
    slowdown
        Of each candidate that was right: its latency over that of the fastest.
    spread
        `BenchRecord.spread` of the same, where it was measured.
    wrong
        Those of which a wrong answer stands.
    """

    slowdown: Mapping[Candidate, float]
    spread: Mapping[Candidate, float]
    wrong: frozenset[Candidate]


@dataclass(frozen=True)
class Point:
    """One T: its workloads, and the mean log slowdown of each candidate that was right at all of them."""

    num_tokens: int
    workloads: Sequence[Comparison]
    log: Mapping[Candidate, float]
    _noise: dict[tuple[Candidate, Candidate], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def noise(self, a: Candidate, b: Candidate) -> np.ndarray:
        """At each workload where it was measured, the spread of the noisier of two candidates."""
        if (a, b) not in self._noise:
            pairs = [[w.spread[c] for c in (a, b) if c in w.spread] for w in self.workloads]
            self._noise[a, b] = np.array([max(pair) for pair in pairs if pair])
        return self._noise[a, b]

    def evidence(self) -> Evidence:
        """The same as a policy keeps it."""
        slowdown = {str(choice): six_digits(math.exp(value)) for choice, value in self.log.items()}
        return Evidence(num_tokens=self.num_tokens, workloads=len(self.workloads), slowdown=slowdown)


def standing(records: Iterable[_M]) -> dict[tuple[Candidate, WorkloadKey], list[_M]]:
    """For each candidate and workload, the passed records that stand.

    An empty list where a wrong answer stands, which it does until a later record passed; no entry where neither was
    seen. The records are of one device, problem and timing.
    """
    passed: dict[tuple[Candidate, WorkloadKey], list[_M]] = defaultdict(list)
    failed: dict[tuple[Candidate, WorkloadKey], list[_M]] = defaultdict(list)
    for record in records:
        if record.status in ("passed", "failed"):
            (passed if record.status == "passed" else failed)[record.choice, record.at].append(record)
    kept = dict(passed)
    for key, wrong in failed.items():
        last = _Last(wrong)
        kept[key] = [record for record in passed.get(key, []) if last.is_before(record)]
    return kept


class _Last:
    """The last of some records, in each file by its line and among the files by time."""

    def __init__(self, records: Iterable[Measured]) -> None:
        self._lines: dict[str | None, int] = {}
        # Without a time, one can't be known to be the older one.
        self._times: dict[str | None, float] = {}
        for record in records:
            file, line = record.place or (None, 0)
            time = _seconds(record.timestamp)
            self._lines[file] = max(line, self._lines.get(file, 0))
            self._times[file] = max(math.inf if time is None else time, self._times.get(file, -math.inf))

    def is_before(self, record: Measured) -> bool:
        file, line = record.place or (None, 0)
        time = _seconds(record.timestamp)
        for other in self._lines:
            if other == file and file is not None:
                if line <= self._lines[file]:
                    return False
            elif time is None or time <= self._times[other]:
                return False
        return True


def _seconds(timestamp: str | None) -> float | None:
    """Seconds since 1970 of an ISO 8601 time, of UTC where it says nothing; ``None`` if it is none."""
    try:
        time = datetime.fromisoformat(timestamp or "")
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def by_workload(records: Iterable[Measured]) -> dict[WorkloadKey, Comparison]:
    """Every workload at which some answer stands, right or wrong, sorted; its candidates sorted by name."""
    found: dict[WorkloadKey, dict[Candidate, list[Measured]]] = defaultdict(dict)
    known = standing(records)
    names = {choice: str(choice) for choice, _ in known}
    for (choice, key), passed in sorted(known.items(), key=lambda item: names[item[0][0]]):
        found[key][choice] = passed
    workloads = {}
    for key, standing_records in sorted(found.items()):
        right = {choice: rs for choice, rs in standing_records.items() if rs}
        latency = {choice: statistics.median(r.relative_time for r in rs) for choice, rs in right.items()}
        best = min(latency.values(), default=1.0)
        spreads = {choice: [r.spread for r in rs if r.spread is not None] for choice, rs in right.items()}
        workloads[key] = Comparison(
            {choice: value / best for choice, value in latency.items()},
            {choice: statistics.median(known) for choice, known in spreads.items() if known},
            frozenset(standing_records.keys() - right.keys()),
        )
    return workloads


def points_of(workloads: Mapping[WorkloadKey, Comparison]) -> list[Point]:
    """One entry for each T at which some answer is right, sorted."""
    by_tokens: dict[int, list[Comparison]] = defaultdict(list)
    for key, workload in workloads.items():
        by_tokens[key.num_tokens].append(workload)
    points = []
    for num_tokens, measured in sorted(by_tokens.items()):
        ws = [w for w in measured if w.slowdown]
        if not ws:
            continue
        wrong = set().union(*(w.wrong for w in measured))
        right = set.intersection(*(set(w.slowdown) for w in ws)) - wrong
        log = {c: math.fsum(math.log(w.slowdown[c]) for w in ws) / len(ws) for c in sorted(right, key=str)}
        points.append(Point(num_tokens, ws, log))
    return points


# ---- What may be compared ----


def check_records(
    records: Sequence[Measured], options: LearnerOptions, problem: MoEProblem, tolerance: Tolerance
) -> tuple[str, Verified]:
    """Device of the records, and what they are good for; refuses those that may not be compared.

    Raises
    ------
    ValueError
        There are none, none passed, or they are of several problems, devices, timings or versions, have both latencies
        and speedups, or passed by looser bounds than ``tolerance``.
    """
    if not records:
        what = f" timed with {options.timing}" if options.timing else ""
        raise ValueError(
            f"no record{what} to learn from: those of peer pipelines don't count, nor traces of solutions that are "
            "called like no candidate (say which they are as solutions= of the options, --solution NAME=CANDIDATE)"
        )
    others = sorted({_problem_for_people(r) for r in records if not is_about(r, problem)})
    if others:
        raise ValueError(f"records: expected some about {problem}, got {'; '.join(others)}: name one as problem=")
    devices = listed(r.device for r in records)
    if "," in devices:
        raise ValueError(f"records are of several devices: {devices}; name one as device=")
    timings = listed(r.timing for r in records)
    if "," in timings:
        raise ValueError(f"records are timed in several ways: {timings}; name one as timing= of the options (--timing)")
    passed = [r for r in records if r.status == "passed"]
    if not passed:
        raise ValueError(f"none of the {len(records)} records passed; found: {listed(r.status for r in records)}")
    by_speedup = [r.by_speedup for r in passed]
    if any(by_speedup) and not all(by_speedup):
        raise ValueError("some records have latency_us and others speedup_vs_reference: learn from one kind at a time")
    check_one_version(passed)
    for record in records:
        try:
            check_offset(record, problem)
        except ValueError as error:
            raise ValueError(f"{_where(record)}{error}") from error
    for record in passed:
        _check_gate(record, tolerance)
    return devices, "published" if all(by_speedup) else "measured"


def _check_gate(record: Measured, tolerance: Tolerance) -> None:
    gate = record.correctness
    if gate is None:
        return
    pairs = {
        "rtol": (gate.rtol, tolerance.rtol),
        "atol": (gate.atol, tolerance.atol),
        "max_relative_l2": (gate.max_relative_l2, tolerance.max_relative_l2),
    }
    looser = [f"{name}={had} above {want}" for name, (had, want) in pairs.items() if had is not None and had > want]
    ratio, wanted = gate.required_matched_ratio, tolerance.required_matched_ratio
    if ratio is not None and ratio < wanted:
        looser.append(f"required_matched_ratio={ratio} below {wanted}")
    if looser:
        raise ValueError(
            f"{_where(record)}{record.choice} at T = {record.num_tokens} passed by looser bounds "
            f"({', '.join(looser)}): measure again with the bounds wanted, or learn with these as tolerance="
        )


def _problem_for_people(record: Measured) -> str:
    try:
        return str(problem_of_record(record))
    except ValueError:  # it leaves something open, or is about another kind of layer
        return record.problem


def _where(record: Measured) -> str:
    return "" if record.place is None else f"{record.place[0]}, line {record.place[1]}: "


def is_about(record: Measured, problem: MoEProblem) -> bool:
    """Whether a record is about a problem; what the record leaves open is taken from the problem."""
    return record.problem == problem.definition and problem == problem_of_record(
        record, num_experts=problem.num_experts, gate_first=problem.gate_first
    )


def under(records: Sequence[_M], where: Mapping[str, str]) -> list[_M]:
    """The records that were measured under these versions, see `is_of`; ValueError if there are none."""
    kept = [r for r in records if is_of(r, where)]
    if records and not kept:
        wanted = ", ".join(f"{name}={value}" for name, value in where.items())
        found = "; ".join(f"{name} {listed(str(r.environment.get(name)) for r in records)}" for name in where)
        raise ValueError(f"where is {wanted}; the records have {found}")
    return kept


def is_of(record: Measured, where: Mapping[str, str]) -> bool:
    """Whether a record was measured under these versions, as ``{"triton": "3.6"}``, which 3.6.0 is one of.

    A record that doesn't say is not; a package that its candidate doesn't use may have any version, or be missing.
    """
    used = packages_of(record.choice)
    for name, wanted in where.items():
        found = record.environment.get(name)
        if name not in used and name in LIBRARIES:
            continue
        text = "" if found is None else str(found)
        if text != wanted and not text.startswith((f"{wanted}.", f"{wanted}+")):
            return False
    return True


def check_one_version(records: Iterable[Measured]) -> None:
    """Refuse records of several versions of what their candidates use: their times may not be compared.

    One without a version, as where the package wasn't installed or noted, goes with any.

    Raises
    ------
    ValueError
        There are several; the message names them and says how to go on.
    """
    # Of many records, most share their environment (see `readers`): each is looked at once.
    groups: dict[tuple[Candidate, int], list[Any]] = {}
    for record in records:
        group = groups.setdefault((record.choice, id(record.environment)), [0, record.environment])
        group[0] += 1
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for (choice, _), (count, environment) in groups.items():
        counting: dict[str, int | None] = {**dict.fromkeys(packages_of(choice)), **COMMON}
        for name, numbers in counting.items():
            version = environment.get(name)
            if version is not None:
                found[name][release(str(version), numbers)] += count
    mixed = {name: versions for name, versions in sorted(found.items()) if len(versions) > 1}
    if mixed:
        listed = "; ".join(
            f"{name} {', '.join(f'{version} ({count} records)' for version, count in sorted(versions.items()))}"
            for name, versions in mixed.items()
        )
        name, versions = next(iter(mixed.items()))
        raise ValueError(
            f"records are measured under several versions: {listed}. Times under one don't hold for another: name one "
            f"as where= of the options (--where {name}={max(versions, key=lambda v: (versions[v], v))}), or measure "
            "the rest again"
        )


def listed(values: Iterable[str]) -> str:
    """The distinct values, sorted, for a message; ``none`` for none."""
    return ", ".join(sorted(set(values))) or "none"
