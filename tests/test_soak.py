"""The soak: small ones on the CPU pass, and each thing that they watch for is found."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from test_api import forget, make_policy

from hybrid_moe import Candidate, backends, save_policy
from hybrid_moe.backends.torch_reference import TorchReference
from hybrid_moe.kernels import interpreter
from hybrid_moe.policy.store import policy_path, user_policy_dir

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "soak.py"
CPU = ["--small", "--cpu", "--round-seconds", "0.3", "--cases", "6", "--max-tokens", "9", "--planned", "4", "--graphs"]


@pytest.fixture
def soak(monkeypatch):
    forget()
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    forget()


def test_threads_on_the_cpu_pass(soak, tmp_path, capsys):
    options = [*CPU, "--seconds", "1", "--threads", "3", "--backend", "torch_reference", "--shadow-every", "5"]
    assert soak.main([*options, "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "soak.json").read_text())
    assert result["calls"] > 20 and result["wrong"] == 0 and not result["failures"]
    assert result["counted"]["made"] == result["counted"]["counters"] > 0
    assert sum(row["calls"] for row in result["latency_us"]) == result["calls"]
    assert all(0 < row["p50"] <= row["p99"] <= row["longest"] * 1.01 for row in result["latency_us"])
    assert sum(status["checks"] for status in result["shadow"]) > 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("PASSED") and "| 1-15 | planned |" in text
    assert (tmp_path / "out" / "soak.md").read_text() in text


@pytest.mark.skipif(not interpreter.interpreting(), reason="the interpreter isn't used on a GPU")
def test_own_kernels_in_the_interpreter_pass(soak):
    options = ["--small", "--cpu", "--cases", "1", "--max-tokens", "3", "--planned", "2", "--graphs"]
    options += ["--seconds", "1", "--round-seconds", "0.5", "--threads", "1", "--backend", "triton_fused"]
    assert soak.main([*options, "--shadow-every", "0"]) == 0


class Near(TorchReference):
    """The reference with other bits, near enough to be right."""

    def __init__(self, name, factor):
        self.name, self.factor = name, factor

    def prepare(self, problem, device, config):
        runner = super().prepare(problem, device, config)
        run, factor = runner.run, self.factor

        def run_near(inputs, output):
            run(inputs, output)
            output.mul_(factor)

        runner.run = run_near
        return runner


def test_policies_are_exchanged_meanwhile(soak, monkeypatch, capsys):
    """Two candidates of which either may have run: each output is that of one."""
    for near in (Near("one", 1.01), Near("two", 0.99)):
        monkeypatch.setitem(backends.BACKENDS, near.name, near)
    save_policy(make_policy(problem=soak.SMALL), policy_path(user_policy_dir(), "cpu", soak.SMALL))
    assert soak.main([*CPU, "--seconds", "1", "--threads", "2", "--reload-seconds", "0.05"]) == 0
    text = capsys.readouterr().out
    assert "| 0-4 | new output |" in text and ", 0 reloads" not in text
    assert "one, torch_reference, two" in text


def test_a_wrong_output_is_found(soak, monkeypatch, capsys):
    runner = type(backends.prepare(soak.SMALL, soak.DeviceKey("cpu"), Candidate("torch_reference")))
    run, begun = runner.run, []

    def sometimes_wrong(self, inputs, output):
        run(self, inputs, output)
        if begun and inputs.num_tokens == 9:
            output[-1, -1] += 1

    def started(*arguments):
        begun.append(True)
        return worker(*arguments)

    worker = soak.Worker
    monkeypatch.setattr(runner, "run", sometimes_wrong)
    monkeypatch.setattr(soak, "Worker", started)
    assert soak.main([*CPU, "--seconds", "1", "--threads", "2", "--backend", "torch_reference"]) == 1
    assert "outputs differ from what was checked" in capsys.readouterr().out


def test_a_wrong_beginning_is_refused(soak, monkeypatch):
    runner = type(backends.prepare(soak.SMALL, soak.DeviceKey("cpu"), Candidate("torch_reference")))
    monkeypatch.setattr(runner, "run", lambda self, inputs, output: output.fill_(3.0))
    with pytest.raises(SystemExit, match="torch_reference is wrong at T = "):
        soak.main([*CPU, "--seconds", "1", "--threads", "2", "--backend", "torch_reference"])


def test_an_error_in_a_thread_ends_it(soak, monkeypatch, capsys):
    def broken(self):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(soak.Worker, "step", broken)
    assert soak.main([*CPU, "--seconds", "1", "--threads", "2", "--backend", "torch_reference"]) == 1
    assert "illegal memory access" in capsys.readouterr().out


def test_memory_that_grows_is_found(soak, monkeypatch, capsys):
    taken = iter(range(0, 2**40, 2**30))
    monkeypatch.setattr(soak, "_resident", lambda: next(taken))
    assert soak.main([*CPU, "--seconds", "1", "--threads", "1", "--backend", "torch_reference"]) == 1
    assert "memory grows: host" in capsys.readouterr().out


def test_calls_that_are_not_counted_are_found(soak, monkeypatch, capsys):
    monkeypatch.setattr(soak.HybridMoE, "stats", lambda self: ())
    assert soak.main([*CPU, "--seconds", "0.5", "--threads", "1", "--backend", "torch_reference"]) == 1
    assert "the counters show 0 calls" in capsys.readouterr().out


def test_quantiles(soak):
    latencies = soak.Latencies()
    for value in range(1, 1001):
        latencies.add(value)
    assert latencies.count == 1000 and latencies.longest == 1000
    assert latencies.quantile(0.5) == pytest.approx(500, rel=0.01)
    assert latencies.quantile(0.99) == pytest.approx(990, rel=0.01)


def test_a_gpu_is_wanted_for_the_whole_layer(soak, capsys):
    with pytest.raises(SystemExit):
        soak.parsed(["--cpu"])
    assert "--small soaks a small layer on the CPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_soak_of_seconds_on_a_gpu(soak, capsys):
    options = ["--seconds", "15", "--round-seconds", "3", "--cases", "12", "--recapture-seconds", "2"]
    status = soak.main([*options, "--max-tokens", "4096", "--planned", "1024", "--graphs", "1", "80"])
    assert status == 0, capsys.readouterr().out
    assert torch.cuda.memory_allocated() > 0
