"""``hybrid-moe regenerate``: measure, learn, verify and install the policy of this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import ValidationError
from rich.markup import escape

from ..learn.learner import preferred_among
from ..learn.regenerate import Observer, Regeneration, Result, candidates_of, failures_of, loads_of
from ..measure.sweep.gpu import GpuBench
from ..measure.sweep.plan import MAX_TOKENS, Plan
from ..policy.schema import GraphOrEager, LearnerOptions, describe
from .common import Json, err, out, print_json, steps
from .learn import print_learned
from .problem import ProblemOptions, takes_problem
from .verify import print_findings
from .watch import watching

SUMMARY = "Measure and install this GPU's policy"
EXAMPLES = (
    "hybrid-moe regenerate --quick",
    "hybrid-moe regenerate --model glm-4.5-air",
)


# To stay under 8 and 20 minutes of GPU time with the start of the processes and the verification.
QUICK_MINUTES, FULL_MINUTES = 6.0, 18.0


@takes_problem
def regenerate(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer T: a useful policy in less time.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes of measuring, all runs together. [default: 18, with --quick 6]"),
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="Where the measurements are kept. [default: among your own data]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="[default: your policies, which come before the shipped ones]")
    ] = None,
    install: Annotated[
        bool, typer.Option("--install/--no-install", help="Without it the policy stays next to the records.")
    ] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again; earlier records stay under another name.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Measure again what failed, hung or was refused in earlier runs.")
    ] = False,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Backend, or name[key=value]; may be repeated. [default: all that can run]"),
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(help="Load to measure; may be repeated. [default: uniform, zipf, concentrated]"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest T to measure.")] = MAX_TOKENS,
    copies: Annotated[int, typer.Option(min=1, help="Weight copies in rotation, 1.4 GB each.")] = 3,
    time_limit: Annotated[
        float, typer.Option(min=1, help="Seconds for one candidate at one workload before it counts as hung.")
    ] = 120,
    tie_margin: Annotated[float, typer.Option(help="Share of the speed that a tie may cost.")] = 0.03,
    prefer: Annotated[str | None, typer.Option(help="Backend, or name[key=value], that ties go to.")] = None,
    max_gap: Annotated[float, typer.Option(help="Between T whose ratio is larger there is no evidence.")] = 2.0,
    timing: Annotated[GraphOrEager, typer.Option(help="What the policy is for; both are measured.")] = "cuda_graph",
    sizes: ProblemOptions,
    as_json: Json = False,
) -> None:
    """Make the policy of this machine's GPU: measure, learn, verify, install.

    Each result is checked before it is timed. It may be stopped at any point; started again, it goes on where it was.
    Exit code 1 if the policy fails its verification; it isn't installed then.
    """
    problem = sizes.problem()
    try:
        options = LearnerOptions.model_validate(
            {"tie_margin": tie_margin, "prefer": prefer, "max_gap": max_gap, "timing": timing}
        )
    except ValidationError as error:
        raise ValueError(describe(error)) from error
    candidates = candidates_of(candidate)
    preferred_among(prefer, candidates)
    loads, left_out = loads_of(problem, routing)
    plan = Plan.make(problem, candidates, quick=quick, loads=loads, max_tokens=max_tokens, timing=timing)
    if output is not None and not install:
        raise ValueError("--output says where to install, --no-install not to: leave one of them out")
    if not torch.cuda.is_available():
        raise ValueError(
            "regenerate measures on an NVIDIA GPU, and torch finds none: run it on the machine that the policy is for "
            "(`hybrid-moe doctor` says what this one has)"
        )
    for load, reason in left_out.items():
        err.print(f"routing load {load} is left out: {escape(reason)}", soft_wrap=True)
    if minutes is None:
        minutes = QUICK_MINUTES if quick else FULL_MINUTES
    task = Regeneration(
        plan,
        options,
        budget_s=60 * minutes,
        limit_s=time_limit,
        records=records,
        output=output,
        install=install,
        fresh=fresh,
        retry=retry,
    )
    try:
        result = task.perform(GpuBench(problem, copies), observer=Shown())
    except KeyboardInterrupt:
        err.print("stopped; what was measured is kept, and the same command (without --fresh) goes on")
        raise typer.Exit(130) from None
    if as_json:
        print_json(result.to_dict())
    else:
        print_result(result)
    if not result.verified:
        raise typer.Exit(1)


class Shown(Observer):
    """Tells of it on stderr."""

    def say(self, message: str) -> None:
        """As it is."""
        err.print(escape(message), soft_wrap=True)

    def warn(self, message: str) -> None:
        """In yellow."""
        err.print(escape(message), style="yellow", soft_wrap=True)

    sweep = staticmethod(watching)
    verification = staticmethod(steps)


def print_result(result: Result) -> None:
    """Print what was learned, verified, refused, and where it is."""
    print_learned(result.policy)
    out.print()
    print_findings(result.findings)
    for choice, reason in result.left_out.items():
        out.print(f"left out: {escape(f'{choice}: {reason}')}", soft_wrap=True)
    failures = dict.fromkeys(
        f"{r.choice} at T = {r.num_tokens} {r.routing}: {r.status}: {r.reason}"
        for r in failures_of(result.outcome.records)
    )
    for failure in failures:
        out.print(escape(failure), style="yellow", soft_wrap=True)
    outcome = result.outcome
    out.print(
        f"{len(outcome.records)} records in {escape(str(result.records))}, {outcome.added} of them new; measured for "
        f"{outcome.spent_s / 60:.1f} minutes in all",
        soft_wrap=True,
    )
    if outcome.out_of_time:
        out.print("the minutes are spent and there is more to look at: more --minutes go on from here")
    where = escape(str(result.path))
    if result.installed:
        out.print(f"[green]verified[/], written to {where}", soft_wrap=True)
    elif result.verified:
        out.print(f"[green]verified[/], not installed: {where}", soft_wrap=True)
    else:
        out.print(f"[bold red]failed its verification[/], not installed: it is kept as {where}", soft_wrap=True)
