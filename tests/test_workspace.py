"""The memory of layers with `max_num_tokens`: who gets which, and that results are the same in it."""

import copy
import gc
import threading
import time

import pytest
import torch

from hybrid_moe import HybridMoE, MoEProblem, backends
from hybrid_moe.backends import triton_fused
from hybrid_moe.backends.base import Backend, Runner
from hybrid_moe.device import DeviceKey
from hybrid_moe.kernels import shapes
from hybrid_moe.kernels.pipeline import Pipeline
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.serving.workspace import Piece, Workspaces

PROBLEM = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=256
)
CPU = torch.device("cpu")
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


def inputs_of(tokens, seed=0):
    return make_inputs(Workload(tokens, 4, seed=seed), PROBLEM, random_weights(PROBLEM, "cpu"))


def activations(inputs):
    return inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale


class Spy(Backend):
    """Notes down the memory that it is given, of which it wants most at T = 3."""

    name = "spy"

    def __init__(self):
        self.memories, self.lock = [], None

    def not_supported_reasons(self, problem, device, config):
        return []

    def prepare(self, problem, device, config):
        return SpyRunner(self)


class SpyRunner(Runner):
    def __init__(self, spy):
        self.spy = spy

    def run(self, inputs, output):
        self.spy.memories.append(None)
        output.zero_()

    def run_in(self, inputs, output, memory):
        assert Workspaces.of(CPU).piece().busy
        self.spy.memories.append(memory)
        output.zero_()

    def workspace_bytes(self, num_tokens):
        return 1024 * (10 if num_tokens == 3 else num_tokens)

    def reserved_bytes(self, num_tokens):
        return self.workspace_bytes(num_tokens)


@pytest.fixture
def spy(monkeypatch):
    spy = Spy()
    monkeypatch.setitem(backends.BACKENDS, "spy", spy)
    backends.prepare.cache_clear()
    yield spy
    backends.prepare.cache_clear()


def layer_of(inputs, **options):
    return HybridMoE.from_inputs(inputs, PROBLEM, **({"backend": "spy"} | options))


def test_calls_up_to_the_promised_number_share_their_memory(spy):
    inputs = inputs_of(1)
    layer, other = layer_of(inputs, max_num_tokens=5), layer_of(inputs, max_num_tokens=2)
    quantized = 5 * 256 + 256  # and their scales, rounded up
    assert layer.planned_bytes == 10 * 1024 + quantized
    assert other.planned_bytes == 2 * 1024 + 2 * 256 + 256
    for tokens in (1, 5, 3):
        layer(*activations(inputs_of(tokens)))
    other(*activations(inputs_of(2)))
    assert len({id(memory) for memory in spy.memories}) == 1
    assert spy.memories[0].numel() == layer.planned_bytes and spy.memories[0].dtype == torch.uint8
    # More tokens, or no promise.
    other(*activations(inputs_of(3)))
    layer_of(inputs)(*activations(inputs_of(1)))
    assert spy.memories[-2:] == [None, None]
    assert layer_of(inputs).planned_bytes == 0


def test_a_larger_layer_comes_later(spy):
    inputs = inputs_of(1)
    small = layer_of(inputs, max_num_tokens=1)
    small(*activations(inputs))
    large = layer_of(inputs, max_num_tokens=20)
    large(*activations(inputs))
    small(*activations(inputs))
    first, second, third = spy.memories
    assert first.numel() == small.planned_bytes and second.numel() == large.planned_bytes and third is second


def test_memory_goes_with_the_last_layer(spy):
    inputs = inputs_of(1)
    layers = [layer_of(inputs, max_num_tokens=4), layer_of(inputs, max_num_tokens=8)]
    layers[0](*activations(inputs))
    layers.pop()
    gc.collect()
    assert Workspaces.of(CPU).piece().memory is spy.memories[0]
    layers.clear()
    gc.collect()
    assert Workspaces.of(CPU)._state == (0, {})


def test_warming_up_reserves_it(spy):
    layer = layer_of(inputs_of(1), max_num_tokens=4)
    layer.warm_up([1, 4, 5])
    assert [memory is None for memory in spy.memories] == [False, False, True]
    assert Workspaces.of(CPU).piece().memory is spy.memories[0]


@pytest.mark.parametrize("gemm", ["triton", "sgl_kernel", "deep_gemm"])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_the_most_is_found_without_asking_for_each_t(monkeypatch, gemm, capability):
    monkeypatch.setattr(shapes, "MAX_ROWS_BYTES", 2**19)  # reached at small T
    pipeline = Pipeline(PROBLEM, triton_fused._gemm(gemm, DeviceKey("gpu_x", capability)))
    sizes = [pipeline.arena(tokens).bytes for tokens in range(1, 3001)]
    assert gemm != "triton" or sizes != sorted(sizes)
    for first, last in ((1, 1), (1, 3000), (2, 700), (250, 260), (1, 512), (513, 2999)):
        assert pipeline.most_bytes(first, last) == max(sizes[first - 1 : last])


@ON_CPU
def test_a_promise_of_ten_million_tokens_takes_no_time():
    begin = time.perf_counter()
    layer = layer_of(inputs_of(1), backend="triton_fused", max_num_tokens=10**7)
    assert time.perf_counter() - begin < 1.0
    assert layer.planned_bytes >= layer.workspace_bytes(10**7)


@pytest.mark.parametrize("wrong", [-1, 2.5, True, None, "8"])
def test_numbers_of_tokens_that_are_none(spy, wrong):
    layer = layer_of(inputs_of(1))
    for ask in (layer.workspace_bytes, layer.choice, layer.explain):
        with pytest.raises(ValueError, match="num_tokens: expected an integer of at least 0, got"):
            ask(wrong)


def test_a_copy_promises_the_same(spy):
    layer = layer_of(inputs_of(1), max_num_tokens=7)
    assert copy.deepcopy(layer).max_num_tokens == 7


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "8"])
def test_a_promise_that_is_none(spy, wrong):
    with pytest.raises(ValueError, match="max_num_tokens: expected an integer of at least 1, got .*"):
        layer_of(inputs_of(1), max_num_tokens=wrong)


def test_wrong_inputs_are_named_as_ever(spy):
    layer, inputs = layer_of(inputs_of(1), max_num_tokens=4), inputs_of(2)
    with pytest.raises(TypeError, match="hidden_states: expected a torch.Tensor, got a list"):
        layer(inputs.routing_logits, [1])
    with pytest.raises(ValueError, match="hidden_states: expected"):
        layer(inputs.routing_logits, torch.zeros(2, 384, dtype=torch.bfloat16))
    assert not Workspaces.of(CPU).piece().busy


def test_a_capture_takes_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    spaces = Workspaces(torch.device("cuda", 0))
    spaces.grow(100)
    assert spaces.piece() is None


def test_threads_ask_at_once():
    spaces, found, start = Workspaces(CPU), [], threading.Barrier(8)
    spaces.grow(1 << 20)

    def ask():
        start.wait()
        found.append(spaces.piece())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1


def test_one_call_at_a_time_has_a_streams_memory():
    """A thread that comes in the middle of another's call waits for it, and then has the memory too."""
    piece, order, had = Piece(torch.empty(4)), [], []

    def second(memory):
        order.append("second")
        had.append(memory)

    other = threading.Thread(target=piece.run, args=(second,))

    def first(memory):
        other.start()
        other.join(0.2)
        order.append("first")
        assert other.is_alive()

    piece.run(first)
    other.join(10)
    assert order == ["first", "second"] and had[0] is piece.memory
    assert not piece.busy


@ON_CPU
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_same_bits_in_the_workspace(bfloat16):
    first = inputs_of(1)
    plain, planned = (layer_of(first, backend="triton_fused", max_num_tokens=n) for n in (None, 9))
    assert planned.planned_bytes >= planned.workspace_bytes(9)
    for tokens in (9, 2):
        inputs = inputs_of(tokens, seed=tokens)
        tensors = activations(inputs)
        if bfloat16:
            tensors = (tensors[0], torch.randn((tokens, 256), generator=torch.Generator().manual_seed(1)).bfloat16())
        piece = Workspaces.of(CPU).piece()
        piece.memory.fill_(255)  # NaN in every format
        assert torch.equal(planned(*tensors), plain(*tensors))
        assert not bool((piece.memory == 255).all())
        assert Workspaces.of(CPU).piece() is piece
