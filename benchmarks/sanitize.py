"""Run every kernel of this package under NVIDIA's compute-sanitizer: memcheck, racecheck and initcheck.

python benchmarks/sanitize.py                             # all tools and cases, several processes at a time
python benchmarks/sanitize.py --tool racecheck --case 15 narrow

A case is one call on a layer of a seventh of DeepSeek-V3's width (the same tiles and the same code): racecheck slows a
kernel down a thousandfold. ``--full-size`` takes the whole layer. First every case runs without a tool: its result has
to be finite, and the cases together have to launch every kernel. A tool that watches nothing finds nothing, so each has
to find what is planted for it: memcheck a write past the end, racecheck a race between two warp groups, initcheck a
read of what nothing wrote. The exit code is 1 if a tool finds something, or doesn't find what was planted.

Racecheck calls it a race when a warp group writes, meets at its own barrier, lets one thread arrive at an mbarrier, and
another group waits for that and reads (`handover_kernel` does so alone, and is reported). Where our kernels hand over
like that (`HANDED_OVER`) it can judge nothing; such pairs are counted apart. ``tests/gluon_emulation`` is what tests
them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

import hybrid_moe.kernels
from hybrid_moe import MoEProblem, fused_moe
from hybrid_moe.inputs import RoutedInputs
from hybrid_moe.kernels.activations import quantize_rows
from hybrid_moe.kernels.external import External, external_inputs
from hybrid_moe.kernels.few_tokens import few_tokens
from hybrid_moe.kernels.grouped_gemm import libraries
from hybrid_moe.kernels.grouped_gemm.base import GroupedGemm
from hybrid_moe.kernels.grouped_gemm.deep_gemm import ALIGN, DeepGemmGroupedGemm
from hybrid_moe.kernels.grouped_gemm.sgl import SglGroupedGemm
from hybrid_moe.kernels.grouped_gemm.sm90.common import LINE, PLAIN
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import Constants, limits_of
from hybrid_moe.kernels.pipeline import Pipeline
from hybrid_moe.kernels.routing import CLEAR
from hybrid_moe.measure.sweep.plan import middle_rank
from hybrid_moe.measure.workloads import DEEPSEEK_V3, MoEInputs, RoutingLoad, Workload, make_inputs, random_weights
from hybrid_moe.reference import chosen_experts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOOLS = ("racecheck", "memcheck", "initcheck")
# `measure.timing` reads memory by it; no call launches it.
NOT_OF_A_CALL = {"read_kernel"}


@functools.cache
def kernels() -> Mapping[str, Path]:
    """This package's kernels by name, and the folder of each."""
    found = {}
    for module in pkgutil.walk_packages(hybrid_moe.kernels.__path__, "hybrid_moe.kernels."):
        loaded = importlib.import_module(module.name)
        for name, value in vars(loaded).items():
            if name.endswith("_kernel") and name not in ("wait_for_previous_kernel", "let_next_kernel_start"):
                found[name] = Path(sys.modules[value.__module__].__file__).parent
    return found


def inputs_of(problem: MoEProblem, tokens: int, load: RoutingLoad = "uniform") -> MoEInputs:
    """Of a rank in the middle."""
    return make_inputs(Workload(tokens, middle_rank(problem), load), problem, random_weights(problem, DEVICE))


def routed(inputs: MoEInputs, problem: MoEProblem) -> RoutedInputs:
    """The same call with its experts chosen before."""
    ids, weights = chosen_experts(inputs, problem)
    return RoutedInputs(ids.int(), weights.contiguous(), *inputs[2:])


def pipeline(
    problem: MoEProblem, tokens: int, intermediate_size: int | None = None, load: RoutingLoad = "uniform"
) -> torch.Tensor:
    """The whole layer by our own GEMMs."""
    if intermediate_size is not None:
        problem = dataclasses.replace(problem, intermediate_size=intermediate_size)
    return fused_moe(*inputs_of(problem, tokens, load), problem=problem, backend="triton_fused[gemm=triton]")


def routed_pipeline(problem: MoEProblem, tokens: int) -> torch.Tensor:
    """The same from experts that were chosen before, and hidden states in bfloat16."""
    inputs = routed(inputs_of(problem, tokens), problem)
    return fused_moe(
        None,
        None,
        inputs.hidden_states.bfloat16(),
        None,
        *inputs[4:],
        topk_ids=inputs.topk_ids,
        topk_weights=inputs.topk_weights,
        problem=problem,
        backend="triton_fused[gemm=triton]",
    )


def weighted_pipeline(problem: MoEProblem, tokens: int) -> torch.Tensor:
    """The same with weights on the input, of one expert of each token, as they are (Llama 4)."""
    one = dict(top_k=1, n_group=1, topk_group=1, routing_method="sigmoid_no_renorm", weight_on_input=True)
    return pipeline(dataclasses.replace(problem, **one), tokens)


def shared_pipeline(problem: MoEProblem, tokens: int) -> torch.Tensor:
    """The same with an expert of all tokens behind 128 that are all local."""
    whole = dict(num_experts=128, num_local_experts=128, num_shared_experts=1, intermediate_size=256)
    return pipeline(dataclasses.replace(problem, **whole), tokens)


def by_gemms(gemm: GroupedGemm, problem: MoEProblem, tokens: int) -> torch.Tensor:
    """The layer by a provider of the GEMMs."""
    inputs = inputs_of(problem, tokens)
    output = torch.empty((tokens, problem.hidden_size), dtype=torch.bfloat16, device=DEVICE)
    Pipeline(problem, gemm).run(inputs, output)
    return output


def around(gemm: GroupedGemm, problem: MoEProblem, tokens: int) -> torch.Tensor:
    """The kernels around a library's GEMMs, in whose place every row gets the same numbers."""

    def of_sgl(output: torch.Tensor, *_: Any) -> None:
        output.fill_(0.5)

    def of_deep_gemm(_: Any, weights: Any, output: torch.Tensor, *rest: Any, **options: Any) -> None:
        output.fill_(0.5)

    library = SimpleNamespace(
        **{libraries.DEEP_GEMM_FUNCTION: of_deep_gemm}, get_mk_alignment_for_contiguous_layout=lambda: ALIGN
    )
    with (
        mock.patch.object(libraries, "sgl_grouped_mm", lambda: of_sgl),
        mock.patch.object(libraries, "deep_gemm", lambda: library),
    ):
        return by_gemms(gemm, problem, tokens)


def whole_library(problem: MoEProblem, tokens: int) -> torch.Tensor:
    """What goes before a library's whole layer, by logits and by chosen experts."""

    def result(external: External) -> torch.Tensor:
        return torch.cat([part.flatten().float() for part in external])

    inputs = inputs_of(problem, tokens)
    limits = limits_of(inputs.hidden_states.device)
    return torch.cat([result(external_inputs(x, problem, limits)) for x in (inputs, routed(inputs, problem))])


def dot_products(problem: MoEProblem, tokens: int) -> torch.Tensor:
    """The layer by the kernels that check others."""
    inputs = inputs_of(problem, tokens)
    return few_tokens(inputs, *routed(inputs, problem)[:2], problem)


@gluon.jit
def write_and_read(shared, out_ptr, ME: gl.constexpr):
    """What the other warp group does too, to the same memory and at the same time."""
    # One number: many would be stored by stmatrix, which racecheck doesn't watch.
    shared.store(gl.full([1], ME, gl.int32, layout=LINE))
    gl.store(out_ptr + ME + gl.arange(0, 1, layout=LINE), shared.load(LINE))


@gluon.jit
def planted_race_kernel(out_ptr):
    """Two warp groups that wait for nothing. Grid: (1,)."""
    shared = gl.allocate_shared_memory(gl.int32, [1], PLAIN)
    gl.warp_specialize([(write_and_read, (shared, out_ptr, 0)), (write_and_read, (shared, out_ptr, 1))], [4], [24])


@gluon.jit
def hand_over(shared, told, out_ptr):
    """What the waiting group of `handover_kernel` does."""
    mbarrier.wait(told, 0)
    gl.store(out_ptr + gl.arange(0, 1, layout=LINE), shared.load(LINE))


@gluon.jit
def write_and_tell(shared, told, out_ptr):
    """What the other group does."""
    shared.store(gl.full([1], 1, gl.int32, layout=LINE))
    mbarrier.arrive(told, count=1)


@gluon.jit
def handover_kernel(out_ptr):
    """One warp group writes, the other waits and reads: no race. Grid: (1,)."""
    shared = gl.allocate_shared_memory(gl.int32, [1], PLAIN)
    told = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(told.index(0), count=1)
    p = (shared, told.index(0), out_ptr)
    gl.warp_specialize([(write_and_tell, p), (hand_over, p)], [4], [24])


def handover() -> torch.Tensor:
    """Launch it."""
    output = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    handover_kernel[(1,)](output, num_warps=4)
    return output


# Whose writes racecheck takes for races with whose reads, by what is in the lines: our handovers by mbarriers (or by
# cp.async's arrival), and what Triton's own warp specialisation tells the groups at its start and end.
HANDED_OVER = (
    ("shared.store(", "shared.load("),
    ("sums.store(", "sums.load("),
    ("self.values.index(mine", "self.values.index(others"),
    ("self.tiles.index(", "shared.load(LINE)"),
    ("self.numbers.index(", ".load(LINE)"),
    ("load_rows(pipeline.x_scale", "scale.slice("),
    ("def ", "def "),
    ("gl.warp_specialize(", "def "),
    ("wait_for_previous_kernel(", "def "),
)
_ACCESS = re.compile(r"(Race reported between|and) (Read|Write) access at (\w+)\+0x\w+ in ([\w.]+):(\d+)")


def races(output: str) -> tuple[int, list[str]]:
    """How many pairs of accesses racecheck reports of handovers, and what else it reports."""
    handed_over, others = 0, []
    first: tuple[str, ...] = ()
    for begins, kind, kernel, file, number in _ACCESS.findall(output):
        access = (kind, kernel, file, number)
        if begins != "and":
            first = access
            continue
        write, read = sorted((first, access), key=lambda each: each[0] != "Write")
        lines = [_line(kernel, file, int(number)) for _, kernel, file, number in (write, read)]
        if kind != first[0] and any(all(map(str.__contains__, lines, parts)) for parts in HANDED_OVER):
            handed_over += 1
        else:
            others.append(f"{first} and {access}")
    return handed_over, others


@functools.cache
def _line(kernel: str, file: str, number: int) -> str:
    """A line of a file that racecheck names without its folder: of two with the name, the one beside the kernel."""
    root = Path(hybrid_moe.kernels.__path__[0])
    paths = [Path(__file__)] if file == Path(__file__).name else sorted(root.rglob(file))
    [path] = paths if len(paths) == 1 else [path for path in paths if path.parent == kernels()[kernel]]
    return path.read_text().splitlines()[number - 1]


def planted_race() -> None:
    """Launch it."""
    planted_race_kernel[(1,)](torch.empty(2, dtype=torch.int32, device=DEVICE), num_warps=4)


def planted_write() -> None:
    """Clear more counters than there are."""
    counters = torch.empty(1024, dtype=torch.int32, device=DEVICE)
    constants = Constants({"BLOCK": 1024, "PDL": False}, {"num_warps": 4})
    CLEAR.launch((1,), (counters, 2**24), constants, counters.device, True)


def planted_read() -> None:
    """Quantise what nothing wrote."""
    quantize_rows(torch.empty((1, 128), dtype=torch.bfloat16, device=DEVICE))


CASES: Mapping[str, Callable[[MoEProblem], torch.Tensor]] = {
    "2048": functools.partial(pipeline, tokens=2048),  # light experts' tiles among the others'
    "901": functools.partial(pipeline, tokens=901),
    "busy": functools.partial(pipeline, tokens=128, load="concentrated"),
    "200": functools.partial(pipeline, tokens=200),
    "15": functools.partial(pipeline, tokens=15),
    # Those for every GPU, with the tiles of one that has no others.
    "plain": functools.partial(by_gemms, TritonGroupedGemm(capability=(8, 9)), tokens=40),
    "one_token": functools.partial(pipeline, tokens=1, intermediate_size=256),
    "narrow": functools.partial(pipeline, tokens=16, intermediate_size=256),
    "routed": functools.partial(routed_pipeline, tokens=15),
    "weighted": functools.partial(weighted_pipeline, tokens=15),
    "shared": functools.partial(shared_pipeline, tokens=15),
    "around_sgl": functools.partial(around, SglGroupedGemm(), tokens=40),
    "around_deep_gemm": functools.partial(around, DeepGemmGroupedGemm(), tokens=40),
    "whole_library": functools.partial(whole_library, tokens=40),
    "handover": lambda problem: handover(),
    "dot_products": functools.partial(dot_products, tokens=2),
}

# What each tool has to find, and what its summary starts with then.
PLANTED: Mapping[str, tuple[Callable[[], None], str]] = {
    "racecheck": (planted_race, r"RACECHECK SUMMARY: [1-9]"),
    "memcheck": (planted_write, r"ERROR SUMMARY: [1-9]"),
    "initcheck": (planted_read, r"ERROR SUMMARY: [1-9]"),
}


def run_case(name: str, full_size: bool) -> None:
    """Run a case, look at its result, and print the kernels that it launched."""
    launched: set[str] = set()
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: launched.add(metadata.get()["name"]))
    sizes = {} if full_size else {"hidden_size": 1024, "intermediate_size": 1024}
    output = CASES[name](dataclasses.replace(DEEPSEEK_V3, **sizes))
    if not bool(output.isfinite().all()) or not bool(output.any()):
        sys.exit(f"case {name}: the result isn't finite, or all zeros")
    print("launched", *sorted(launched))


def run(what: list[str], *prefix: str, seconds: float, **environment: str) -> tuple[int, str]:
    """Exit code and output of a process of this script."""
    command = [*prefix, sys.executable, __file__, *what]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env=os.environ | environment,
        )
    except subprocess.TimeoutExpired:
        return 1, f"not finished within {seconds:.0f} s"
    return done.returncode, done.stdout


def watch(sanitizer: str, tool: str, what: list[str], seconds: float) -> tuple[int, str]:
    """Run a tool on a process of this script: its exit code and output."""
    prefix = [sanitizer, f"--tool={tool}", "--error-exitcode=1"]
    # What no watched kernel wrote counts as unwritten: initcheck watches torch's as well.
    if tool != "initcheck":
        prefix += [
            f"--kernel-name=kns={name}" for name in ("planted_race_kernel", "handover_kernel", *sorted(kernels()))
        ]
    # An allocation for each tensor: in the allocator's large blocks, what is past a tensor is no error.
    return run(what, *prefix, seconds=seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def summary(output: str) -> str:
    """The line in which a tool sums up; without one, the end of what it said."""
    lines = [line for line in output.splitlines() if "SUMMARY" in line]
    return lines[-1].strip("= ") if lines else output[-500:]


def main() -> None:
    """Run all cases without a tool, then each tool on its planted fault and on all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for one tool on one case")
    parser.add_argument("--full-size", action="store_true", help="DeepSeek-V3's own width")
    parser.add_argument("--run-case", help=argparse.SUPPRESS)
    parser.add_argument("--plant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plant:
        PLANTED[options.plant][0]()
        torch.cuda.synchronize()
        return
    if options.run_case:
        run_case(options.run_case, options.full_size)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        parser.error("expected compute-sanitizer, a part of the CUDA toolkit, on PATH; got none")
    begun = time.monotonic()
    said = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=True).stdout
    version = said.partition("Version ")[2].strip()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, compute-sanitizer {version}", flush=True)
    size = ["--full-size"] if options.full_size else []
    cases = {name: [f"--run-case={name}", *size] for name in options.case}
    bad = False
    with ThreadPoolExecutor(options.jobs) as pool:
        # They also fill Triton's cache: what comes after compiles nothing.
        plain = {name: pool.submit(run, what, seconds=options.time_limit) for name, what in cases.items()}
        launched: set[str] = set()
        for name, future in plain.items():
            code, output = future.result()
            if code:
                sys.exit(f"{name} fails without a tool: {output[-2000:]}")
            launched |= set(re.findall(r"\w+_kernel\b", output.splitlines()[-1]))
        missing = set(kernels()) - launched - NOT_OF_A_CALL
        if missing and options.case == list(CASES):
            sys.exit(f"no case launches {', '.join(sorted(missing))}")
        print(f"{len(launched)} kernels launched; {time.monotonic() - begun:.0f} s", flush=True)
        watched = {}
        for tool in options.tool:
            watched[tool, "what is planted"] = pool.submit(
                watch, sanitizer, tool, [f"--plant={tool}"], options.time_limit
            )
            for name, what in cases.items():
                watched[tool, name] = pool.submit(watch, sanitizer, tool, what, options.time_limit)
        for (tool, name), future in watched.items():
            code, output = future.result()
            verdict, others = summary(output), list[str]()
            if name == "what is planted":
                wrong = not re.match(PLANTED[tool][1], verdict)
                verdict = f"{'NOT FOUND' if wrong else 'found'}: {verdict}"
            else:
                wrong = code != 0
                if tool == "racecheck":
                    handed_over, others = races(output)
                    wrong = bool(others) or "\nlaunched " not in output or not verdict.startswith("RACECHECK SUMMARY")
                    verdict += f", {handed_over} pairs of handovers" if handed_over else ""
            bad |= wrong
            print(f"{tool}, {name}: {verdict}", flush=True)
            if wrong:
                print(*others, output[:3000], sep="\n", flush=True)
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(bad)


if __name__ == "__main__":
    main()
