"""The benchmark of states of the source: what it imports from where, turns, and what it says of bits."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "versions.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("versions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def states(tmp_path):
    """Two folders with a package each, whose function imports when it is called."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "hybrid_moe"}
    for name in ("before", "after"):
        folder = tmp_path / name / "hybrid_moe"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("def fused_moe():\n    from .late import VALUE\n    return VALUE\n")
        (folder / "late.py").write_text(f"VALUE = {name!r}\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "hybrid_moe"]:
        del sys.modules[name]
    sys.modules.update(ours)


def test_each_state_has_its_own_modules(script, states):
    modules, loaded = script.Modules(), []
    for name in ("before", "after", "before"):
        loaded.append(modules.load(states / name))
        assert loaded[-1].fused_moe() == name
    kept = {id(module) for of_one in modules._kept for module in of_one}
    assert len(set(map(id, loaded))) == 3 and {*map(id, loaded[:-1])} <= kept


def test_a_package_from_elsewhere(script, states):
    (states / "nothing").mkdir()
    with pytest.raises(ImportError):
        script.Modules().load(states / "nothing")


def test_turns(script):
    """All once, then all again; a median each."""
    replayed = []

    def time(replay):
        replay()
        return float(len(replayed))

    us = script.by_turns({"a": lambda: replayed.append("a"), "b": lambda: replayed.append("b")}, time)
    assert replayed == ["a", "b"] * (2 + script.TURNS)
    middle = 2 + script.TURNS // 2
    assert us == {"a": 2 * middle + 1, "b": 2 * middle + 2}


def test_bits(script):
    def prepared(value, **changes):
        fields = {"outputs": [torch.full((2, 128), value)], "repeats": True, "finite": True} | changes
        return types.SimpleNamespace(**fields)

    assert script.bits({"a": prepared(1.0), "b": prepared(1.0)}) == "equal"
    assert script.bits({"a": prepared(1.0), "b": prepared(1.5)}) == "b differs by 5.0e-01"
    wrong = {"a": prepared(1.0, repeats=False), "b": prepared(1.0, finite=False)}
    assert script.bits(wrong) == "a doesn't repeat its own; b isn't finite"


def test_a_state_without_the_package(script, states, monkeypatch, capsys):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: True)
    command = ["versions.py", "--state", f"a={states}", "--case", "deepseek-v3:1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        script.main()
    assert f"--state a: expected a folder with hybrid_moe/ in it, got {states}" in capsys.readouterr().err
