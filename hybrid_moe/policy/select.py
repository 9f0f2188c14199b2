"""Which candidate runs: a pure function of policy, problem, device, number of tokens T and refusals.

The order, here and nowhere else:

1. An explicit choice of the caller (`explicit`). It never falls back: if it is refused, that is an error.
2. The choice of the policy's regime that holds T.
3. The policy's default.
4. The first supported one of the policy's other candidates, in the policy's order.
5. `NoBackendError`, with every reason of every candidate.

Without a policy, the first supported candidate of ``fallback_order`` runs instead of 2 to 4. With one, that order is
never used: nothing runs that was not measured on this device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..candidate import BackendUnsupportedError, Candidate
from ..device import DeviceKey
from ..problem import MoEProblem
from .schema import Evidence, Interval, Policy, Regime, expected_regret

Source = Literal["explicit", "regime", "default", "fallback", "no_policy"]

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
    """The decisions of one policy, problem, device and set of refusals for every T; made by `resolve`.

    `choice` only bisects, so that a call can afford it; `decision` says why as well.
    """

    __slots__ = ("_policy", "_problem", "_device", "_refusals", "_fallback_order", "_note", "_starts", "_choices")

    def __init__(
        self,
        policy: Policy | None,
        problem: MoEProblem,
        device: DeviceKey,
        refusals: Refusals | None = None,
        fallback_order: Sequence[Candidate] = (),
        note: str | None = None,
    ) -> None:
        self._policy, self._problem, self._device = policy, problem, device
        self._refusals = {choice: tuple(reasons) for choice, reasons in (refusals or {}).items()}
        self._fallback_order = tuple(fallback_order)
        self._note = note
        # The decision changes only where a regime starts or has ended.
        starts = {0}
        for regime in policy.regimes if policy is not None else ():
            starts.add(regime.min_tokens)
            if regime.max_tokens is not None:
                starts.add(regime.max_tokens + 1)
        self._starts = sorted(starts)
        self._choices = [self.decision(start).choice for start in self._starts]

    def choice(self, num_tokens: int) -> Candidate:
        """What runs at ``num_tokens``; ValueError if it is negative."""
        if num_tokens < 0:
            raise ValueError(_negative(num_tokens))
        return self._choices[bisect_right(self._starts, num_tokens) - 1]

    def decision(self, num_tokens: int) -> Decision:
        """What runs at ``num_tokens``, with its trace; ValueError if it is negative."""
        return choose(
            self._policy,
            self._problem,
            self._device,
            num_tokens,
            refusals=self._refusals,
            fallback_order=self._fallback_order,
            note=self._note,
        )

    @property
    def starts(self) -> tuple[int, ...]:
        """The T at which the decision may change, sorted, 0 the first."""
        return tuple(self._starts)

    def spans(self) -> tuple[Span, ...]:
        """All T from 1 on, cut where a regime of the policy starts or has ended."""
        starts = sorted({max(start, 1) for start in self._starts})
        ends = [start - 1 for start in starts[1:]]
        return tuple(Span(a, b, self.decision(a)) for a, b in zip(starts, [*ends, None], strict=True))

    @property
    def choices(self) -> tuple[Candidate, ...]:
        """Every choice that `choice` can return, each once: what a layer has to prepare."""
        return tuple(dict.fromkeys(self._choices))


def resolve(
    policy: Policy | None,
    problem: MoEProblem,
    device: DeviceKey,
    refusals: Refusals | None = None,
    fallback_order: Sequence[Candidate] = (),
    note: str | None = None,
) -> DecisionTable:
    """Decide once for every T. Arguments and errors are those of `choose`."""
    return DecisionTable(policy, problem, device, refusals, fallback_order, note)


def explicit(choice: Candidate, num_tokens: int, refusals: Refusals | None = None) -> Decision:
    """The decision for a choice that the caller named; it never falls back.

    Raises
    ------
    ValueError
        If ``num_tokens`` is negative.
    BackendUnsupportedError
        If the choice is refused, with the reasons.
    """
    if num_tokens < 0:
        raise ValueError(_negative(num_tokens))
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
        What to try without a policy, the best hope first.
    note
        What there is to say of the policy itself; the first reason of every decision by it.

    Raises
    ------
    ValueError
        ``num_tokens`` is negative, or the policy is for another problem or device.
    NoBackendError
        Every candidate is refused.
    """
    if num_tokens < 0:
        raise ValueError(_negative(num_tokens))
    refusals = refusals or {}
    if policy is None:
        return _without_policy(device, num_tokens, refusals, fallback_order)
    if policy.device != device.name or policy.problem != problem:
        raise ValueError(
            f"policy is for {policy.device} with {policy.problem}; one for {device.name} with {problem} is wanted"
        )

    regime = next((r for r in policy.regimes if num_tokens in r), None)
    evidence = policy.default_evidence if regime is None else regime.evidence
    reasons = [] if note is None else [note]
    if regime is None:
        reasons.append(f"policy regimes: none holds T = {num_tokens}")
    tried: set[Candidate] = set()
    for source, choice, why in _steps(policy, regime):
        if choice in tried:
            continue
        tried.add(choice)
        step = f"policy regime {regime.label}" if source == "regime" and regime is not None else _STEP_NAMES[source]
        if refused := refusals.get(choice):
            reasons.append(f"{step}: {choice} passed over, as it can't run here: {'; '.join(refused)}")
            continue
        reasons.append(f"{step}: {choice} taken: {why}")
        bounds = None if regime is None else regime.bounds
        regret = (
            regime.expected_regret if source == "regime" and regime is not None else expected_regret(choice, evidence)
        )
        return Decision(choice, num_tokens, bounds, source, tuple(reasons), evidence, regret)

    unmeasured = [str(c) for c in fallback_order if c not in tried and not refusals.get(c)]
    hint = ""
    if unmeasured:
        hint = (
            f"\nNot measured on {device.name}, but able to run: {', '.join(unmeasured)}; name one as backend=, "
            "or make the policy anew there, with it among the candidates: `hybrid-moe regenerate`"
        )
    others = [c for c in fallback_order if c not in tried and refusals.get(c)]
    raise NoBackendError(_nothing(device, [*policy.candidates, *others], refusals) + hint)


_STEP_NAMES: Mapping[Source, str] = {"default": "policy default", "fallback": "next of the policy's candidates"}


def _steps(policy: Policy, regime: Regime | None) -> Iterable[tuple[Source, Candidate, str]]:
    if regime is not None:
        note = " (verified: seed_only, learned from published speedups)" if regime.verified == "seed_only" else ""
        yield "regime", regime.choice, regime.reason + note
    yield "default", policy.default, policy.default_reason
    for choice in policy.candidates:
        yield "fallback", choice, "the first in the policy's order that can run"


def _without_policy(
    device: DeviceKey, num_tokens: int, refusals: Refusals, fallback_order: Sequence[Candidate]
) -> Decision:
    reasons = [f"policy: none for {device.name}"]
    for choice in fallback_order:
        if refused := refusals.get(choice):
            reasons.append(f"order without a policy: {choice} passed over, as it can't run here: {'; '.join(refused)}")
            continue
        reasons.append(f"order without a policy: {choice} taken, the first that can run")
        return Decision(choice, num_tokens, None, "no_policy", tuple(reasons), (), None)
    raise NoBackendError(_nothing(device, fallback_order, refusals))


def _nothing(device: DeviceKey, candidates: Sequence[Candidate], refusals: Refusals) -> str:
    if not candidates:
        return f"no backend can run on {device.name}: no policy and no candidates were given"
    lines = [f"  {choice}: {'; '.join(refusals[choice])}" for choice in candidates]
    return "\n".join([f"no backend can run on {device.name}:", *lines])


def _negative(num_tokens: int) -> str:
    return f"num_tokens is {num_tokens}; 0 or more is wanted"
