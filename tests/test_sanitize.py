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


def racecheck_says(tmp_path, monkeypatch, *lines):
    """What is made of a report of races between each first line and those that follow it."""
    (tmp_path / "kernel.py").write_text("\n".join(line for line, _ in lines))
    monkeypatch.setattr(sanitize.hybrid_moe.kernels, "__path__", [str(tmp_path)])
    sanitize._line.cache_clear()
    report = [
        f"{'and' if number else 'Race reported between'} {kind} access at k+0x10 in kernel.py:{number + 1}"
        for number, (_, kind) in enumerate(lines)
    ]
    return sanitize.races("\n".join(report))


def test_handovers_between_warp_groups_are_no_races(tmp_path, monkeypatch):
    write, read = ("sums.store(total)", "Write"), ("sums.store(total + sums.load(SUM))", "Read")
    assert racecheck_says(tmp_path, monkeypatch, write, read, read) == (2, [])
    assert racecheck_says(tmp_path, monkeypatch, read, write) == (1, [])


def test_what_is_no_handover_is_a_race(tmp_path, monkeypatch):
    write, read = ("sums.store(total)", "Write"), ("sums.load(SUM)", "Read")
    handed_over, others = racecheck_says(tmp_path, monkeypatch, write, write, read)
    assert handed_over == 1 and len(others) == 1 and "kernel.py" in others[0]
    assert racecheck_says(tmp_path, monkeypatch, write, ("x.load(ROWS)", "Read"))[0] == 0


def test_of_two_files_of_a_name_the_one_beside_the_kernel_counts(tmp_path, monkeypatch):
    for folder, line in (("sm90", "shared.store(x)\nshared.load(L)"), ("triton", "x = 1\ny = 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "common.py").write_text(line)
    monkeypatch.setattr(sanitize.hybrid_moe.kernels, "__path__", [str(tmp_path)])
    for folder, found in (("sm90", 1), ("triton", 0)):
        sanitize._line.cache_clear()
        monkeypatch.setattr(sanitize, "kernels", lambda folder=folder: {"k": tmp_path / folder})
        said = "Race reported between Write access at k+0x10 in common.py:1\nand Read access at k+0x20 in common.py:2"
        assert sanitize.races(said)[0] == found


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
