"""Time states of the source by turns, replay by replay, in one process: whether a change makes a call faster.

git worktree add ../before main
python benchmarks/versions.py --state before=../before after=. --case deepseek-v3:4096 deepseek-v3:256:concentrated
python benchmarks/versions.py --state before=../before after=. --case kimi-k2:80 --backend flashinfer_cutlass

A case is a layer of `MODELS`, T, and if wanted a routing load. Each state calls on outputs full of NaN and on memory of
ones, on three copies of the weights with one routing; then its calls are captured in a CUDA graph, and all states'
graphs take turns, so that they meet the same clock and the same power: a median each, in microseconds of a call. What
the bits of a state's results are beside the first one's is in the last column. Exit code 1 if a result isn't finite, or
a state doesn't repeat its own bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

PACKAGE = "hybrid_moe"
COPIES, CALLS, TURNS = 3, 12, 15
POISONED_BYTES = 2**28

Call = Callable[[], object]


def main() -> None:
    """Time what the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", nargs="+", required=True, metavar="NAME=FOLDER", help="that has hybrid_moe/ in it")
    parser.add_argument("--case", nargs="+", required=True, metavar="MODEL:T[:LOAD]")
    parser.add_argument("--offset", type=int, help="first local expert; default: a rank in the middle")
    parser.add_argument("--backend", default="triton_fused[gemm=triton]")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")
    folders = {name: Path(folder) for name, _, folder in (state.partition("=") for state in options.state)}
    for name, folder in folders.items():
        if not (folder / PACKAGE).is_dir():
            parser.error(f"--state {name}: expected a folder with {PACKAGE}/ in it, got {folder}")
    print(f"| layer | T | {' | '.join(folders)} | bits |\n|---|---:|{'---:|' * len(folders)}---|", flush=True)
    right = True
    for case in options.case:
        model, tokens, *load = case.split(":")
        prepared = prepare(folders, model, int(tokens), load[0] if load else "uniform", options.offset, options.backend)
        us = by_turns({name: one.replay for name, one in prepared.items()}, event_us)
        cells = " | ".join(f"{us[name] / CALLS:.1f}" for name in prepared)
        print(f"| {model} | {' '.join([tokens, *load])} | {cells} | {bits(prepared)} |", flush=True)
        right &= all(one.repeats and one.finite for one in prepared.values())
        del prepared
        torch.cuda.empty_cache()
    sys.exit(not right)


class Prepared(NamedTuple):
    """A state's calls on one case, in a graph."""

    replay: Call
    outputs: list[torch.Tensor]
    repeats: bool
    finite: bool
    kept: object  # what the graph reads


class Modules:
    """Imports a package from one folder after the other.

    None of what was imported is dropped: graphs run kernels that it has compiled, and Triton may unload those of
    modules that are gone.
    """

    def __init__(self) -> None:
        self._kept: list[list[ModuleType]] = []

    def load(self, folder: Path) -> ModuleType:
        """The package of a folder; what it imports later comes from there too, until another is loaded."""
        ours = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
        self._kept.append([sys.modules.pop(name) for name in ours])
        sys.path.insert(0, str(folder.resolve()))
        try:
            package = __import__(PACKAGE)
        finally:
            sys.path.pop(0)
        found = Path(package.__file__ or "").resolve().parent
        if found != folder.resolve() / PACKAGE:
            raise ImportError(f"expected {PACKAGE} of {folder}, got that of {found}")
        return package


def prepare(
    folders: Mapping[str, Path], model: str, tokens: int, load: str, offset: int | None, backend: str
) -> dict[str, Prepared]:
    """Each state's calls; all of them on the tensors that the first one makes."""
    modules, prepared = Modules(), {}
    fields: list[dict[str, Any]] = []
    for name, folder in folders.items():
        package = modules.load(folder)
        from hybrid_moe.inputs import MoEInputs
        from hybrid_moe.measure.sweep.plan import middle_rank
        from hybrid_moe.measure.workloads import MODELS, Workload, make_inputs, random_weights

        problem = MODELS[model]
        if not fields:
            workload = Workload(tokens, middle_rank(problem) if offset is None else offset, load)
            first, *others = [random_weights(problem, "cuda", seed) for seed in range(COPIES)]
            made = make_inputs(workload, problem, first)
            of_weights = [{key: getattr(one, key) for key in first.__dataclass_fields__} for one in others]
            fields = [made._asdict(), *(made._replace(**one)._asdict() for one in of_weights)]
        inputs = [MoEInputs(**one) for one in fields]
        outputs = [torch.full_like(one.hidden_states, torch.nan, dtype=torch.bfloat16) for one in inputs]

        def call(at: int, run=package.fused_moe, problem=problem, inputs=inputs, outputs=outputs) -> None:
            run(*inputs[at], problem=problem, backend=backend, output=outputs[at])

        prepared[name] = capture(call, outputs, (modules, inputs))
    return prepared


def capture(call: Callable[[int], None], outputs: list[torch.Tensor], kept: object) -> Prepared:
    """Calls on poisoned memory, then CALLS of them in a graph; ``call`` is of a copy of the weights, by its number."""
    block = torch.full((POISONED_BYTES,), 255, dtype=torch.uint8, device="cuda")
    del block
    for at in range(COPIES):
        call(at)
    torch.cuda.synchronize()
    found = [output.clone() for output in outputs]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        for number in range(CALLS):
            call(number % COPIES)
    graph.replay()
    torch.cuda.synchronize()
    repeats = all(map(torch.equal, found, outputs))
    return Prepared(graph.replay, outputs, repeats, all(bool(one.isfinite().all()) for one in found), kept)


def event_us(replay: Call) -> float:
    """Microseconds on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def by_turns(replays: Mapping[str, Call], time: Callable[[Call], float]) -> dict[str, float]:
    """The median of each, of TURNS in which all are replayed, after two."""
    turns = [{name: time(replay) for name, replay in replays.items()} for _ in range(2 + TURNS)]
    return {name: statistics.median(turn[name] for turn in turns[2:]) for name in replays}


def bits(prepared: Mapping[str, Prepared]) -> str:
    """Whether the states agree, and what is wrong."""
    (_, first), *others = prepared.items()
    notes = [f"{name} doesn't repeat its own" for name, one in prepared.items() if not one.repeats]
    notes += [f"{name} isn't finite" for name, one in prepared.items() if not one.finite]
    for name, one in others:
        if not all(map(torch.equal, first.outputs, one.outputs)):
            notes.append(f"{name} differs by {max(map(relative_l2, first.outputs, one.outputs)):.1e}")
    return "; ".join(notes) or "equal"


def relative_l2(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Of two results."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


if __name__ == "__main__":
    main()
