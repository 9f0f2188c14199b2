"""benchmarks/sanitize.py: what it makes of a tool's output, and cases that the interpreter can run."""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import pytest

from hybrid_moe.kernels.interpreter import repair

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("sanitize", ROOT / "benchmarks" / "sanitize.py")
sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitize)


@pytest.mark.parametrize(
    ("tool", "line", "found"),
    [
        ("memcheck", "========= ERROR SUMMARY: 30 errors were not printed. Use --print-limit option", True),
        ("memcheck", "========= ERROR SUMMARY: 0 errors", False),
        ("racecheck", "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", True),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", False),
    ],
)
def test_what_a_tool_found_is_read_from_its_summary(tool, line, found):
    assert bool(re.match(sanitize.PLANTED[tool][1], sanitize.summary(f"launched\n{line}\n"))) == found


def test_a_tool_without_a_summary_found_nothing_and_is_quoted():
    said = sanitize.summary("Error: no device")
    assert said == "Error: no device"
    assert not re.match(sanitize.PLANTED["initcheck"][1], said)


def test_every_kernel_of_the_package_is_watched():
    source = "\n".join(path.read_text() for path in (ROOT / "hybrid_moe" / "kernels").rglob("*.py"))
    defined = set(re.findall(r"jit.*\)?\ndef (\w+_kernel)\(", source))
    assert set(sanitize.kernels()) == defined - {"wait_for_previous_kernel", "let_next_kernel_start"}


@pytest.mark.parametrize("name", ["around_sgl", "around_deep_gemm", "whole_library", "dot_products"])
def test_a_case_gives_numbers(name):
    repair()
    problem = dataclasses.replace(sanitize.DEEPSEEK_V3, hidden_size=256, intermediate_size=128)
    case = functools.partial(sanitize.CASES[name], problem)
    output = case(tokens=2)
    assert output.isfinite().all()
    assert output.any()
