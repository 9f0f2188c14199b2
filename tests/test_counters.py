"""The benchmark that asks ncu: what it reads from its table."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "counters.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("counters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(*kernels):
    """What ncu prints: its own lines, then a table whose second row has the units."""
    lines = ["==PROF== Connected", '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum"', '"","","ns","byte"']
    return "\n".join(lines + [f'"{at}","{name}","{ns}","{size}"' for at, (name, ns, size) in enumerate(kernels)])


MARK = ("spin_kernel(long)", "2000", "0")


@pytest.mark.parametrize("failed", [False, True])
def test_profile(script, monkeypatch, failed):
    text = "==ERROR== no permission" if failed else said(MARK, ("clear_kernel", "3000", "64"))
    done = subprocess.CompletedProcess([], 1 if failed else 0, text, "")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: done)
    if failed:
        with pytest.raises(SystemExit, match="ncu failed .1.: ==ERROR== no permission"):
            script.profile("ncu", 1)
    else:
        assert [row["Kernel Name"] for row in script.profile("ncu", 1)] == ["spin_kernel(long)", "clear_kernel"]


def test_table(script):
    """A call begins at its marker; what ncu couldn't count stays empty."""
    rows = [
        dict(zip(("Kernel Name", "gpu__time_duration.sum", "dram__bytes.sum"), each, strict=True))
        for each in (MARK, ("a_kernel", "1,500.0", "2,000,000"), MARK, ("a_kernel", "n/a", ""), ("b_kernel", "9", "0"))
    ]
    head, rule, *lines = script.table(rows, [1, 8])
    assert head.count("|") == rule.count("|") == lines[0].count("|")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    at = 2 + list(script.METRICS).index("DRAM, MB")
    assert [(row[0], row[1], row[2], row[at]) for row in cells] == [
        ("1", "`a_kernel`", "1.5", "2.0"),
        ("8", "`a_kernel`", "", ""),
        ("8", "`b_kernel`", "0.0", "0.0"),
    ]
