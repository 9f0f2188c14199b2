"""``hybrid-moe learn``: from benchmark records to a policy file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.markup import escape

from ..files import POLICY, check_outputs, check_target
from ..learn.learner import learn_from_files
from ..measure.readers import Experts
from ..policy.schema import LearnerOptions, Policy, describe
from ..policy.store import policy_path, save_policy, user_policy_dir
from ..problem import problem_of_definition
from . import view
from .common import (
    Json,
    Solutions,
    Where,
    device_named,
    known_devices,
    out,
    print_json,
    solutions_from,
    versions_from,
    warnings_shown,
)
from .table import shortened

SUMMARY = "From benchmark records to a policy file"
EXAMPLES = ("hybrid-moe learn records.jsonl --timing cuda_graph -o policy.json",)


def learn(
    records: Annotated[
        list[Path], typer.Argument(help="Records or flashinfer-bench's traces (JSON Lines), or the published table.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="[default: your policies, which come before the shipped ones]")
    ] = None,
    regimes: Annotated[str, typer.Option(help="auto, or intervals of T: 1-7,14-32,901,10001-")] = "auto",
    tie_margin: Annotated[float, typer.Option(help="Share of the speed that a tie may cost.")] = 0.05,
    prefer: Annotated[str | None, typer.Option(help="Backend, or name[key=value], that ties go to.")] = None,
    max_gap: Annotated[
        float, typer.Option(help="For auto: between T whose ratio is larger there is no evidence.")
    ] = 1.5,
    timing: Annotated[str | None, typer.Option(help="Use these records only: cuda_graph, eager or cupti.")] = None,
    where: Where = None,
    solution: Solutions = None,
    device: Annotated[str | None, typer.Option(help="Slug of the device, where the records have several.")] = None,
    problem: Annotated[str | None, typer.Option(help="Definition name, where the records have several.")] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(min=1, help="Experts of the whole model, where records leave it open, as traces do."),
    ] = None,
    definition: Annotated[
        list[Path] | None,
        typer.Option(help="Definition of flashinfer-bench, whose axes say it. [default: that of the traces' data set]"),
    ] = None,
    gate_first: Annotated[
        bool | None, typer.Option("--gate-first/--up-first", help="Half stored first, where records leave it open.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn a policy from benchmark records.

    The same records and options give the same bytes. The file is written whole or not at all.
    """
    try:
        options = LearnerOptions.model_validate(
            {
                "regimes": regimes,
                "tie_margin": tie_margin,
                "prefer": prefer,
                "max_gap": max_gap,
                "timing": timing,
                "where": versions_from(where),
                "solutions": solutions_from(solution),
            }
        )
    except ValidationError as error:
        raise ValueError(describe(error)) from error
    wanted = None
    if problem is not None:
        known = Experts(num_experts, definition or ()).of(problem, records[0])
        if known is None:
            raise ValueError(
                f"problem is {problem!r}, which leaves open how many experts the model has: say --num-experts"
            )
        wanted = problem_of_definition(problem, num_experts=known, gate_first=bool(gate_first))
    check_outputs({"--output": output}, [*records, *(definition or ())])
    if output is not None:
        check_target(output, POLICY)
    if device is not None:
        device = device_named(device, known_devices())
    with warnings_shown():
        policy = learn_from_files(
            records,
            options,
            wanted,
            device,
            num_experts=num_experts,
            gate_first=gate_first,
            definitions=definition or (),
        )
    path = policy_path(user_policy_dir(), policy.device, policy.problem) if output is None else output
    if path.is_dir():
        raise ValueError(
            f"--output: expected a file, as {policy_path(path, policy.device, policy.problem)}, got the folder {path}"
        )
    save_policy(policy, path)
    if as_json:
        print_json({"path": str(path), "policy": policy.model_dump(mode="json")})
        return
    print_learned(policy)
    out.print(f"\nwritten to {escape(str(path))}", soft_wrap=True)


def print_learned(policy: Policy) -> None:
    """Print what was learned: regimes, reasons and regrets."""
    files = ", ".join(f"{digest.name} ({digest.records} records)" for digest in policy.inputs)
    problem = policy.problem
    shared = f", {problem.num_shared_experts} shared" if problem.num_shared_experts else ""
    experts = f"{problem.num_local_experts} of {problem.num_experts} experts{shared}"
    out.print(f"[bold]{policy.device}[/], {problem.definition} ({experts})\nlearned from {escape(files)}")
    out.print(view.regimes(policy))
    first, omitted, last = shortened(policy.regimes)
    for regime in first:
        out.print(f"  {regime.label}: {escape(regime.reason)}")
    if omitted:
        out.print(f"  ... {omitted} more regimes: `hybrid-moe explain --json` has all of them")
    for regime in last:
        out.print(f"  {regime.label}: {escape(regime.reason)}")
    out.print(f"  otherwise: {escape(str(policy.default))}, {escape(policy.default_reason)}\n")
    out.print(view.regrets(policy))
