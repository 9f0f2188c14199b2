"""What fails in a process is passed over in it, with its reason, until released; and a call without memory says so."""

import gc
import json
import logging
import threading
import time

import pytest
import torch
from test_api import PROBLEM, REFERENCE, ROUTING, Spy, _SpyRunner, call, forget, inputs_of, layer_of, make_policy

from hybrid_moe import (
    BackendFailedError,
    BackendUnsupportedError,
    CallOutOfMemoryError,
    Candidate,
    DeviceKey,
    HybridMoE,
    MoEProblem,
    NoBackendError,
    backends,
    fused_moe,
    quarantined,
    release_quarantine,
)
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights
from hybrid_moe.serving.quarantine import QUARANTINE, Quarantine
from hybrid_moe.serving.workspace import Workspaces

CPU = DeviceKey("cpu")
ONE, TWO = Candidate("one"), Candidate("two")


class Failing(Spy):
    """Raises what it is told to: when it is prepared, or in a run."""

    def __init__(self, name, value):
        super().__init__(name, value)
        self.at_prepare = self.at_run = None

    def prepare(self, problem, device, config):
        if self.at_prepare is not None:
            raise self.at_prepare
        self.prepared += 1
        return FailingRunner(self)


class FailingRunner(_SpyRunner):
    def run(self, inputs, output):
        if self.spy.at_run is not None:
            raise self.spy.at_run
        super().run(inputs, output)

    def run_in(self, inputs, output, memory):
        self.run(inputs, output)

    def reserved_bytes(self, num_tokens):
        return self.workspace_bytes(num_tokens)


@pytest.fixture(autouse=True)
def pair(monkeypatch):
    forget()
    made = Failing("one", 1.0), Failing("two", 2.0)
    for each in made:
        monkeypatch.setitem(backends.BACKENDS, each.name, each)
    yield made
    forget()


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


def put_all_but(*names):
    for candidate in backends.candidates():
        if candidate.backend not in names:
            QUARANTINE.put(CPU, PROBLEM, candidate, "shadow_check", "wrong")


def value(output):
    assert output.unique().numel() == 1
    return float(output[0, 0])


# Failing to prepare


def test_what_raises_at_prepare_gives_way(weights, pair, caplog):
    pair[0].at_prepare = OSError("libcuda.so.1: cannot open shared object file")
    layer, inputs = layer_of(inputs_of(weights, 1), policy=make_policy()), inputs_of(weights, 3)
    assert layer.choice(3) == REFERENCE and layer.choice(7) == TWO
    assert not torch.equal(call(layer, inputs), torch.ones(3, 256, dtype=torch.bfloat16))
    (entry,) = quarantined()
    assert (entry.device, entry.problem, entry.choice, entry.cause) == ("cpu", PROBLEM, ONE, "prepare")
    assert entry.reason == "libcuda.so.1: cannot open shared object file"
    passed_over = next(reason for reason in layer.explain(3).reasons if "one passed over" in reason)
    assert "in quarantine since 20" in passed_over and "it raised when it was prepared: libcuda.so.1" in passed_over
    # The error isn't lost: its traceback is in the log, and the entry's own record has its fields.
    with_traceback, put = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert isinstance(with_traceback.exc_info[1].__cause__, OSError)
    assert put.cause == "prepare" and put.backend == "one" and json.dumps(entry.to_dict())


def test_the_function_passes_it_over_too(weights, pair):
    pair[0].at_prepare = ValueError("wrong")
    inputs = inputs_of(weights, 3)
    policy = make_policy(default=TWO)
    assert value(fused_moe(*inputs, **ROUTING, policy=policy)) == 2.0
    pair[0].at_prepare = None
    assert value(fused_moe(*inputs, **ROUTING, policy=policy)) == 2.0  # until it is released
    release_quarantine()
    assert value(fused_moe(*inputs, **ROUTING, policy=policy)) == 1.0


def test_an_explicit_backend_raises_what_it_raised(weights, pair):
    pair[0].at_prepare = ValueError("wrong")
    with pytest.raises(BackendFailedError, match="backend one failed to prepare: ValueError: wrong") as caught:
        layer_of(inputs_of(weights, 1), backend="one")
    assert isinstance(caught.value.__cause__, ValueError) and quarantined() == ()


def test_an_explicit_backend_in_quarantine_is_refused(weights):
    QUARANTINE.put(CPU, PROBLEM, ONE, "warm_up", "wrong")
    with pytest.raises(BackendUnsupportedError, match="backend one can't run here: in quarantine since .*: wrong"):
        layer_of(inputs_of(weights, 1), backend="one")
    with pytest.raises(BackendUnsupportedError, match="in quarantine"):
        fused_moe(*inputs_of(weights, 1), **ROUTING, backend="one")


def test_out_of_memory_is_no_fault_of_a_backend(weights, pair):
    pair[0].at_prepare = torch.OutOfMemoryError("none left")
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        layer_of(inputs_of(weights, 1), policy=make_policy())
    assert quarantined() == ()


def test_nothing_is_left(weights, pair):
    pair[0].at_prepare, pair[1].at_prepare = ValueError("first"), ValueError("second")
    policy = make_policy(candidates=[ONE, TWO], default=ONE, regimes=[])
    put_all_but("one", "two")
    with pytest.raises(NoBackendError) as caught:
        layer_of(inputs_of(weights, 1), policy=policy)
    assert "first" in str(caught.value) and "second" in str(caught.value)


# Failing in a warm-up


def test_what_raises_in_a_warm_up_gives_way(weights, pair):
    layer = layer_of(inputs_of(weights, 1), policy=make_policy())
    pair[1].at_run = RuntimeError("no kernel image")
    done = layer.warm_up([3, 7, 9])
    assert [(w.num_tokens, w.choice) for w in done] == [(3, ONE), (7, REFERENCE), (9, REFERENCE)]
    (entry,) = quarantined()
    assert entry.cause == "warm_up" and entry.reason == "RuntimeError: no kernel image (T = 7)"
    # Layers made before and after pass it over.
    assert layer_of(inputs_of(weights, 1), policy=make_policy()).choice(7) == REFERENCE


def test_other_layers_learn_of_it(weights, pair):
    layers = [layer_of(inputs_of(weights, 1), policy=make_policy()) for _ in range(3)]
    named = layer_of(inputs_of(weights, 1), backend="two")
    gone = layer_of(inputs_of(weights, 1), policy=make_policy())
    del gone
    gc.collect()
    pair[1].at_run = RuntimeError("no kernel image")
    layers[0].warm_up([7])
    pair[1].at_run = None
    inputs = inputs_of(weights, 7)
    for layer in layers:
        assert layer.choice(7) == REFERENCE
    assert value(call(named, inputs)) == 2.0  # an explicit backend is never exchanged
    assert release_quarantine("one") == ()
    (released,) = release_quarantine("two")
    assert released.choice == TWO and quarantined() == ()
    for layer in layers:
        assert value(call(layer, inputs)) == 2.0


def test_nothing_else_can_be_warmed_up(weights, pair, caplog):
    layer = layer_of(inputs_of(weights, 1), policy=make_policy())
    put_all_but("two")
    assert layer.choice(7) == layer.choice(3) == TWO
    pair[1].at_run = RuntimeError("no kernel image")
    with pytest.raises(RuntimeError, match="no kernel image"):
        layer.warm_up([7])
    assert layer.choice(7) == TWO  # and goes on with it
    assert "a layer goes on as it was" in caplog.text and "NoBackendError" in caplog.text


def test_another_problem_goes_on(weights):
    other = MoEProblem(
        num_experts=16, num_local_experts=2, top_k=3, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
    )
    QUARANTINE.put(CPU, other, ONE, "warm_up", "wrong")
    QUARANTINE.put(DeviceKey("nvidia_b200", (10, 0)), PROBLEM, ONE, "warm_up", "wrong")
    assert layer_of(inputs_of(weights, 1), policy=make_policy()).choice(3) == ONE


def test_the_first_reason_stays():
    quarantine = Quarantine()
    quarantine.put(CPU, PROBLEM, Candidate("triton_fused"), "warm_up", "first")
    epoch = quarantine.epoch
    quarantine.put(CPU, PROBLEM, Candidate("triton_fused", {"gemm": "triton"}), "shadow_check", "second")
    assert [entry.reason for entry in quarantine.entries()] == ["first"] and quarantine.epoch == epoch


def test_a_policy_that_is_reloaded_meanwhile_is_not_lost(weights):
    layer = layer_of(inputs_of(weights, 1), policy=make_policy())
    policies = [make_policy(), make_policy(regimes=[])]
    stop = threading.Event()

    def work():
        while not stop.is_set():
            QUARANTINE.put(CPU, PROBLEM, ONE, "warm_up", "wrong")
            release_quarantine()
            time.sleep(0.005)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(50):
            layer.reload_policy(policies[number % 2])
    finally:
        stop.set()
        thread.join()
    assert layer.choice(7) == REFERENCE  # that of the last policy
    layer.reload_policy(policies[0])
    assert layer.choice(3) == ONE and layer.choice(7) == TWO
    QUARANTINE.put(CPU, PROBLEM, ONE, "warm_up", "wrong")
    assert layer.choice(3) == REFERENCE


# Out of memory


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("max_num_tokens", [None, 16])
def test_a_call_without_memory_says_what_it_takes(weights, pair, given, max_num_tokens):
    layer = layer_of(inputs_of(weights, 1), policy=make_policy(), max_num_tokens=max_num_tokens)
    inputs = inputs_of(weights, 3)
    output = torch.empty((3, 256), dtype=torch.bfloat16) if given else None
    pair[0].at_run = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(CallOutOfMemoryError) as caught:
        call(layer, inputs, output=output)
    error = caught.value
    assert (error.num_tokens, error.choice) == (3, ONE)
    assert error.bytes_wanted == 30 + (0 if given else 3 * 256 * 2)
    assert isinstance(error, torch.OutOfMemoryError) and error.__cause__ is pair[0].at_run
    for text in ("T = 3", f"{error.bytes_wanted:,} bytes", "max_num_tokens", "workspace_bytes", "2.00 GiB"):
        assert text in str(error)
    # The process goes on.
    pair[0].at_run = None
    assert value(call(layer, inputs, output=output)) == 1.0 and quarantined() == ()


def test_a_workspace_that_cannot_be_reserved(weights, monkeypatch):
    layer, inputs = layer_of(inputs_of(weights, 1), policy=make_policy(), max_num_tokens=16), inputs_of(weights, 3)

    def none_left(self):
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(Workspaces, "piece", none_left)
        with pytest.raises(CallOutOfMemoryError, match="T = 3 takes"):
            call(layer, inputs)
        with pytest.raises(CallOutOfMemoryError, match="T = 3 takes"):
            layer.warm_up([3])
    assert value(call(layer, inputs)) == 1.0


def test_the_function_without_memory(weights, pair):
    pair[0].at_run = torch.OutOfMemoryError("none left")
    with pytest.raises(CallOutOfMemoryError, match="T = 3 takes 1,566 bytes with one"):
        fused_moe(*inputs_of(weights, 3), **ROUTING, policy=make_policy())


@pytest.mark.gpu
def test_a_gpu_without_memory_goes_on_afterwards():
    weights = random_weights(DEEPSEEK_V3, "cuda")
    inputs = make_inputs(Workload(8192, 96), DEEPSEEK_V3, weights)
    layer = HybridMoE.from_inputs(inputs, DEEPSEEK_V3, backend="triton_fused")
    planned = HybridMoE.from_inputs(inputs, DEEPSEEK_V3, backend="triton_fused", max_num_tokens=8192)
    wanted = call(layer, inputs).clone()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    # Less is left than a call takes.
    left = layer.workspace_bytes(8192) // 2
    taken = torch.empty(free - left, dtype=torch.uint8, device="cuda")
    for each in (layer, planned):
        with pytest.raises(CallOutOfMemoryError, match="T = 8192 takes") as caught:
            call(each, inputs)
        assert caught.value.bytes_wanted > left
    few = make_inputs(Workload(16, 96), DEEPSEEK_V3, weights)
    assert call(layer, few).shape == (16, 7168)  # what fits goes on meanwhile
    del taken
    torch.cuda.empty_cache()
    for each in (layer, planned):
        assert torch.equal(call(each, inputs), wanted)
