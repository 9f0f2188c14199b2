"""A problem that has no policy: the regimes of the nearest one that has, at the T with as many rows for each expert.

What the speed of a grouped GEMM depends on most is how many rows an expert has: T * top_k / num_experts if routing is
even. Pure: which policies there are, and what can run, is said by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from ..problem import MoEProblem
from .schema import Policy, Regime

_SIZES = ("num_experts", "num_local_experts", "top_k", "hidden_size", "intermediate_size")


def distance(one: MoEProblem, other: MoEProblem) -> float:
    """How far apart two problems are: the sum of the factors between their sizes, as powers of two."""
    return sum(abs(math.log2(getattr(one, name) / getattr(other, name))) for name in _SIZES)


def nearest(problem: MoEProblem, policies: Iterable[Policy]) -> Policy | None:
    """The policy whose problem is nearest, with the same routing method if any has it; the first of equals.

    Routing is little of the layer's time, and the GEMMs are the same behind either method.
    """

    def order(policy: Policy) -> tuple[bool, float]:
        other = policy.problem
        return other.routing_method != problem.routing_method, distance(problem, other)

    return min(policies, key=order, default=None)


def scaled(policy: Policy, problem: MoEProblem) -> Policy:
    """The policy made one for another problem: every T is decided as the T with as many rows for each expert was.

    Nothing of it was measured, so its regimes have neither evidence nor expected regret, and their reasons name the
    problem that they were learned for. ``training_regret`` is still that of the policy it was made of.

    Parameters
    ----------
    policy
        For the same device.
    problem
        What it is wanted for.
    """
    old = policy.problem
    # T of this problem for each T of the policy's.
    factor = Fraction(old.top_k * problem.num_experts, old.num_experts * problem.top_k)
    regimes = []
    for regime in policy.regimes:
        first = math.ceil(regime.min_tokens * factor)
        # Up to the next whole T of the policy's: neighbouring regimes stay neighbours.
        last = None if regime.max_tokens is None else math.ceil((regime.max_tokens + 1) * factor) - 1
        if last is not None and last < first:
            continue  # between two T
        regimes.append(
            Regime(
                min_tokens=first,
                max_tokens=last,
                choice=regime.choice,
                verdict=regime.verdict,
                verified=regime.verified,
                reason=f"of {old.definition} at T = {regime.label}: {regime.reason}",
                expected_regret=None,
                evidence=(),
            )
        )
    fields = {name: getattr(policy, name) for name in Policy.model_fields}
    return Policy(
        **fields
        | {
            "problem": problem,
            "definition": problem.definition,
            "default_reason": f"of {old.definition}: {policy.default_reason}",
            "default_evidence": [],
            "regimes": regimes,
        }
    )
