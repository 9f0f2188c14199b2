"""Whether a policy file still says the same, and its choices are right where they run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .. import backends
from ..candidate import Candidate
from ..device import DeviceKey
from ..measure.bench import poisoned_output
from ..measure.single import call_fused_moe, checked
from ..measure.workloads import LayerWeights, Workload, make_inputs, random_weights
from ..policy.schema import Policy
from ..policy.store import load_policy, save_policy

Status = Literal["verified", "unverified", "failed"]
# Given the number of steps: what is called with each step's name as the step begins.
Progress = Callable[[int], AbstractContextManager[Callable[[str], None]]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one part of the policy."""

    what: str
    choice: str
    num_tokens: int | None
    status: Status
    reason: str


@contextlib.contextmanager
def silent(total: int) -> Iterator[Callable[[str], None]]:
    """A `Progress` that shows nothing."""
    yield lambda step: None


def verify_policy(policy: Policy, progress: Progress = silent) -> list[Finding]:
    """All checks of a policy: that it survives a file, and each part of it run where that can be.

    What can't run on this machine is unverified, not failed.
    """
    return [_same_policy(policy), *_runs(policy, progress)]


def _same_policy(policy: Policy) -> Finding:
    """Write the policy and read it back: what is decided depends on nothing else in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.json"
        save_policy(policy, path)
        again = load_policy(path)
    if again != policy:
        names = [name for name in Policy.model_fields if getattr(again, name) != getattr(policy, name)]
        return Finding("file", "", None, "failed", f"read back, it differs in {', '.join(names)}")
    regimes = len(policy.regimes)
    reason = f"read back, it is the same, with {regimes} regimes; its records passed by {policy.gate_rule}"
    return Finding("file", "", None, "verified", reason)


def _parts(policy: Policy) -> list[tuple[str, Candidate, list[int]]]:
    """Each regime and the default, with the least and the largest T to run it at."""
    parts = []
    for regime in policy.regimes:
        measured = [e.num_tokens for e in regime.evidence] or [max(1, regime.min_tokens)]
        parts.append((f"regime {regime.label}", regime.choice, sorted({min(measured), max(measured)})))
    # Where the regimes hold every T, the default still runs what they can't.
    measured = [e.num_tokens for e in policy.default_evidence] or [max(1, policy.first_outside)]
    parts.append(("default", policy.default, sorted({min(measured), max(measured)})))
    return parts


def _runs(policy: Policy, progress: Progress) -> list[Finding]:
    on_gpu = policy.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    key = DeviceKey.of(device)
    parts = _parts(policy)
    findings: list[Finding] = []
    weights: LayerWeights | None = None
    with progress(sum(len(tokens) for _, _, tokens in parts)) as begin:
        for what, choice, tokens in parts:
            if unknown := _unknown(choice):
                findings.append(Finding(what, str(choice), None, "failed", unknown))
                continue
            if key.name != policy.device:
                reason = f"this machine's device is {key.name}"
                findings.append(Finding(what, str(choice), None, "unverified", reason))
                continue
            refused = backends.not_supported_reasons(policy.problem, key, choice)
            if refused:
                findings.append(Finding(what, str(choice), None, "unverified", "; ".join(refused)))
                continue
            for num_tokens in tokens:
                begin(f"{what}: {choice} at T = {num_tokens}")
                weights = random_weights(policy.problem, device) if weights is None else weights
                findings.append(_run(policy, what, choice, num_tokens, weights))
    return findings


def _unknown(choice: Candidate) -> str:
    """Why nothing of that name can run anywhere; empty if something can."""
    if choice.backend not in backends.BACKENDS:
        return f"no backend is called {choice.backend!r}; known: {', '.join(backends.BACKENDS)}"
    backend = backends.BACKENDS[choice.backend]
    known = [Candidate(choice.backend, config) for config in backend.configs()]
    if backends.complete(choice) not in known:
        return f"{choice} is no configuration of it; known: {', '.join(map(str, known))}"
    return ""


def _run(policy: Policy, what: str, choice: Candidate, num_tokens: int, weights: LayerWeights) -> Finding:
    inputs = make_inputs(Workload(num_tokens), policy.problem, weights)
    output = poisoned_output(inputs, policy.problem)
    call_fused_moe(inputs, policy.problem, output, choice)
    result = checked(output, inputs, policy.problem, choice)
    figures = f"relative L2 {result.relative_l2:.4f}, cosine {result.cosine:.5f}, matched {result.matched_ratio:.4f}"
    if result.passed:
        return Finding(what, str(choice), num_tokens, "verified", figures)
    return Finding(what, str(choice), num_tokens, "failed", "; ".join(result.failures))
