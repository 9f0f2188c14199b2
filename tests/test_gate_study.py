"""The study behind the gate's bounds: its pipelines are the layer, and it catches what it should, at small sizes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import OWN_KERNELS_TOLERANCE, check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work, moe_reference

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gate_study
from gate.corruptions import BELOW_ROUNDING, CORRUPTIONS, Bench
from gate.data import DATA_SETS, DataSet
from gate.pipelines import FUSED, PIPELINES, results

SMALL = MoEProblem(
    num_experts=16, num_local_experts=8, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=256
)
TOKENS = 300
# Below what honest results scatter in a call this small.
TOO_SMALL = {"everything times 1.005", "one pair's weight 10% too large"}


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(Workload(TOKENS, 8), SMALL, random_weights(SMALL, "cpu"))


def test_the_pipelines_are_the_layer(inputs):
    reference, outputs, work = results(inputs, SMALL)
    torch.testing.assert_close(reference, moe_reference(inputs, SMALL), rtol=1e-4, atol=1e-4)
    assert torch.equal(work, has_local_work(inputs, SMALL))
    twin = moe_reference(inputs, SMALL, quantize_intermediate=True)
    # The rows and the output are rounded to bfloat16 as well.
    assert check(outputs[FUSED.name], twin, work).relative_l2 < 0.003
    # Each rounds something of its own.
    for one in PIPELINES:
        for other in PIPELINES:
            assert one is other or not torch.equal(outputs[one.name], outputs[other.name])


SKEWED = [d for d in DATA_SETS if d.change is not None]


@pytest.mark.parametrize("data", SKEWED, ids=lambda d: d.name)
def test_no_false_alarm(data, monkeypatch):
    monkeypatch.setattr(gate_study, "_BATCH", 64)
    monkeypatch.setattr(gate_study, "CALLS", ((1, 3), (7, 2)))
    small = replace(data.problem, hidden_size=256, intermediate_size=256)
    for tail in gate_study.honest(replace(data, problem=small), "cpu", 20, []):
        assert tail.rows >= 20 and tail.calls >= 6
        assert tail.false_alarms == 0, (tail.pipeline, tail.failures)
        assert all(0 < share < 1 for share in tail.of_bound.values())


def test_skewed_data_is_skewed(inputs):
    """Each changes what it says, and leaves the routing alone."""
    assert len(SKEWED) >= 5
    for data in SKEWED:
        changed = data.change(inputs, torch.Generator().manual_seed(0))
        names = [n for n in inputs._fields if isinstance(getattr(inputs, n), torch.Tensor)]
        differing = {n for n in names if not torch.equal(getattr(inputs, n).float(), getattr(changed, n).float())}
        assert differing and not differing & {"routing_logits", "routing_bias"}
        assert bool(torch.isfinite(moe_reference(changed, SMALL)).all())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_caught(bench, name):
    case, reference, work = bench
    output = CORRUPTIONS[name](case)
    assert not torch.equal(output, case.output)
    found = check(output, reference, work, OWN_KERNELS_TOLERANCE, width=SMALL.intermediate_size)
    assert found.passed == (name in TOO_SMALL | set(BELOW_ROUNDING)), found
    assert bool(gate_study.rules(found)) != found.passed


@pytest.fixture(scope="module")
def bench(inputs):
    reference, outputs, work = results(inputs, SMALL, (FUSED,))
    bench = Bench.make(inputs, SMALL, outputs[FUSED.name].roll(1, dims=0))
    assert check(bench.output, reference, work, OWN_KERNELS_TOLERANCE, width=SMALL.intermediate_size).passed
    return bench, reference, work


def test_only_tokens_with_work():
    inputs = DataSet("some", SMALL).inputs(50, "cpu", 0)
    assert 0 < inputs.num_tokens < 50 and bool(has_local_work(inputs, SMALL).all())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate_study, "DATA_SETS", (DataSet("small", SMALL),))
    monkeypatch.setattr(gate_study, "DEEPSEEK_V3", SMALL)
    monkeypatch.setattr(gate_study, "_BATCH", 128)
    monkeypatch.setattr(gate_study, "CALLS", ((1, 3),))
    path = tmp_path / "gate.json"
    argv = ["gate_study.py", "--output", str(path), "--rows", "40", "--tokens", "300", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(gate_study, "BELOW_ROUNDING", BELOW_ROUNDING | dict.fromkeys(TOO_SMALL, "too small a call"))
    gate_study.main()
    written = gate_study.json.loads(path.read_text())
    assert {tail["pipeline"] for tail in written["honest"]} == {p.name for p in PIPELINES}
    assert {found["corruption"] for found in written["corruptions"]} == set(CORRUPTIONS)
    printed = capsys.readouterr().out
    assert "everything times 1.015" in printed and "slope" in printed

    monkeypatch.setattr(gate_study, "BELOW_ROUNDING", {})
    with pytest.raises(SystemExit) as left:
        gate_study.main()
    assert left.value.code == 1
