"""``hybrid-moe solution``: a policy or a candidate as a Solution for flashinfer-bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..candidate import Candidate
from ..files import DEFINITION, SOLUTION, check_outputs, check_target, write_whole
from ..flashinfer_bench.definition import definition_of
from ..flashinfer_bench.solution import AUTHOR, candidate_solution, dumps_solution, policy_solution
from ..measure.workloads import DEEPSEEK_V3
from .common import GivenPolicy, Json, PolicyPath, out, print_json, wanted_policy
from .problem import ProblemOptions, takes_problem

SUMMARY = "A Solution for flashinfer-bench"
EXAMPLES = (
    "hybrid-moe solution --device nvidia_b200 -o b200.json",
    'hybrid-moe solution --candidate "triton_fused[gemm=triton]"',
)


@takes_problem
def solution(
    *,
    device: Annotated[
        str | None, typer.Option(help="Slug of the policy's device, as nvidia_b200. [default: this machine's GPU]")
    ] = None,
    policy: PolicyPath = None,
    candidate: Annotated[
        str | None, typer.Option(help="Of one candidate instead of a policy: name or name[key=value].")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="[default: NAME.json]")] = None,
    definition: Annotated[Path | None, typer.Option(help="Write the layer's Definition too, to this file.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the Solution. [default: hybrid_moe_ with the device or the candidate]")
    ] = None,
    author: Annotated[str, typer.Option(help="Of the Solution.")] = AUTHOR,
    sizes: ProblemOptions,
    as_json: Json = False,
) -> None:
    """Write a policy as a Solution for flashinfer-bench 0.1.2 and flashinfer.trace_apply.

    It stands alone: the policy is code in it, and the kernels that it runs are there as sources. The same policy gives
    the same bytes.
    """
    given = GivenPolicy.at(None if candidate is not None else policy)
    problem = sizes.problem(given.problem(DEEPSEEK_V3))
    if candidate is not None:
        if device is not None or policy is not None:
            raise ValueError(f"--candidate {candidate} runs on any device and has no policy: leave out the others")
        made = candidate_solution(Candidate.parse(candidate), problem, name=name, author=author)
    else:
        found, _ = wanted_policy(device, problem, given)
        made = policy_solution(found, name=name, author=author)
    path = Path(f"{made['name']}.json") if output is None else output
    check_outputs({"--output": path, "--definition": definition}, [policy])
    check_target(path, SOLUTION)
    if definition is not None:
        write_whole(definition, (json.dumps(definition_of(problem), indent=2) + "\n").encode(), DEFINITION)
    write_whole(path, dumps_solution(made).encode(), SOLUTION)
    if as_json:
        print_json({"path": str(path), **{key: value for key, value in made.items() if key != "sources"}})
        return
    out.print(f"[bold]{escape(made['name'])}[/], {made['definition']}\n{escape(made['description'])}", soft_wrap=True)
    out.print(f"needs {', '.join(made['spec']['dependencies'])}")
    out.print(f"written to {escape(str(path))}", soft_wrap=True)
