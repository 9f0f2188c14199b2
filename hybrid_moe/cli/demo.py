"""``hybrid-moe demo``: the whole way on any machine: learn, choose, run, check."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
import typer
from rich.markup import escape

from .. import backends
from ..candidate import Candidate
from ..device import DeviceKey
from ..learn.learner import learn_from_files
from ..measure.bench import poisoned_output
from ..measure.readers import shipped_records_dir
from ..measure.single import call_fused_moe, checked, simple_time
from ..measure.timing import Work
from ..measure.workloads import DEEPSEEK_V3, DEFINITION_WORKLOADS, LayerWeights, Workload, make_inputs, random_weights
from ..policy.resolve import decision_table, policy_or_nearest
from ..policy.schema import LearnerOptions, Policy
from ..policy.select import resolve
from ..policy.store import dumps_policy, policy_path, shipped_policy_dir
from ..problem import MoEProblem
from ..reference import moe_reference
from . import view
from .common import out, steps, warnings_shown
from .table import Column, Fitted

SUMMARY = "Learn, choose, run and check, anywhere"
EXAMPLES = ("hybrid-moe demo",)


B200 = "nvidia_b200"
# The learner's options for the shipped B200 policy: the regimes that its data was published with.
B200_OPTIONS = LearnerOptions(regimes="1-7,14-32,52-80,901,10001-", tie_margin=0.05, prefer="triton_fused")
SMALL = MoEProblem(
    num_experts=32,
    num_local_experts=8,
    top_k=4,
    n_group=4,
    topk_group=2,
    hidden_size=512,
    intermediate_size=256,
)
SMALL_WORKLOADS = (
    Workload(1, 8),
    Workload(7, 0),
    Workload(33, 12),
    Workload(16, 24, "concentrated"),
    Workload(5, 8, "none"),
)


def demo() -> None:
    """Show the whole way: at full size on a GPU; without one, learn the B200 policy and run a small size on the CPU.

    Exit code 1 if a check fails.
    """
    failures = _on_gpu() if torch.cuda.is_available() else _without_gpu()
    if failures:
        out.print("\n[bold red]FAILED[/]")
        for failure in failures:
            out.print(f"  - {escape(failure)}")
        raise typer.Exit(1)
    out.print("\n[bold green]All checks passed.[/]")


def _on_gpu() -> list[str]:
    device = torch.device("cuda")
    key = DeviceKey.of(device)
    out.rule("The definition's 19 workloads at full size", align="left")
    out.print(f"{torch.cuda.get_device_name(device)}, {DEEPSEEK_V3.definition}")
    with warnings_shown():
        decisions = decision_table(DEEPSEEK_V3, key)
    policy, where, _ = policy_or_nearest(DEEPSEEK_V3, key.name)
    for said in [where] if policy is not None else decisions.decision(1).reasons:
        out.print(f"  - {escape(said)}", soft_wrap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing policy was spoken of above
        return _run_all(DEEPSEEK_V3, DEFINITION_WORKLOADS, [None], key, device)


def _without_gpu() -> list[str]:
    failures: list[str] = []
    out.print("No GPU here: the B200 policy is learned from published results, and a small layer runs on the CPU.\n")
    out.rule("1. Learn", align="left")
    policy = _learn_b200(failures)
    out.print(view.regimes(policy))
    out.print(view.regrets(policy) + "\n")

    out.rule("2. Choose", align="left")
    out.print("What the policy runs on a B200; `hybrid-moe explain --device nvidia_b200 --num-tokens 16` says why.")
    table = resolve(policy, policy.problem, DeviceKey(B200))
    slowdown_of_choice = Column("slowdown against the fastest", right=True)
    chosen = Fitted([Column("T", right=True), Column("regime"), Column("choice"), slowdown_of_choice])
    measured = {e.num_tokens: e for r in policy.regimes for e in r.evidence}
    for num_tokens in (13, 14, 15, 16, 32, 33, 901):
        decision = table.decision(num_tokens)
        at = measured.get(num_tokens)
        slowdown = "no result" if at is None else f"{at.slowdown[str(decision.choice)]:.2f}"
        chosen.add(str(num_tokens), view.regime_text(decision), decision.choice, slowdown)
    out.print(chosen)

    out.rule("3. Run and check", align="left")
    candidates = [Candidate("torch_reference")]
    if importlib.util.find_spec("triton") is not None:
        # Triton reads this when it is imported, which happens below for the first time.
        os.environ["TRITON_INTERPRET"] = "1"
        candidates.append(Candidate("triton_fused", {"gemm": "triton"}))
        how = "The Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1): their times mean nothing."
    else:
        how = "Triton isn't installed, so its kernels are left out."
    p = SMALL
    out.print(
        f"`fused_moe` with {p.num_local_experts} of {p.num_experts} experts, top {p.top_k}, hidden size "
        f"{p.hidden_size}, intermediate size {p.intermediate_size}, against the float32 reference. {how}"
    )
    key = DeviceKey.of("cpu")
    for choice in list(candidates):
        if refused := backends.not_supported_reasons(SMALL, key, choice):
            out.print(f"{escape(str(choice))} is left out: {escape('; '.join(refused))}")
            candidates.remove(choice)
    return failures + _run_all(SMALL, SMALL_WORKLOADS, candidates, key, torch.device("cpu"))


def _learn_b200(failures: list[str]) -> Policy:
    shipped = policy_path(shipped_policy_dir(), B200, DEEPSEEK_V3)
    data = shipped_records_dir() / "data" / "nvidia_b200_2026-02-02.md"
    policy = learn_from_files([data], B200_OPTIONS)
    out.print(
        f"A policy for {B200} from {data.name}: published speedups over a PyTorch reference (flashinfer-bench); "
        "nothing on B200 was measured by us."
    )
    if shipped.is_file() and shipped.read_text(encoding="utf-8") == dumps_policy(policy):
        out.print("Byte for byte what is shipped.")
    else:
        failures.append(f"the policy learned from {data.name} isn't the shipped one, {shipped}")
    return policy


def _run_all(
    problem: MoEProblem,
    workloads: tuple[Workload, ...],
    candidates: list[Candidate] | list[None],
    key: DeviceKey,
    device: torch.device,
) -> list[str]:
    """Run every workload on every candidate (``None``: what the policy chooses); print the table, return failures."""
    table = view.checks()
    failures = []
    decisions = decision_table(problem, key) if None in candidates else None
    with steps(1 + len(workloads)) as begin, torch.inference_mode():
        begin("making the weights")
        weights: LayerWeights = random_weights(problem, device)
        for workload in workloads:
            begin(f"T = {workload.num_tokens}")
            inputs = make_inputs(workload, problem, weights)
            load = Work.of(inputs, problem)
            reference = moe_reference(inputs, problem)
            for candidate in candidates:
                choice = candidate if decisions is None else decisions.choice(workload.num_tokens)
                assert choice is not None
                output = poisoned_output(inputs, problem)
                call = functools.partial(call_fused_moe, inputs, problem, output, candidate)
                call()
                result = checked(output, inputs, problem, choice, reference)
                time = simple_time(call, device)
                view.add_check(table, workload.num_tokens, workload.local_expert_offset, load, choice, result, time)
                failures += [f"{choice} at T = {workload.num_tokens}: {failure}" for failure in result.failures]
    out.print(table)
    out.print(
        "rel L2 and cosine are over the tokens with local work; the others must be exactly zero. Before each checked "
        "call the output was filled with NaN.\nTime: median of single calls from Python."
    )
    return failures
