"""How good a policy is on records that it wasn't learned from: a pure function of the two.

What runs by the policy is compared, workload by workload, with

- the oracle, the fastest candidate that was right there;
- the bound: the best that a choice by T alone can do, as a policy's is. At each T that is the candidate with the least
  mean log slowdown over the workloads of this T, picked with these very records;
- every single candidate, used for all T.

Where a T has several workloads (other seeds, offsets or loads) no choice by T alone can reach the oracle.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..candidate import Candidate
from ..device import DeviceKey
from ..measure.records import BenchRecord, WorkloadKey
from ..policy.schema import LearnerOptions, Policy, Timing
from ..policy.select import resolve
from .compare import by_workload, check_records, is_about, under


@dataclass(frozen=True, slots=True)
class Judged:
    """One workload.

    Attributes
    ----------
    at
        Which one.
    choice, oracle, bound
        What runs by the policy, what was fastest, and what is best for all workloads of this T.
    slowdown
        Of each candidate that was right: its latency over the oracle's.
    noise
        Measured spread of the noisier of choice and oracle, see `BenchRecord.spread`; ``None`` where it isn't known.
    """

    at: WorkloadKey
    choice: Candidate
    oracle: Candidate
    bound: Candidate
    slowdown: Mapping[Candidate, float]
    noise: float | None

    @property
    def regret(self) -> float:
        """Slowdown - 1 of the policy's choice."""
        return self.slowdown[self.choice] - 1

    @property
    def within_noise(self) -> bool:
        """Whether the regret is no more than the measured noise."""
        return self.regret <= (self.noise or 0.0)


@dataclass(frozen=True, slots=True)
class Score:
    """Regrets (slowdown - 1 against the oracle) of one way to choose.

    Attributes
    ----------
    mean
        Over the T, each counted once with the mean of its workloads.
    worst, worst_at
        The largest of a single workload, and which one it is.
    workloads
        How many were judged.
    """

    mean: float
    worst: float
    worst_at: WorkloadKey
    workloads: int

    def to_dict(self) -> dict[str, Any]:
        """The score as a JSON object."""
        return asdict(self) | {"worst_at": self.worst_at._asdict()}


@dataclass(frozen=True, slots=True)
class Single:
    """One candidate used everywhere, at the workloads where it was right.

    ``policy_gain`` is how much slower it is than the policy: geometric mean of its latency over the policy's, less 1,
    each T counted once.
    """

    choice: Candidate
    score: Score
    policy_gain: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    timing
        Of the records that were used.
    policy, bound
        Their regrets.
    singles
        Every candidate measured, the fastest first.
    judged
        The workloads, sorted.
    noise
        Median over the workloads of their measured noise; ``None`` where it was never measured.
    not_judged
        Workloads where the policy's choice has no right result, or no candidate is right at all workloads of the T;
        with the reason.
    """

    timing: str
    policy: Score
    bound: Score
    singles: tuple[Single, ...]
    judged: tuple[Judged, ...]
    noise: float | None
    not_judged: tuple[tuple[WorkloadKey, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as a JSON object."""
        return {
            "timing": self.timing,
            "policy": self.policy.to_dict(),
            "bound": self.bound.to_dict(),
            "singles": [
                {"candidate": str(s.choice), "score": s.score.to_dict(), "policy_gain": s.policy_gain}
                for s in self.singles
            ],
            "noise": self.noise,
            "beyond_noise": sum(not j.within_noise for j in self.judged),
            "judged": [
                {
                    **j.at._asdict(),
                    "choice": str(j.choice),
                    "oracle": str(j.oracle),
                    "bound": str(j.bound),
                    "regret": j.regret,
                    "noise": j.noise,
                    "slowdown": {str(choice): value for choice, value in j.slowdown.items()},
                }
                for j in self.judged
            ],
            "not_judged": [{**at._asdict(), "reason": reason} for at, reason in self.not_judged],
        }


def evaluate(
    policy: Policy,
    records: Iterable[BenchRecord],
    *,
    timing: Timing | None = None,
    where: Mapping[str, str] | None = None,
) -> Evaluation:
    """Judge a policy by records.

    Parameters
    ----------
    policy
        What is judged; all that it chooses is taken to run.
    records
        Those of other devices and problems than the policy's, and of peers, are left out.
    timing
        The only timing to judge by; by default the one that the policy was learned from.
    where
        The only versions to judge by, see `compare.is_of`.

    Raises
    ------
    ValueError
        No record is left, the rest may not be compared (`compare.check_records`), or the policy's choices have no right
        result at any workload.
    """
    ours = [r for r in records if not r.is_peer]
    here = [r for r in ours if r.device == policy.device and is_about(r, policy.problem)]
    if not here:
        found = ", ".join(sorted({f"{r.device} with {r.problem}" for r in ours})) or "none"
        raise ValueError(f"policy is for {policy.device} with {policy.problem}; the records are of {found}")
    wanted = timing or policy.timing
    used = [r for r in here if wanted in (None, r.timing)]
    if not used:
        found = ", ".join(sorted({r.timing for r in here}))
        raise ValueError(f"records: expected some timed with {wanted}, got {found}: name another as timing= (--timing)")
    used = under(used, where or {})
    check_records(used, LearnerOptions(timing=used[0].timing if wanted else None), policy.problem, policy.tolerance)

    judged, not_judged = _judge(policy, used)
    if not judged:
        raise ValueError(
            "the policy can be judged at no workload: " + "; ".join(sorted({why for _, why in not_judged}))
        )
    noise = [j.noise for j in judged if j.noise is not None]
    return Evaluation(
        timing=used[0].timing,
        policy=_score((j, j.choice) for j in judged),
        bound=_score((j, j.bound) for j in judged),
        singles=_singles(judged),
        judged=tuple(judged),
        noise=statistics.median(noise) if noise else None,
        not_judged=tuple(not_judged),
    )


def _judge(policy: Policy, records: Sequence[BenchRecord]) -> tuple[list[Judged], list[tuple[WorkloadKey, str]]]:
    workloads = by_workload(records)
    table = resolve(policy, policy.problem, DeviceKey(policy.device))
    by_tokens: dict[int, list[WorkloadKey]] = defaultdict(list)
    for at in workloads:
        by_tokens[at.num_tokens].append(at)

    judged: list[Judged] = []
    not_judged: list[tuple[WorkloadKey, str]] = []
    for num_tokens, ats in by_tokens.items():
        slowdowns = {at: workloads[at].slowdown for at in ats}
        everywhere = set.intersection(*(set(s) for s in slowdowns.values()))
        if not everywhere:
            not_judged += [(at, f"no candidate is right at all workloads of T = {num_tokens}") for at in ats]
            continue
        choice = table.choice(num_tokens)
        mean_log = {c: _mean(math.log(slowdowns[at][c]) for at in ats) for c in everywhere}
        bound = min(everywhere, key=lambda c: (mean_log[c], str(c)))
        for at in ats:
            if choice not in slowdowns[at]:
                not_judged.append((at, f"{choice}, which the policy runs at T = {num_tokens}, has no right result"))
            else:
                oracle = next(c for c, slowdown in slowdowns[at].items() if slowdown == 1)
                spread = workloads[at].spread
                noise = max((spread[c] for c in (choice, oracle) if c in spread), default=None)
                judged.append(Judged(at, choice, oracle, bound, slowdowns[at], noise))
    return judged, not_judged


def _singles(judged: Sequence[Judged]) -> tuple[Single, ...]:
    singles = []
    for choice in {choice for j in judged for choice in j.slowdown}:
        there = [j for j in judged if choice in j.slowdown]
        logs = ((j, math.log(j.slowdown[choice] / j.slowdown[j.choice])) for j in there)
        singles.append(Single(choice, _score((j, choice) for j in there), math.exp(_mean_over_tokens(logs)) - 1))
    return tuple(sorted(singles, key=lambda s: (-s.score.workloads, s.policy_gain, str(s.choice))))


def _score(chosen: Iterable[tuple[Judged, Candidate]]) -> Score:
    regrets = [(j, j.slowdown[choice] - 1) for j, choice in chosen]
    at, worst = max(regrets, key=lambda item: item[1])
    return Score(_mean_over_tokens(regrets), worst, at.at, len(regrets))


def _mean_over_tokens(values: Iterable[tuple[Judged, float]]) -> float:
    by_tokens: dict[int, list[float]] = defaultdict(list)
    for j, value in values:
        by_tokens[j.at.num_tokens].append(value)
    return _mean(map(_mean, by_tokens.values()))


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
