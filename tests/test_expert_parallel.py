"""The example of expert parallelism: two processes, whose sum is that of the parts on one device."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "expert_parallel.py"


def launch(*options, ranks=2):
    """Start torchrun, which waits for its ranks and fails with them."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(SCRIPT)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*run, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process, timeout=60):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def assert_right(process, head, tokens_of_ranks, **options):
    code, out, err = finished(process, **options)
    assert code == 0, err
    lines = out.splitlines()
    assert any(re.match(head, line) for line in lines), out
    for name in ("step", "its layer", "one device"):
        assert re.search(rf"^{name} +\d+\.\d us", out, re.MULTILINE), out
    for rank, tokens in enumerate(tokens_of_ranks):
        found = re.search(rf"^rank {rank}: tokens {tokens} right, relative L2 (\d\.\d+)", out, re.MULTILINE)
        assert found and float(found[1]) < 0.005, out


def test_two_processes():
    # Side by side, as most of their time is the start. An odd T: the last share of a scatter is shorter.
    cpu = ("--device", "cpu", "--tokens", "41", "--steps", "2")
    whole, shared = launch(*cpu), launch(*cpu, "--reduce", "scatter")
    try:
        head = r"2 x cpu, 8 of 16 experts, T = 41, reduce {}, eager: torch_reference$"
        assert_right(whole, head.format("all"), ["0-40", "0-40"])
        assert_right(shared, head.format("scatter"), ["0-20", "21-40"])
    finally:
        for process in (whole, shared):
            process.kill()


@pytest.fixture
def script(monkeypatch):
    """The example's module, in a group of this process alone."""
    spec = importlib.util.spec_from_file_location("expert_parallel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield module
    dist.destroy_process_group()


OPTIONS = argparse.Namespace(tokens=19, reduce="all", steps=1, graph=False, backend=None)
CPU = torch.device("cpu")


def test_a_sum_that_lacks_a_part_is_wrong(script, monkeypatch, capsys):
    assert script.run(OPTIONS, CPU)
    assert "tokens 0-18 right" in capsys.readouterr().out
    # The first of two ranks, and nobody there to add the other's part.
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert not script.run(OPTIONS, CPU)
    assert "tokens 0-18 WRONG: matched ratio" in capsys.readouterr().out


@pytest.mark.parametrize("tokens, ranks, shares", [(5, 2, ["0:3", "3:5"]), (2, 4, ["0:1", "1:2", "2:2", "2:2"])])
def test_shares_of_a_scatter(script, monkeypatch, tokens, ranks, shares):
    weights = script.random_weights(script.SMALL, CPU)
    inputs = script.make_inputs(script.Workload(tokens), script.SMALL, weights)
    layer = script.HybridMoE.from_inputs(inputs, script.SMALL, backend="torch_reference")
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    for rank, share in enumerate(shares):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        step = script.ExpertParallelStep(layer, inputs, "scatter")
        assert f"{step.tokens.start}:{step.tokens.stop}" == share
        assert step.result.shape == (step.tokens.stop - step.tokens.start, 256)


@pytest.mark.parametrize(
    "change, words",
    [({"tokens": 0}, ["--tokens is 0", "1 or more"]), ({"ranks": 5}, ["--nproc-per-node is 5", "at most 4"])],
)
def test_bad_options(script, monkeypatch, change, words):
    ranks = change.pop("ranks", 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    with pytest.raises(ValueError) as caught:
        script.run(argparse.Namespace(**vars(OPTIONS) | change), CPU)
    assert all(word in str(caught.value) for word in words)


def test_without_torchrun(script, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["expert_parallel.py"])
    with pytest.raises(SystemExit):
        script.main()
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [(), ("--graph",), ("--reduce", "scatter", "--tokens", "901")], ids=" ".join)
def test_two_gpus(options):
    tokens = ["0-450", "451-900"] if "901" in options else ["0-63", "0-63"]
    how = "one CUDA graph" if "--graph" in options else "eager"
    head = rf"2 x nvidia_\w+, 64 of 256 experts, T = \d+, reduce \w+, {how}: "
    assert_right(launch(*options), head, tokens, timeout=600)
