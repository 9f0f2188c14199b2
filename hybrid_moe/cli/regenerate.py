"""``hybrid-moe regenerate``: measure, learn, verify and install the policy of this machine's GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError
from rich.markup import escape

from .. import backends
from ..candidate import Choice
from ..learn.learner import learn, preferred_among
from ..measure.records import BenchRecord, read_with_digest
from ..measure.sweep import journal
from ..measure.sweep import run as sweeping
from ..measure.sweep.gpu import GpuBench
from ..measure.sweep.plan import LOADS, MAX_TOKENS, Plan, Results, middle_rank
from ..measure.sweep.process import Bench, Identity, Worker
from ..measure.workloads import DEEPSEEK_V3, ROUTING_LOADS, RoutingLoad, Workload, make_routing
from ..policy.schema import (
    GraphOrEager,
    LearnerOptions,
    Policy,
    PolicyError,
    describe,
    load_policy,
    policy_path,
    save_policy,
    user_policy_dir,
)
from ..policy.select import NoBackendError
from ..problem import MoEProblem
from .common import (
    GateFirst,
    HiddenSize,
    IntermediateSize,
    Json,
    Model,
    NGroup,
    NumExperts,
    NumLocalExperts,
    RoutingMethodName,
    TopK,
    TopkGroup,
    err,
    out,
    print_json,
    problem_from,
)
from .learn import print_learned
from .verify import Finding, print_findings, verify_policy
from .watch import watching

# To stay under 8 and 20 minutes of GPU time with the start of the processes and the verification.
QUICK_MINUTES, FULL_MINUTES = 6.0, 18.0


def regenerate(
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
        bool, typer.Option("--install/--no-install", help="Without it the policy stays beside the records.")
    ] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; earlier records stay under another name.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Measure anew what failed, hung or was refused in earlier runs.")
    ] = False,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Backend, or name[key=value]; may be given several times. [default: all that can run]"),
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(help="Load to measure; may be given several times. [default: uniform, zipf, concentrated]"),
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
    model: Model = None,
    num_experts: NumExperts = None,
    num_local_experts: NumLocalExperts = None,
    top_k: TopK = None,
    n_group: NGroup = None,
    topk_group: TopkGroup = None,
    hidden_size: HiddenSize = None,
    intermediate_size: IntermediateSize = None,
    routing_method: RoutingMethodName = None,
    gate_first: GateFirst = None,
    as_json: Json = False,
) -> None:
    """Make the policy of this machine's GPU: measure, learn, verify, install.

    Each result is checked before it is timed. It may be stopped at any point; started again, it goes on where it was.
    Exit code 1 if the policy fails its verification; it isn't installed then.
    """
    problem = problem_from(
        DEEPSEEK_V3,
        model=model,
        num_experts=num_experts,
        num_local_experts=num_local_experts,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        routing_method=routing_method,
        gate_first=gate_first,
    )
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
        result = task.perform(GpuBench(problem, copies))
    except KeyboardInterrupt:
        err.print("stopped; what was measured is kept, and the same command (without --fresh) goes on")
        raise typer.Exit(130) from None
    if as_json:
        print_json(result.to_dict())
    else:
        print_result(result)
    if not result.verified:
        raise typer.Exit(1)


def candidates_of(names: Sequence[str] | None) -> list[Choice]:
    """The candidates of that names, or every configuration worth measuring; ValueError for an unknown one.

    The reference isn't among them by itself: it can't be captured in a CUDA graph, and takes seconds at large T.
    """
    if not names:
        return [choice for choice in backends.candidates() if choice.backend != "torch_reference"]
    found: dict[Choice, None] = {}
    for name in names:
        given = Choice.parse(name)
        choice = backends.complete(given)
        # By their text: what is read from text has strings where the configuration may have numbers.
        known = {str(c): c for c in backends.candidates() if c.backend == choice.backend}
        wanted = known if not given.config else [str(choice)]
        for text in wanted:
            if text not in known:
                raise ValueError(f"candidate is {name!r}; one of {', '.join(known)} is wanted")
            found[known[text]] = None
    return list(found)


def loads_of(
    problem: MoEProblem, wanted: Sequence[str] | None
) -> tuple[tuple[RoutingLoad, ...], dict[RoutingLoad, str]]:
    """The routing loads to measure, and the default ones that can't be made for this problem, with the reasons.

    Raises
    ------
    ValueError
        One that was asked for is unknown, or it or the uniform one can't be made.
    """
    left_out: dict[RoutingLoad, str] = {}
    for name in wanted or ():
        if name not in ROUTING_LOADS:
            raise ValueError(f"routing is {name!r}; one of {', '.join(ROUTING_LOADS)} is wanted")
    loads: list[RoutingLoad] = [load for load in ROUTING_LOADS if load in (wanted or LOADS)]
    for load in loads:
        try:
            make_routing(Workload(8, middle_rank(problem), load), problem)
        except ValueError as error:
            if wanted or load == "uniform":
                raise
            left_out[load] = str(error)
    return tuple(load for load in loads if load not in left_out), left_out


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a regeneration.

    Attributes
    ----------
    policy, path
        What was learned, and the file that it is in.
    installed
        Whether that file is the one asked for; else it is beside the records.
    findings
        Of the verification.
    left_out
        Candidates that were refused or given up, and why.
    records, outcome
        The file of records, and what came of the measuring.
    """

    policy: Policy
    path: Path
    installed: bool
    findings: list[Finding]
    left_out: dict[Choice, str]
    records: Path
    outcome: sweeping.Outcome

    @property
    def verified(self) -> bool:
        """Whether everything of the policy could be run here, and was right."""
        return all(finding.status == "verified" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "path": str(self.path),
            "installed": self.installed,
            "verified": self.verified,
            "findings": [asdict(finding) for finding in self.findings],
            "left_out": {str(choice): reason for choice, reason in self.left_out.items()},
            "records": str(self.records),
            "measured_now": self.outcome.added,
            "measured_in_all": len(self.outcome.records),
            "failures": [
                {"candidate": str(r.choice), "num_tokens": r.num_tokens, "routing": r.routing, "timing": r.timing}
                | {"status": r.status, "reason": r.reason}
                for r in _failures(self.outcome.records)
            ],
            "seconds": round(self.outcome.spent_s, 1),
            "out_of_time": self.outcome.out_of_time,
            "policy": self.policy.model_dump(mode="json"),
        }


@dataclass(frozen=True, slots=True)
class Regeneration:
    """All of it, from the plan to the installed policy.

    Parameters
    ----------
    plan, options
        What to measure, and how to learn from it.
    budget_s, limit_s
        Seconds of measuring in all, and for one candidate at one workload; see `sweep.run.sweep`.
    records, output
        The files to write; by default among the user's own data.
    install
        Write the policy where it is looked up, or to ``output``.
    fresh, retry
        Set earlier records aside; measure anew what didn't pass.
    """

    plan: Plan
    options: LearnerOptions
    budget_s: float
    limit_s: float
    records: Path | None = None
    output: Path | None = None
    install: bool = True
    fresh: bool = False
    retry: bool = False

    def perform(self, bench: Bench, context: SpawnContext | ForkContext | None = None) -> Result:
        """Measure with ``bench`` (see `sweep.process`), learn, verify, install.

        Raises
        ------
        ValueError
            The records in the file were measured in other circumstances, another run writes it, or nothing can be
            learned from them.
        NoBackendError
            No candidate can run here.
        SweepError
            Nothing can be measured.
        """
        log = self.records or journal.user_records_dir() / "measuring"
        with Worker(bench, log.with_name(f"{log.name}.log"), context) as worker:
            identity = worker.identify()
            target = self._target(identity.device)  # before anything is measured: whether it can be written
            path = self.records or journal.default_path(identity.device, self.plan.problem)
            with journal.locked(path):
                outcome = self._measure(worker, identity, path)
                worker.close()  # its memory is wanted for the verification
                return self._conclude(outcome, path, identity.device, target)

    def _measure(self, worker: Worker, identity: Identity, path: Path) -> sweeping.Outcome:
        if self.fresh and (aside := journal.set_aside(path)):
            err.print(f"earlier records are now in {escape(str(aside))}", soft_wrap=True)
        if mended := journal.mend(path):
            err.print(escape(mended), style="yellow", soft_wrap=True)
        records = journal.resume(path, identity, self.plan.problem)
        if records:
            err.print(f"going on from {len(records)} records in {escape(str(path))}", soft_wrap=True)
        before = Results() if self.retry else Results(records)
        with watching(before, self.plan) as (on_workload, on_record):
            return sweeping.sweep(
                self.plan,
                worker,
                identity,
                path,
                records,
                budget_s=self.budget_s,
                limit_s=self.limit_s,
                retry=self.retry,
                on_workload=on_workload,
                on_record=on_record,
            )

    def _conclude(self, outcome: sweeping.Outcome, path: Path, device: str, target: Path) -> Result:
        """Learn, verify, install."""
        if not outcome.records:
            raise ValueError("nothing was measured, so there is nothing to learn from: give more --minutes")
        left_out = Results(outcome.records).left_out(self.plan.candidates)
        if len(left_out) == len(self.plan.candidates):
            lines = [f"  {choice}: {reason}" for choice, reason in left_out.items()]
            raise NoBackendError("\n".join([f"no candidate can run on {device}:", *lines]))
        policy = self._learn(path)
        # Kept before it is tried: if trying it ends this process, the file is there to look at.
        tried = path.with_name(f"{path.stem}.unverified.json")
        save_policy(policy, tried)
        policy = load_policy(tried)
        findings = verify_policy(policy)
        installed = False
        if any(finding.status != "verified" for finding in findings):
            target = path.with_name(f"{path.stem}.failed-verification.json")
            os.replace(tried, target)
        elif self.install:
            save_policy(policy, target)
            tried.unlink()
            installed = True
        else:
            target = path.with_name(f"{path.stem}.policy.json")
            os.replace(tried, target)
        return Result(policy, target, installed, findings, left_out, path, outcome)

    def _learn(self, path: Path) -> Policy:
        # From the file, not from memory: the same records give the same policy by `hybrid-moe learn`.
        records, digest = read_with_digest(path)
        used = [r for r in records if r.choice in self.plan.candidates and r.num_tokens <= max(self.plan.anchors)]
        try:
            return learn(used, self.options, problem=self.plan.problem, inputs=[digest])
        except ValueError as error:
            raise ValueError(
                f"{error}. The records are kept in {path}: --retry measures anew what failed, and --max-tokens leaves "
                "larger T out"
            ) from error

    def _target(self, device: str) -> Path:
        """Where the policy goes; ValueError if something else is there."""
        path = self.output or policy_path(user_policy_dir(), device, self.plan.problem)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; a file name is wanted as --output")
        try:
            there = load_policy(path) if self.install and path.exists() else None
        except PolicyError:
            there = None  # of no use as it is: it is replaced
        if there is not None and (there.device, there.problem) != (device, self.plan.problem):
            raise ValueError(
                f"{path} has the policy of {there.device} for {there.problem}, which would be lost: name another file "
                "as --output"
            )
        return path


# ---- What is shown ----


def _failures(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    return [record for record in records if record.status in ("failed", "timeout")]


def print_result(result: Result) -> None:
    """Print what was learned, verified, refused, and where it is."""
    print_learned(result.policy)
    out.print()
    print_findings(result.findings)
    for choice, reason in result.left_out.items():
        out.print(f"left out: {escape(f'{choice}: {reason}')}", soft_wrap=True)
    failures = dict.fromkeys(
        f"{r.choice} at T = {r.num_tokens} {r.routing}: {r.status}: {r.reason}"
        for r in _failures(result.outcome.records)
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
