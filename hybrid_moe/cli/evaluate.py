"""``hybrid-moe evaluate``: how good a policy is on records that it wasn't learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..learn.evaluate import Evaluation, Score
from ..learn.evaluate import evaluate as judge
from ..learn.learner import check_solutions
from ..measure.readers import read_with_digest
from ..measure.records import BenchRecord, WorkloadKey
from ..policy.schema import Policy, Timing
from ..policy.store import load_policy
from . import view
from .common import Json, Solutions, Where, out, print_json, solutions_from, versions_from
from .table import Cell, Column, Fitted

SUMMARY = "Judge a policy on records it hasn't seen"
EXAMPLES = ("hybrid-moe evaluate policy.json other_records.jsonl",)


def evaluate(
    policy: Annotated[Path, typer.Argument(help="A policy file.")],
    records: Annotated[
        list[Path], typer.Argument(help="As for learn; other records than the policy was learned from.")
    ],
    timing: Annotated[Timing | None, typer.Option(help="Use these records only. [default: the policy's]")] = None,
    where: Where = None,
    solution: Solutions = None,
    as_json: Json = False,
) -> None:
    """Compare what a policy runs with the fastest at each workload, and with every backend used alone.

    Next to it is the best choice by T alone: no policy can do better. Records of other GPUs and problems are
    left out.
    """
    loaded = load_policy(policy)
    solutions = solutions_from(solution)
    read: list[BenchRecord] = []
    learned_from = []
    for path in records:
        some, digest = read_with_digest(path, solutions)
        read += some
        if digest.sha256 in {one.sha256 for one in loaded.inputs}:
            learned_from.append(str(path))
    check_solutions(read, solutions)
    result = judge(loaded, read, timing=timing, where=versions_from(where))
    if as_json:
        print_json(
            {
                "path": str(policy),
                "device": loaded.device,
                "definition": loaded.definition,
                "learned_from": learned_from,
                **result.to_dict(),
            }
        )
    else:
        _print(loaded, result, learned_from)


def _print(policy: Policy, result: Evaluation, learned_from: list[str]) -> None:
    tokens = len({j.at.num_tokens for j in result.judged})
    out.print(
        f"[bold]{policy.device}[/], {policy.definition}\n"
        f"judged at {len(result.judged)} workloads of {tokens} T, timed with {result.timing}"
    )
    for path in learned_from:
        out.print(f"[yellow]learned from {escape(path)} itself: regret there is training regret[/]", soft_wrap=True)
    table = Fitted(
        [
            Column("what runs"),
            Column("workloads", right=True, optional=True),
            Column("mean regret", right=True),
            Column("worst", right=True),
            Column("policy is faster by", right=True),
        ]
    )
    rows: list[tuple[Cell, Score, str]] = [
        ("the policy", result.policy, ""),
        ("the best by T alone", result.bound, ""),
        *((single.choice, single.score, view.percent(single.policy_gain)) for single in result.singles),
    ]
    for name, score, gain in rows:
        table.add(name, str(score.workloads), view.percent(score.mean), view.percent(score.worst), gain)
    out.print(table)
    if result.policy.worst > 0:
        out.print(f"The policy's worst, {view.percent(result.policy.worst)}: {_place(result.policy.worst_at)}")
    if result.noise is None:
        out.print("How noisy the times are wasn't measured.")
    else:
        beyond = sum(not j.within_noise for j in result.judged)
        out.print(
            f"Measured noise is {view.percent(result.noise)} (median); at {beyond} of {len(result.judged)} workloads "
            "the policy loses more than the noise there."
        )
    for at, reason in result.not_judged:
        out.print(f"[yellow]not judged: {escape(_place(at))}: {escape(reason)}[/]")


def _place(at: WorkloadKey) -> str:
    workload = f" ({at.workload[:8]})" if at.workload else ""
    return f"T = {at.num_tokens}, {at.routing}, seed {at.seed}{workload}"
