"""Metrics as Prometheus reads them."""

import os
import subprocess
import sys

import pytest
from test_api import PROBLEM, call, forget, inputs_of, layer_of, make_policy, spies  # noqa: F401

from hybrid_moe import Candidate, DeviceKey, MoEProblem, metrics, release_quarantine
from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.serving.metrics import Counters, Label, ShadowCounters
from hybrid_moe.serving.quarantine import QUARANTINE

prometheus_client = pytest.importorskip("prometheus_client")
from hybrid_moe.serving.prometheus import HybridMoECollector, Mirror, register  # noqa: E402

ONE = {"device": "cpu", "problem": PROBLEM.definition, "candidate": "one"}


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    forget()
    monkeypatch.setattr(metrics, "_PROCESS", metrics._Process())
    monkeypatch.setattr(metrics, "_CHECKS", {})
    yield
    forget()


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


@pytest.mark.parametrize("kind", ["collector", "mirror"])
@pytest.mark.usefixtures("spies")
def test_what_prometheus_reads(weights, kind):
    registry = prometheus_client.CollectorRegistry()
    mirror = None
    if kind == "collector":
        register(registry)
    else:
        mirror = Mirror(registry)

    def value(name, **labels):
        if mirror is not None:
            mirror.update()
        return registry.get_sample_value(name, labels)

    in_regime = ONE | {"regime": "0-4", "source": "regime"}
    outside = ONE | {"candidate": "torch_reference", "regime": "none", "source": "default"}
    assert value("hybrid_moe_calls_total", **in_regime) is None
    layers = [layer_of(inputs_of(weights, 1), policy=make_policy()) for _ in range(2)]
    for number in (1, 2):
        for layer in layers:
            call(layer, inputs_of(weights, 3))
        call(layers[0], inputs_of(weights, 20))
        assert value("hybrid_moe_calls_total", **in_regime) == 2 * number
        assert value("hybrid_moe_tokens_total", **in_regime) == 6 * number
        assert value("hybrid_moe_calls_total", **outside) == number

    counters = ShadowCounters("cpu", PROBLEM)
    counters.checked(Candidate("one"), True)
    counters.checked(Candidate("one"), False)
    counters.skipped(Candidate("one"))
    assert [value(f"hybrid_moe_shadow_{what}_total", **ONE) for what in ("checks", "breaches", "skipped")] == [2, 1, 1]

    put = ONE | {"cause": "shadow_check"}
    assert value("hybrid_moe_quarantined", **put) is None
    QUARANTINE.put(DeviceKey("cpu"), PROBLEM, Candidate("one"), "shadow_check", "wrong")
    assert value("hybrid_moe_quarantined", **put) == 1
    release_quarantine()
    assert not value("hybrid_moe_quarantined", **put)
    text = prometheus_client.generate_latest(registry).decode()
    assert "# TYPE hybrid_moe_calls_total counter" in text and "# TYPE hybrid_moe_quarantined gauge" in text


def test_problems_with_one_definition_are_added_up():
    """A definition's name leaves the number of experts out: the same labels twice would be refused."""
    counters = Counters()
    for experts in (128, 256):
        problem = MoEProblem(num_experts=experts)
        counters.of(Label("cpu", problem, Candidate("one"), (8, None), "regime")).add(5)
    calls = next(family for family in HybridMoECollector().collect() if family.name == "hybrid_moe_calls")
    (sample,) = calls.samples
    assert sample.value == 2 and sample.labels["regime"] == "8-"


def test_one_registry_shows_them_once():
    registry = prometheus_client.CollectorRegistry()
    register(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        register(registry)


def test_processes_are_added_up(tmp_path):
    """As a server of several processes has it: each writes files, and one answers."""
    code = """
import hybrid_moe
from hybrid_moe import Candidate, MoEProblem
from hybrid_moe.serving.metrics import Counters, Label
from hybrid_moe.serving.prometheus import Mirror
mirror, counters = Mirror(), Counters()
for _ in range(3):
    counters.of(Label("cpu", MoEProblem(), Candidate("one"), None, "explicit")).add(7)
    mirror.update()
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    from prometheus_client import multiprocess

    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    text = prometheus_client.generate_latest(registry).decode()
    (line,) = [line for line in text.splitlines() if line.startswith("hybrid_moe_tokens_total{")]
    assert float(line.rsplit(" ", 1)[1]) == 42
