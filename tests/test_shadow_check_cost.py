"""The benchmark of shadow checks' cost: a small run on the CPU, and its figures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "shadow_check_cost.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("shadow_check_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shadow_check_cost", module)
    spec.loader.exec_module(module)
    return module


def test_a_small_run(script, tmp_path, capsys):
    options = ["--small", "--tokens", "3", "--every", "2", "4", "--turns", "2", "--calls", "4", "--max-overhead", "inf"]
    script.main([*options, "--backend", "torch_reference", "--output", str(tmp_path)])
    rows = [r for r in json.loads((tmp_path / "shadow_check_cost.json").read_text())["rows"] if r["mode"] == "eager"]
    # Three batches of four calls each, and the first layer's calls aren't checked.
    assert [(row["every"], row["checks"], row["skipped"]) for row in rows] == [(2, 6, 0), (4, 3, 0)]
    assert "in all (%)" in capsys.readouterr().out


def test_figures(script):
    times = {"eager 0": [100.0, 200.0, 100.0], "eager 50": [102.0, 204.0, 101.0]}

    class Layer:
        class shadow:
            checks, skipped, breaches = 6, 0, 0

        def finish_shadow_checks(self):
            pass

    (row,) = script.rows(times, {"eager 50": script.Way(Layer(), None)}, 16)
    assert row["slowdown_percent"] == pytest.approx(2.0) and row["call_us"] == 100.0
    assert row["total_percent"] == pytest.approx(1.75)
