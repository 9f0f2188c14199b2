"""What to measure next: a pure function of the plan and of the records so far.

First the anchors, coarse to fine, so that a sweep that is stopped has seen the whole range. Then, one at a time, the T
in the middle of the gap between two measured T where a choice made from its ends could cost most. At each T every
routing load is measured, one after the other, as the learner averages over them: where arithmetic counts, so do a
rank's share of the rows, and the uniform load is measured at half, once and 1.5 times the mean. The order of the
candidates rotates from workload to workload.

Nothing depends on the clock: a sweep that was killed and goes on measures what it would have measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from ...candidate import Candidate
from ...policy.schema import GraphOrEager
from ...problem import MoEProblem
from ..records import BenchRecord, WorkloadKey
from ..workloads import DEEPSEEK_V3, DEFINITION_WORKLOADS, RANK_SHARES, RoutingLoad, Workload

TIMINGS: tuple[GraphOrEager, ...] = get_args(GraphOrEager)
LOADS: tuple[RoutingLoad, ...] = ("uniform", "zipf", "concentrated")
MAX_TOKENS = 16384
# From so many tokens on, the time of a rank follows its rows: fewer of them read the weights of the same experts.
SHARED_TOKENS = 901
# How many T are put between the anchors.
QUICK_REFINEMENTS, FULL_REFINEMENTS = 8, 16
# A candidate is given up when it hung or crashed at so many workloads: each costs a time limit and a new process.
LOSSES = 2

# How much the logarithm of the ratio of two candidates' latencies may change unseen, for each e-fold of T: on H100 and
# H200 the grouped GEMMs' changes by 0.05 to 0.2.
_DRIFT = 0.15
# T closer together than this share a choice for all that matters.
_LEAST_RATIO = 1.05


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate to measure on one workload, in the ways of timing that are still wanted."""

    workload: Workload
    choice: Candidate
    timings: tuple[GraphOrEager, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sweep is to find out.

    Parameters
    ----------
    problem
        The layer.
    candidates
        Complete choices, in the order of their rank.
    loads
        Routing loads, each measured at every T; see `loads_at`.
    anchors
        T to measure in any case, in this order.
    refinements
        Most T to put between them.
    timing
        The timing that the policy is to be learned from: it says where to look closer.
    """

    problem: MoEProblem
    candidates: tuple[Candidate, ...]
    loads: tuple[RoutingLoad, ...]
    anchors: tuple[int, ...]
    refinements: int
    timing: GraphOrEager = "cuda_graph"

    @classmethod
    def make(
        cls,
        problem: MoEProblem,
        candidates: Sequence[Candidate],
        *,
        quick: bool = False,
        loads: Sequence[RoutingLoad] = LOADS,
        max_tokens: int = MAX_TOKENS,
        timing: GraphOrEager = "cuda_graph",
    ) -> Plan:
        """The quick plan has the powers of two; the full one the definition's T as well, and more refinements."""
        powers = {2**n for n in range(max_tokens.bit_length())} | {max_tokens}
        anchors = _coarse_to_fine(sorted(powers))
        if not quick:
            others = {w.num_tokens for w in DEFINITION_WORKLOADS if w.num_tokens <= max_tokens} - powers
            anchors += _coarse_to_fine(sorted(others))
        refinements = QUICK_REFINEMENTS if quick else FULL_REFINEMENTS
        return cls(problem, tuple(candidates), tuple(loads), tuple(anchors), refinements, timing)

    @property
    def most_workloads(self) -> int:
        """As many as there can be: the sweep ends earlier where closer looks wouldn't pay."""
        each = [len(self.loads_at(tokens)) for tokens in self.anchors]
        return sum(each) + self.refinements * max(each)

    def loads_at(self, num_tokens: int) -> tuple[RoutingLoad, ...]:
        """The routing loads at a T: from SHARED_TOKENS on a rank's shares in place of ``uniform``, if it has any."""
        if num_tokens < SHARED_TOKENS or "uniform" not in self.loads:
            return self.loads
        return tuple(load for given in self.loads for load in loads_of_ranks(self.problem, given))

    def workloads(self, num_tokens: int) -> list[Workload]:
        """All of a T."""
        return [self.workload(num_tokens, load) for load in self.loads_at(num_tokens)]

    def workload(self, num_tokens: int, load: RoutingLoad) -> Workload:
        """The workload of a T: the definition's own where it is one of its T, else on a rank in the middle."""
        if self.problem == DEEPSEEK_V3:
            for known in DEFINITION_WORKLOADS:
                if known.num_tokens == num_tokens:
                    uuid = known.uuid if load == known.routing else None
                    return Workload(num_tokens, known.local_expert_offset, load, uuid=uuid)
        return Workload(num_tokens, middle_rank(self.problem), load)


def loads_of_ranks(problem: MoEProblem, load: RoutingLoad) -> tuple[RoutingLoad, ...]:
    """A rank's shares in place of ``uniform``; other loads, and where there is one rank, as they are."""
    return tuple(RANK_SHARES) if load == "uniform" and problem.num_local_experts < problem.num_experts else (load,)


def middle_rank(problem: MoEProblem) -> int:
    """Offset of the local experts on a rank that is neither the first nor the last where there are more than two."""
    ranks = problem.num_experts // problem.num_local_experts
    return (ranks - 1) // 2 * problem.num_local_experts


def _coarse_to_fine(items: Sequence[int]) -> list[int]:
    """The ends, then the middle of the widest gap (by rank) again and again."""
    if len(items) <= 2:
        return list(items)
    order = [0, len(items) - 1]
    gaps = [(0, len(items) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [items[index] for index in order]


class Results:
    """What the records say, ready to be asked; of two records of the same, the later one counts."""

    def __init__(self, records: Iterable[BenchRecord] = ()) -> None:
        self._records: dict[tuple[WorkloadKey, Candidate, str], BenchRecord] = {}
        self._begun: dict[WorkloadKey, None] = {}
        for record in records:
            self.add(record)

    def add(self, record: BenchRecord) -> None:
        """Take one more record."""
        self._begun.setdefault(record.at)
        self._records[record.at, record.choice, record.timing] = record

    def left_out(self, candidates: Sequence[Candidate]) -> dict[Candidate, str]:
        """The candidates that aren't measured any more, and why: refused, or hung and crashed too often."""
        refused: dict[Candidate, str] = {}
        lost: dict[Candidate, dict[WorkloadKey, str]] = {}
        for (point, choice, _), record in self._records.items():
            if record.status == "unsupported":
                refused.setdefault(choice, record.reason or "")
            elif record.status == "timeout" or record.crashed:
                lost.setdefault(choice, {}).setdefault(point, record.reason or "")
        reasons = {}
        for choice in candidates:
            if choice in refused:
                reasons[choice] = refused[choice]
            elif len(points := lost.get(choice, {})) >= LOSSES:
                where = "; ".join(
                    f"T = {point.num_tokens} {point.routing}: {reason}" for point, reason in points.items()
                )
                reasons[choice] = f"given up after {len(points)} workloads at which it hung or crashed ({where})"
        return reasons

    def missing(self, workload: Workload, choice: Candidate) -> tuple[GraphOrEager, ...]:
        """The ways of timing without a record."""
        point = workload.key
        return tuple(timing for timing in TIMINGS if (point, choice, timing) not in self._records)

    def median_us(self, workload: Workload, choice: Candidate, timing: str) -> float | None:
        """The median latency in microseconds; ``None`` unless it passed."""
        record = self._records.get((workload.key, choice, timing))
        return None if record is None or record.latency_us is None else record.latency_us.median

    def begun(self, plan: Plan) -> list[int]:
        """The plan's T that have a record, in the order in which they were begun."""
        tokens = dict.fromkeys(point.num_tokens for point in self._begun)
        return [t for t in tokens if any(workload.key in self._begun for workload in plan.workloads(t))]

    def order(self, workload: Workload) -> int:
        """How many workloads were begun before this one."""
        for index, point in enumerate(self._begun):
            if point == workload.key:
                return index
        return len(self._begun)


def next_job(plan: Plan, results: Results) -> Job | None:
    """What to measure next; ``None`` if nothing more is worth it."""
    left_out = results.left_out(plan.candidates)
    in_play = [choice for choice in plan.candidates if choice not in left_out]
    if not in_play:
        return None
    begun = results.begun(plan)
    job = _first_missing(plan, results, dict.fromkeys([*begun, *plan.anchors]), in_play)
    if job is not None or len(set(begun) - set(plan.anchors)) >= plan.refinements:
        return job
    between = _least_sure(_latencies(plan, results, begun, in_play))
    return None if between is None else _first_missing(plan, results, [between], in_play)


def _first_missing(plan: Plan, results: Results, tokens: Iterable[int], in_play: Collection[Candidate]) -> Job | None:
    for num_tokens in tokens:
        for workload in plan.workloads(num_tokens):
            shift = results.order(workload) % len(plan.candidates)
            for choice in plan.candidates[shift:] + plan.candidates[:shift]:
                if choice in in_play and (timings := results.missing(workload, choice)):
                    return Job(workload, choice, timings)
    return None


def _latencies(
    plan: Plan, results: Results, tokens: Sequence[int], candidates: Sequence[Candidate]
) -> dict[int, dict[Candidate, float]]:
    """Mean log latency over the loads at each T, of each candidate that was right at all of them."""
    found: dict[int, dict[Candidate, float]] = {}
    for num_tokens in sorted(tokens):
        found[num_tokens] = {}
        for choice in candidates:
            medians = [results.median_us(workload, choice, plan.timing) for workload in plan.workloads(num_tokens)]
            known = [math.log(median) for median in medians if median is not None]
            if len(known) == len(medians):
                found[num_tokens][choice] = statistics.fmean(known)
    return found


def _least_sure(latencies: Mapping[int, Mapping[Candidate, float]]) -> int | None:
    """The T to look at next: the middle of the gap with the largest `_doubt`; ``None`` if no gap has any."""
    best: tuple[float, int] | None = None
    tokens = sorted(latencies)
    for low, high in zip(tokens, tokens[1:], strict=False):
        middle = math.isqrt(low * high)
        if not low < middle < high or high < _LEAST_RATIO * low:
            continue
        doubt = _doubt(math.log(high / low), latencies[low], latencies[high])
        if doubt > 0 and (best is None or doubt > best[0]):
            best = doubt, middle
    return None if best is None else best[1]


def _doubt(width: float, low: Mapping[Candidate, float], high: Mapping[Candidate, float]) -> float:
    """What running one candidate in the whole gap could cost: its log slowdown, times the log T that it holds over.

    That of the best candidate for it: how far it lags behind another one at the worse of the two ends, and what may
    change unseen up to the middle. A lead at both ends is a negative lag, and takes its share off.
    """
    both = [choice for choice in low if choice in high]
    if len(both) < 2:
        return 0.0
    lag = min(
        max(max(low[choice] - low[other], high[choice] - high[other]) for other in both if other != choice)
        for choice in both
    )
    return width * max(0.0, lag + _DRIFT * width / 2)
