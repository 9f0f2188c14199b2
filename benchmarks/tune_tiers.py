"""Time each GEMM of the Triton pipeline alone, by how many rows its experts have; what the M buckets were chosen from.

python benchmarks/tune_tiers.py --output tiers.jsonl

Every variant of a tile runs in every situation: a routing and a number of tokens. Kernels are compiled first, on all
cores. Each variant's result, on a poisoned output, is compared with that of the first before it is timed, in a CUDA
graph on rotating weights. Two tables with the ratios to the GEMM's own floor, the best of each situation marked with a
star; the file has a line for each time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from tune_tiles import REPEATS, compile_all, key_of, limits_for

from hybrid_moe.kernels.arena import Arena
from hybrid_moe.kernels.grouped_gemm.tiles import MBucket, Tile
from hybrid_moe.kernels.grouped_gemm.triton.gemm1 import block_arrivals, gemm1, reserve_activation
from hybrid_moe.kernels.grouped_gemm.triton.gemm1 import signals as signals_of
from hybrid_moe.kernels.grouped_gemm.triton.gemm2 import gemm2
from hybrid_moe.kernels.plan import by_name
from hybrid_moe.kernels.routing import reserve_routing, route
from hybrid_moe.kernels.shapes import max_local_rows
from hybrid_moe.kernels.steps import Step
from hybrid_moe.measure.timing import PeakRates, measure_peak_rates, time_graph
from hybrid_moe.measure.workloads import DEEPSEEK_V3 as PROBLEM
from hybrid_moe.measure.workloads import LayerWeights, Workload, make_inputs, random_weights
from hybrid_moe.reference import local_rows_per_expert_and_token

# Those weighed most come first: what the time doesn't suffice for is left out from the end.
SITUATIONS: dict[str, Workload] = {
    "901": Workload(901, 96),
    "56": Workload(56, 64),
    "c901": Workload(901, 32, "concentrated"),
    "c32": Workload(32, 32, "concentrated"),
    "128": Workload(128, 32),
    "400": Workload(400, 32),
    "80": Workload(80, 96),
    "32": Workload(32, 32),
    "200": Workload(200, 32),
    "2048": Workload(2048, 32),
    "c128": Workload(128, 32, "concentrated"),
    # Few experts are active: what the tiles of 32 and 64 columns were chosen by.
    "1": Workload(1, 32),
    "3": Workload(3, 96),
    "7": Workload(7, 192),
    "14": Workload(14, 0),
    "15": Workload(15, 32),
    "16": Workload(16, 224),
}
RELATIVE_ERROR = 0.01  # sums in another order make some e4m3 values round to the other side


def buckets(text: str) -> tuple[MBucket, ...]:
    """``16:3x2 64:4``: 16 rows by 3 stages of two 128 blocks, 64 rows by 4 stages."""
    found = []
    for part in text.split():
        rows, pipeline = part.split(":")
        stages, _, unroll = pipeline.partition("x")
        found.append(MBucket(int(rows), int(stages), int(unroll or 1)))
    return tuple(found)


# Names: j both halves of the columns by one product, s by one each; warps; columns if unusual; registers, M buckets or
# programs if bounded.
GEMM1: dict[str, Tile] = {
    "s4 base": Tile(64, 4, buckets("16:3x2 64:4")),
    "s4 +32": Tile(64, 4, buckets("16:3x2 32:4 64:4")),
    "s4 168": Tile(64, 4, buckets("16:2x2 32:3 64:3"), max_registers=168),
    "s4 16 only": Tile(64, 4, buckets("16:3x2")),
    "j4 16 only": Tile(64, 4, buckets("16:5"), fused=True),
    "j4 16 64": Tile(64, 4, buckets("16:4x2 64:4"), fused=True),
    "j4 +32": Tile(64, 4, buckets("16:4x2 32:6 64:4"), fused=True),
    "j4 +32 p2": Tile(64, 4, buckets("16:4x2 32:6 64:4"), 2, fused=True),
    "j4 168": Tile(64, 4, buckets("16:5 32:4 64:3"), fused=True, max_registers=168),
    "j4 168 no32": Tile(64, 4, buckets("16:5 64:3"), fused=True, max_registers=168),
    "j4 168 p3": Tile(64, 4, buckets("16:5 32:4 64:3"), 3, fused=True, max_registers=168),
    "j4 168 p9": Tile(64, 4, buckets("16:5 32:4 64:3"), 9, fused=True, max_registers=168),
    "j4 n32 128": Tile(32, 4, buckets("16:6 32:5 64:3"), fused=True, max_registers=128),
    "j8 128": Tile(64, 8, buckets("16:4x2 32:6 64:4"), fused=True, max_registers=128),
    "j8 80": Tile(64, 8, buckets("16:5 32:4 64:3"), fused=True, max_registers=80),
    "j8 128+128": Tile(64, 8, buckets("16:4x2 32:6 64:4 128:3"), fused=True, max_registers=128),
    "s8 128+128": Tile(64, 8, buckets("16:3x2 32:5 64:4 128:3"), max_registers=128),
    "j8 +128": Tile(64, 8, buckets("16:6x2 32:10 64:8 128:6"), fused=True),
    "j8 +128 p1": Tile(64, 8, buckets("16:6x2 32:10 64:8 128:6"), 1, fused=True),
    "s8 n128": Tile(128, 8, buckets("128:3"), 4),
    "s8 n128 +64": Tile(128, 8, buckets("32:5 64:4 128:3"), 4),
    "j8 n128": Tile(128, 8, buckets("128:3"), 4, fused=True),
    "j8 n128 +64": Tile(128, 8, buckets("32:5 64:4 128:3"), 4, fused=True),
    "s4 16:4": Tile(64, 4, buckets("16:4")),
    "j4 n32 6": Tile(32, 4, buckets("16:6"), fused=True),
    "j4 n32 4x2": Tile(32, 4, buckets("16:4x2"), fused=True),
    "j4 n32 3x4": Tile(32, 4, buckets("16:3x4"), fused=True),
}
GEMM2: dict[str, Tile] = {
    "j4 base": Tile(128, 4, buckets("16:3x2 64:4"), fused=True),
    "j4 +32": Tile(128, 4, buckets("16:3x2 32:5 64:4"), fused=True),
    "j4 +32 p2": Tile(128, 4, buckets("16:3x2 32:5 64:4"), 2, fused=True),
    "j4 16 only": Tile(128, 4, buckets("16:3x2"), fused=True),
    "j4 16 only4": Tile(128, 4, buckets("16:4"), fused=True),
    "j4 168 2x2": Tile(128, 4, buckets("16:2x2 32:3 64:3"), fused=True, max_registers=168),
    "j4 168": Tile(128, 4, buckets("16:4 32:3 64:3"), fused=True, max_registers=168),
    "j4 168 no32": Tile(128, 4, buckets("16:4 64:3"), fused=True, max_registers=168),
    "j4 168 p3": Tile(128, 4, buckets("16:4 32:3 64:3"), 3, fused=True, max_registers=168),
    "j4 168 p9": Tile(128, 4, buckets("16:4 32:3 64:3"), 9, fused=True, max_registers=168),
    "j4 n64 128": Tile(64, 4, buckets("16:5 32:4 64:3"), fused=True, max_registers=128),
    "j4 n64 +128": Tile(64, 4, buckets("16:4x2 32:6 64:5 128:4"), fused=True),
    "j8 128": Tile(128, 8, buckets("16:3x2 32:5 64:4"), fused=True, max_registers=128),
    "j8 80": Tile(128, 8, buckets("16:4 32:3 64:3"), fused=True, max_registers=80),
    "j8 128+128": Tile(128, 8, buckets("16:3x2 32:5 64:4 128:3"), fused=True, max_registers=128),
    "s8 128+128": Tile(128, 8, buckets("16:3x2 32:5 64:4 128:3"), max_registers=128),
    "s4 n256 +64": Tile(256, 4, buckets("16:2x2 32:2 64:2")),
    "j8 +128": Tile(128, 8, buckets("16:6x2 32:10 64:8 128:6"), fused=True),
    "j8 +128 p1": Tile(128, 8, buckets("16:6x2 32:10 64:8 128:6"), 1, fused=True),
    "s8 n256": Tile(256, 8, buckets("128:3"), 4),
    "s8 n256 +64": Tile(256, 8, buckets("32:5 64:4 128:3"), 4),
    "j4 n64 3x2": Tile(64, 4, buckets("16:3x2"), fused=True),
    "j4 n64 8": Tile(64, 4, buckets("16:8"), fused=True),
}
VARIANTS = {"gemm1": GEMM1, "gemm2": GEMM2}


class Situation:
    """One routing on each weight copy, and the activations that GEMM2 starts from."""

    def __init__(self, workload: Workload, copies: list[LayerWeights]) -> None:
        self.tokens = workload.num_tokens
        self.limits = limits_for()
        self.inputs = [make_inputs(workload, PROBLEM, weights) for weights in copies]
        rows = local_rows_per_expert_and_token(self.inputs[0], PROBLEM)
        self.rows, self.active = int(rows.sum()), int(rows.any(dim=0).sum())
        output = torch.empty((self.tokens, PROBLEM.hidden_size), dtype=torch.bfloat16, device="cuda")
        self.key = key_of(self.inputs[0], output)
        max_rows = max_local_rows(PROBLEM, self.tokens)
        routing, activation, out = Arena(), Arena(), Arena()
        most = max(block_arrivals(PROBLEM, self.tokens, tile) for tile in GEMM1.values())
        reserve_routing(routing, PROBLEM, self.tokens, {"block_arrivals": most})
        reserve_activation(activation, PROBLEM, max_rows, GEMM1["s4 base"])
        out.reserve("rows", (max_rows, PROBLEM.hidden_size), torch.bfloat16)
        # What the variants write, of either GEMM.
        self.written = {"gemm1": memory_of(activation), "gemm2": memory_of(out)}
        self.results = {**activation.tensors(self.written["gemm1"]), **out.tensors(self.written["gemm2"])}
        # GEMM2 alone waits for no expert.
        self.all_finished = torch.full((PROBLEM.num_local_experts + 1,), 2**30, dtype=torch.int32, device="cuda")
        # By name, with the activations that GEMM2 starts from.
        self.ready = []
        for inputs in self.inputs:
            call = by_name(inputs, output, routing, memory_of(routing)) | activation.tensors(memory_of(activation))
            base = gemm1(PROBLEM, self.limits, self.key, GEMM1["s4 base"])
            for step in (*route(PROBLEM, self.limits, self.key, routing), base):
                step.run(call, output.device)
            self.ready.append(call)

    def floor_us(self, which: str, peak: PeakRates) -> float:
        """Of one GEMM: its weights and what it reads and writes once, or its operations."""
        h, i, b = PROBLEM.hidden_size, PROBLEM.intermediate_size, PROBLEM.block
        matrices = 2 if which == "gemm1" else 1
        moved = self.active * matrices * (h * i + h // b * (i // b) * 4)
        moved += self.tokens * h + self.rows * i if which == "gemm1" else self.rows * (i + 2 * h)
        flop = self.rows * 2 * matrices * h * i
        return max(moved / peak.read_bytes_per_s, flop / peak.fp8_flop_per_s) * 1e6

    def calls(self, which: str, tile: Tile) -> list[Callable[[], object]]:
        """One for each weight copy."""
        run, step = (self._gemm1, self._step1(tile)) if which == "gemm1" else (self._gemm2, self._step2(tile))
        return [lambda call=call: run(call, step) for call in self.ready]

    def result(self, which: str, tile: Tile) -> torch.Tensor:
        """Of the first copy, what isn't written being NaN."""
        self.written[which].fill_(255)
        self.calls(which, tile)[0]()
        if which == "gemm2":
            return self.results["rows"][: self.rows].float()
        values, scale = self.results["activated"], self.results["activated_scale"]
        return values[: self.rows].float() * scale[:, : self.rows].t().repeat_interleave(PROBLEM.block, dim=1)

    def _step1(self, tile: Tile) -> Step:
        return gemm1(PROBLEM, self.limits, self.key, tile)

    def _step2(self, tile: Tile) -> Step:
        signals = signals_of(PROBLEM, GEMM1["s4 base"])
        return gemm2(PROBLEM, self.limits, self.key, tile, PROBLEM.hidden_size, 0, signals)

    def _gemm1(self, call: dict, step: Step) -> None:
        call["block_arrivals"].zero_()  # for all variants, that none is favoured
        step.run(call | self.results, call["output"].device)

    def _gemm2(self, call: dict, step: Step) -> None:
        step.run(call | {"rows": self.results["rows"], "finished": self.all_finished}, call["output"].device)


def memory_of(arena: Arena) -> torch.Tensor:
    """For its tensors."""
    return torch.empty(arena.bytes, dtype=torch.uint8, device="cuda")


def measure(situation: Situation, which: str, tile: Tile, expected: torch.Tensor) -> tuple[float | None, str]:
    """Microseconds, or None and why there are none."""
    try:
        got = situation.result(which, tile)
        error = float((got - expected).norm() / expected.norm())
        if not error < RELATIVE_ERROR:
            return None, f"wrong by {error:.3g}"
        return time_graph(situation.calls(which, tile) * REPEATS, runs=5).median, ""
    except triton.runtime.errors.OutOfResources as error:
        return None, str(error)[:100]


def table(which: str, ratios: dict[tuple[str, str, str], float], names: list[str]) -> str:
    """Variants by situations."""
    lines = [f"{which:12}" + "".join(f"{name:>7}" for name in names)]
    best = {name: min((r for (w, n, _), r in ratios.items() if (w, n) == (which, name)), default=0.0) for name in names}
    for variant in VARIANTS[which]:
        cells = [ratios.get((which, name, variant)) for name in names]
        marked = ((r, "*" if r == best[name] else " ") for r, name in zip(cells, names, strict=True))
        shown = ("" if r is None else f"{r:.3f}{mark}" for r, mark in marked)
        lines.append(f"{variant:12}" + "".join(f"{cell:>7}" for cell in shown))
    return "\n".join(lines)


def main() -> None:
    """Measure all variants in the situations that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--situations", nargs="+", choices=list(SITUATIONS), default=list(SITUATIONS))
    parser.add_argument("--seconds", type=float, default=100.0, help="no situation is begun later than this")
    parser.add_argument("--workers", type=int, default=16)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")
    began = time.monotonic()
    jobs = [(which, tile, 901) for which, tiles in VARIANTS.items() for tile in tiles.values()]
    bad = compile_all(jobs, options.workers)
    peak = measure_peak_rates()
    device = torch.cuda.get_device_name()
    print(f"{device}, {peak}, compiled after {time.monotonic() - began:.0f} s", flush=True)
    copies = [random_weights(PROBLEM, "cuda", seed) for seed in range(3)]
    ratios: dict[tuple[str, str, str], float] = {}
    names = []
    for name in options.situations:
        if time.monotonic() - began > options.seconds:
            print("no time for", name)
            continue
        names.append(name)
        situation = Situation(SITUATIONS[name], copies)
        for which, tiles in VARIANTS.items():
            floor = situation.floor_us(which, peak)
            expected = situation.result(which, next(iter(tiles.values())))
            for variant, tile in tiles.items():
                us, problem = None, "does not compile"
                if (which, tile) not in bad:
                    us, problem = measure(situation, which, tile, expected)
                if us is None:
                    print(f"{which} {name} {variant}: {problem}", flush=True)
                else:
                    ratios[which, name, variant] = us / floor
                row = {"device": device, "gemm": which, "situation": name, "variant": variant, "tile": str(tile)}
                row |= {"us": us, "floor_us": round(floor, 2), "rows": situation.rows, "active": situation.active}
                with options.output.open("a") as out:
                    out.write(json.dumps(row) + os.linesep)
    for which in VARIANTS:
        print(table(which, ratios, names))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
