"""Which candidate runs: a pure function of policy, problem, device, number of tokens T and refusals.

The order, here and nowhere else:

1. An explicit choice of the caller (`explicit`). It never falls back: if it is refused, that is an error.
2. The choice of the policy's regime that holds T.
3. The policy's default.
4. The first supported one of the policy's other candidates, in the policy's order.
5. The first supported one of ``fallback_order``. Nothing of it was measured here, so that a policy comes before it.
6. `NoBackendError`, with every reason of every candidate.

Without a policy, 5 is the first step after 1.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..candidate import BackendUnsupportedError, Candidate
from ..device import DeviceKey
from ..problem import MoEProblem
from .schema import Evidence, Interval, Policy, Regime, expected_regret

Source = Literal["explicit", "regime", "default", "fallback", "unmeasured", "no_policy"]

# Why each candidate can't run; missing or empty means that it can.
Refusals = Mapping[Candidate, Sequence[str]]


class NoBackendError(RuntimeError):
    """Nothing can run; the message lists every candidate with every reason why not."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What runs at one T, and why.

    Attributes
    ----------
    choice
        What runs.
    num_tokens
        T.
    regime
        Bounds of the policy's regime that holds T, whether or not its choice runs; ``None`` if there is none.
    source
        The step of the order that took the choice.
    reasons
        Each step tried, and why it was taken or passed over.
    evidence
        The measurements of that regime; outside of all, those that belong to none.
    expected_regret
        Mean over the evidence of the choice's slowdown - 1; ``None`` where it wasn't measured.
    """

    choice: Candidate
    num_tokens: int
    regime: Interval | None
    source: Source
    reasons: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    expected_regret: float | None

    def to_dict(self) -> dict[str, Any]:
        """The decision as a JSON object."""
        regime = None if self.regime is None else {"min_tokens": self.regime[0], "max_tokens": self.regime[1]}
        return {
            "backend": self.choice.backend,
            "config": dict(self.choice.config),
            "regime": regime,
            "source": self.source,
            "num_tokens": self.num_tokens,
            "reasons": list(self.reasons),
            "evidence": [evidence.model_dump(mode="json") for evidence in self.evidence],
            "expected_regret": self.expected_regret,
        }


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring T, from ``first`` to ``last`` (``None``: all above), for which the decision is the same."""

    first: int
    last: int | None
    decision: Decision


class DecisionTable:
    """The decisions for every T, as `resolve` makes them: ``decisions[i]`` from ``starts[i]`` on.

    Decided once for each interval in which no regime begins or ends; asking only bisects, so that a call can afford it.

    Attributes
    ----------
    policy, where
        What the decisions are of, if there is one, and where it comes from, for people.
    refusals
        Why candidates were passed over, or would have been.
    """

    __slots__ = ("policy", "where", "refusals", "_starts", "_decisions")

    def __init__(
        self,
        starts: Sequence[int],
        decisions: Sequence[Decision],
        policy: Policy | None = None,
        where: str = "",
        refusals: Refusals | None = None,
    ) -> None:
        self.policy, self.where, self.refusals = policy, where, refusals or {}
        self._starts, self._decisions = tuple(starts), tuple(decisions)

    def choice(self, num_tokens: int) -> Candidate:
        """What runs at ``num_tokens``; ValueError if that is no integer of at least 0."""
        return self._at(num_tokens).choice

    def decision(self, num_tokens: int) -> Decision:
        """What runs at ``num_tokens``, with its trace; ValueError as `choice`."""
        at = self._at(num_tokens)
        return at if at.num_tokens == num_tokens else replace(at, num_tokens=num_tokens)

    def _at(self, num_tokens: int) -> Decision:
        check_num_tokens(num_tokens)
        return self._decisions[bisect_right(self._starts, num_tokens) - 1]

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What is decided at each of `starts`."""
        return self._decisions

    @property
    def starts(self) -> tuple[int, ...]:
        """The T at which the decision may change, sorted, 0 the first."""
        return self._starts

    def spans(self) -> tuple[Span, ...]:
        """All T from 1 on, cut where a regime of the policy starts or has ended."""
        starts = sorted({max(start, 1) for start in self._starts})
        ends = [start - 1 for start in starts[1:]]
        return tuple(Span(a, b, self.decision(a)) for a, b in zip(starts, [*ends, None], strict=True))

    @property
    def choices(self) -> tuple[Candidate, ...]:
        """Every choice that `choice` can return, each once: what a layer has to prepare."""
        return tuple(dict.fromkeys(decision.choice for decision in self._decisions))


def resolve(
    policy: Policy | None,
    problem: MoEProblem,
    device: DeviceKey,
    refusals: Refusals | None = None,
    fallback_order: Sequence[Candidate] = (),
    note: str | None = None,
    where: str = "",
) -> DecisionTable:
    """Decide once for every T. Arguments and errors are those of `choose`; ``where`` is the table's."""
    # The decision changes only where a regime starts or has ended: each such T, and whether a regime holds it.
    starts = {0: policy is None}
    for regime in policy.regimes if policy is not None else ():
        starts[regime.min_tokens] = True
        if regime.max_tokens is not None:
            starts[regime.max_tokens + 1] = False
    at = functools.partial(choose, policy, problem, device, refusals=refusals, fallback_order=fallback_order, note=note)
    decisions: list[Decision] = []
    outside: Decision | None = None  # the same wherever no regime holds T: its regret is over all that is in none
    for start, inside in starts.items():
        if inside:
            decisions.append(at(start))
        else:
            outside = outside or at(start)
            decisions.append(replace(outside, num_tokens=start))
    return DecisionTable(list(starts), decisions, policy, where, refusals)


def explicit(choice: Candidate, num_tokens: int, refusals: Refusals | None = None) -> Decision:
    """The decision for a choice that the caller named; it never falls back.

    Raises
    ------
    ValueError
        If ``num_tokens`` is no integer of at least 0.
    BackendUnsupportedError
        If the choice is refused, with the reasons.
    """
    check_num_tokens(num_tokens)
    refused = (refusals or {}).get(choice)
    if refused:
        raise BackendUnsupportedError(choice, refused)
    return Decision(choice, num_tokens, None, "explicit", (f"explicit: {choice} taken, as asked for",), (), None)


def choose(
    policy: Policy | None,
    problem: MoEProblem,
    device: DeviceKey,
    num_tokens: int,
    *,
    refusals: Refusals | None = None,
    fallback_order: Sequence[Candidate] = (),
    note: str | None = None,
) -> Decision:
    """What runs at ``num_tokens``, by the order in this module's description.

    Parameters
    ----------
    policy
        The policy for this problem and device, or ``None`` if there is none.
    problem, device
        What is computed, and where.
    num_tokens
        T, 0 or more.
    refusals
        Why each candidate can't run here; those missing or with an empty list can.
    fallback_order
        What to try where nothing else can run, the best hope first.
    note
        What there is to say of the policy itself; the first reason of every decision by it.

    Raises
    ------
    ValueError
        ``num_tokens`` is no integer of at least 0, or the policy is for another problem or device.
    NoBackendError
        Every candidate is refused.
    """
    check_num_tokens(num_tokens)
    refusals = refusals or {}
    regime: Regime | None = None
    evidence: Sequence[Evidence] = ()
    reasons = [] if note is None else [note]
    if policy is None:
        reasons.append(f"policy: none for {device.name}")
    elif policy.device != device.name or policy.problem != problem:
        raise ValueError(
            f"policy: expected one for {device.name} with {problem}, got one for {policy.device} with {policy.problem}"
        )
    else:
        regime = policy.regime_of(num_tokens)
        evidence = policy.default_evidence if regime is None else regime.evidence
        if regime is None:
            reasons.append("policy regimes: none holds this T")
    tried: dict[Candidate, None] = {}
    for source, choice, why in _steps(policy, regime, fallback_order):
        if choice in tried:
            continue
        tried[choice] = None
        step = f"policy regime {regime.label}" if source == "regime" and regime is not None else _STEP_NAMES[source]
        if refused := refusals.get(choice):
            reasons.append(f"{step}: {choice} passed over, as it can't run here: {'; '.join(refused)}")
            continue
        reasons.append(f"{step}: {choice} taken: {why}")
        bounds = None if regime is None else regime.bounds
        regret = (
            regime.expected_regret if source == "regime" and regime is not None else expected_regret(choice, evidence)
        )
        return Decision(choice, num_tokens, bounds, source, tuple(reasons), tuple(evidence), regret)
    raise NoBackendError(_nothing(device, list(tried), refusals))


_STEP_NAMES: Mapping[Source, str] = {
    "default": "policy default",
    "fallback": "next of the policy's candidates",
    "unmeasured": "beyond the policy",
    "no_policy": "order without a policy",
}


def _steps(
    policy: Policy | None, regime: Regime | None, fallback_order: Sequence[Candidate]
) -> Iterable[tuple[Source, Candidate, str]]:
    if policy is None:
        for choice in fallback_order:
            yield "no_policy", choice, "the first that can run"
        return
    if regime is not None:
        note = " (learned from published speedups)" if regime.verified == "published" else ""
        yield "regime", regime.choice, regime.reason + note
    yield "default", policy.default, policy.default_reason
    for choice in policy.candidates:
        yield "fallback", choice, "the first in the policy's order that can run"
    for choice in fallback_order:
        yield "unmeasured", choice, "the first that can run, never measured here"


def _nothing(device: DeviceKey, candidates: Sequence[Candidate], refusals: Refusals) -> str:
    if not candidates:
        return f"no backend can run on {device.name}: no policy and no candidates were given"
    lines = [f"  {choice}: {'; '.join(refusals[choice])}" for choice in candidates]
    return "\n".join([f"no backend can run on {device.name}:", *lines])


def check_num_tokens(num_tokens: int) -> None:
    """ValueError for what is no number of tokens: an integer of at least 0."""
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 0:
        raise ValueError(f"num_tokens: expected an integer of at least 0, got {num_tokens!r}")
