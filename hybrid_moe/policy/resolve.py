"""What a call may run: the policy that speaks for it, resolved against what can run here."""

from __future__ import annotations

import warnings
from pathlib import Path

from .. import backends
from ..candidate import BackendUnsupportedError, Candidate
from ..device import DeviceKey
from ..problem import MoEProblem
from .nearest import nearest, scaled
from .schema import Policy
from .select import DecisionTable, Refusals, resolve
from .store import find_policy, how_to_make_one, known_policies, warn_once
from .versions import PolicyMismatchWarning, installed_versions, mismatch

# What runs where no policy speaks, or nothing of it can run: the first of these that is supported.
DEFAULT_ORDER: tuple[Candidate, ...] = tuple(backends.complete(Candidate(name)) for name in backends.BACKENDS)
# On the CPU the reference: the kernels run there in Triton's interpreter alone, for tests.
CPU_ORDER: tuple[Candidate, ...] = DEFAULT_ORDER[::-1]
REFERENCE = "torch_reference"


def as_candidate(backend: str | Candidate) -> Candidate:
    """A full `Candidate` from what a caller gave as ``backend=``; ValueError for an unknown backend."""
    if not isinstance(backend, str | Candidate):
        raise TypeError(f"backend: expected a name, 'name[key=value]' or a Candidate, got {backend!r}")
    return backends.complete(Candidate.parse(backend) if isinstance(backend, str) else backend)


def decision_table(
    problem: MoEProblem,
    device: DeviceKey,
    policy: Policy | str | Path | None = None,
    *,
    routed: bool = False,
    refused: Refusals | None = None,
    stacklevel: int = 3,
) -> DecisionTable:
    """Find the policy and resolve it against what can run here.

    A problem without a policy gets the regimes of the nearest one that has one on this device, and its
    decisions say so. For a layer that is ``routed``, whose experts are chosen before the call, backends that choose
    them themselves can't run. ``refused`` are further reasons against candidates, given with all of their options.

    Warns where a GPU has no policy for the problem, and says how to get one (``stacklevel`` is that of the warning's
    place). Warns once in a process with `PolicyMismatchWarning` where a policy was measured on something else than
    there is here, or none of its candidates can run; and where the reference is left to run what it is too slow for.
    """
    if not isinstance(policy, Policy | str | Path | None):
        raise TypeError(f"policy: expected a Policy, a file or a folder, got {policy!r}")
    order = CPU_ORDER if device.name == "cpu" else DEFAULT_ORDER
    found, where, note = policy_or_nearest(problem, device.name, policy)
    if (found is None or note is not None) and device.name != "cpu":
        instead = note or f"the first supported of {', '.join(map(str, order))} runs at every token count"
        warnings.warn(
            f"no policy for device {device.name} and problem {problem.definition}: {instead}. "
            f"{how_to_make_one(problem)}",
            stacklevel=stacklevel,
        )
    candidates = [*(found.candidates if found else ()), *order]
    refusals = {choice: backends.not_supported_reasons(problem, device, choice) for choice in candidates}
    if routed:
        refusals = {c: (*reasons, *backends.routed_reasons(problem, c)) for c, reasons in refusals.items()}
    if refused:
        refusals = {c: (*reasons, *refused.get(backends.complete(c), ())) for c, reasons in refusals.items()}
    while True:
        table = resolve(found, problem, device, refusals=refusals, fallback_order=order, note=note, where=where)
        # Some refuse only when they are prepared, as a library that is installed but doesn't load.
        late = {
            choice: reasons for choice in table.choices if (reasons := _refusal_to_prepare(problem, device, choice))
        }
        if not late:
            break
        refusals |= late
    if found is not None:
        differs = mismatch(found, device.name, refusals, installed_versions())
        for message in differs.messages(where):
            warn_once(message, PolicyMismatchWarning)
    for decision in table.decisions:
        if decision.source == "unmeasured":
            warn_once(
                f"{where}: none of its candidates can run here. {decision.choice} runs instead, which nobody measured "
                f"on {device.name}: `hybrid-moe regenerate` does",
                PolicyMismatchWarning,
            )
        if decision.choice.backend == REFERENCE:
            for remark in backends.BACKENDS[REFERENCE].remarks(problem, device, decision.choice.config):
                warn_once(f"{REFERENCE} runs on {device.name}: {remark}", UserWarning)
    return table


def policy_or_nearest(
    problem: MoEProblem,
    device: str,
    policy: Policy | str | Path | None = None,
    *,
    what: str = "the policy given",
) -> tuple[Policy | None, str, str | None]:
    """As `find_policy`; a problem that has none gets that of the nearest one on this device, scaled to it.

    Returns
    -------
    policy, where
        As `find_policy` has them; ``None`` if the device has no policy at all.
    note
        For people: whose regimes they are; ``None`` where the policy is the problem's own or there is none.
    """
    found, where = find_policy(problem, device, policy, what=what)
    if found is not None:
        return found, where, None
    known = [(path, policy) for path, policy in known_policies() if policy.device == device]
    near = nearest(problem, [policy for _, policy in known])
    if near is None:
        return None, where, None
    path = next(path for path, each in known if each is near)
    note = (
        f"nothing was measured for {problem.definition}: it takes the regimes of the nearest problem, "
        f"{near.definition} ({path}), scaled by rows per expert"
    )
    return scaled(near, problem), note, note


def _refusal_to_prepare(problem: MoEProblem, device: DeviceKey, choice: Candidate) -> tuple[str, ...]:
    try:
        backends.prepare(problem, device, choice)
    except BackendUnsupportedError as error:
        return tuple(error.reasons)
    return ()
