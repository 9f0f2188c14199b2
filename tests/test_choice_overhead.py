"""The benchmark of the host's own time: that it compares what it says, and prints it."""

import importlib.util
import sys
from pathlib import Path

import pytest

from hybrid_moe import backends

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "choice_overhead.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("choice_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    return module


def test_every_way_calls_the_same_runner_once(script, monkeypatch):
    seen = []
    monkeypatch.setattr(script._IdleRunner, "run", lambda self, inputs, output: seen.append((self, output)))
    for call in script.ways(20, 16).values():
        call()
    assert len(seen) == 4
    assert len({id(runner) for runner, _ in seen}) == 1 and len({id(output) for _, output in seen}) == 1


def test_it_prints_what_choosing_costs(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["choice_overhead.py", "--turns", "3", "--calls", "5", "--tokens", "20"])
    script.main()
    text = capsys.readouterr().out
    for name in ("runner ", "backend ", "policy ", "fused_moe ", "policy over backend:", "policy over runner:"):
        assert name in text
