"""Time each GEMM of the Triton pipeline over many tiles; what the tile table was chosen from.

python benchmarks/tune_tiles.py --output tiles.jsonl --tokens 1 15 56

GEMM1 is timed with the routing before it, which clears its counters; GEMM2 alone. Kernels are compiled first, on all
cores. Every tile's result is compared with that of the first before it is timed.
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

from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.kernels.arena import Arena
from hybrid_moe.kernels.combine import combine
from hybrid_moe.kernels.grouped_gemm.tiles import MBucket, Tile
from hybrid_moe.kernels.grouped_gemm.triton.gemm1 import block_arrivals, gemm1, reserve_activation
from hybrid_moe.kernels.grouped_gemm.triton.gemm1 import signals as signals_of
from hybrid_moe.kernels.grouped_gemm.triton.gemm2 import gemm2
from hybrid_moe.kernels.launcher import DeviceLimits
from hybrid_moe.kernels.plan import LaunchKey, addresses_of, by_name
from hybrid_moe.kernels.routing import reserve_routing, route
from hybrid_moe.kernels.shapes import column_chunk, max_local_rows
from hybrid_moe.kernels.steps import AnyStep
from hybrid_moe.measure.timing import Work, measure_peak_rates, time_graph
from hybrid_moe.measure.workloads import DEEPSEEK_V3 as PROBLEM
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights

REPEATS = 4  # of the weight copies in one graph
SHARED_LIMIT = 225_000


def candidates(which: str, tokens: int) -> list[Tile]:
    """Tiles worth trying at this T: up to 16 rows for all, then 64 or 128 rows, or 16 where an expert has no more."""
    shapes = [(16, 64, 4), (16, 128, 4)] if tokens <= 32 else []
    if tokens > 16:
        shapes += [(32, 64, 4), (64, 64, 4), (64, 128, 4)]
    if tokens > 256:
        shapes += [(64, 128, 8), (128, 64, 8), (128, 128, 8)]
        if which == "gemm2":
            shapes += [(128, 256, 8), (64, 256, 8)]
    tiles = []
    for (m, n, warps), (stages, unroll) in product(shapes, ((3, 1), (4, 1), (5, 1), (2, 2), (3, 2))):
        if m > 16 and unroll > 1:
            continue
        few_rows = ((), (MBucket(16, 3, 2),), (MBucket(16, 4),)) if m > 16 and n <= 128 else ((),)
        for few in few_rows:
            buckets = (*few, MBucket(m, stages, unroll))
            weights = 2 * n if which == "gemm1" else n
            shared = 128 * max(bucket.num_stages * bucket.k_unroll * (weights + bucket.block_m) for bucket in buckets)
            if shared <= SHARED_LIMIT:
                tiles.append(Tile(n, warps, buckets, 32 if tokens <= 2560 else 4, which == "gemm2" and n <= 128))
    return tiles


def limits_for() -> DeviceLimits:
    """Launch parameters of the device."""
    return DeviceLimits(torch.cuda.get_device_properties(0).multi_processor_count, pdl=True)


def key_of(inputs: MoEInputs, output: torch.Tensor) -> LaunchKey:
    """What the launches hang on."""
    return LaunchKey.of(inputs, addresses_of(inputs), output, row_alignment=1)


def reserved(tokens: int, tile: Tile) -> Arena:
    """Of all that the steps of a call with this tile of GEMM1 want."""
    arena, rows = Arena(), max_local_rows(PROBLEM, tokens)
    reserve_routing(arena, PROBLEM, tokens, {"block_arrivals": block_arrivals(PROBLEM, tokens, tile)})
    reserve_activation(arena, PROBLEM, rows, tile)
    arena.reserve("rows", (rows, column_chunk(PROBLEM, rows)), torch.bfloat16)
    return arena


class Bench:
    """One T: inputs on each weight copy, and the tensors that GEMM2 and the combine start from."""

    def __init__(self, tokens: int, copies: list) -> None:
        self.tokens = tokens
        self.inputs = [make_inputs(Workload(tokens, 32), PROBLEM, w) for w in copies]
        self.limits = limits_for()
        self.work = Work.of(self.inputs[0], PROBLEM)
        self.firsts = range(0, PROBLEM.hidden_size, column_chunk(PROBLEM, max_local_rows(PROBLEM, tokens)))
        self.output = torch.empty((tokens, PROBLEM.hidden_size), dtype=torch.bfloat16, device="cuda")
        self.key = key_of(self.inputs[0], self.output)
        first = Tile(128, 8, (MBucket(64, 3),))
        self.ready = [self.tensors(inputs, reserved(tokens, first)) for inputs in self.inputs]
        for call in self.ready:
            self.run(call, *self.routing(reserved(tokens, first)), gemm1(PROBLEM, self.limits, self.key, first))

    def tensors(self, inputs: MoEInputs, arena: Arena) -> dict:
        """By name, in memory of their own."""
        return by_name(inputs, self.output, arena, torch.empty(arena.bytes, dtype=torch.uint8, device="cuda"))

    def routing(self, arena: Arena) -> list[AnyStep]:
        """Its two steps."""
        return route(PROBLEM, self.limits, self.key, arena)

    def run(self, call: dict, *steps: AnyStep) -> None:
        """Launch steps with the tensors of a call."""
        for step in steps:
            step.run(call, self.output.device)

    def calls(self, which: str, tile: Tile):
        """The calls that a graph holds, and a function that gives the result of the first."""
        if which == "gemm1":
            arena = reserved(self.tokens, tile)
            steps = [*self.routing(arena), gemm1(PROBLEM, self.limits, self.key, tile)]
            taken = [self.tensors(inputs, arena) for inputs in self.inputs]
        else:
            columns = self.firsts.step
            signals = signals_of(PROBLEM, tile)
            steps = [gemm2(PROBLEM, self.limits, self.key, tile, columns, first, signals) for first in self.firsts]
            # Alone it waits for no expert.
            finished = torch.full((PROBLEM.num_local_experts + 1,), 2**30, dtype=torch.int32, device="cuda")
            taken = [call | {"finished": finished} for call in self.ready]

        def result():
            self.run(taken[0], *steps)
            rows = self.work.local_rows
            if which == "gemm2":
                return taken[0]["rows"][:rows].float()
            # Slots may differ from call to call: compare the rows' sorted sums.
            scale = taken[0]["activated_scale"][:, :rows].t().repeat_interleave(128, dim=1)
            return (taken[0]["activated"][:rows].float() * scale).norm(dim=1).sort().values

        return [lambda call=call: self.run(call, *steps) for call in taken], result

    def other_steps(self) -> dict[str, float]:
        """Microseconds of routing and combine alone."""
        arena = reserved(self.tokens, Tile(128, 8, (MBucket(64, 3),)))
        routing = time_graph([lambda c=c: self.run(c, *self.routing(arena)) for c in self.ready] * REPEATS, runs=5)
        steps = [combine(PROBLEM, self.limits, self.key, self.firsts.step, first) for first in self.firsts]
        combining = time_graph([lambda c=c: self.run(c, *steps) for c in self.ready] * REPEATS, runs=5)
        return {"route": routing.median, "combine": combining.median}


def compile_one(which: str, tile: Tile, tokens: int) -> None:
    """In a worker: compile without launching, into the shared cache."""
    jit = triton.runtime.jit.JITFunction
    original = jit.run
    jit.run = lambda self, *a, grid, warmup, **k: original(self, *a, grid=grid, warmup=True, **k)
    try:

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        h = PROBLEM.hidden_size
        inputs = MoEInputs(
            empty(tokens, 256), empty(256), empty(tokens, h, dtype=FP8), empty(h // 128, tokens),
            empty(1, 256, h, dtype=FP8), empty(16), empty(1, 256, PROBLEM.intermediate_size, dtype=FP8), empty(16),
            32, 2.5,
        )  # fmt: skip
        output, arena = empty(tokens, h, dtype=torch.bfloat16), reserved(tokens, tile)
        key = key_of(inputs, output)
        call = by_name(inputs, output, arena, empty(arena.bytes, dtype=torch.uint8))
        if which == "gemm1":
            step = gemm1(PROBLEM, limits_for(), key, tile)
        else:
            step = gemm2(PROBLEM, limits_for(), key, tile, call["rows"].shape[1], 0, signals_of(PROBLEM, tile))
        step.run(call, output.device)
    finally:
        jit.run = original


def compile_all(jobs: list[tuple[str, Tile, int]], workers: int) -> set[tuple[str, Tile]]:
    """Compile each specialisation once; returns what doesn't compile."""
    bad, seen = set(), {}
    for which, tile, tokens in jobs:
        chunk = column_chunk(PROBLEM, max_local_rows(PROBLEM, tokens)) if which == "gemm2" else 0
        seen.setdefault((which, tile, chunk), tokens)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, key[0], key[1], tokens): key for key, tokens in seen.items()}
        for future in as_completed(futures):
            if error := future.exception():
                bad.add(futures[future][:2])
                print("does not compile:", futures[future], str(error)[:200], flush=True)
    print(f"compiled {len(seen)}", flush=True)
    return bad


def main() -> None:
    """Sweep what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--workers", type=int, default=14)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")

    jobs = [(which, tile, t) for t in options.tokens for which in ("gemm1", "gemm2") for tile in candidates(which, t)]
    bad = compile_all(jobs, options.workers)
    peak = measure_peak_rates()
    print(peak, flush=True)
    copies = [random_weights(PROBLEM, "cuda", seed) for seed in range(3)]
    for tokens in options.tokens:
        bench = Bench(tokens, copies)
        floor = bench.work.floor_us(peak)
        print(f"T={tokens} rows={bench.work.local_rows} active={bench.work.active_experts} floor {floor:.1f}")
        print("  ", bench.other_steps())
        for which in ("gemm1", "gemm2"):
            part = floor * (2 / 3 if which == "gemm1" else 1 / 3)
            expected, timed = None, []
            for w, tile, t in jobs:
                if (w, t) != (which, tokens) or (which, tile) in bad:
                    continue
                try:
                    calls, result = bench.calls(which, tile)
                    got = result()
                    expected = got if expected is None else expected
                    error = float((got - expected).norm() / expected.norm())
                    if not error < 0.01:
                        print("WRONG", tokens, which, tile, error, flush=True)
                        continue
                    latency = time_graph(calls * REPEATS, runs=5)
                except triton.runtime.errors.OutOfResources as error:
                    print("does not fit:", tokens, which, tile, str(error)[:150], flush=True)
                    continue
                timed.append((latency.median, tile))
                row = {"tokens": tokens, "gemm": which, "tile": str(tile), "us": latency.median, "floor_us": part}
                with options.output.open("a") as out:
                    out.write(json.dumps(row) + os.linesep)
            for us, tile in sorted(timed, key=lambda pair: pair[0])[:8]:
                buckets = " ".join(
                    f"{bucket.block_m}:{bucket.num_stages}x{bucket.k_unroll}" for bucket in tile.m_buckets
                )
                short = f"{buckets} by {tile.block_n}, {tile.num_warps} warps"
                print(f"   {which} {us:8.1f} {us / part:5.2f} {short}", flush=True)


if __name__ == "__main__":
    main()
