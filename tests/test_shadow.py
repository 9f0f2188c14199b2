"""Shadow checks: what is wrong while serving is found, said, and passed over; what is right is left alone."""

import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import math
import random
import time
import types

import pytest
import torch
from given_routing import routed_of
from test_api import PROBLEM, REFERENCE, call, forget, inputs_of, layer_of, make_policy

from hybrid_moe import Candidate, HybridMoE, RoutedInputs, ShadowCheck, backends, metrics, quarantined
from hybrid_moe.backends.base import Backend, Runner
from hybrid_moe.kernels import interpreter
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights
from hybrid_moe.numerics import Tolerance, check
from hybrid_moe.reference import has_local_work, moe_reference
from hybrid_moe.serving import shadow

ONE, TWO = Candidate("one"), Candidate("two")


class Faulty(Backend):
    """The reference, and what ``fault`` makes of its result."""

    def __init__(self, name):
        self.name, self.fault, self.runs = name, None, 0

    def not_supported_reasons(self, problem, device, config):
        return []

    def prepare(self, problem, device, config):
        return FaultyRunner(self, problem)


class FaultyRunner(Runner):
    def __init__(self, backend, problem):
        self.backend, self.problem = backend, problem

    def run(self, inputs, output):
        self.backend.runs += 1
        result = moe_reference(inputs, self.problem)
        if self.backend.fault is not None:
            self.backend.fault(result)
        output.copy_(result)

    def workspace_bytes(self, num_tokens):
        return 0


@pytest.fixture(autouse=True)
def pair(monkeypatch):
    forget()
    metrics._CHECKS.clear()
    made = Faulty("one"), Faulty("two")
    for each in made:
        monkeypatch.setitem(backends.BACKENDS, each.name, each)
    yield made
    forget()
    metrics._CHECKS.clear()


UNBOUNDED = math.inf  # of the time that checks may take


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


def doubled(result):
    result *= 2


def checked_layer(weights, every=1, **options):
    options = {"policy": make_policy(), "tokens": 64} | options  # all: one without local work shows little
    fields = {
        name: options.pop(name) for name in ("tokens", "on_breach", "dump_dir", "max_overhead") if name in options
    }
    options["shadow_check"] = ShadowCheck(every=every, **{"max_overhead": UNBOUNDED} | fields)
    return layer_of(inputs_of(weights, 1), **options)


def test_checks_keep_to_their_share_of_the_time(weights, monkeypatch):
    """Each read of the clock is a millisecond: a check takes over 20, and 60 pass between two calls."""
    now = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: next(now) / 1000, time=time.time)
    monkeypatch.setattr(shadow, "time", clock)

    def slow(*arguments):
        for _ in range(20):
            next(now)
        return check(*arguments)

    monkeypatch.setattr(shadow, "check", slow)
    layer = checked_layer(weights, max_overhead=0.1)
    inputs = inputs_of(weights, 5)
    made = []
    for _ in range(60):
        call(layer, inputs)
        for _ in range(60):
            next(now)
        made.append(layer.shadow.checks)
    status = layer.shadow
    assert status.checks + status.skipped == 60
    assert made[0] == 1 and 4 <= status.checks < 30, status  # the first one at once, then as the time allows


@pytest.mark.parametrize(
    "wrong",
    [{"every": 0}, {"every": True}, {"every": 1.5}, {"tokens": 0}, {"on_breach": "raise"}, {"max_overhead": 0}],
    ids=str,
)
def test_no_options(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected .*, got "):
        ShadowCheck(**wrong)


def test_right_results_pass(weights):
    layer = checked_layer(weights)
    for tokens in (1, 3, 4, 0, 7, 9, 40):
        call(layer, inputs_of(weights, tokens))
    status = layer.shadow
    assert (status.checks, status.breaches, status.skipped) == (6, 0, 0)
    assert not status.breached and status.last_breach is None
    assert {(str(s.choice), s.checks, s.breaches) for s in metrics.shadow_snapshot()} == {
        ("one", 3, 0),
        ("two", 2, 0),
        ("torch_reference", 1, 0),
    }
    assert layer_of(inputs_of(weights, 1)).shadow is None


def test_one_of_so_many_calls_is_checked(weights):
    layers = [checked_layer(weights, every=5) for _ in range(4)]
    inputs = inputs_of(weights, 1)
    firsts = []
    for layer in layers:
        seen = []
        for _ in range(10):
            call(layer, inputs)
            seen.append(layer.shadow.checks)
        assert seen[-1] == 2
        firsts.append(seen.index(1))
    assert len(set(firsts)) >= 3  # not all layers at one step


def test_a_wrong_result_is_found_and_said(weights, pair, caplog, tmp_path):
    layer, inputs = checked_layer(weights, dump_dir=tmp_path / "dumps", tokens=7), inputs_of(weights, 8)
    call(layer, inputs)
    pair[1].fault = doubled
    output = call(layer, inputs)
    status = layer.shadow
    assert (status.checks, status.breaches) == (2, 1) and status.breached
    breach = status.last_breach
    assert (breach.choice, breach.num_tokens, breach.local_expert_offset) == (TWO, 8, inputs.local_expert_offset)
    assert len(breach.tokens) == 7 and set(breach.tokens) <= set(range(8))
    assert breach.correctness.relative_l2 == pytest.approx(1.0, abs=0.01)
    assert layer.choice(8) == TWO and quarantined() == ()  # logged alone
    (sample,) = metrics.shadow_snapshot()
    assert (sample.choice, sample.checks, sample.breaches) == (TWO, 2, 1) and json.dumps(sample.to_dict())

    record = next(r for r in caplog.records if r.levelno == logging.ERROR)
    assert "two on cpu at T = 8 is wrong" in record.getMessage() and "relative L2" in record.getMessage()
    for name, value in breach.to_dict().items():
        assert getattr(record, name) == value
    assert record.problem == PROBLEM.definition

    # What was dumped repeats it, with the layer's weights.
    dump = torch.load(breach.dump)
    assert dump["tokens"] == list(breach.tokens) and dump["problem"] == dataclasses.asdict(PROBLEM)
    repeated = inputs._replace(**dump["inputs"])
    again = check(dump["output"], moe_reference(repeated, PROBLEM), has_local_work(repeated, PROBLEM))
    assert again == breach.correctness and dump["failures"] == list(again.failures)
    assert torch.equal(dump["output"], output[list(breach.tokens)])


def test_a_dump_that_cannot_be_written_is_said(weights, pair, caplog, tmp_path):
    (tmp_path / "file").touch()
    layer = checked_layer(weights, dump_dir=tmp_path / "file")
    pair[0].fault = doubled
    call(layer, inputs_of(weights, 3))
    assert layer.shadow.last_breach.dump is None and "what was compared is lost" in caplog.text


def test_what_breaches_goes_into_quarantine(weights, pair):
    layer, other = checked_layer(weights, on_breach="quarantine"), layer_of(inputs_of(weights, 1), policy=make_policy())
    inputs = inputs_of(weights, 8)
    pair[1].fault = doubled
    call(layer, inputs)
    (entry,) = quarantined()
    assert (entry.choice, entry.cause) == (TWO, "shadow_check")
    assert "relative L2" in entry.reason and "T = 8" in entry.reason
    assert layer.choice(8) == other.choice(8) == REFERENCE
    assert any("it failed the shadow check" in reason for reason in layer.explain(8).reasons)
    call(layer, inputs)
    assert (layer.shadow.checks, layer.shadow.breaches) == (2, 1)


def test_an_explicit_backend_goes_on(weights, pair):
    layer = checked_layer(weights, policy=None, backend="two", on_breach="quarantine")
    pair[1].fault = doubled
    for _ in range(2):
        call(layer, inputs_of(weights, 3))
    assert layer.choice(3) == TWO and layer.shadow.breaches == 2 and len(quarantined()) == 1


def test_tokens_without_local_work_have_to_be_zero(weights, pair):
    layer, inputs = checked_layer(weights, tokens=64), inputs_of(weights, 30)
    idle = ~has_local_work(inputs, PROBLEM)
    assert bool(idle.any())

    def fault(result):
        result[idle] = 1e-3

    reference = backends.BACKENDS["torch_reference"]
    backends.BACKENDS["one"].fault = fault
    layer = checked_layer(weights, policy=None, backend="one", tokens=64)
    call(layer, inputs)
    assert reference is backends.BACKENDS["torch_reference"]
    assert "not exactly zero" in layer.shadow.last_breach.correctness.failures[0]


def test_nan_is_found(weights, pair):
    pair[0].fault = lambda result: result.fill_(float("nan"))
    layer = checked_layer(weights)
    call(layer, inputs_of(weights, 4))
    assert "not finite" in layer.shadow.last_breach.correctness.failures[-1]


def test_bfloat16_that_is_written_over(weights):
    """The inputs are copied before the call: it may write its result over them."""
    layer, inputs = checked_layer(weights), inputs_of(weights, 3)
    hidden = torch.randn((3, 256), generator=torch.Generator().manual_seed(1)).bfloat16()
    layer(inputs.routing_logits, hidden, output=hidden)
    assert (layer.shadow.checks, layer.shadow.breaches) == (1, 0)


def test_given_experts(weights, pair):
    inputs = routed_of(inputs_of(weights, 6), PROBLEM)
    options = ShadowCheck(max_overhead=UNBOUNDED, every=1, tokens=64)
    layer = HybridMoE.from_inputs(inputs, PROBLEM, backend="one", shadow_check=options)
    tensors = dict(topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights)
    layer(None, inputs.hidden_states, inputs.hidden_states_scale, **tensors)
    assert (layer.shadow.checks, layer.shadow.breaches) == (1, 0)
    pair[0].fault = doubled
    layer(None, inputs.hidden_states, inputs.hidden_states_scale, **tensors)
    assert layer.shadow.breaches == 1


def test_a_choice_that_rounding_decides_is_no_breach(weights, monkeypatch):
    """Of two experts that score alike but for a rounding, a kernel may take either."""
    inputs = inputs_of(weights, 4)
    logits = inputs.routing_logits.clone()
    best = logits.topk(2, dim=1)
    # Twins: every expert scores as its neighbour does, but for the last bits.
    logits[:, 1::2] = logits[:, 0::2] * (1 - 1e-7)
    assert best.values.shape == (4, 2)
    inputs = inputs._replace(routing_logits=logits, routing_bias=torch.zeros_like(inputs.routing_bias))
    swapped = inputs._replace(routing_logits=logits.view(4, -1, 2).flip(2).reshape(4, -1).contiguous())
    right, other = moe_reference(inputs, PROBLEM), moe_reference(swapped, PROBLEM)
    assert not torch.allclose(right, other, rtol=0.1)
    backends.BACKENDS["one"].fault = lambda result: result.copy_(other)
    layer = HybridMoE.from_inputs(
        inputs, PROBLEM, backend="one", shadow_check=ShadowCheck(max_overhead=UNBOUNDED, every=1, tokens=64)
    )
    call(layer, inputs)
    assert (layer.shadow.checks, layer.shadow.breaches) == (1, 0)
    # Where nothing is near, it is one.
    monkeypatch.setattr(shadow, "_NOISE", 0.0)
    call(layer, inputs)
    assert layer.shadow.breaches == 1


def test_a_bias_that_the_backend_rounds_is_rounded(weights, pair, monkeypatch):
    inputs = inputs_of(weights, 9)
    bias = torch.ones(16)
    bias[inputs.local_expert_offset : inputs.local_expert_offset + 3] += 1e-3  # lost in bfloat16
    inputs = inputs._replace(routing_logits=torch.zeros_like(inputs.routing_logits), routing_bias=bias)
    rounded = moe_reference(inputs._replace(routing_bias=inputs.routing_bias.bfloat16()), PROBLEM)
    assert not torch.allclose(rounded, moe_reference(inputs, PROBLEM), rtol=0.1)
    pair[0].fault = lambda result: result.copy_(rounded)
    layer = HybridMoE.from_inputs(
        inputs, PROBLEM, backend="one", shadow_check=ShadowCheck(max_overhead=UNBOUNDED, every=1, tokens=64)
    )
    call(layer, inputs)
    assert layer.shadow.breaches == 1
    monkeypatch.setattr(Faulty, "rounds_bias", True)
    monkeypatch.setattr(shadow, "_NOISE", 0.0)
    call(layer, inputs)
    assert layer.shadow.breaches == 1
    assert backends.BACKENDS["flashinfer_trtllm"].rounds_bias and not backends.BACKENDS["triton_fused"].rounds_bias


def test_seeds_of_the_process_stay(weights):
    layer, inputs = checked_layer(weights), inputs_of(weights, 9)
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    call(layer, inputs)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_copy_is_checked_as_well(weights):
    layer = checked_layer(weights, every=7, tokens=3)
    assert copy.deepcopy(layer)._shadow.options == ShadowCheck(max_overhead=UNBOUNDED, every=7, tokens=3)


# Replays


def test_a_replay_is_checked_by_its_tensors(weights, pair):
    layer, inputs = checked_layer(weights, every=2), inputs_of(weights, 8)
    output = call(layer, inputs)
    before = layer.shadow.checks
    tensors = inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale
    for _ in range(6):
        layer.check_replay(*tensors, output=output)
    assert layer.shadow.checks == before + 3 and not layer.shadow.breached
    output *= 2  # as a graph would have written it
    for _ in range(2):
        layer.check_replay(*tensors, output=output, choice=ONE)
    assert layer.shadow.last_breach.choice == ONE and layer.shadow.breaches == 1


def test_no_replay(weights):
    inputs = inputs_of(weights, 8)
    tensors, output = (inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale), torch.zeros(8, 256)
    with pytest.raises(ValueError, match="expected a layer with shadow_check="):
        layer_of(inputs).check_replay(*tensors, output=output.bfloat16())
    layer = checked_layer(weights)
    with pytest.raises(TypeError, match="output: expected dtype .*, got torch.float32"):
        layer.check_replay(*tensors, output=output)
    hidden = output.bfloat16()
    with pytest.raises(ValueError, match="output: expected memory of its own, to be compared"):
        layer.check_replay(inputs.routing_logits, hidden, output=hidden)


# In flight, with streams and events of a GPU that isn't there


class FakeEvent:
    through = False
    waits = 0

    def record(self, stream=None):
        pass

    def query(self):
        return FakeEvent.through

    def synchronize(self):
        FakeEvent.waits += 1


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def in_flight(monkeypatch):
    """A layer whose checks take the way of a GPU: `FakeEvent.through` says when they are through."""
    if torch.cuda.is_available():
        pytest.skip("the tests marked gpu have a real one")
    FakeEvent.through, FakeEvent.waits = False, 0
    capturing = []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    interpreter.repair()

    def give(layer):
        layer._shadow._stream = FakeStream()
        layer._shadow._slots.extend(shadow._Slot(layer._shadow.options.tokens, PROBLEM) for _ in range(shadow._SLOTS))
        return layer, capturing

    return give


def test_a_check_in_flight_is_judged_by_a_later_call(weights, pair, in_flight):
    layer, capturing = in_flight(checked_layer(weights, tokens=3))
    inputs = inputs_of(weights, 3)
    layer._shadow.warm_up(inputs, torch.zeros((3, 256), dtype=torch.bfloat16))
    assert layer.shadow.checks == 0
    pair[0].fault = doubled
    call(layer, inputs)
    pair[0].fault = None
    call(layer, inputs)
    call(layer, inputs)  # two are in flight already
    assert (layer.shadow.checks, layer.shadow.skipped) == (0, 1)
    FakeEvent.through = True
    capturing.append(True)
    call(layer, inputs)  # nobody asks an event while a graph is captured
    assert layer.shadow.checks == 0
    capturing.clear()
    call(layer, inputs)
    assert (layer.shadow.checks, layer.shadow.breaches) == (2, 1) and FakeEvent.waits == 0
    layer.finish_shadow_checks()
    assert (layer.shadow.checks, layer.shadow.breaches, layer.shadow.skipped) == (3, 1, 1) and FakeEvent.waits == 1
    assert len(layer._shadow._slots) == shadow._SLOTS


def test_a_check_without_memory_is_left_out(weights, in_flight, monkeypatch):
    layer, _ = in_flight(checked_layer(weights, tokens=3))

    def none_left(*arguments):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(shadow, "chosen_experts", none_left)
    call(layer, inputs_of(weights, 3))
    assert layer.shadow.skipped == 1 and len(layer._shadow._slots) == shadow._SLOTS


def test_a_call_that_raises_gives_its_check_back(weights, pair, in_flight):
    layer, _ = in_flight(checked_layer(weights, tokens=3))

    def fault(result):
        raise RuntimeError("illegal memory access")

    pair[0].fault = fault
    for _ in range(3):
        with pytest.raises(RuntimeError, match="illegal"):
            call(layer, inputs_of(weights, 3))
    assert len(layer._shadow._slots) == shadow._SLOTS and layer.shadow.checks == 0


# On a GPU


def gpu_layer(tokens, weights, **options):
    inputs = make_inputs(Workload(tokens, 96), DEEPSEEK_V3, weights)
    layer = HybridMoE.from_inputs(inputs, DEEPSEEK_V3, backend="triton_fused", **options)
    return layer, inputs, (inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale)


@pytest.mark.gpu
def test_no_call_waits_for_its_check():
    layer, _, tensors = gpu_layer(
        64, random_weights(DEEPSEEK_V3, "cuda"), shadow_check=ShadowCheck(max_overhead=UNBOUNDED, every=3)
    )
    layer.warm_up([64])
    output = layer(*tensors)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(300):
            layer(*tensors, output=output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layer.finish_shadow_checks()
    status = layer.shadow
    assert status.breaches == 0 and status.checks >= 10 and status.checks + status.skipped == 100
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated + 2**20


@pytest.mark.gpu
def test_a_wrong_result_on_a_gpu_is_found_and_passed_over(monkeypatch):
    weights = random_weights(DEEPSEEK_V3, "cuda")
    options = ShadowCheck(max_overhead=UNBOUNDED, every=1, tokens=16, on_breach="quarantine")
    inputs = make_inputs(Workload(16, 96), DEEPSEEK_V3, weights)
    layer = HybridMoE.from_inputs(inputs, DEEPSEEK_V3, shadow_check=options)
    tensors = inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale
    layer.warm_up([16])
    before = layer.choice(16)
    runner = type(layer._dispatch.runner(16))
    run = runner.run

    def wrong(self, given, output):
        run(self, given, output)
        output.mul_(1.5)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", wrong)
        layer(*tensors)
        torch.cuda.synchronize()
        layer(*tensors)
    layer.finish_shadow_checks()
    assert layer.shadow.breaches >= 1 and layer.shadow.last_breach.choice == before
    assert layer.choice(16) != before
    forget()
    assert layer.choice(16) == before


@pytest.mark.gpu
def test_graphs_are_captured_beside_checks_and_their_replays_checked():
    weights = random_weights(DEEPSEEK_V3, "cuda")
    layer, inputs, tensors = gpu_layer(
        16, weights, shadow_check=ShadowCheck(max_overhead=UNBOUNDED, every=1), max_num_tokens=16
    )
    layer.warm_up([16])
    layer(*tensors)  # its check is in flight while the graph is captured
    output, graph = torch.empty((16, 7168), dtype=torch.bfloat16, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(*tensors, output=output)
    for _ in range(3):
        graph.replay()
        layer.check_replay(*tensors, output=output)
        torch.cuda.synchronize()
    layer.finish_shadow_checks()
    assert layer.shadow.checks == 4 and not layer.shadow.breached
    output[inputs.num_tokens // 2 :] *= 1.5
    layer.check_replay(*tensors, output=output)
    layer.finish_shadow_checks()
    reference = moe_reference(inputs, DEEPSEEK_V3)
    wrong = not check(output, reference, has_local_work(inputs, DEEPSEEK_V3), Tolerance()).passed
    assert wrong and layer.shadow.checks == 5


@pytest.mark.gpu
def test_given_experts_on_a_gpu():
    weights = random_weights(DEEPSEEK_V3, "cuda")
    inputs = routed_of(make_inputs(Workload(33, 96), DEEPSEEK_V3, weights), DEEPSEEK_V3)
    assert isinstance(inputs, RoutedInputs)
    layer = HybridMoE.from_inputs(
        inputs, DEEPSEEK_V3, backend="triton_fused", shadow_check=ShadowCheck(max_overhead=UNBOUNDED, every=1)
    )
    hidden = torch.randn((33, 7168), device="cuda").bfloat16()
    for _ in range(4):
        layer(None, hidden, topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights)
        torch.cuda.synchronize()
    layer.finish_shadow_checks()
    assert (layer.shadow.checks, layer.shadow.breaches) == (4, 0)
