"""A bench without a GPU: latencies by formula, and candidates that misbehave, for the tests of sweeps."""

import ctypes
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_moe.candidate import Candidate
from hybrid_moe.cli.demo import SMALL
from hybrid_moe.measure.bench import record_fields
from hybrid_moe.measure.records import BenchRecord, RecordCorrectness
from hybrid_moe.measure.sweep.process import Identity
from hybrid_moe.problem import MoEProblem

# Microseconds a + b * T: from T = 50 on B is faster than A, from T = 1889 on C faster than B.
A, B, C = (Candidate(name) for name in ("fake_a", "fake_b", "fake_c"))
COSTS = {A: (10.0, 0.5), B: (30.0, 0.1), C: (200.0, 0.01)}


def latency_us(choice, num_tokens, costs=COSTS):
    fixed, each = costs[choice]
    return fixed + each * num_tokens


class _Mute(Exception):
    def __str__(self):
        raise RuntimeError("an exception without a message")


@dataclass
class FakeBench:
    """``bad`` says how candidates misbehave: kind by name, or by workload as ``fake_a@16 zipf``."""

    problem: MoEProblem = SMALL
    device: str = "cpu"
    environment: Mapping[str, str] = field(default_factory=lambda: {"torch": "1.0"})
    costs: Mapping[Candidate, tuple[float, float]] = field(default_factory=lambda: COSTS)
    bad: Mapping[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    pids: Path | None = None
    workload = None
    broken = False

    def identify(self):
        print("a library prints what it likes")
        if self.pids is not None:
            with open(self.pids, "a") as file:
                file.write(f"{os.getpid()}\n")
        return Identity(self.device, self.environment)

    def load(self, workload):
        if self.bad.get("load") == "raise":
            raise RuntimeError("no room for the weights")
        self.workload = workload

    def usable(self):
        return not self.broken

    def measure(self, choice, timings):
        workload = self.workload
        kind = self.bad.get(str(choice)) or self.bad.get(f"{choice}@{workload.num_tokens} {workload.routing}")
        common = record_fields(self.device, self.problem, workload, choice, self.environment)
        for timing in timings:
            time.sleep(self.pause_s)
            # Noise to the libraries' taste, on both descriptors, between the records.
            os.write(1, b"noise\x00{\n")
            os.write(2, b"more noise")
            if kind == "hang" or kind == f"hang {timing}":
                time.sleep(1e6)
            elif kind == "exit":
                os._exit(7)
            elif kind == "leave a child":  # which has this process's pipes, and would keep them open
                if os.fork() == 0:
                    time.sleep(30)
                    os._exit(0)
                os._exit(5)
            elif kind == "segfault":
                ctypes.string_at(0)
            elif kind in ("raise", "break"):
                self.broken = kind == "break"
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            elif kind == "unencodable":
                raise RuntimeError("\udcff\x1b[2J")
            elif kind == "mute":
                raise _Mute()
            elif kind in ("wrong", "refuse"):
                status, reason = ("failed", "relative_l2 is 0.7") if kind == "wrong" else ("unsupported", "no such GPU")
                yield BenchRecord(**common, timing=timing, status=status, reason=reason)
            else:
                us = latency_us(choice, workload.num_tokens, self.costs) * (1 if timing == "cuda_graph" else 2)
                latency = {"median": us, "p10": us, "p90": us, "runs": 5}
                gate = RecordCorrectness(relative_l2=0.02, matched_ratio=1.0)
                yield BenchRecord(**common, timing=timing, status="passed", latency_us=latency, correctness=gate)
