"""Serve for a while and check everything: threads, streams, graphs and eager calls at random T, policies exchanged.

    python benchmarks/soak.py                     # five minutes on DeepSeek-V3's layer, on a GPU
    python benchmarks/soak.py --seconds 3600 --threads 16 --output soak/
    python benchmarks/soak.py --small --multiprocessors 8 --calls 20000   # on a part of the GPU

Eight threads share four streams. Each draws calls at random: T from 0 to 16384, loads, e4m3 and bfloat16 hidden states,
logits and chosen experts, a new output and one that is given, with and without a workspace, eager and as a replay of a
graph of its own, which is captured again now and then. In ``uniform`` loads each expert's popularity is drawn, from all
alike to a few that have everything. Meanwhile the policy is exchanged every few seconds.

``--multiprocessors`` gives all streams to a green context, which has so many (CUDA rounds them up): launches of more
programs than fit at once, which wait for one another, must end there too.

Every output is compared on the device, bit for bit, with what the same candidate computed before the soak; that was
checked against the reference by the rule of `hybrid_moe.numerics`. Candidates whose results aren't the same bits twice
are refused: ``--backend`` names one that is. Between rounds all threads stop, and memory is read: it has to be flat
from the end of the second round on. At the end the counters have to show every call, and shadow checks no breach.

Prints a table by regime and mode, with latencies between events on the call's stream, beside all others. Writes
soak.json and soak.md to ``--output``, by default to the folder that the environment's OUT names. The exit status is 1
if anything was wrong. Without a GPU, ``--small`` soaks a small layer on the CPU, without streams and graphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import platform
import random
import resource
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hybrid_moe import Candidate, DeviceKey, HybridMoE, MoEInputs, MoEProblem, Policy, RoutedInputs, ShadowCheck
from hybrid_moe.files import write_whole
from hybrid_moe.inputs import Inputs
from hybrid_moe.measure.workloads import DEEPSEEK_V3, RoutingLoad, Workload, make_inputs, random_weights
from hybrid_moe.numerics import check
from hybrid_moe.policy.resolve import policy_or_nearest
from hybrid_moe.policy.versions import installed_versions
from hybrid_moe.reference import chosen_experts, has_local_work, moe_reference
from hybrid_moe.serving.quantize_input import quantize

SMALL = MoEProblem(
    num_experts=32, num_local_experts=8, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
LOADS: tuple[RoutingLoad, ...] = ("uniform", "zipf", "concentrated", "none")
# Calls of a thread that it hasn't looked back at.
IN_FLIGHT = 32
# Memory that may come and go between rounds: events, small tensors of the allocator's rounding. What stays reserved
# once the unused is given back depends on where the graphs of the moment lie, so on chance: a share of it.
ALLOCATED_SLACK, HOST_SLACK, RESERVED_SLACK = 2**20, 64 * 2**20, 0.25


@dataclass
class Case:
    """One call's activations, and what each candidate makes of them."""

    kind: str  # "e4m3", "bfloat16" or "routed"
    inputs: Inputs
    expected: dict[Candidate, torch.Tensor] = field(default_factory=dict)  # [T, H] as int16: NaN equals itself

    @property
    def tokens(self) -> int:
        """T."""
        return self.inputs.num_tokens

    def call(self, layer: HybridMoE, output: torch.Tensor | None = None, inputs: Inputs | None = None) -> torch.Tensor:
        """Call a layer with the activations, or with others of the same kind."""
        first, second, hidden, scale = (self.inputs if inputs is None else inputs)[:4]
        if self.kind == "routed":
            return layer(None, hidden, scale, topk_ids=first, topk_weights=second, output=output)
        return layer(first, hidden, scale, output=output)


class Latencies:
    """Latencies in buckets of one percent: as much memory after an hour as after a minute."""

    def __init__(self) -> None:
        self.buckets: dict[int, int] = defaultdict(int)
        self.longest = 0.0

    def add(self, microseconds: float) -> None:
        """Count one."""
        self.buckets[round(math.log(max(microseconds, 1e-3)) / math.log(1.01))] += 1
        self.longest = max(self.longest, microseconds)

    def merge(self, other: Latencies) -> None:
        """Count all of another's."""
        for bucket, count in other.buckets.items():
            self.buckets[bucket] += count
        self.longest = max(self.longest, other.longest)

    @property
    def count(self) -> int:
        """How many."""
        return sum(self.buckets.values())

    def quantile(self, share: float) -> float:
        """The latency in microseconds that ``share`` of all don't exceed."""
        left = share * self.count
        for bucket in sorted(self.buckets):
            left -= self.buckets[bucket]
            if left <= 0:
                return 1.01**bucket
        return math.nan


class Graph:
    """A captured call with its own tensors."""

    def __init__(self, layer: HybridMoE, case: Case, candidate: Candidate, stream: torch.cuda.Stream) -> None:
        self.case, self.candidate = case, candidate
        first, second, hidden, scale, *held = case.inputs
        own = (t.clone() if isinstance(t, torch.Tensor) else t for t in (first, second, hidden, scale))
        self.inputs = type(case.inputs)(*own, *held)
        self.output = torch.empty((case.tokens, hidden.shape[1]), dtype=torch.bfloat16, device=hidden.device)
        self.graph = torch.cuda.CUDAGraph()
        # On a stream of its own, as what other threads launch on the current one would be captured too. They go on
        # calling and reserving memory: of this thread alone nothing else may be asked.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                case.call(layer, self.output, self.inputs)
            finally:
                self.graph.capture_end()

    def replay(self, case: Case) -> torch.Tensor:
        """Run on another case's activations, of the same kind and T."""
        for mine, given in zip(self.inputs[:4], case.inputs[:4], strict=True):
            if mine is not None:
                mine.copy_(given)
        self.output.fill_(math.nan)
        self.graph.replay()
        return self.output


class Soak:
    """All that the threads share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cuda = torch.cuda.is_available() and not options.cpu
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.problem = SMALL if options.small else DEEPSEEK_V3
        self.random = random.Random(options.seed)
        weights = random_weights(self.problem, self.device, options.seed)
        self.base = make_inputs(Workload(1, self.problem.num_local_experts), self.problem, weights)
        self.policies = self._policies()
        shadow = ShadowCheck(every=options.shadow_every, max_overhead=math.inf) if options.shadow_every else None
        self.layers = {
            "plain": self._layer(self.base, shadow_check=shadow),
            "planned": self._layer(self.base, max_num_tokens=options.planned, shadow_check=shadow),
            "routed": self._layer(_routed(self.base, self.problem), max_num_tokens=options.planned),
        }
        # One by each policy, of either kind: what the layers may choose.
        self.by_policy = {
            routed: [self._layer_like(self.layers[name], policy=policy) for policy in self.policies]
            for routed, name in ((False, "plain"), (True, "routed"))
        }
        self.new_stream: Callable[[], torch.cuda.Stream] = lambda: torch.cuda.Stream(self.device)
        self.multiprocessors = None
        if options.multiprocessors:
            self.new_stream, self.multiprocessors = part_of_gpu(options.multiprocessors)
        self.streams = [self.new_stream() for _ in range(options.streams)] if self.cuda else [None]
        self.cases = self._cases()
        self.by_size: dict[tuple[str, int], list[Case]] = defaultdict(list)
        for case in self.cases:
            self.by_size[case.kind, case.tokens].append(case)
        self.barrier = threading.Barrier(options.threads + 1)
        self.deadline, self.stopping = 0.0, False
        self.capturing = threading.Lock()  # one graph at a time
        self.failures: list[str] = []
        self.reloads = self.captures = 0

    def _policies(self) -> list[Policy]:
        """What the layers are given in turns: the device's policy, and the same without its regimes."""
        if self.options.backend is not None:
            return []
        found, _, _ = policy_or_nearest(self.problem, DeviceKey.of(self.device).name)
        return [] if found is None else [found, found.model_copy(update={"regimes": []})]

    def _layer(self, inputs: Inputs, **options: Any) -> HybridMoE:
        return HybridMoE.from_inputs(inputs, self.problem, backend=self.options.backend, **options)

    def layer_of(self, case: Case, name: str) -> HybridMoE:
        """The layer that takes such a case."""
        return self.layers["routed" if case.kind == "routed" else name]

    def _cases(self) -> list[Case]:
        """T from 0 to the largest, small ones as often as large ones, and those of the graphs in every kind."""
        largest = self.options.max_tokens
        drawn = [round(math.exp(self.random.uniform(0, math.log(largest)))) for _ in range(self.options.cases)]
        counts = [0, 1, largest, *drawn]
        made = [self._case(n, tokens, ("e4m3", "bfloat16", "routed")[n % 3]) for n, tokens in enumerate(counts)]
        for tokens in self.options.graphs:
            # Two of each, so that a replay that didn't run would show.
            made += [self._case(n, tokens, kind) for kind in ("e4m3", "bfloat16", "routed") for n in range(2)]
        return made

    def _case(self, number: int, tokens: int, kind: str) -> Case:
        load = LOADS[number // 3 % len(LOADS)]
        # Few tokens may draw no local expert.
        load = "uniform" if tokens < 2 and load in ("zipf", "none") else load
        workload = Workload(tokens, self.base.local_expert_offset, load, seed=number)
        drawn = make_inputs(workload, self.problem, _weights_of(self.base))
        inputs: Inputs = drawn._replace(routing_bias=self.base.routing_bias)
        if load == "uniform" and tokens > 1:
            popularity = [self.random.gauss(0, 1) for _ in range(self.problem.num_experts)]
            spread = self.random.uniform(0, 8)
            shifts = torch.tensor(popularity, device=self.device) * spread
            inputs = inputs._replace(routing_logits=inputs.routing_logits + shifts)
        if kind == "bfloat16":
            hidden = inputs.hidden_states.float() * 0.01
            inputs = inputs._replace(hidden_states=hidden.bfloat16(), hidden_states_scale=None)
        elif kind == "routed":
            inputs = _routed(inputs, self.problem)
        case = Case(kind, inputs)
        for candidate in self._candidates(case):
            case.expected[candidate] = self._expected(case, candidate)
        return case

    def _candidates(self, case: Case) -> list[Candidate]:
        """What any of the policies chooses for a case."""
        layers = (self.layer_of(case, "plain"), *self.by_policy[case.kind == "routed"])
        return list({layer.choice(case.tokens): None for layer in layers})

    def _layer_like(self, layer: HybridMoE, **options: Any) -> HybridMoE:
        routed = layer is self.layers["routed"]
        return HybridMoE.from_inputs(_routed(self.base, self.problem) if routed else self.base, self.problem, **options)

    def _expected(self, case: Case, candidate: Candidate) -> torch.Tensor:
        """Its bits, after the check against the reference; the same twice."""
        layer = self._layer_like(self.layer_of(case, "plain"), backend=candidate)
        output = case.call(layer)
        if case.tokens:
            quantized = quantize(case.inputs) if case.inputs.hidden_states_scale is None else case.inputs
            reference = moe_reference(quantized, self.problem)
            correctness = check(output, reference, has_local_work(quantized, self.problem))
            if not correctness.passed:
                raise SystemExit(f"{candidate} is wrong at T = {case.tokens}: {'; '.join(correctness.failures)}")
        if not torch.equal(_bits(case.call(layer)), _bits(output)):
            raise SystemExit(f"{candidate} gives other bits each time at T = {case.tokens}: name another --backend")
        return _bits(output)


class Worker(threading.Thread):
    """One thread of the server: rounds of random calls on its stream."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(name=f"soak-{number}")
        self.soak, self.number = soak, number
        self.random = random.Random(f"{soak.options.seed} {number}")
        self.stream = soak.streams[number % len(soak.streams)]
        self.capture_stream = soak.new_stream() if soak.cuda else None
        self.latencies: dict[tuple[str, str], Latencies] = defaultdict(Latencies)
        self.wrong = torch.zeros((), dtype=torch.int64, device=soak.device)
        self.checked, self.counted = 0, 0
        self.flying: deque[tuple[tuple[str, str], Any, Any]] = deque()
        self.graphs: list[Graph] = []
        self.captured_at = 0.0

    def run(self) -> None:
        """Until `Soak.stopping`, round by round."""
        try:
            with torch.cuda.stream(self.stream):
                while True:
                    self.soak.barrier.wait()
                    if self.soak.stopping:
                        return
                    while time.monotonic() < self.soak.deadline:
                        self.step()
                    while self.flying:
                        self.look_back()
                    self.soak.barrier.wait()
        except threading.BrokenBarrierError:
            pass
        except BaseException:
            self.soak.failures.append(f"{self.name}:\n{traceback.format_exc()}")
            self.soak.barrier.abort()

    def step(self) -> None:
        """One call, checked."""
        if self.stream is not None and time.monotonic() - self.captured_at > self.soak.options.recapture_seconds:
            self.capture()
        mode = self.random.choice(("new output", "output=", "planned") + (("graph",) * 3 if self.graphs else ()))
        if mode == "graph":
            graph = self.random.choice(self.graphs)
            case = self.random.choice(self.soak.by_size[graph.case.kind, graph.case.tokens])
            self.timed(mode, case, lambda: graph.replay(case), [graph.candidate])
            return
        case = self.random.choice(self.soak.cases)
        layer = self.soak.layer_of(case, "planned" if mode == "planned" else "plain")
        output = None
        if mode != "new output":
            shape = (case.tokens, self.soak.problem.hidden_size)
            output = torch.full(shape, math.nan, dtype=torch.bfloat16, device=self.soak.device)
        self.counted += case.tokens > 0
        # Which of the policies ran the call isn't known: another thread may exchange it right before.
        self.timed(mode, case, lambda: case.call(layer, output), list(case.expected))

    def capture(self) -> None:
        """Graphs of every T and kind; later one of them again, as after a reload."""
        soak = self.soak
        sizes = [(kind, tokens) for tokens in soak.options.graphs for kind in ("e4m3", "bfloat16", "routed")]
        chosen = sizes if not self.graphs else [self.random.choice(sizes)]
        with soak.capturing:
            for kind, tokens in chosen:
                case = soak.by_size[kind, tokens][0]
                layer = soak.layer_of(case, "planned")
                while True:
                    candidate = layer.choice(tokens)
                    graph = Graph(layer, case, candidate, self.capture_stream)
                    self.counted += 1
                    soak.captures += 1
                    if layer.choice(tokens) == candidate:  # else a reload came between
                        break
                self.graphs = [g for g in self.graphs if (g.case.kind, g.case.tokens) != (kind, tokens)] + [graph]
        self.captured_at = time.monotonic()

    def timed(self, mode: str, case: Case, call: Callable[[], torch.Tensor], candidates: Sequence[Candidate]) -> None:
        """Make the call between two events, and compare what it wrote."""
        what = (band(case.tokens, self.soak), mode)
        if self.stream is None:
            begin = time.perf_counter()
            output = call()
            self.latencies[what].add((time.perf_counter() - begin) * 1e6)
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            output = call()
            end.record()
            self.flying.append((what, begin, end))
        bits = _bits(output)
        differs = [(bits != case.expected[candidate]).any() for candidate in candidates]
        self.wrong += torch.stack(differs).all()
        self.checked += 1
        if len(self.flying) > IN_FLIGHT:
            self.look_back()

    def look_back(self) -> None:
        """Take the latency of the earliest call that is in flight."""
        what, begin, end = self.flying.popleft()
        end.synchronize()
        self.latencies[what].add(begin.elapsed_time(end) * 1e3)


def part_of_gpu(multiprocessors: int) -> tuple[Callable[[], torch.cuda.Stream], int]:
    """What makes streams on a part of the current GPU, and how many multiprocessors that has."""
    from cuda.bindings import driver  # comes with torch for CUDA

    def called(result: Sequence[Any]) -> Any:
        if int(result[0]):
            raise SystemExit(f"--multiprocessors {multiprocessors}: {driver.cuGetErrorString(result[0])[1].decode()}")
        return result[1] if len(result) == 2 else result[1:]

    torch.cuda.synchronize()  # the device's own context is there
    device = called(driver.cuDeviceGet(torch.cuda.current_device()))
    whole = called(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    parts = called(driver.cuDevSmResourceSplitByCount(1, whole, 0, multiprocessors))[0]
    wanted = called(driver.cuDevResourceGenerateDesc(parts, 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = called(driver.cuGreenCtxCreate(wanted, device, flags))
    not_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING

    def new_stream() -> torch.cuda.Stream:
        return torch.cuda.ExternalStream(int(called(driver.cuGreenCtxStreamCreate(context, not_blocking, 0))))

    return new_stream, parts[0].sm.smCount


def band(tokens: int, soak: Soak) -> str:
    """The regime of the device's policy that holds T, or else a band of T."""
    if soak.policies:
        found = next((r for r in soak.policies[0].regimes if tokens in r), None)
        return "no regime" if found is None else found.label
    first = next(b for b in (8192, 1024, 128, 16, 1, 0) if tokens >= b)
    return {8192: "8192-", 1024: "1024-8191", 128: "128-1023", 16: "16-127", 1: "1-15", 0: "0"}[first]


def _bits(output: torch.Tensor) -> torch.Tensor:
    return output.view(torch.int16)


def _routed(inputs: MoEInputs, problem: MoEProblem) -> RoutedInputs:
    ids, weights = chosen_experts(inputs, problem)
    return RoutedInputs(ids.int(), weights, *inputs[2:])


def _weights_of(inputs: Inputs) -> Any:
    return inputs  # `make_inputs` asks for the four by their names


def memory(soak: Soak, trim: bool) -> dict[str, int]:
    """Bytes of the device and of the host, while nothing runs; ``trim`` gives back what is reserved and unused."""
    gc.collect()
    found = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "host": _resident()}
    if soak.cuda:
        torch.cuda.synchronize()
        found["allocated"] = torch.cuda.memory_allocated()
        found["reserved"] = torch.cuda.memory_reserved()
        if trim:
            torch.cuda.empty_cache()
            found["trimmed"] = torch.cuda.memory_reserved()
    return found


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def reloading(soak: Soak, stop: threading.Event) -> None:
    """Exchange the layers' policies in turns."""
    while not stop.wait(soak.options.reload_seconds):
        policy = soak.policies[soak.reloads % 2]
        for layer in soak.layers.values():
            layer.reload_policy(policy)
        soak.reloads += 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The soak: what it found, as a JSON object."""
    soak = Soak(options)
    print(f"{len(soak.cases)} cases are checked against the reference; soaking for {options.seconds:g} s", flush=True)
    for layer in soak.layers.values():
        layer.warm_up(sorted({case.tokens for case in soak.cases} - {0}))
    workers = [Worker(soak, number) for number in range(options.threads)]
    if soak.cuda:
        torch.cuda.synchronize()  # before other streams read what this one wrote
    counted_before = sum(s.calls for layer in soak.layers.values() for s in layer.stats())
    stop = threading.Event()
    reloader = threading.Thread(target=reloading, args=(soak, stop))
    if soak.policies:
        reloader.start()
    rounds = []
    begin = time.monotonic()
    try:
        for worker in workers:
            worker.start()
        while (
            (elapsed := time.monotonic() - begin) < options.seconds
            or len(rounds) < 3
            or sum(worker.checked for worker in workers) < options.calls
        ):
            left = options.seconds - elapsed if elapsed < options.seconds else options.round_seconds
            soak.deadline = time.monotonic() + min(options.round_seconds, max(left, 0.1))
            soak.barrier.wait()
            soak.barrier.wait(timeout=600)
            elapsed = time.monotonic() - begin
            trim = len(rounds) == 1 or elapsed >= options.seconds
            rounds.append({"seconds": round(elapsed, 1), **memory(soak, trim)})
        soak.stopping = True
        soak.barrier.wait()
    except threading.BrokenBarrierError:
        soak.failures.append("the threads didn't come to the end of a round")
    finally:
        stop.set()
        soak.barrier.abort()
        for thread in (*workers, *([reloader] if soak.policies else [])):
            if thread.ident is not None:
                thread.join(60)
    seconds = time.monotonic() - begin
    for layer in soak.layers.values():
        layer.finish_shadow_checks()
    return _result(soak, workers, rounds, seconds, counted_before)


def _result(
    soak: Soak, workers: Sequence[Worker], rounds: Sequence[dict[str, Any]], seconds: float, counted_before: int
) -> dict[str, Any]:
    wrong = sum(int(worker.wrong) for worker in workers)
    failures = list(soak.failures)
    if wrong:
        failures.append(f"{wrong} outputs differ from what was checked")
    made = sum(worker.counted for worker in workers)
    counted = sum(s.calls for layer in soak.layers.values() for s in layer.stats()) - counted_before
    if counted != made and not soak.failures:
        failures.append(f"the counters show {counted} calls; {made} were made")
    shadow = [status for layer in soak.layers.values() if (status := layer.shadow) is not None]
    if breaches := sum(status.breaches for status in shadow):
        failures.append(f"{breaches} shadow checks found a wrong result")
    if len(rounds) >= 3:
        first, last = rounds[1], rounds[-1]
        slacks = {"allocated": ALLOCATED_SLACK, "host": HOST_SLACK, "trimmed": RESERVED_SLACK * first.get("trimmed", 0)}
        for name, slack in slacks.items():
            if name in first and name in last and last[name] > first[name] + slack:
                failures.append(f"memory grows: {name} {first[name]:,} bytes after round 2, {last[name]:,} at the end")
    table: dict[tuple[str, str], Latencies] = defaultdict(Latencies)
    for worker in workers:
        for what, latencies in worker.latencies.items():
            table[what].merge(latencies)
    return {
        "device": DeviceKey.of(soak.device).name,
        "problem": soak.problem.definition,
        "environment": {"python": platform.python_version(), **installed_versions()},
        "options": {k: v for k, v in vars(soak.options).items() if k != "output"},
        "multiprocessors": soak.multiprocessors,
        "seconds": round(seconds, 1),
        "calls": sum(worker.checked for worker in workers),
        "wrong": wrong,
        "candidates": sorted({str(c) for case in soak.cases for c in case.expected}),
        "reloads": soak.reloads,
        "captures": soak.captures,
        "counted": {"made": made, "counters": counted},
        "shadow": [dataclasses.asdict(status) for status in shadow],
        "rounds": list(rounds),
        "latency_us": [
            {
                "regime": regime,
                "mode": mode,
                "calls": found.count,
                "p50": round(found.quantile(0.5), 1),
                "p99": round(found.quantile(0.99), 1),
                "longest": round(found.longest, 1),
            }
            for (regime, mode), found in sorted(table.items(), key=lambda item: (_first(item[0][0]), item[0][1]))
        ],
        "failures": failures,
    }


def _first(regime: str) -> int:
    number = regime.partition("-")[0]
    return int(number) if number.isdigit() else sys.maxsize


def markdown(result: dict[str, Any]) -> str:
    """The result for people."""
    part = f", {result['multiprocessors']} multiprocessors" if result["multiprocessors"] else ""
    lines = [
        f"{result['device']}{part}, {result['problem']}: {result['seconds']:g} s, {result['calls']:,} calls by "
        f"{result['options']['threads']} threads, {result['captures']} graphs captured, {result['reloads']} reloads, "
        f"{', '.join(result['candidates'])}",
        "",
        "| regime | mode | calls | p50 (us) | p99 (us) | longest (us) |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in result["latency_us"]:
        numbers = f"{row['calls']:,} | {row['p50']:,.0f} | {row['p99']:,.0f} | {row['longest']:,.0f}"
        lines.append(f"| {row['regime']} | {row['mode']} | {numbers} |")
    lines += ["", f"outputs that differ: {result['wrong']} of {result['calls']:,}"]
    counted = result["counted"]
    lines.append(f"calls counted: {counted['counters']:,} of {counted['made']:,} eager and captured")
    checks = sum(status["checks"] for status in result["shadow"])
    lines.append(f"shadow checks: {checks:,}, {sum(status['breaches'] for status in result['shadow'])} breaches")
    if len(result["rounds"]) > 1:
        first, last = result["rounds"][1], result["rounds"][-1]
        for name in ("allocated", "reserved", "trimmed", "host"):
            if name in first and name in last:
                pair = f"{first[name] / 2**20:,.1f} after round 2, {last[name] / 2**20:,.1f} at the end"
                lines.append(f"memory {name} (MiB): {pair}")
    lines += ["", "PASSED" if not result["failures"] else "FAILED:", *result["failures"]]
    return "\n".join(lines) + "\n"


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--calls", type=int, default=0, help="go on until so many are made")
    parser.add_argument("--multiprocessors", type=int, help="of the GPU, in a green context; default: all, without one")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--planned", type=int, default=4096, help="max_num_tokens of the layer with a workspace")
    parser.add_argument("--cases", type=int, default=60, help="T drawn at random")
    parser.add_argument("--graphs", type=int, nargs="*", default=[1, 16, 80, 901], help="T of the graphs")
    parser.add_argument("--reload-seconds", type=float, default=2)
    parser.add_argument("--recapture-seconds", type=float, default=20)
    parser.add_argument("--round-seconds", type=float, default=10)
    parser.add_argument("--shadow-every", type=int, default=200, help="calls between shadow checks; 0 for none")
    parser.add_argument("--backend", help="in place of the device's policy, which isn't exchanged then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a small layer")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT"), help="folder for soak.json and soak.md")
    options = parser.parse_args(arguments)
    if options.multiprocessors and (options.cpu or not torch.cuda.is_available()):
        parser.error("--multiprocessors: expected an NVIDIA GPU that torch can use, got none")
    if not options.small and (options.cpu or not torch.cuda.is_available()):
        parser.error("expected an NVIDIA GPU that torch can use, got none; --small soaks a small layer on the CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, print and write; the exit status."""
    options = parsed(arguments)
    result = run(options)
    text = markdown(result)
    print(text, end="")
    if options.output is not None:
        folder = Path(options.output)
        write_whole(folder / "soak.json", (json.dumps(result, indent=2, default=str) + "\n").encode())
        write_whole(folder / "soak.md", text.encode())
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
