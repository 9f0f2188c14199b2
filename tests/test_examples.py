"""The examples run where there is no GPU, and print what they say."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "serve_layer.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("serve_layer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_layer", module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs at full size on a GPU: see test_gpu_serving.py")
def test_a_serving_loop(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve_layer.py", "--steps", "20"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"warmed up 6 token counts in \d+\.\d s on cpu", lines[0])
    # Of 20 steps two are prefills, of 40 and of 100; the decode steps go through 1, 4, 16 and 64, 18 in all.
    found = re.fullmatch(
        r"eager  no regime    torch_reference: [\d,]+ tokens/s \(20 steps, T = 1, 4, 16, 40, 64, 100\)", lines[1]
    )
    assert found
    decode = sum(script.DECODE[step % 4] for step in range(20) if step % 10 != 9)
    assert lines[2:] == [f"called in Python: torch_reference 20 times, {decode + 140} tokens"]
