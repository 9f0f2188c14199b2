"""Time each GEMM of the Triton pipeline alone over many tiles; what the tile table was chosen from.

python benchmarks/tune_tiles.py --output tiles.jsonl --tokens 1 15 56

Kernels are compiled first, on all cores. Every tile's result is compared with that of the first before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from hybrid_moe.kernels.grouped_gemm.tiles import Tile, TilePlan
from hybrid_moe.kernels.grouped_gemm.triton_gemm import gemm1, gemm2
from hybrid_moe.kernels.pipeline import Launch, column_chunk, route
from hybrid_moe.timing import Work, measure_ceilings, time_graph
from hybrid_moe.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights

OUTPUT = TilePlan(Tile(64, 128, 8, 3, 2), Tile(64, 128, 4, 3, 4))


def candidates(tokens: int) -> list[tuple[int, int, int, int]]:
    """(block_m, block_n, num_warps, num_stages) worth trying at this T."""
    tiles = []
    if tokens <= 100:
        tiles += product((16,), (16, 32, 64), (2, 4), (3, 5, 7))
        tiles += product((16,), (128,), (4,), (3, 4, 5))
    if 30 <= tokens <= 5000:
        tiles += product((32,), (32, 64), (4,), (3, 5))
        tiles += product((64,), (32, 64), (4,), (3, 5))
        tiles += product((64,), (128,), (4,), (3, 4))
    if tokens > 100:
        tiles += product((64,), (128,), (8,), (3, 4))
        tiles += product((128,), (64, 128), (4, 8), (3, 4))
    return tiles


def grid_bounds(tokens: int) -> tuple[int, ...]:
    """Programs a multiprocessor worth trying at this T; 32 is as good as one program a tile."""
    return (8, 32) if tokens <= 100 else (2, 4, 32)


def shared_bytes(which: str, tile: tuple[int, int, int, int], quantized: bool) -> int:
    """Shared memory of a tile's load pipeline, about."""
    m, n, _, stages = tile
    return stages * 128 * (2 * n + m if which == "gemm1" else n + m * (1 if quantized else 4))


def launch_of() -> Launch:
    """This device's launch parameters."""
    return Launch(torch.cuda.get_device_properties(0).multi_processor_count, pdl=True)


class Bench:
    """One T: routed inputs on each weight copy and the activations that GEMM2 starts from."""

    def __init__(self, tokens: int, copies: list) -> None:
        self.problem = DEEPSEEK_V3
        workload = Workload(tokens, 32)
        self.inputs = [make_inputs(workload, self.problem, w) for w in copies]
        self.launch = launch_of()
        self.routed = [route(i, self.problem, self.launch) for i in self.inputs]
        self.work = Work.of(self.inputs[0], self.problem)
        self.tokens = tokens

    def plan(self, which: str, tile: Tile, quantized: bool) -> TilePlan:
        """A plan with this tile; the other GEMM's tile decides whether the activation is quantised."""
        if which == "gemm1":
            return TilePlan(tile, OUTPUT.gemm2)
        return TilePlan(Tile(64, 128 if quantized else 64, 4, 3, 4), tile)

    def calls(self, which: str, tile: Tile, quantized: bool):
        """The calls that a graph holds, and a function that gives the result of the first."""
        plan = self.plan(which, tile, quantized)
        pairs = list(zip(self.inputs, self.routed, strict=True))
        if which == "gemm1":
            calls = [lambda i=i, r=r: gemm1(i, r, self.problem, self.launch, plan) for i, r in pairs]
            rows = self.work.local_rows

            def result():
                values, scale = calls[0]()
                values = values[:rows].float()
                if plan.quantized:
                    values = values * scale[:, :rows].t().repeat_interleave(128, dim=1)
                return values
        else:
            activated = [gemm1(i, r, self.problem, self.launch, plan) for i, r in pairs]
            capacity = activated[0][0].shape[0]
            columns = column_chunk(self.problem, capacity)
            rows_out = torch.empty((capacity, columns), dtype=torch.bfloat16, device="cuda")

            def run(a, i, r):
                for first in range(0, self.problem.hidden_size, columns):
                    gemm2(*a, i, r, self.problem, self.launch, plan, rows_out, first)

            calls = [lambda a=a, i=i, r=r: run(a, i, r) for a, (i, r) in zip(activated, pairs, strict=True)]

            def result():
                calls[0]()
                return rows_out[: self.work.local_rows].float()

        return calls, result


def compile_one(which: str, tile: tuple, quantized: bool, tokens: int) -> None:
    """In a worker: compile without launching, into the shared cache."""
    from hybrid_moe.kernels.grouped_gemm import triton_gemm

    kernel = triton_gemm.gemm1_swiglu_kernel if which == "gemm1" else triton_gemm.gemm2_kernel
    run = triton.runtime.jit.JITFunction.run
    type(kernel).run = lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k)
    e, h, i = 32, 7168, 2048
    empty = lambda *s, d=torch.float32: torch.empty(s, dtype=d, device="cuda")  # noqa: E731
    from hybrid_moe.kernels.pipeline import Routed, row_capacity
    from hybrid_moe.problem import FP8, MoEInputs

    inputs = MoEInputs(
        empty(tokens, 256), empty(256), empty(tokens, h, d=FP8), empty(h // 128, tokens), empty(1, 16, d=FP8), empty(16),
        empty(1, 16, d=FP8), empty(16), 32, 2.5,
    )  # fmt: skip
    ints = empty(e, d=torch.int32)
    routed = Routed(ints, ints, ints, ints)
    full = Tile(*tile, 4)
    if which == "gemm1":
        gemm1(inputs, routed, DEEPSEEK_V3, launch_of(), TilePlan(full, OUTPUT.gemm2))
    else:
        plan = TilePlan(Tile(64, 128 if quantized else 64, 4, 3, 4), full)
        capacity = row_capacity(DEEPSEEK_V3, tokens)
        activated = empty(1, 16, d=FP8 if quantized else torch.float32)
        out = torch.empty((capacity, column_chunk(DEEPSEEK_V3, capacity)), dtype=torch.bfloat16, device="cuda")
        gemm2(activated, empty(1, 16), inputs, routed, DEEPSEEK_V3, launch_of(), plan, out, 0)


def main() -> None:
    """Sweep what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--workers", type=int, default=12)
    options = parser.parse_args()

    jobs = []
    for tokens in options.tokens:
        for which, tile in product(("gemm1", "gemm2"), candidates(tokens)):
            for quantized in (False, True) if which == "gemm2" else (False,):
                if quantized and tokens < 30 or not quantized and which == "gemm2" and tokens > 5000:
                    continue
                if shared_bytes(which, tile, quantized) <= 225_000:
                    jobs.append((which, tile, quantized, tokens))
    bad = set()
    seen = {}
    for which, tile, quantized, tokens in jobs:
        seen.setdefault((which, tile, quantized, column_chunk(DEEPSEEK_V3, tokens * 8), tokens == 1, tokens % 16 == 0, tokens % 2), tokens)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, k[0], k[1], k[2], tokens): k for k, tokens in seen.items()}
        for future in as_completed(futures):
            if error := future.exception():
                bad.add(futures[future][:3])
                print("does not compile:", futures[future], str(error)[:200], flush=True)
    print(f"compiled {len(seen)}", flush=True)

    ceilings = measure_ceilings()
    print(ceilings, flush=True)
    copies = [random_weights(DEEPSEEK_V3, "cuda", seed) for seed in range(3)]
    for tokens in options.tokens:
        bench = Bench(tokens, copies)
        floor = bench.work.floor_us(ceilings)
        expected, results = {}, {}
        for which, shape, quantized, t in jobs:
            if t != tokens or (which, shape, quantized) in bad:
                continue
            for per in grid_bounds(tokens):
                tile = Tile(*shape, per)
                try:
                    calls, result = bench.calls(which, tile, quantized)
                    got = result()
                    want = expected.setdefault((which, quantized), got)
                    error = float((got - want).norm() / want.norm())
                    if not error < 0.04:
                        print("WRONG", tokens, which, tile, quantized, error, flush=True)
                        continue
                    latency = time_graph(calls * 4, runs=5)
                except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                    print("fails:", tokens, which, tile, str(error)[:150], flush=True)
                    continue
                row = dict(tokens=tokens, gemm=which, quantized=quantized, tile=[*shape, per], us=latency.median, p90=latency.p90)
                row |= dict(floor_us=floor * (2 / 3 if which == "gemm1" else 1 / 3), rows=bench.work.local_rows)
                row |= dict(active=bench.work.active_experts)
                results.setdefault((which, quantized), []).append((latency.median, tile))
                with options.output.open("a") as out:
                    out.write(json.dumps(row) + os.linesep)
        for (which, quantized), timed in results.items():
            timed.sort(key=lambda pair: pair[0])
            part = floor * (2 / 3 if which == "gemm1" else 1 / 3)
            print(f"T={tokens} rows={bench.work.local_rows} active={bench.work.active_experts} {which} quantized={quantized} floor {part:.1f}")
            for us, tile in timed[:6]:
                print(f"   {us:8.1f} {us / part:5.2f} {tile}", flush=True)


if __name__ == "__main__":
    main()
