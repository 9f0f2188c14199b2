"""``hybrid-moe run``: the layer at full size on one workload."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated, Literal

import torch
import typer
from rich.markup import escape

from ..api import HybridMoE
from ..measure.bench import poisoned_output
from ..measure.single import checked, simple_time
from ..measure.timing import Work
from ..measure.workloads import DEFINITION_WORKLOADS, RoutingLoad, Workload, make_inputs, random_weights
from ..problem import MoEProblem
from . import view
from .common import Json, PolicyPath, out, print_json, steps, this_device, warnings_shown
from .problem import ProblemOptions, takes_problem

SUMMARY = "Run the layer on one workload"
EXAMPLES = (
    "hybrid-moe run --num-tokens 64 --check",
    'hybrid-moe run --model kimi-k2 --backend "triton_fused[gemm=triton]"',
)


@takes_problem
def run(
    *,
    workload: Annotated[str | None, typer.Option(help="One of the definition's, by the start of its UUID.")] = None,
    num_tokens: Annotated[int | None, typer.Option(min=0, help="T. [default: 16]")] = None,
    offset: Annotated[
        int | None, typer.Option(min=0, help="Global index of the first local expert. [default: 0]")
    ] = None,
    routing: Annotated[RoutingLoad, typer.Option(help="How the tokens spread over the experts.")] = "uniform",
    seed: Annotated[int, typer.Option(min=0, help="Of the random data.")] = 0,
    backend: Annotated[str | None, typer.Option(help="A name, or name[key=value]; never falls back.")] = None,
    policy: PolicyPath = None,
    device: Annotated[Literal["cuda", "cpu"] | None, typer.Option(help="[default: the GPU if there is one]")] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare with the float32 reference.")] = False,
    sizes: ProblemOptions,
    as_json: Json = False,
) -> None:
    """Run the layer on seeded random data: what was chosen, a simple time, and with --check whether it is right.

    Exit code 1 if it is wrong.
    """
    problem = sizes.problem()
    point = _workload(workload, num_tokens, offset, routing, seed, problem)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU that it can use: leave --device out, or see `hybrid-moe doctor`")
    where = this_device() if device is None else torch.device(device)
    _check_memory(problem, point.num_tokens, where)

    with steps(4 + check) as begin, warnings_shown(), torch.inference_mode():
        begin(f"making {_weight_bytes(problem) / 1e9:.2g} GB of weights")
        weights = random_weights(problem, where)
        begin("making the inputs")
        inputs = make_inputs(point, problem, weights)
        moe = HybridMoE.from_inputs(inputs, problem, backend=backend, policy=policy)
        decision = moe.explain(point.num_tokens)
        output = poisoned_output(inputs, problem)

        def call() -> None:
            moe(inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale, output=output)

        begin(f"first call of {decision.choice}")
        call()
        correctness = None
        if check:
            begin("comparing with the reference")
            correctness = checked(output, inputs, problem, decision.choice)
        begin("timing")
        time = simple_time(call, where)
    load, held = Work.of(inputs, problem), problem.all_routed.num_local_experts

    if as_json:
        print_json(
            {
                "device": moe.device.name,
                "problem": asdict(problem),
                "workload": asdict(point) | asdict(load),
                "decision": decision.to_dict(),
                "workspace_bytes": moe.workspace_bytes(point.num_tokens),
                "time": asdict(time),
                "correctness": None
                if correctness is None
                else correctness.to_dict() | {"passed": correctness.passed, "failures": list(correctness.failures)},
            }
        )
    else:
        out.print(
            f"[bold]{moe.device.name}[/], {problem.definition}\n"
            f"T = {point.num_tokens}, offset {point.local_expert_offset}, {point.routing} routing: "
            f"{load.local_rows} local rows on {load.active_experts} of {held} local experts"
        )
        out.print(f"[bold]runs[/]    [bold green]{escape(str(decision.choice))}[/]")
        for reason in decision.reasons:
            out.print(f"          - {escape(reason)}")
        out.print(f"[bold]memory[/]  {moe.workspace_bytes(point.num_tokens) / 1e6:.1f} MB next to inputs and output")
        out.print(f"[bold]time[/]    {time} (median of {time.runs} single calls, {time.clock})")
        if correctness is not None:
            verdict = (
                "[green]pass[/]" if correctness.passed else f"[bold red]{escape('; '.join(correctness.failures))}[/]"
            )
            out.print(
                f"[bold]check[/]   {verdict}: relative L2 {correctness.relative_l2:.4f}, "
                f"cosine {correctness.cosine:.5f}, matched {view.percent(correctness.matched_ratio)}"
            )
    if correctness is not None and not correctness.passed:
        raise typer.Exit(1)


def _workload(
    prefix: str | None, num_tokens: int | None, offset: int | None, routing: RoutingLoad, seed: int, problem: MoEProblem
) -> Workload:
    if prefix is not None:
        if num_tokens is not None or offset is not None:
            raise ValueError("--workload says T and offset: leave --num-tokens and --offset out")
        found = [w for w in DEFINITION_WORKLOADS if w.uuid is not None and w.uuid.startswith(prefix)]
        if len(found) != 1:
            known = ", ".join(f"{w.uuid[:8]} (T = {w.num_tokens})" for w in DEFINITION_WORKLOADS if w.uuid)
            raise ValueError(
                f"--workload: expected the start of one UUID, got {prefix!r}, of which there are {len(found)}: {known}"
            )
        num_tokens, offset, uuid = found[0].num_tokens, found[0].local_expert_offset, found[0].uuid
    else:
        num_tokens, offset, uuid = 16 if num_tokens is None else num_tokens, offset or 0, None
    last = problem.num_experts - problem.num_local_experts
    if offset > last:
        raise ValueError(f"--offset: expected 0 to {last}, got {offset}")
    return Workload(num_tokens, offset, routing, seed, uuid)


def _check_memory(problem: MoEProblem, num_tokens: int, device: torch.device) -> None:
    """ValueError if the machine can't hold the weights and the call's inputs and output."""
    # Hidden states in float32 while they are made, in FP8 after it; logits; the output.
    token = 4 * problem.hidden_size + problem.hidden_size + 4 * problem.num_experts + 2 * problem.hidden_size
    wanted = _weight_bytes(problem) + num_tokens * token
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if wanted > has:
        raise ValueError(
            f"T = {num_tokens} takes {wanted / 1e9:.3g} GB for weights, inputs and output: expected at most the "
            f"{has / 1e9:.3g} GB of this {'GPU' if device.type == 'cuda' else 'machine'}; give a smaller --num-tokens"
        )


def _weight_bytes(problem: MoEProblem) -> int:
    return 3 * problem.all_routed.num_local_experts * problem.hidden_size * problem.intermediate_size
