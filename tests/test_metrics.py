"""Counts and the log: exact under threads, once a regime, and kept when a layer is gone."""

import gc
import json
import logging
import sys
import threading

import pytest
from test_api import PROBLEM, REFERENCE, ROUTING, call, forget, inputs_of, layer_of, make_policy, spies  # noqa: F401

from hybrid_moe import Candidate, fused_moe
from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.serving import call as calling
from hybrid_moe.serving import dispatch, metrics
from hybrid_moe.serving.metrics import Counter, Counters, Label


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    forget()
    calling._function_counters.cache_clear()
    dispatch._ANNOUNCED.forget()
    monkeypatch.setattr(metrics, "_PROCESS", metrics._Process())
    yield
    forget()


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


@pytest.fixture
def switching():
    """Threads give way to one another as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def counts(samples):
    return {(str(s.label.choice), s.label.regime): (s.calls, s.tokens) for s in samples}


def test_a_counter_is_exact_whatever_threads_do(switching):
    counter, first, seen = Counter(), [], []

    def work():
        for tokens in range(20_000):
            if counter.add(tokens):
                first.append(tokens)
            if tokens % 999 == 0:
                seen.append(counter.totals())

    in_threads(4, work)
    assert counter.totals() == (80_000, 4 * sum(range(20_000)))
    assert len(first) == 1
    assert max(seen) <= counter.totals()
    assert len(counter._items) <= metrics._BATCH


def test_a_counter_keeps_few_calls_waiting():
    counter = Counter()
    for _ in range(3 * metrics._BATCH):
        counter.add(2)
        assert len(counter._items) <= metrics._BATCH
    assert counter.totals() == (3 * metrics._BATCH, 6 * metrics._BATCH)


def test_what_is_added_while_a_log_is_folded_stays():
    log = metrics._Log((0, 0))
    log.items.append(5)

    def shorter(items):
        log.items.append(7)  # as another thread does meanwhile
        return [(len(items) - 1, sum(items[1:]))]

    log.fold(shorter)
    assert log.items == [(1, 5), 7]


def test_a_reader_before_the_first_call_changes_nothing():
    counter = Counter()
    assert counter.totals() == (0, 0)
    assert counter.add(5) is True and counter.add(5) is False


@pytest.mark.usefixtures("spies")
def test_a_layer_counts_by_what_ran_and_regime(weights):
    layer = layer_of(inputs_of(weights, 1), policy=make_policy())
    assert layer.stats() == ()
    for tokens in (1, 4, 4, 9, 0, 10, 33):
        call(layer, inputs_of(weights, tokens))
    wanted = {("one", (0, 4)): (3, 9), ("two", (5, 9)): (1, 9), ("torch_reference", None): (2, 43)}
    assert counts(layer.stats()) == wanted
    other = layer_of(inputs_of(weights, 1), policy=make_policy())
    call(other, inputs_of(weights, 4))
    assert counts(layer.stats()) == wanted
    assert counts(other.stats()) == {("one", (0, 4)): (1, 4)}
    assert counts(metrics.snapshot())[("one", (0, 4))] == (4, 13)
    assert {s.label.source for s in layer.stats()} == {"regime", "default"}
    assert json.loads(json.dumps([s.to_dict() for s in other.stats()])) == [
        {
            "device": "cpu",
            "problem": PROBLEM.definition,
            "backend": "one",
            "config": {},
            "regime": {"min_tokens": 0, "max_tokens": 4},
            "source": "regime",
            "calls": 1,
            "tokens": 4,
        }
    ]


@pytest.mark.usefixtures("spies")
def test_the_function_is_counted_as_well(weights):
    inputs = inputs_of(weights, 7)
    fused_moe(*inputs, **ROUTING, policy=make_policy())
    fused_moe(*inputs, **ROUTING, backend="two")
    found = {(s.label.source, s.label.regime): s.calls for s in metrics.snapshot()}
    assert found == {("regime", (5, 9)): 1, ("explicit", None): 1}


@pytest.mark.usefixtures("spies")
def test_counts_outlive_their_layer(weights):
    inputs = inputs_of(weights, 7)
    for number in range(1, 4):
        layer = layer_of(inputs, backend="one")
        call(layer, inputs)
        del layer
        gc.collect()
        assert counts(metrics.snapshot()) == {("one", None): (number, 7 * number)}
    Counters()
    assert len(metrics._PROCESS.owners) <= 2  # buried when the next one joins


def test_owners_come_and_go_while_counts_are_read(switching):
    label = Label("cpu", PROBLEM, REFERENCE, None, "explicit")
    falls = []

    def work():
        before = 0
        for _ in range(300):
            owner = Counters()
            owner.of(label).add(3)
            del owner
            now = sum(s.calls for s in metrics.snapshot())
            if now < before:
                falls.append((before, now))
            before = now

    in_threads(4, work)
    assert [(s.calls, s.tokens) for s in metrics.snapshot()] == [(1200, 3600)]
    assert not falls


@pytest.mark.usefixtures("spies")
def test_threads_that_call_one_layer(weights, switching):
    layer, cases = layer_of(inputs_of(weights, 1), policy=make_policy()), [inputs_of(weights, t) for t in (3, 8)]

    def work():
        for _ in range(50):
            for inputs in cases:
                call(layer, inputs)

    in_threads(4, work)
    assert counts(layer.stats()) == {("one", (0, 4)): (200, 600), ("two", (5, 9)): (200, 1600)}


@pytest.mark.usefixtures("spies")
def test_the_first_decision_of_each_regime_is_logged_once(weights, caplog):
    caplog.set_level(logging.INFO, "hybrid_moe")
    layers = [layer_of(inputs_of(weights, 1), policy=make_policy()) for _ in range(3)]
    assert not caplog.records
    for tokens in (3, 4, 7, 7, 20, 11):
        for layer in layers:
            call(layer, inputs_of(weights, tokens))
    found = [(r.name, r.levelname, r.backend, r.regime, r.source, r.num_tokens, r.device) for r in caplog.records]
    assert found == [
        ("hybrid_moe", "INFO", "one", {"min_tokens": 0, "max_tokens": 4}, "regime", 3, "cpu"),
        ("hybrid_moe", "INFO", "two", {"min_tokens": 5, "max_tokens": 9}, "regime", 7, "cpu"),
        ("hybrid_moe", "INFO", "torch_reference", None, "default", 20, "cpu"),
    ]
    record = caplog.records[0]
    assert record.problem == PROBLEM.definition and record.config == {} and record.expected_regret == 0.0
    assert record.reasons == ["policy regime 0-4: one taken: r"]
    assert record.getMessage() == "T = 3 on cpu runs one: policy regime 0-4: one taken: r"


@pytest.mark.usefixtures("spies")
def test_threads_log_a_first_decision_once(weights, switching, caplog):
    caplog.set_level(logging.INFO, "hybrid_moe")
    layers, inputs = (
        [layer_of(inputs_of(weights, 1), backend=Candidate("one")) for _ in range(8)],
        inputs_of(weights, 3),
    )
    waiting, start = iter(layers), threading.Barrier(8)

    def work():
        layer = next(waiting)
        start.wait()
        call(layer, inputs)

    in_threads(8, work)
    assert len(caplog.records) == 1 and caplog.records[0].source == "explicit"
