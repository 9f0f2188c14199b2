"""What the report says, as values: a pure function of records and policy.

Regret is reckoned by `regret.outcomes`, so by the rules that the policy was learned with. Latencies are those of the
records that stand, in microseconds; several workloads of one T count by their geometric mean.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...candidate import Candidate
from ...device import DeviceKey
from ...measure.records import PEER_PREFIX, BenchRecord, WorkloadKey
from ...policy.schema import InputDigest, Policy, RegretSummary, Timing
from ...policy.select import Span, resolve
from ...policy.store import dumps_policy
from ..compare import standing
from ..regret import outcomes, summarise
from .letters import assign_letters

# The order in which timings and loads are shown where the policy doesn't say which is its own.
_TIMINGS: tuple[Timing, ...] = ("cuda_graph", "cupti", "eager")
_MAIN_LOAD = "uniform"
# Is shown with it at T where that wasn't measured: from `sweep.plan.SHARED_TOKENS` on.
_MEAN_LOAD = "mean_rank"

Range = tuple[float, float]


@dataclass(frozen=True)
class Latency:
    """Microseconds; ``p10`` and ``p90`` are ``None`` where they weren't measured."""

    median: float
    p10: float | None
    p90: float | None


@dataclass(frozen=True)
class Row:
    """All candidates at one T.

    Attributes
    ----------
    num_tokens, workloads
        T, and the number of workloads at it.
    local_rows, active_experts
        Least and most over the workloads; ``None`` where it isn't known.
    floor_us
        Least time that the device allows; ``None`` where it isn't known at each workload.
    latency
        Of the candidates and peers that were right at every workload; empty where only speedups are known.
    slowdown, regret
        As `regret.Outcome` has them.
    chosen, policy_regret
        What the policy runs, and what that costs; ``None`` if it has none of the candidates measured.
    passed_over
        What the policy would run if it had been right, and measured, at this T; ``None`` if that is what runs.
    """

    num_tokens: int
    workloads: int
    local_rows: tuple[int, int] | None
    active_experts: tuple[int, int] | None
    floor_us: float | None
    latency: Mapping[Candidate, Latency]
    slowdown: Mapping[Candidate, float]
    regret: Mapping[Candidate, float]
    chosen: Candidate | None
    policy_regret: float | None
    passed_over: Candidate | None


@dataclass(frozen=True)
class Standing:
    """How the policy, or one candidate used alone, did over all T at which that is known.

    Attributes
    ----------
    choice
        ``None`` for the policy.
    regret
        Mean and worst; ``None`` where nothing is known.
    policy_gain
        Geometric mean, over the T where both are known, of its latency over the policy's, less 1: 0.05 means that the
        policy is 1.05 times as fast.
    """

    choice: Candidate | None
    regret: RegretSummary | None
    policy_gain: float | None


@dataclass(frozen=True)
class View:
    """The records of one timing, and of one routing load or (``routing`` is ``None``) of all of them."""

    timing: Timing
    routing: str | None
    rows: Sequence[Row]
    standings: Sequence[Standing]  # the policy's first, then each candidate's, the least mean regret first

    @property
    def policy(self) -> Standing:
        """The policy's own standing."""
        return self.standings[0]

    @property
    def best_single(self) -> Standing | None:
        """Of the candidates known at every T, that with the least mean regret."""
        whole = [s for s in self.standings[1:] if s.regret is not None and s.regret.num_tokens == len(self.rows)]
        return whole[0] if whole else None


@dataclass(frozen=True)
class Checked:
    """How close a candidate's or peer's results were, as ranges over the workloads, and the bounds applied."""

    choice: Candidate
    workloads: int
    relative_l2: Range | None
    cosine: Range | None
    matched_ratio: Range | None
    max_abs_error: Range | None
    bounds: Sequence[str]


@dataclass(frozen=True)
class Refused:
    """A candidate that gave no result, and why."""

    choice: Candidate
    status: str
    reason: str
    timings: Sequence[Timing]
    num_tokens: Sequence[int]
    passed_later: bool


@dataclass(frozen=True)
class Input:
    """A file of records, and whether the policy was learned from it."""

    digest: InputDigest
    learned_from: bool


@dataclass(frozen=True)
class Report:
    """All that the page says.

    Attributes
    ----------
    policy, policy_sha256
        The policy, and the digest of its file.
    letters
        The letter of each candidate, in their order.
    peers
        Pipelines that aren't ours.
    spans
        What the policy runs, from T = 1 on.
    overall
        All loads together, one view a timing; the first is of the policy's own timing.
    loads
        One view a timing and load, in the same order.
    environment, dates
        What the records say of where they were measured, and their first and last day.
    """

    policy: Policy
    policy_sha256: str
    letters: Mapping[Candidate, str]
    peers: Sequence[Candidate]
    spans: Sequence[Span]
    overall: Sequence[View]
    loads: Sequence[View]
    by_speedup: bool
    checked: Sequence[Checked]
    refused: Sequence[Refused]
    environment: Mapping[str, str]
    dates: tuple[str, str] | None
    inputs: Sequence[Input]

    @property
    def device(self) -> str:
        """The device's product name where the records have one, else its slug."""
        return self.environment.get("gpu", self.policy.device)


def report(records: Sequence[BenchRecord], policy: Policy, inputs: Iterable[InputDigest] = ()) -> Report:
    """What is to be said of a policy by records, which it may have been learned from or not.

    Parameters
    ----------
    records
        Of the policy's device and problem; of any timings and routing loads, peers as well.
    policy
        The policy.
    inputs
        Digests of the files that the records come from.

    Raises
    ------
    ValueError
        None of the records passed, or some have latencies and others speedups.
    """
    passed = [r for r in records if r.status == "passed" and not r.is_peer]
    if not passed:
        raise ValueError(
            f"none of the {len(records)} records of {policy.device} is of a candidate that passed: nothing to draw"
        )
    by_speedup = {r.latency_us is None for r in passed}
    if len(by_speedup) > 1:
        raise ValueError("some records have latency_us and others speedup_vs_reference: report one kind at a time")
    by_letter = assign_letters({*policy.candidates, *(r.choice for r in records if not r.is_peer)})
    overall, loads = [], []
    for timing in _timings(policy, {r.timing for r in passed}):
        timed = [r for r in records if r.timing == timing]
        overall.append(_view(timed, policy, timing, None))
        main = {r.num_tokens for r in timed if r.routing == _MAIN_LOAD}

        def load_of(record: BenchRecord, main: set[int] = main) -> str:
            is_mean = record.routing == _MEAN_LOAD and main and record.num_tokens not in main
            return _MAIN_LOAD if is_mean else record.routing

        routings = sorted(
            {load_of(r) for r in passed if r.timing == timing}, key=lambda name: (name != _MAIN_LOAD, name)
        )
        loads += [_view([r for r in timed if load_of(r) == name], policy, timing, name) for name in routings]
    dates = sorted({r.timestamp[:10] for r in passed if r.timestamp})
    learned_from = {digest.sha256 for digest in policy.inputs}
    return Report(
        policy=policy,
        policy_sha256=hashlib.sha256(dumps_policy(policy).encode()).hexdigest(),
        letters=by_letter,
        peers=sorted({r.choice for r in records if r.is_peer}, key=str),
        spans=resolve(policy, policy.problem, DeviceKey(policy.device)).spans(),
        overall=overall,
        loads=loads,
        by_speedup=by_speedup.pop(),
        checked=_checked(records, by_letter),
        refused=_refused(records),
        environment=_environment(records),
        dates=(dates[0], dates[-1]) if dates else None,
        inputs=[Input(digest, digest.sha256 in learned_from) for digest in inputs],
    )


def _timings(policy: Policy, measured: set[Timing]) -> list[Timing]:
    return sorted(measured, key=lambda timing: (timing != policy.timing, _TIMINGS.index(timing)))


# ---- One timing and load ----


def _view(records: Sequence[BenchRecord], policy: Policy, timing: Timing, routing: str | None) -> View:
    latencies = _latencies(records)
    table = resolve(policy, policy.problem, DeviceKey(policy.device))
    rows = []
    for outcome in outcomes(policy, records):
        at = [r for r in records if r.num_tokens == outcome.num_tokens and r.status == "passed"]
        wanted = table.choice(outcome.num_tokens)
        chosen = None if outcome.decision is None else outcome.decision.choice
        rows.append(
            Row(
                num_tokens=outcome.num_tokens,
                workloads=outcome.workloads,
                local_rows=_range(r.local_rows for r in at),
                active_experts=_range(r.active_experts for r in at),
                floor_us=_floor(at),
                latency={c: value for (c, t), value in latencies.items() if t == outcome.num_tokens},
                slowdown=outcome.slowdown,
                regret=outcome.regret,
                chosen=chosen,
                policy_regret=outcome.policy_regret,
                passed_over=None if chosen == wanted else wanted,
            )
        )
    return View(timing, routing, rows, _standings(rows))


def _standings(rows: Sequence[Row]) -> list[Standing]:
    def of(choice: Candidate | None) -> Standing:
        known = [(row, row.policy_regret if choice is None else row.regret.get(choice)) for row in rows]
        regrets = [(row.num_tokens, regret) for row, regret in known if regret is not None]
        gains = [
            math.log(row.slowdown[choice] / row.slowdown[row.chosen])
            for row in rows
            if choice in row.slowdown and row.chosen is not None and choice is not None
        ]
        gain = math.exp(math.fsum(gains) / len(gains)) - 1 if gains else None
        return Standing(choice, summarise(regrets) if regrets else None, gain)

    singles = [of(choice) for choice in sorted({c for row in rows for c in row.regret}, key=str)]
    # Those that lack a T come last: their means are over other T.
    singles.sort(key=lambda s: (s.regret.num_tokens != len(rows), s.regret.mean) if s.regret else (True, math.inf))
    return [of(None), *singles]


def _latencies(records: Sequence[BenchRecord]) -> dict[tuple[Candidate, int], Latency]:
    """By candidate or peer and T: of those right at every workload that any candidate was right at."""
    kept = {key: found for key, found in standing(records).items() if found}
    wanted: dict[int, set[WorkloadKey]] = defaultdict(set)
    for choice, key in kept:
        if not choice.backend.startswith(PEER_PREFIX):
            wanted[key.num_tokens].add(key)
    latencies = {}
    for choice in sorted({choice for choice, _ in kept}, key=str):
        for num_tokens, keys in wanted.items():
            found = [kept.get((choice, key)) for key in sorted(keys)]
            latency = _mean_latency([rs for rs in found if rs])
            if latency is not None and all(found):
                latencies[choice, num_tokens] = latency
    return latencies


def _mean_latency(workloads: Sequence[Sequence[BenchRecord]]) -> Latency | None:
    """Geometric mean over workloads of the median over the measurements of each; ``None`` for speedups."""

    def mean(figure: str) -> float | None:
        logs = []
        for measurements in workloads:
            found = [getattr(r.latency_us, figure) for r in measurements if r.latency_us is not None]
            known = [value for value in found if value is not None]
            if not known:
                return None
            logs.append(math.log(statistics.median(known)))
        return math.exp(math.fsum(logs) / len(logs)) if logs else None

    median = mean("median")
    return None if median is None else Latency(median, mean("p10"), mean("p90"))


def _floor(records: Sequence[BenchRecord]) -> float | None:
    by_workload: dict[WorkloadKey, list[float]] = defaultdict(list)
    for record in records:
        if record.is_peer:
            continue
        floors = by_workload[record.at]
        if record.floor_us:
            floors.append(record.floor_us)
    if not by_workload or not all(by_workload.values()):
        return None
    return math.exp(math.fsum(math.log(statistics.median(f)) for f in by_workload.values()) / len(by_workload))


def _range(values: Iterable[int | None]) -> tuple[int, int] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None


# ---- What holds for all records ----


def _checked(records: Sequence[BenchRecord], order: Mapping[Candidate, str]) -> list[Checked]:
    by_choice: dict[Candidate, list[BenchRecord]] = defaultdict(list)
    for record in records:
        if record.status == "passed":
            by_choice[record.choice].append(record)
    ranked = [c for c in order if c in by_choice]
    found = []
    for choice in [*ranked, *sorted(set(by_choice) - set(ranked), key=str)]:
        gates = [r.correctness for r in by_choice[choice] if r.correctness is not None]

        def interval(name: str, gates: Sequence[object] = gates) -> Range | None:
            known = [value for value in (getattr(gate, name) for gate in gates) if value is not None]
            return (min(known), max(known)) if known else None

        bounds = set()
        for gate in gates:
            said = {
                "relative L2 at most": gate.max_relative_l2,
                "matched ratio at least": gate.required_matched_ratio,
                "rtol": gate.rtol,
                "atol": gate.atol,
            }
            bounds.add(", ".join(f"{name} {value:g}" for name, value in said.items() if value is not None))
        found.append(
            Checked(
                choice=choice,
                workloads=len({r.at for r in by_choice[choice]}),
                relative_l2=interval("relative_l2"),
                cosine=interval("cosine"),
                matched_ratio=interval("matched_ratio"),
                max_abs_error=interval("max_abs_error"),
                bounds=sorted(bounds - {""}),
            )
        )
    return found


def _refused(records: Sequence[BenchRecord]) -> list[Refused]:
    groups: dict[tuple[str, str, str], list[BenchRecord]] = defaultdict(list)
    for record in records:
        if record.status != "passed":
            groups[str(record.choice), record.status, record.reason or ""].append(record)
    passed = {timing: standing([r for r in records if r.timing == timing]) for timing in {r.timing for r in records}}
    return [
        Refused(
            choice=found[0].choice,
            status=status,
            reason=reason,
            timings=sorted({r.timing for r in found}),
            num_tokens=sorted({r.num_tokens for r in found}),
            passed_later=all(passed[r.timing].get((r.choice, r.at)) for r in found),
        )
        for (_, status, reason), found in sorted(groups.items())
    ]


def _environment(records: Sequence[BenchRecord]) -> dict[str, str]:
    """What the records say of where they were measured, one line each."""
    values: dict[str, list[object]] = defaultdict(list)
    for record in records:
        for name, value in record.environment.items():
            values[name].append(value)
        for name in ("host_us", "gpu_before", "gpu_after"):
            found = getattr(record, name)
            for key, value in found.model_dump().items() if found is not None else ():
                if isinstance(value, int | float):
                    values[f"{name}, {key}"].append(value)
    lines = {name: _line(found) for name, found in sorted(values.items())}
    return {name: line for name, line in lines.items() if line}


def _line(values: Sequence[object]) -> str:
    known = [value for value in values if value is not None]
    distinct = sorted({str(value) for value in known})
    if len(distinct) <= 4:
        return " | ".join(distinct)
    numbers = [value for value in known if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(known):
        return f"{min(numbers):g} to {max(numbers):g}"
    return f"{len(distinct)} different values"
