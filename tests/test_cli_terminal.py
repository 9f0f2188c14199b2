"""What a person sees of the command line: at any width, in its help, in a pipe, and when it is interrupted."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from test_cli import cli, cli_json, fails

from hybrid_moe import backends
from hybrid_moe.candidate import Candidate
from hybrid_moe.cli import COMMANDS, app
from hybrid_moe.cli.common import device_named
from hybrid_moe.cli.table import Column, Fitted

ROOT = Path(__file__).parents[1]
H200 = next(ROOT.glob("policies/nvidia_h200/*.json"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


# ---- Width ----


@pytest.fixture(params=[60, 80, 120])
def width(request, monkeypatch):
    monkeypatch.setattr("hybrid_moe.cli.common.out.width", request.param)
    return request.param


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "--device", "nvidia_b200"),
        ("explain", "--device", "nvidia_h200", "--num-tokens", 300),
        ("explain", "--device", "nvidia_h200", "--here"),
        ("evaluate", H200, ROOT / "benchmarks/results/nvidia_h200/definition.jsonl"),
        ("verify", H200),
        ("doctor",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_nothing_is_cut_at_any_width(arguments, width):
    text = cli(*arguments).stdout
    assert "…" not in text
    for line in text.splitlines():
        # Paths and sentences wrap by themselves in a terminal; tables can't.
        assert len(line.rstrip()) <= width or "  " not in line.strip() or "/" in line, line
    # A name is whole, or not there.
    for name in re.findall(r"triton_fused\S*", text):
        assert re.match(r"triton_fused\[gemm=\w+\]", name), name


def test_letters_stand_for_names_where_there_is_no_room(monkeypatch):
    by_width = {}
    for width in (60, 120):
        monkeypatch.setattr("hybrid_moe.cli.common.out.width", width)
        by_width[width] = cli("explain", "--device", "nvidia_b200").stdout
    assert re.search(r"14-32 +triton_fused\[gemm=sgl_kernel\] +tie", by_width[120])
    assert re.search(r"14-32 +D +tie", by_width[60])
    assert re.search(r"^ D +triton_fused\[gemm=sgl_kernel\]$", by_width[60], re.MULTILINE)


def test_a_table_gives_up_its_optional_columns_last_first():
    from rich.console import Console

    def shown(width):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))
        table = Fitted([Column("T"), Column("wide one", optional=True), Column("other", optional=True), Column("runs")])
        table.add("1", "x" * 12, "y" * 12, Candidate("triton_fused", {"gemm": "triton"}))
        console.print(table)
        return console.export_text()

    assert "triton_fused[gemm=triton]" in shown(80) and "yyy" in shown(80) and " E " not in shown(80)
    assert " E" in shown(40) and "yyy" in shown(40)
    assert "xxx" in shown(30) and "yyy" not in shown(30)
    assert "xxx" not in shown(14) and " E" in shown(14)


def test_a_pipe_takes_the_width_of_columns():
    def longest(**environment):
        done = run("explain", "--device", "nvidia_b200", **environment)
        return max(len(line) for line in done.stdout.splitlines() if line.startswith(" "))

    assert longest(COLUMNS="60") <= 60 < longest(COLUMNS="")


# ---- Help ----


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command):
    words = [] if command is None else [command]
    short, long = cli(*words, "-h").stdout, cli(*words, "--help").stdout
    assert short == long and "Usage: " in short
    if command is not None:
        assert COMMANDS[command].SUMMARY in cli("-h").stdout
        for example in COMMANDS[command].EXAMPLES:
            assert example in short


def test_the_list_of_commands_is_not_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = cli("-h").stdout
    assert "..." not in text.replace("[ARGS]...", "")
    for name, module in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(module.SUMMARY)}$", text, re.MULTILINE)


@pytest.mark.parametrize("example", [e for module in COMMANDS.values() for e in module.EXAMPLES])
def test_the_examples_of_the_help_are_understood(example):
    program, command, *arguments = shlex.split(example)
    assert program == "hybrid-moe"
    with typer.main.get_command(app).commands[command].make_context(command, arguments):
        pass


def test_every_command_that_speaks_of_a_layer_has_the_same_options():
    commands = typer.main.get_command(app).commands
    options = {name: {o for p in command.params for o in p.opts} for name, command in commands.items()}
    layer = {"--model", "--num-experts", "--num-local-experts", "--top-k", "--n-group", "--topk-group"}
    layer |= {"--hidden-size", "--intermediate-size", "--routing-method", "--gate-first"}
    assert [name for name in options if layer <= options[name]] == ["run", "explain", "regenerate", "solution"]


# ---- Names of devices ----


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("b200", "nvidia_b200"),
        ("NVIDIA B200", "nvidia_b200"),
        ("nvidia_h100", "nvidia_h100_80gb_hbm3"),
        ("H100", "nvidia_h100_80gb_hbm3"),
        ("nvidia", "nvidia"),  # several
        ("h2", "h2"),  # no whole word
        ("mi300x", "mi300x"),
    ],
)
def test_a_device_by_a_part_of_its_name(text, found):
    assert device_named(text, ["nvidia_b200", "nvidia_h100_80gb_hbm3", "nvidia_h200"]) == found


def test_an_exact_name_comes_first():
    assert device_named("nvidia_h100", ["nvidia_h100", "nvidia_h100_nvl"]) == "nvidia_h100"


def test_a_short_name_is_enough_everywhere(tmp_path):
    assert "T = 16 on nvidia_b200" in cli("explain", "--device", "b200", "--num-tokens", 16).stdout
    assert cli_json("solution", "--device", "h200", "-o", tmp_path / "s.json")["name"].endswith("nvidia_h200")
    assert "Did you mean nvidia_b200?" in fails("explain", "--device", "b20")
    assert "Did you mean" not in fails("explain", "--device", "mi300x")


# ---- What was measured, and for what ----


def test_nothing_of_another_problems_policy_is_called_measured():
    text = cli("explain", "--device", "nvidia_h100_80gb_hbm3", "--model", "kimi-k2").stdout
    assert "not measured for this problem" in text
    assert not re.search(r"(?<!not )(?<!was )\bmeasured\b", text) and "training regret" not in text
    found = cli_json("explain", "--device", "nvidia_h100_80gb_hbm3", "--model", "kimi-k2")
    assert {regime["verified"] for regime in found["regimes"]} == {"not_measured"}
    assert found["training_regret"] is None and found["leave_one_out_regret"] is None
    own = cli_json("explain", "--device", "nvidia_h100_80gb_hbm3")
    assert {regime["verified"] for regime in own["regimes"]} == {"measured"} and own["training_regret"]


@pytest.mark.parametrize("device", ["nvidia_h100_80gb_hbm3", "nvidia_h200"])
def test_the_strip_reaches_as_far_as_the_records(device):
    largest = max(e["num_tokens"] for r in cli_json("explain", "--device", device)["regimes"] for e in r["evidence"])
    assert largest == 16384
    assert re.search(r"^1 +10 +100 +1000 +10000 +T$", cli("explain", "--device", device).stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("num_tokens", "kernels"),
    [
        (16, "GEMM1 sm90/few_rows.py, GEMM2 sm90/few_rows.py, for 0.5 rows"),
        (
            200,
            "GEMM1 sm90/few_rows.py, GEMM2 sm90/few_rows.py, sm90/many_rows.py for experts that more than 75% of the "
            "tokens choose, for 6.25 rows",
        ),
        (250, "GEMM1 sm90/many_rows.py, GEMM2 sm90/many_rows.py, for 7.81 rows"),
    ],
)
def test_explain_names_the_kernels(num_tokens, kernels):
    text = cli("explain", "--device", "h100", "--num-tokens", num_tokens).stdout
    assert f"kernels: {kernels}" in " ".join(text.split())
    for module in re.findall(r"\w+/\w+\.py", kernels):
        assert (ROOT / "hybrid_moe/kernels/grouped_gemm" / module).is_file()
    assert "kernels:" not in cli("explain", "--device", "b200", "--num-tokens", num_tokens).stdout  # a library's


# ---- Too large, closed, interrupted ----


def test_a_t_that_no_machine_holds():
    message = fails("run", "--device", "cpu", "--num-tokens", 10**9)
    assert "T = 1000000000" in message and "GB of this machine" in message


def test_a_cpu_out_of_memory_is_no_bug(monkeypatch):
    def allocate(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("hybrid_moe.cli.run.random_weights", allocate)
    assert "can't allocate memory" in fails("run", "--device", "cpu")


def run(*arguments, shell=None, **environment):
    command = [sys.executable, "-m", "hybrid_moe", *arguments]
    if shell is not None:
        command = ["bash", "-c", f"set -o pipefail; {shlex.join(command)} {shell}"]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment)


def test_as_a_module():
    done = run("--version")
    assert done.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize(
    "arguments", [("explain", "--device", "h200"), ("explain", "--device", "h200", "--json"), ("run", "-h"), ("-h",)]
)
def test_who_reads_may_stop(arguments):
    done = run(*arguments, shell="| head -1")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1


def start(folder, content):
    """The program's own start, with ``content`` in place of torch."""
    (folder / "torch.py").write_text(content)
    command = [sys.executable, "-c", "from hybrid_moe_cli import main; main()", "doctor"]
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


def test_interrupted_while_torch_is_imported(tmp_path):
    done = start(tmp_path, "raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    # Anything else is seen.
    assert "ZeroDivisionError" in start(tmp_path, "1 / 0").stderr


def test_interrupted_in_a_command(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybrid_moe.cli.run.random_weights", interrupt)
    result = cli("run", "--device", "cpu", code=130)
    assert result.stderr.strip() == "interrupted"


def test_every_backend_is_in_the_doctors_list_with_its_letter():
    text = cli("doctor").stdout
    rows = re.findall(r"^(?:yes|no )  ?([A-Z])  (\S+)$", text.replace("yes ", "yes  "), re.MULTILINE)
    assert {name for _, name in rows} == {str(c) for c in backends.candidates()}
    assert len({letter for letter, _ in rows}) == len(rows)
    assert json.loads(cli("doctor", "--json").stdout)["backends"]
