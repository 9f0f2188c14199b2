"""``hybrid-moe explain``: what a policy runs, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from .. import backends
from ..candidate import Candidate
from ..device import DeviceKey
from ..learn.report.letters import assign_letters
from ..measure.sweep.plan import MAX_TOKENS
from ..measure.workloads import DEEPSEEK_V3
from ..policy.resolve import DEFAULT_ORDER
from ..policy.schema import Policy
from ..policy.select import Decision, DecisionTable, Refusals, resolve
from ..policy.versions import installed_versions, mismatch
from ..problem import MoEProblem
from . import view
from .common import GivenPolicy, Json, PolicyPath, out, policy_or_nearest, print_json, this_device
from .problem import ProblemOptions, takes_problem

SUMMARY = "What a policy runs, and why"
EXAMPLES = (
    "hybrid-moe explain --device nvidia_h100_80gb_hbm3 --num-tokens 300",
    "hybrid-moe explain --device b200",
)


@takes_problem
def explain(
    *,
    device: Annotated[
        str | None, typer.Option(help="A GPU with a policy, as nvidia_b200 or b200. [default: this machine's]")
    ] = None,
    num_tokens: Annotated[int | None, typer.Option(help="T; without it, every regime is shown.")] = None,
    policy: PolicyPath = None,
    here: Annotated[bool, typer.Option("--here", help="Pass over what this machine can't run.")] = False,
    sizes: ProblemOptions,
    as_json: Json = False,
) -> None:
    """Say what a device's policy runs, and why.

    Speaks of the policy, whatever is installed here; --here applies what this machine can and can't run.
    """
    given = GivenPolicy.at(policy)
    problem = sizes.problem(given.problem(DEEPSEEK_V3))
    found, where, note = policy_or_nearest(device, problem, given)
    this = DeviceKey.of(this_device())
    refusals = _refusals(found, problem, this) if here or found.device == this.name else {}
    differs = mismatch(found, this.name, refusals, installed_versions()) if refusals else None
    table = resolve(
        found,
        problem,
        DeviceKey(found.device),
        refusals=refusals if here else {},
        fallback_order=DEFAULT_ORDER,
        note=note,
    )
    if num_tokens is not None:
        decision = table.decision(num_tokens)
        if as_json:
            print_json(decision.to_dict())
        else:
            _print_decision(decision, found, where)
    elif as_json:
        data = found.model_dump(mode="json")
        names = ("device", "definition", "default", "default_reason", "regimes")
        regrets = ("training_regret", "leave_one_out_regret")
        if note is not None:  # another problem's: nothing of it was measured for this one
            data |= dict.fromkeys(regrets)
            data["regimes"] = [regime | {"verified": "not_measured"} for regime in data["regimes"]]
        # How it differs from this machine; null where it is of another one.
        compared = None if differs is None else asdict(differs)
        print_json({name: data[name] for name in (*names, *regrets)} | {"mismatch": compared, "where": where})
    else:
        _print_regimes(found, where, table, here, borrowed=note is not None)
    if differs is not None and not as_json:
        for message in differs.messages("this policy here"):
            out.print(f"[yellow]{escape(message)}[/]", soft_wrap=True)


def _refusals(policy: Policy, problem: MoEProblem, key: DeviceKey) -> Refusals:
    return {c: backends.not_supported_reasons(problem, key, c) for c in (*policy.candidates, *DEFAULT_ORDER)}


# Of the GPUs that there may be a policy for on a machine without one, by a word of their names.
_CAPABILITIES = {
    **dict.fromkeys(("h100", "h200", "h800", "h20", "gh200"), (9, 0)),
    **dict.fromkeys(("b200", "gb200"), (10, 0)),
    **dict.fromkeys(("b300", "gb300"), (10, 3)),
}


def _kernels(decision: Decision, policy: Policy) -> str | None:
    """Which kernels the choice runs as; ``None`` if that isn't known here."""
    this = DeviceKey.of(this_device())
    words = policy.device.split("_")
    capability = next((_CAPABILITIES[word] for word in words if word in _CAPABILITIES), None)
    if this.name == policy.device:
        capability = this.capability
    backend = backends.BACKENDS.get(decision.choice.backend)
    if backend is None or capability is None:
        return None
    return backend.kernels(policy.problem, capability, decision.choice.config, decision.num_tokens)


def _print_decision(decision: Decision, policy: Policy, where: str) -> None:
    out.print(f"[bold]T = {decision.num_tokens}[/] on {policy.device}: [bold green]{escape(str(decision.choice))}[/]")
    regret = view.percent(decision.expected_regret)
    out.print(f"regime {view.regime_text(decision)}, expected regret {regret}")
    out.print(escape(where), soft_wrap=True)
    for reason in decision.reasons:
        out.print(f"  - {escape(reason)}")
    if kernels := _kernels(decision, policy):
        out.print(f"kernels: {kernels}")
    if decision.evidence:
        out.print("\nSlowdown against the fastest at each T measured:")
        out.print(view.evidence(decision.evidence, decision.choice))


def _print_regimes(policy: Policy, where: str, table: DecisionTable, here: bool, *, borrowed: bool) -> None:
    out.print(f"[bold]{policy.device}[/], {policy.definition}\n{escape(where)}", soft_wrap=True)
    runs_here: dict[str, Candidate] | None = None
    if here:
        runs_here = {regime.label: table.choice(regime.min_tokens) for regime in policy.regimes}
        runs_here["otherwise"] = table.choice(policy.first_outside)
    letters = assign_letters([*policy.candidates, *table.choices])
    evidence = [e.num_tokens for part in (policy.default_evidence, *(r.evidence for r in policy.regimes)) for e in part]
    out.print(view.strip(table.spans(), letters, out.width, max(evidence, default=MAX_TOKENS)))
    out.print(view.regimes(policy, runs_here, borrowed=borrowed, legend=False))
    out.print(view.regrets(policy, borrowed=borrowed))
