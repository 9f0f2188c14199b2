"""The benchmark of both GEMMs: which launches it takes for which, and what it adds up."""

import importlib.util
import types
from pathlib import Path

import pytest
from test_specialized import key_of

from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import DeviceLimits
from hybrid_moe.kernels.steps import LibraryStep
from hybrid_moe.measure.workloads import DEEPSEEK_V3

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gemms.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gemms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launches(tokens):
    return TritonGroupedGemm((9, 0)).steps(DEEPSEEK_V3, DeviceLimits(132, pdl=True), key_of(tokens))


@pytest.mark.parametrize("tokens, wanted", [(4096, [1, 2, 0]), (128, [1, 2, 1, 2, 0]), (32768, [1, 2, 0, 2, 0])])
def test_own_launches(script, tokens, wanted):
    """A pair for busy experts before the others', and a result in two chunks of columns."""
    steps = launches(tokens)
    assert [script.gemm_of(steps, n) for n in range(len(steps))] == wanted


def test_a_librarys_calls(script):
    first, *_ = launches(4096)
    call = LibraryStep(lambda call: None)
    steps = [types.SimpleNamespace(kernel=types.SimpleNamespace(function=lambda: None)), call, call]
    steps[0].kernel.function.__name__ = "gather_kernel"
    assert [script.gemm_of(steps, n) for n in range(3)] == [0, 1, 2]
    assert script.gemm_of([first, *steps], 2) == 1


def test_chunks_are_added_up(script):
    until = {0: 0, 1: 100, 2: 130, 3: 137, 4: 177}  # the launches take 100, 30, 7, 40 and, unasked, 5
    assert script.lengths(launches(32768)) == [*until]
    assert script.gemms_of(launches(32768), until) == [100, 70]


def test_graphs_take_turns(script, monkeypatch):
    """Each key's median, of as many replays as the others', one after the other."""
    replayed = []

    def graph(calls):
        return lambda: replayed.append(calls[0]())

    monkeypatch.setattr(script, "CUDA_CLOCK", types.SimpleNamespace(graph=graph))
    monkeypatch.setattr(script.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(script, "event_us", lambda replay: replay() or 8.0 * len(replayed))
    us = script.medians({"a": [lambda: "a"] * 4, "b": [lambda: "b"] * 8})
    assert replayed == ["a", "b"] * (2 + script.RUNS)
    middle = 2 + script.RUNS // 2  # the turn of the median: each takes longer than the one before
    assert us == {"a": 8.0 * (2 * middle + 1) / 4, "b": 8.0 * (2 * middle + 2) / 8}
