"""From benchmark records to a policy: a pure function of records and options.

What counts is regret, the slowdown of what runs against the fastest candidate of the workload, not the number of wins:

- Each T counts once: the mean of the logarithms of the slowdowns over its workloads.
- A candidate can be chosen for an interval only if it was right at every workload of every T measured in it. A wrong
  answer stands until a later record (by timestamp) of the same candidate and workload passed.
- The default is the candidate with the least mean over all T, of those right at all of them.
- Intervals are given, or found (``auto``) so that the sum of the regret and of a price for each change of candidate is
  least; the price is the tie margin, so that a change must pay for itself.
- In an interval, a preferred candidate within the tie margin of the fastest wins (a tie); else, where the default is
  within the margin, the default does (unsure); else the fastest. Where spread was measured, the margin is no less.
- T without evidence near it gets the default.

The same records and options give the same bytes, in whatever order the records come.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..candidate import Candidate
from ..measure.readers import Experts, read_measurements
from ..measure.records import Measured, problem_of_record
from ..numerics import Tolerance
from ..policy.schema import (
    GATE_RULE,
    InputDigest,
    Interval,
    LearnerOptions,
    Policy,
    Regime,
    RegretSummary,
    Verdict,
    Verified,
    expected_regret,
    label,
)
from ..problem import MoEProblem
from .compare import Comparison, Point, WorkloadKey, by_workload, check_records, is_about, listed, points_of, under
from .regret import regret_at, summarise

# Differences below this are rounding of the logarithms, not of the measurements.
_ROUNDING = 12
_SLACK = 1e-12


def learn_from_files(
    paths: Iterable[str | Path],
    options: LearnerOptions,
    problem: MoEProblem | None = None,
    device: str | None = None,
    *,
    num_experts: int | None = None,
    gate_first: bool | None = None,
    definitions: Iterable[Path] = (),
    environment: Mapping[str, str] | None = None,
    tolerance: Tolerance | None = None,
) -> Policy:
    """Learn from files of records, and keep their digests in the policy.

    Parameters
    ----------
    paths
        Records, traces of flashinfer-bench or the published table, see `readers.read_any`.
    options, environment, tolerance
        As for `learn`.
    problem
        The only problem to learn about; ``None`` if the records have just one.
    device
        Slug of the only device to learn about; ``None`` if the records have just one.
    num_experts, gate_first
        Of the problem, for records that leave them open; a ``problem`` that is given has its own.
    definitions
        Definitions of flashinfer-bench, whose axes say of how many experts the models of traces are.

    Raises
    ------
    ValueError
        As for `learn` and `readers.read_any`, no record is left, or ``solutions`` of the options names one that isn't
        there.
    OSError
        A file can't be read.
    """
    records: list[Measured] = []
    inputs: list[InputDigest] = []
    given = num_experts if problem is None else {problem.definition: problem.num_experts}
    experts = Experts(given, definitions)
    for path in paths:
        read, digest = read_measurements(path, options.solutions, experts)
        records += read
        inputs.append(digest)
    check_solutions(records, options.solutions)
    unknown = sorted({r.solution for r in records if r.solution is not None and r.is_peer})
    if unknown:
        warnings.warn(
            f"not learned from, as no candidate is called so: the solution {', '.join(unknown)}. If it is one, say "
            "which as solutions= of the options (--solution NAME=CANDIDATE)",
            stacklevel=2,
        )
    if device is not None:
        devices = listed(r.device for r in records)
        records = [r for r in records if r.device == device]
        if not records:
            raise ValueError(f"device is {device!r}; the records have {devices}")
    if problem is not None:
        problems = listed(r.problem for r in records)
        records = [r for r in records if is_about(r, problem)]
        if not records:
            raise ValueError(f"problem is {problem}; the records have none about it, but {problems}")
    else:
        found = {
            problem_of_record(r, num_experts=num_experts, gate_first=bool(gate_first)) for r in records if not r.is_peer
        }
        if len(found) != 1:
            names = "; ".join(sorted(map(str, found))) or "none"
            raise ValueError(f"the records are about several problems or none: {names}; name one as problem=")
        problem = found.pop()
        for name, value in (("num_experts", num_experts), ("gate_first", gate_first)):
            if value not in (None, getattr(problem, name)):
                raise ValueError(f"{name} is {value}; the records say {getattr(problem, name)}")
    return learn(
        records, options, problem=problem, inputs=inputs, environment=environment, tolerance=tolerance or Tolerance()
    )


def learn(
    records: Iterable[Measured],
    options: LearnerOptions,
    *,
    problem: MoEProblem,
    inputs: Sequence[InputDigest],
    environment: Mapping[str, str] | None = None,
    tolerance: Tolerance = Tolerance(),  # noqa: B008 (frozen)
) -> Policy:
    """Learn a policy from records.

    Parameters
    ----------
    records
        Of one device, one problem, one timing, and one version of what the candidates use. Those of peer pipelines are
        left out.
    options
        What to learn, see `LearnerOptions`.
    problem
        What the records are about.
    inputs
        Digests of the files that the records come from.
    environment
        What to keep about where they were measured; by default, what the records say.
    tolerance
        The gate that the records must have passed.

    Raises
    ------
    ValueError
        The records are mixed, none passed, no candidate is right at every measured T, some passed by looser bounds,
        only wrong answers are known at some T, or an option is wrong; the message says what was found and how to go on.
    """
    used = [r for r in records if not r.is_peer and options.timing in (None, r.timing)]
    used = under(used, options.where or {})
    device, verified = check_records(used, options, problem, tolerance)
    intervals = None if options.regimes == "auto" else parse_regimes(options.regimes)
    workloads = by_workload(used)
    points = points_of(workloads)
    _check_answers(workloads, points)
    learner = _Learner(
        problem=problem,
        device=device,
        verified=verified,
        options=options,
        intervals=intervals,
        preferred=preferred_among(options.prefer, {r.choice for r in used}),
        wrong=frozenset(choice for workload in workloads.values() for choice in workload.wrong),
        inputs=sorted(inputs, key=lambda digest: (digest.name, digest.sha256)),
        environment=dict(environment) if environment is not None else _environment(used),
        tolerance=tolerance,
    )
    policy = learner.learn(points)
    training = summarise((point.num_tokens, regret_at(policy, point)) for point in points)
    left_out = None
    if len(points) >= 3:
        left_out = summarise(
            (point.num_tokens, regret_at(learner.learn([p for p in points if p is not point]), point))
            for point in _to_leave_out(points)
        )
    return policy.model_copy(update={"training_regret": training, "leave_one_out_regret": left_out})


def _to_leave_out(points: Sequence[Point]) -> Sequence[Point]:
    """All of them up to 256; of more a part, evenly spread: each is a policy learned from all others."""
    count = len(points)
    wanted = count if count <= 256 else max(16, 256 * 256 // count)
    return [points[index * count // wanted] for index in range(wanted)]


def check_solutions(records: Iterable[Measured], solutions: Mapping[str, str] | None) -> None:
    """Refuse ``solutions`` that name one of which there is no trace: a slip would leave a candidate out."""
    found = {r.solution for r in records if r.solution is not None}
    missing = sorted(set(solutions or ()) - found)
    if missing:
        raise ValueError(f"no trace is of the solution {', '.join(missing)}; found: {listed(found)}")


def parse_regimes(text: str) -> list[Interval]:
    """``"1-7,14-32,901,10001-"`` -> ``[(1, 7), (14, 32), (901, 901), (10001, None)]``, sorted.

    Raises
    ------
    ValueError
        An interval is malformed, empty, or overlaps another.
    """
    intervals: list[Interval] = []
    for part in text.split(","):
        low, dash, high = (piece.strip() for piece in part.partition("-"))
        if not low.isdecimal() or (high and not high.isdecimal()):
            raise ValueError(f"regimes: expected 'auto', or intervals as 1-7,14-32,901,10001-, got {part.strip()!r}")
        upper = (int(high) if high else None) if dash else int(low)
        if upper is not None and upper < int(low):
            raise ValueError(f"regimes: expected the smaller bound first, got {part.strip()!r}")
        intervals.append((int(low), upper))
    intervals.sort(key=lambda interval: interval[0])
    for lower, above in zip(intervals, intervals[1:], strict=False):
        if lower[1] is None or lower[1] >= above[0]:
            raise ValueError(f"regimes: expected disjoint intervals, got {label(lower)} and {label(above)}")
    return intervals


# ---- From points to a policy ----


@dataclass(frozen=True)
class _Ruling:
    points: Sequence[Point]
    choice: Candidate
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class _Learner:
    """All that stays the same whichever T are learned from."""

    problem: MoEProblem
    device: str
    verified: Verified
    options: LearnerOptions
    intervals: Sequence[Interval] | None  # None: to be found
    preferred: frozenset[Candidate]
    wrong: frozenset[Candidate]  # wrong at some workload
    inputs: Sequence[InputDigest]
    environment: Mapping[str, str]
    tolerance: Tolerance

    def learn(self, points: Sequence[Point]) -> Policy:
        """The policy, with regrets that are still to be filled in."""
        default = self._default(points)
        if self.intervals is None:
            regimes = self._found_regimes(points, default)
        else:
            regimes = self._given_regimes(points, default, self.intervals)
        outside = [p for p in points if not any(p.num_tokens in regime for regime in regimes)]
        unknown = RegretSummary(mean=0.0, worst=0.0, worst_num_tokens=None, num_tokens=len(points))
        return Policy(
            device=self.device,
            problem=self.problem,
            definition=self.problem.definition,
            candidates=self._candidates(points, default, {default, *(regime.choice for regime in regimes)}),
            default=default,
            default_reason=self._default_reason(points, default),
            default_evidence=tuple(p.evidence() for p in outside),
            regimes=tuple(regimes),
            training_regret=unknown,
            leave_one_out_regret=None,
            learner=self.options,
            tolerance=self.tolerance,
            inputs=tuple(self.inputs),
            environment=dict(self.environment),
        )

    def _rank(self, choice: Candidate) -> tuple[bool, str]:
        return choice not in self.preferred, str(choice)

    def _best(self, points: Sequence[Point], among: Collection[Candidate]) -> Candidate:
        return min(among, key=lambda choice: (round(_score(choice, points), _ROUNDING), self._rank(choice)))

    def _default(self, points: Sequence[Point]) -> Candidate:
        right = _right_everywhere(points)
        if right:
            return self._best(points, right)
        seen = sorted({choice for p in points for choice in p.log}, key=str)
        lacking = [f"{c} lacks T = {_tokens([p for p in points if c not in p.log])}" for c in seen]
        raise ValueError(
            "no candidate is right at every measured T, so there is no default: "
            f"{'; '.join(lacking) or 'none passed'}; measure what is missing, or leave those T out"
        )

    def _default_reason(self, points: Sequence[Point], default: Candidate) -> str:
        others = _right_everywhere(points) - {default}
        reason = f"the fastest by geometric mean over all {len(points)} T measured, {_tokens(points)}"
        if others:
            second = self._best(points, others)
            reason += f"; next is {second} at {_speed(second, default, points):.2f} of its speed"
        return reason

    def _candidates(
        self, points: Sequence[Point], default: Candidate, chosen: Collection[Candidate]
    ) -> tuple[Candidate, ...]:
        # One that was wrong somewhere may run only where evidence chose it; even there it is the last to fall back to.
        seen = {c for p in points for c in p.log if c not in self.wrong or c in chosen}

        def order(choice: Candidate) -> tuple[bool, bool, int, float, tuple[bool, str]]:
            where = [p for p in points if choice in p.log]
            missing = len(points) - len(where)
            score = round(_score(choice, where), _ROUNDING)
            return choice != default, choice in self.wrong, missing, score, self._rank(choice)

        return tuple(sorted(seen, key=order))

    # -- one interval --

    def _rule(self, points: Sequence[Point], default: Candidate) -> _Ruling | None:
        """What runs in an interval with these points; ``None`` if nothing was right at all of them."""
        right = _right_everywhere(points)
        if not right:
            return None
        best = self._best(points, right)
        choice = best
        preferred = right & self.preferred
        if preferred and best not in preferred:
            favourite = self._best(points, preferred)
            if self._is_tie(favourite, best, points):
                choice = favourite
        if choice == best and best not in preferred and default in right and self._is_tie(default, best, points):
            choice = default
        return self._ruling(points, choice)

    def _ruling(self, points: Sequence[Point], choice: Candidate) -> _Ruling:
        right = _right_everywhere(points)
        best = self._best(points, right)
        over = f"over T = {_tokens(points)}"
        if choice == best:
            verdict: Verdict = "best"
            reason = f"{choice} is the fastest {over} by geometric mean"
            if len(right) > 1:
                second = self._best(points, right - {best})
                reason += f"; next is {second} at {_speed(second, best, points):.2f} of its speed"
        else:
            speed = _speed(choice, best, points)
            margin = self._margin(choice, best, points)
            within = f"{choice} has {speed:.2f} of the speed of {best} {over}, within the margin of {100 * margin:.3g}%"
            if margin > self.options.tie_margin:
                within += " (the spread measured)"
            # Joined intervals may be further apart than each of them was; then the figure alone speaks.
            if not self._is_tie(choice, best, points):
                within = within.partition(", within")[0]
            if choice in self.preferred:
                verdict, reason = "tie", f"tie: {within}; ties go to the preferred {self.options.prefer}"
            else:
                verdict, reason = "unsure", f"unsure: {within}; the default stays"
        left_out = sorted({str(c) for p in points for c in p.log if c not in right})
        if left_out:
            reason += f"; not right, or not measured, at all of these T: {', '.join(left_out)}"
        return _Ruling(points, choice, verdict, reason)

    def _is_tie(self, choice: Candidate, best: Candidate, points: Sequence[Point]) -> bool:
        margin = self._margin(choice, best, points)
        return _speed(choice, best, points) >= 1 - margin - _SLACK

    def _margin(self, a: Candidate, b: Candidate, points: Sequence[Point]) -> float:
        """The tie margin, or the typical half spread of the noisier of the two where that was measured and is more."""
        noise = np.concatenate([p.noise(a, b) for p in points])
        return max(self.options.tie_margin, float(np.median(noise))) if noise.size else self.options.tie_margin

    def _regime(self, interval: Interval, ruling: _Ruling, note: str = "") -> Regime:
        evidence = tuple(p.evidence() for p in ruling.points)
        return Regime(
            min_tokens=interval[0],
            max_tokens=interval[1],
            choice=ruling.choice,
            verdict=ruling.verdict,
            verified=self.verified,
            reason=ruling.reason + note,
            expected_regret=expected_regret(ruling.choice, evidence),
            evidence=evidence,
        )

    # -- all intervals --

    def _given_regimes(
        self, points: Sequence[Point], default: Candidate, intervals: Sequence[Interval]
    ) -> list[Regime]:
        regimes = []
        for low, high in intervals:
            inside = [p for p in points if low <= p.num_tokens and (high is None or p.num_tokens <= high)]
            ruling = self._rule(inside, default) if inside else None
            if ruling is not None:
                regimes.append(self._regime((low, high), ruling))
        return regimes

    def _found_regimes(self, points: Sequence[Point], default: Candidate) -> list[Regime]:
        rulings = [ruling for part in self._partition(points, default) if (ruling := self._rule(part, default))]
        rulings = list(self._joined(rulings))
        bounds = [[r.points[0].num_tokens, r.points[-1].num_tokens] for r in rulings]
        for lower, upper in zip(bounds, bounds[1:], strict=False):
            a, b = lower[1], upper[0]
            if b <= self.options.max_gap * a:
                lower[1] = math.isqrt(a * b)
                upper[0] = lower[1] + 1
        regimes = []
        for index, (ruling, (low, high)) in enumerate(zip(rulings, bounds, strict=True)):
            note = ""
            if index == 0 and low > 1:
                note += f"; kept below T = {low}, as nothing smaller was measured"
                low = 1
            # Open above: the largest T measured says more about the T beyond it than the default does.
            last = index == len(rulings) - 1
            if last:
                note += f"; kept above T = {high}, as nothing larger was measured"
            regimes.append(self._regime((low, None if last else high), ruling, note))
        return regimes

    def _partition(self, points: Sequence[Point], default: Candidate) -> Iterator[list[Point]]:
        """Cut the sorted points so that the regret and the price of the cuts are least, by dynamic programming."""
        price = math.log1p(self.options.tie_margin)

        # Of equal sums, that with fewer changes, then the default, then the preferred one, then by name.
        def least(ways: Mapping[Candidate, tuple[float, int]]) -> Candidate:
            return min(ways, key=lambda c: (round(ways[c][0], _ROUNDING), ways[c][1], c != default, self._rank(c)))

        sums: dict[Candidate, tuple[float, int]] = {choice: (cost, 0) for choice, cost in points[0].log.items()}
        steps: list[dict[Candidate, Candidate]] = []
        for point in points[1:]:
            reached: dict[Candidate, tuple[float, int]] = {}
            came: dict[Candidate, Candidate] = {}
            for choice, cost in point.log.items():
                ways = {
                    before: (total + (0 if before == choice else price), changes + (before != choice))
                    for before, (total, changes) in sums.items()
                }
                came[choice] = least(ways)
                total, changes = ways[came[choice]]
                reached[choice] = (total + cost, changes)
            sums = reached
            steps.append(came)
        choices = [least(sums)]
        for came in reversed(steps):
            choices.append(came[choices[-1]])
        choices.reverse()

        part = [points[0]]
        for point, before, choice in zip(points[1:], choices, choices[1:], strict=False):
            if choice != before:
                yield part
                part = []
            part.append(point)
        yield part

    def _joined(self, rulings: Sequence[_Ruling]) -> Iterator[_Ruling]:
        """Neighbours of the same choice as one, with what was said of the parts where that differs."""
        groups: list[list[_Ruling]] = []
        for ruling in rulings:
            if groups and groups[-1][0].choice == ruling.choice:
                groups[-1].append(ruling)
            else:
                groups.append([ruling])
        for group in groups:
            if len(group) == 1:
                yield group[0]
                continue
            whole = self._ruling([p for ruling in group for p in ruling.points], group[0].choice)
            parts = "".join(f"; part of it: {r.reason}" for r in group if r.verdict != "best")
            yield _Ruling(whole.points, whole.choice, whole.verdict, whole.reason + parts)


def _right_everywhere(points: Sequence[Point]) -> set[Candidate]:
    return set.intersection(*(set(p.log) for p in points)) if points else set()


def _score(choice: Candidate, points: Sequence[Point]) -> float:
    return math.fsum(p.log[choice] for p in points) / len(points)


def _speed(choice: Candidate, best: Candidate, points: Sequence[Point]) -> float:
    return math.exp(_score(best, points) - _score(choice, points))


def _tokens(points: Sequence[Point]) -> str:
    tokens = [str(p.num_tokens) for p in points]
    return ", ".join(tokens) if len(tokens) <= 6 else f"{tokens[0]} ... {tokens[-1]}"


def _check_answers(workloads: Mapping[WorkloadKey, Comparison], points: Sequence[Point]) -> None:
    wrong: dict[int, set[str]] = defaultdict(set)
    for key, workload in workloads.items():
        if workload.wrong:
            wrong[key.num_tokens].update(map(str, workload.wrong))
    hopeless = sorted(set(wrong) - {point.num_tokens for point in points})
    if hopeless:
        named = "; ".join(f"T = {t}: {', '.join(sorted(wrong[t]))}" for t in hopeless)
        raise ValueError(f"wrong answers and no right one at {named}; mend that, or leave these records out")


def preferred_among(prefer: str | None, known: Collection[Candidate]) -> frozenset[Candidate]:
    """The candidates that ``prefer`` names, a backend or a candidate; ValueError if it names none of them."""
    if prefer is None:
        return frozenset()
    # As text: a candidate read from text has strings where the configuration may have numbers.
    text = str(Candidate.parse(prefer))
    chosen = frozenset(choice for choice in known if text in (str(choice), choice.backend))
    if not chosen:
        names = ", ".join(sorted({str(choice) for choice in known}))
        raise ValueError(f"prefer: expected a backend or candidate of the records ({names}), got {prefer!r}")
    return chosen


def _environment(records: Sequence[Measured]) -> dict[str, str]:
    values: dict[str, set[str]] = defaultdict(set)
    values["timing"] = {record.timing for record in records}
    for environment in {id(record.environment): record.environment for record in records}.values():
        for name, value in environment.items():
            if value is not None:
                values[name].add(str(value))
    rules = {str(r.correctness.rule or 1) for r in records if r.status == "passed" and r.correctness is not None}
    if rules - {"1"}:  # policies of records that name none stay as they are, to the byte
        values[GATE_RULE] = rules
    return {
        name: " | ".join(sorted(found)) if len(found) <= 4 else f"{len(found)} different values"
        for name, found in values.items()
    }
