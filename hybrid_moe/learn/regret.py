"""How far a policy's choices are from the fastest, on records that it was learned from or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..candidate import Candidate
from ..device import DeviceKey
from ..measure.records import BenchRecord
from ..policy.schema import Policy, RegretSummary, six_digits
from ..policy.select import Decision, choose
from .compare import Point, by_workload, points_of


@dataclass(frozen=True)
class Outcome:
    """How the candidates, and with them a policy, did at one T.

    Attributes
    ----------
    num_tokens, workloads
        T, and how many workloads it was measured at.
    slowdown
        Of each candidate right at all of them, the geometric mean of its latency over the fastest's, as in `Evidence`.
    regret
        Of the same candidates, the mean of slowdown - 1, which is what a `RegretSummary` sums up.
    decision
        What the policy runs of these candidates; ``None`` if it knows none of them.
    """

    num_tokens: int
    workloads: int
    slowdown: Mapping[Candidate, float]
    regret: Mapping[Candidate, float]
    decision: Decision | None

    @property
    def policy_regret(self) -> float | None:
        """Regret of what the policy runs; ``None`` if it knows none of the candidates."""
        return None if self.decision is None else self.regret[self.decision.choice]


def outcomes(policy: Policy, records: Iterable[BenchRecord]) -> list[Outcome]:
    """How a policy does on records, learned from or not, by the rules of `learn`: one entry a T, sorted.

    The records are of the policy's device and problem and of one timing; peers don't count. A T at which no answer is
    right has no entry.
    """
    found = []
    for point in points_of(by_workload(r for r in records if not r.is_peer)):
        known = any(choice in point.log for choice in policy.candidates)
        found.append(
            Outcome(
                num_tokens=point.num_tokens,
                workloads=len(point.workloads),
                slowdown={choice: math.exp(value) for choice, value in point.log.items()},
                regret={choice: _regret(choice, point) for choice in point.log},
                decision=_decision_at(policy, point) if known else None,
            )
        )
    return found


def summarise(regrets: Iterable[tuple[int, float]]) -> RegretSummary:
    """Mean and worst of the regrets at each T, given as ``(T, regret)``; the smallest T of equal worst ones."""
    found = [(num_tokens, six_digits(regret)) for num_tokens, regret in regrets]
    worst_tokens, worst = max(found, key=lambda item: (item[1], -item[0]))
    return RegretSummary(
        mean=six_digits(math.fsum(regret for _, regret in found) / len(found)),
        worst=worst,
        worst_num_tokens=worst_tokens if worst > 0 else None,
        num_tokens=len(found),
    )


def regret_at(policy: Policy, point: Point) -> float:
    """Mean slowdown - 1 of what a policy runs at one T."""
    return _regret(_decision_at(policy, point).choice, point)


def _decision_at(policy: Policy, point: Point) -> Decision:
    # One that wasn't right at this T isn't run there: its backend refuses, or its records are to be learned from.
    refusals = {c: ("not right at this T",) for c in policy.candidates if c not in point.log}
    return choose(policy, policy.problem, DeviceKey(policy.device), point.num_tokens, refusals=refusals)


def _regret(choice: Candidate, point: Point) -> float:
    return math.fsum(w.slowdown[choice] for w in point.workloads) / len(point.workloads) - 1
