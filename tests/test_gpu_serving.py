"""Serving on a GPU: graphs replayed many times, torch.compile, streams, threads and layers at once, warming up."""

import threading

import pytest
import torch

from hybrid_moe import HybridMoE, MoEProblem, fused_moe, lookup
from hybrid_moe.activations import quantize
from hybrid_moe.kernels.activations import quantize_rows
from hybrid_moe.numerics import Tolerance, check
from hybrid_moe.reference import has_local_work, moe_reference
from hybrid_moe.reference import quantize_rows as reference_quantize_rows
from hybrid_moe.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights

pytestmark = pytest.mark.gpu

TRITON = lookup.as_choice("triton_fused")
GRAPHS = (1, 16, 80, 901)
REPLAYS = 1000


@pytest.fixture(scope="module")
def weights():
    return random_weights(DEEPSEEK_V3, "cuda")


@pytest.fixture(scope="module", params=["policy", "triton_fused"])
def layer(request, weights):
    """By this GPU's policy, whatever it chooses, and by our own kernels alone."""
    backend = None if request.param == "policy" else TRITON
    return HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3, backend=backend)


def inputs_of(weights, tokens, seed=0):
    return make_inputs(Workload(tokens, 96, seed=seed), DEEPSEEK_V3, weights)


def activations(inputs):
    return inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale


class Replay:
    """One graph, and the tensors that it reads and writes."""

    def __init__(self, layer, tokens, bfloat16):
        self.logits = torch.randn((tokens, 256), dtype=torch.float32, device="cuda")
        hidden = torch.randn((tokens, 7168), dtype=torch.bfloat16, device="cuda")
        self.activations = (hidden,) if bfloat16 else quantize_rows(hidden)
        self.output = torch.empty((tokens, 7168), dtype=torch.bfloat16, device="cuda")
        layer.warm_up([tokens])
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            layer(self.logits, *self.activations, output=self.output)

    def refill(self, generator):
        """Other experts and other values, in place."""
        self.logits.normal_(generator=generator)
        values = self.activations[0]
        if values.dtype == torch.bfloat16:
            values.normal_(generator=generator)
        else:
            fresh = torch.randn(values.shape, dtype=torch.bfloat16, device="cuda", generator=generator)
            for old, new in zip(self.activations, quantize_rows(fresh), strict=True):
                old.copy_(new)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["e4m3", "bfloat16"])
def test_a_graph_for_each_t_is_replayed_a_thousand_times(layer, bfloat16):
    """In turns, as a server does: each time the result of a call that isn't captured, and no memory more."""
    replays = REPLAYS // 4 if bfloat16 else REPLAYS
    graphs = [Replay(layer, tokens, bfloat16) for tokens in GRAPHS]
    generator = torch.Generator("cuda").manual_seed(1)
    differ = torch.zeros(len(GRAPHS), dtype=torch.int64, device="cuda")
    not_finite, unchanged = torch.zeros_like(differ), torch.zeros_like(differ)
    calls_before = sum(s.calls for s in layer.stats())

    def turn():
        for number, graph in enumerate(graphs):
            graph.refill(generator)
            before = graph.output.clone()
            eager = layer(graph.logits, *graph.activations)
            graph.output.fill_(float("nan"))
            graph.graph.replay()
            differ[number] += (graph.output != eager).any()
            not_finite[number] += ~torch.isfinite(graph.output).all()
            unchanged[number] += (graph.output == before).all()

    for _ in range(5):  # what caches take once
        turn()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    for _ in range(replays - 5):
        turn()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert differ.tolist() == not_finite.tolist() == [0] * len(GRAPHS)
    # One token may have no local expert, twice running.
    assert unchanged.tolist()[1:] == [0] * (len(GRAPHS) - 1)
    # The eager calls alone: no Python runs in a replay.
    assert sum(s.calls for s in layer.stats()) == calls_before + replays * len(GRAPHS)


@pytest.mark.parametrize("given", [False, True], ids=["new", "output"])
def test_compiled_for_every_t_at_once(weights, layer, given):
    torch.compiler.reset()

    def step(logits, hidden, scale, output=None):
        return layer(logits + 0.0, hidden, scale, output=output) * 2.0

    run = torch.compile(step, fullgraph=True)
    for number, tokens in enumerate((80, 7, 901)):
        inputs = inputs_of(weights, tokens)
        tensors = activations(inputs)
        for tensor, dim in zip(tensors, (0, 0, 1), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        output = None
        if given:
            output = torch.full((tokens, 7168), float("nan"), dtype=torch.bfloat16, device="cuda")
            torch._dynamo.mark_dynamic(output, 0)
        wanted = layer(*tensors)
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            assert torch.equal(run(*tensors, output), wanted * 2.0)
        assert output is None or torch.equal(output, wanted)


def test_the_function_compiled(weights):
    torch.compiler.reset()
    run = torch.compile(lambda inputs: fused_moe(*inputs, backend="triton_fused"), fullgraph=True)
    for tokens in (80, 7):
        inputs = inputs_of(weights, tokens)
        for tensor, dim in zip(activations(inputs), (0, 0, 1), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        assert torch.equal(run(inputs), fused_moe(*inputs, backend="triton_fused"))


def test_a_compiled_call_is_captured(weights, layer):
    """What `mode="reduce-overhead"` does, without its own bookkeeping."""
    torch.compiler.reset()
    run = torch.compile(lambda *tensors: layer(*tensors) * 2.0, fullgraph=True)
    tensors = activations(inputs_of(weights, 16))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(*tensors)
    for seed in (1, 2):
        for old, new in zip(tensors, activations(inputs_of(weights, 16, seed)), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(result, layer(*tensors) * 2.0)


def test_four_threads_two_streams_two_layers(weights):
    other = random_weights(DEEPSEEK_V3, "cuda", seed=1)
    layers = [HybridMoE.from_inputs(inputs_of(w, 1), DEEPSEEK_V3, backend=TRITON) for w in (weights, other)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    cases = []
    for number in range(4):
        layer, tensors = layers[number % 2], activations(inputs_of(weights, (1, 16, 80, 901)[number], seed=number))
        cases.append((layer, streams[number // 2], tensors, layer(*tensors)))
    assert not torch.equal(layers[0](*cases[2][2]), layers[1](*cases[2][2]))
    torch.cuda.synchronize()
    start, wrong = threading.Barrier(4), []

    def work(layer, stream, tensors, wanted):
        start.wait()
        output = torch.empty_like(wanted)
        with torch.cuda.stream(stream):
            for turn in range(50):
                given = output if turn % 2 else None
                if given is not None:
                    given.fill_(float("nan"))
                if not torch.equal(layer(*tensors, output=given), wanted):
                    wrong.append((wanted.shape[0], turn))

    threads = [threading.Thread(target=work, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(s.calls for layer in layers for s in layer.stats()) == 4 + 2 + 4 * 50


@pytest.mark.parametrize("bfloat16", [False, True], ids=["e4m3", "bfloat16"])
def test_a_planned_workspace_is_all_the_memory_of_a_call(weights, bfloat16):
    """Eager calls of changing T with a given output: nothing is reserved, not even for a moment."""
    plain, planned = (
        HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3, backend=TRITON, max_num_tokens=n) for n in (None, 901)
    )
    counts = (1, 16, 3, 80, 901, 200, 7)
    planned.warm_up(counts)
    cases = []
    for tokens in counts:
        inputs = inputs_of(weights, tokens)
        tensors = activations(inputs)
        if bfloat16:
            tensors = (tensors[0], torch.randn((tokens, 7168), dtype=torch.bfloat16, device="cuda"))
        cases.append((tensors, plain(*tensors), torch.empty((tokens, 7168), dtype=torch.bfloat16, device="cuda")))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        for tensors, _, output in cases:
            assert planned(*tensors, output=output) is output
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() == before
    for _, wanted, output in cases:
        assert torch.equal(output, wanted)


def test_a_graph_has_memory_of_its_own(weights):
    """A replay beside eager calls of the same planned layer on another stream."""
    layer = HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3, backend=TRITON, max_num_tokens=80)
    graph = Replay(layer, 80, bfloat16=False)
    eager = activations(inputs_of(weights, 80, seed=5))
    wanted = layer(graph.logits, *graph.activations), layer(*eager)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.graph.replay()
        results.append(layer(*eager))
    torch.cuda.synchronize()
    assert torch.equal(graph.output, wanted[0])
    assert all(torch.equal(result, wanted[1]) for result in results)


def test_threads_that_share_a_stream_and_a_workspace(weights):
    layer = HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3, backend=TRITON, max_num_tokens=80)
    cases = [activations(inputs_of(weights, tokens, seed=tokens)) for tokens in (1, 16, 33, 80)]
    wanted = [layer(*tensors) for tensors in cases]
    torch.cuda.synchronize()
    stream, results = torch.cuda.Stream(), [[] for _ in cases]

    def work(number):
        with torch.cuda.stream(stream):
            results[number] += [layer(*cases[number]) for _ in range(100)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for found, right in zip(results, wanted, strict=True):
        assert len(found) == 100 and all(torch.equal(result, right) for result in found)


def test_launches_by_address_follow_the_tensors(weights):
    """Weights elsewhere, another offset and factor, unaligned tensors: nothing is kept from a call before."""
    other = random_weights(DEEPSEEK_V3, "cuda", seed=1)
    for number in range(6):
        inputs = inputs_of((weights, other)[number % 2], 16, seed=number)
        inputs = inputs._replace(local_expert_offset=32 * number, routed_scaling_factor=1.0 + number)
        shifted = torch.empty(16 * 256 + 1, dtype=torch.float32, device="cuda")[1:].view(16, 256)
        shifted.copy_(inputs.routing_logits)
        work, wanted = has_local_work(inputs, DEEPSEEK_V3), moe_reference(inputs, DEEPSEEK_V3)
        for same in (inputs, inputs, inputs._replace(routing_logits=shifted)):
            result = fused_moe(*same, backend=TRITON)
            if bool(work.any()):
                assert check(result, wanted, work, Tolerance()).failures == ()


def test_launches_by_address_are_used(weights):
    from hybrid_moe.kernels import pipeline
    from hybrid_moe.kernels.plan import Addressed

    calls, run = [], Addressed.run
    layer = HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3, backend=TRITON)
    tensors = activations(inputs_of(weights, 5))
    layer(*tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Addressed, "run", lambda self, *given: (calls.append(self), run(self, *given)))
        layer(*tensors)
    assert len(calls) == 1 and len(calls[0].launchers) == 5
    assert pipeline.launch_on(tensors[0].device).pdl


@pytest.mark.parametrize("tokens", [1, 80, 901])
def test_bfloat16_hidden_states(weights, layer, tokens):
    inputs = inputs_of(weights, tokens)
    generator = torch.Generator("cuda").manual_seed(tokens)
    hidden = torch.randn((tokens, 7168), dtype=torch.bfloat16, device="cuda", generator=generator)
    output = layer(inputs.routing_logits, hidden)
    quantized = quantize(inputs._replace(hidden_states=hidden, hidden_states_scale=None))
    assert torch.equal(output, layer(inputs.routing_logits, *activations(quantized)[1:]))
    values, scale = reference_quantize_rows(hidden)
    torch.testing.assert_close(quantized.hidden_states_scale, scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(quantized.hidden_states.float(), values.float(), rtol=0.13, atol=2**-9)
    exact = inputs._replace(hidden_states=values, hidden_states_scale=scale)
    work = has_local_work(exact, DEEPSEEK_V3)
    if bool(work.any()):
        assert check(output, moe_reference(exact, DEEPSEEK_V3), work, Tolerance()).failures == ()


def test_nothing_compiles_after_warming_up(monkeypatch):
    """A problem that no other test has, so that its kernels are compiled here."""
    from triton.runtime.jit import JITFunction

    problem = MoEProblem(
        num_experts=48, num_local_experts=12, top_k=5, n_group=6, topk_group=3, hidden_size=640, intermediate_size=384
    )
    layer = HybridMoE.from_inputs(
        make_inputs(Workload(4, 12), problem, random_weights(problem, "cuda")), problem, backend=TRITON
    )
    compiled, compile_one = [], JITFunction._do_compile

    def watch(self, *arguments, **options):
        compiled.append(self.__name__)
        return compile_one(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", watch)
    done = layer.warm_up(max_num_tokens=4096)
    assert [w.num_tokens for w in done] == [2**n for n in range(13)]
    assert len(set(compiled)) >= 5, compiled
    compiled.clear()
    for tokens in (1, 2, 3, 5, 17, 33, 77, 131, 133, 300, 700, 1001, 1500, 3000, 4096):
        logits = torch.randn((tokens, 48), dtype=torch.float32, device="cuda")
        layer(logits, torch.randn((tokens, 640), dtype=torch.bfloat16, device="cuda"))
    assert compiled == []


def test_a_policy_is_taken_between_replays(weights):
    """A captured graph keeps what it was captured with, and new calls take the new policy."""
    table = lookup.decision_table(DEEPSEEK_V3, HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3).device)
    layer = HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3)
    graph = Replay(layer, 16, bfloat16=False)
    graph.graph.replay()
    before = graph.output.clone()
    layer.reload_policy()
    assert layer.choice(16) == table.choice(16)
    graph.output.fill_(float("nan"))
    graph.graph.replay()
    assert torch.equal(graph.output, before)
