"""Serving on a GPU: graphs replayed many times, torch.compile, streams, threads and layers at once, warming up."""

import threading

import pytest
import torch
from given_routing import random_choice

from hybrid_moe import DeviceKey, HybridMoE, MoEProblem, RoutedInputs, backends, fused_moe
from hybrid_moe.kernels.activations import quantize_rows
from hybrid_moe.kernels.external import external_inputs
from hybrid_moe.kernels.launcher import limits_of
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights
from hybrid_moe.numerics import Tolerance, check
from hybrid_moe.policy import resolve
from hybrid_moe.reference import has_local_work, moe_reference
from hybrid_moe.reference import quantize_rows as reference_quantize_rows
from hybrid_moe.serving.quantize_input import quantize

pytestmark = pytest.mark.gpu

TRITON = resolve.as_candidate("triton_fused")
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
    assert torch.cuda.memory_allocated() <= allocated  # others' may have been freed
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
    from hybrid_moe.kernels.plan import Addressed

    calls, run = [], Addressed.run
    layer = HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3, backend=TRITON)
    tensors = activations(inputs_of(weights, 5))
    layer(*tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Addressed, "run", lambda self, *given: (calls.append(self), run(self, *given)))
        layer(*tensors)
    assert len(calls) == 1 and len(calls[0].launchers) == 5
    assert limits_of(tensors[0].device).pdl


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
    # The layer's own bias: that of another T is drawn again.
    bias = inputs_of(weights, 1).routing_bias
    exact = inputs._replace(routing_bias=bias, hidden_states=values, hidden_states_scale=scale)
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
    table = resolve.decision_table(DEEPSEEK_V3, HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3).device)
    layer = HybridMoE.from_inputs(inputs_of(weights, 1), DEEPSEEK_V3)
    graph = Replay(layer, 16, bfloat16=False)
    graph.graph.replay()
    before = graph.output.clone()
    layer.reload_policy()
    assert layer.choice(16) == table.choice(16)
    graph.output.fill_(float("nan"))
    graph.graph.replay()
    assert torch.equal(graph.output, before)


# ---- Experts chosen before the call ----


def choice_of(inputs):
    """Ids and weights of the routing kernel, which are the reference's but for the weights' last bits."""
    external = external_inputs(inputs, DEEPSEEK_V3, limits_of(inputs.hidden_states.device))
    return (external.experts + inputs.local_expert_offset) % 256, external.weights


@pytest.fixture(scope="module", params=["policy", *map(str, backends.candidates())])
def routed_layer(request, weights):
    """By this GPU's policy, and by each backend that can run here and takes chosen experts."""
    backend = None if request.param == "policy" else resolve.as_candidate(request.param)
    if backend is not None:
        if backend.backend == "torch_reference":
            pytest.skip("not for CUDA graphs")
        reasons = backends.not_supported_reasons(DEEPSEEK_V3, DeviceKey.of("cuda"), backend)
        if reasons := (*reasons, *backends.routed_reasons(DEEPSEEK_V3, backend)):
            pytest.skip("; ".join(reasons))
    inputs = inputs_of(weights, 1)
    return HybridMoE.from_inputs(RoutedInputs(*choice_of(inputs), *inputs[2:]), DEEPSEEK_V3, backend=backend)


@pytest.mark.parametrize("tokens", [1, 16, 80, 901])
def test_the_choice_of_the_routing_gives_the_call_with_logits(weights, routed_layer, tokens):
    inputs = inputs_of(weights, tokens)
    layer = HybridMoE.from_inputs(inputs, DEEPSEEK_V3, backend=routed_layer.choice(tokens))
    ids, scores = choice_of(inputs)
    output = torch.full((tokens, 7168), float("nan"), dtype=torch.bfloat16, device="cuda")
    routed_layer(None, *activations(inputs)[1:], topk_ids=ids, topk_weights=scores, output=output)
    assert torch.equal(output, layer(*activations(inputs)))


@pytest.mark.parametrize("tokens", [1, 16, 80, 901])
def test_any_choice_of_experts(weights, routed_layer, tokens):
    inputs = inputs_of(weights, tokens)
    routed = RoutedInputs(*(t.cuda() for t in random_choice(DEEPSEEK_V3, tokens)), *inputs[2:])
    chosen = dict(topk_ids=routed.topk_ids, topk_weights=routed.topk_weights)
    output = torch.full((tokens, 7168), float("nan"), dtype=torch.bfloat16, device="cuda")
    routed_layer(None, routed.hidden_states, routed.hidden_states_scale, **chosen, output=output)
    work = has_local_work(routed, DEEPSEEK_V3)
    assert not output[~work].any()
    if bool(work.any()):
        assert check(output, moe_reference(routed, DEEPSEEK_V3), work, Tolerance()).failures == ()


@pytest.mark.parametrize("tokens", [1, 16, 901])
def test_a_graph_is_replayed_with_other_experts(weights, routed_layer, tokens):
    inputs = inputs_of(weights, tokens)
    ids, scores = (tensor.cuda() for tensor in random_choice(DEEPSEEK_V3, tokens))
    output = torch.empty((tokens, 7168), dtype=torch.bfloat16, device="cuda")
    routed_layer.warm_up([tokens])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routed_layer(None, *activations(inputs)[1:], topk_ids=ids, topk_weights=scores, output=output)
    results = []
    for seed in range(1, 20):
        for old, new in zip((ids, scores), random_choice(DEEPSEEK_V3, tokens, seed), strict=True):
            old.copy_(new)
        # All on one expert, each token's experts all elsewhere, all none, one expert named by every place.
        if seed in (16, 17, 18, 19):
            ids.copy_(torch.tensor({16: [96] + [-1] * 7, 17: [*range(8)], 18: [-1] * 8, 19: [127] * 8}[seed]))
        output.fill_(float("nan"))
        graph.replay()
        results.append(output.clone())
        wanted = routed_layer(None, *activations(inputs)[1:], topk_ids=ids, topk_weights=scores)
        assert torch.equal(output, wanted), seed
    assert not results[16].any() and not results[17].any()
    assert results[15].any() and results[18].any()
    assert tokens == 1 or not torch.equal(results[0], results[1])


def test_nothing_compiles_after_warming_up_for_chosen_experts(monkeypatch):
    """A problem of its own, so that its kernels are compiled here."""
    from triton.runtime.jit import JITFunction

    problem = MoEProblem(
        num_experts=40, num_local_experts=10, top_k=6, n_group=5, topk_group=3, hidden_size=640, intermediate_size=384
    )
    inputs = make_inputs(Workload(4, 10), problem, random_weights(problem, "cuda"))
    routed = RoutedInputs(*(t.cuda() for t in random_choice(problem, 4)), *inputs[2:])
    layer = HybridMoE.from_inputs(routed, problem, backend=TRITON)
    compiled, compile_one = [], JITFunction._do_compile

    def watch(self, *arguments, **options):
        compiled.append(self.__name__)
        return compile_one(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", watch)
    layer.warm_up(max_num_tokens=1024)
    assert "scatter_kernel" in compiled and "route_kernel" not in compiled
    compiled.clear()
    for tokens in (1, 2, 3, 5, 17, 33, 77, 300, 1001):
        ids, scores = (tensor.cuda() for tensor in random_choice(problem, tokens))
        hidden = torch.randn((tokens, 640), dtype=torch.bfloat16, device="cuda")
        layer(None, hidden, topk_ids=ids, topk_weights=scores)
        wide = torch.full((tokens, 8), -1, dtype=torch.int32, device="cuda")  # rows of a dispatcher's buffer
        wide[:, :6] = ids
        layer(None, hidden, topk_ids=wide[:, :6], topk_weights=scores)
    assert compiled == []


@pytest.mark.parametrize("tokens", [1, 80])
def test_a_bias_in_float32(weights, layer, tokens):
    """The same values give the same bits, as neither dtype takes the other's binary; others aren't rounded."""
    inputs = inputs_of(weights, tokens)
    choice = layer.choice(tokens)
    wanted = HybridMoE.from_inputs(inputs, DEEPSEEK_V3, backend=choice)(*activations(inputs))
    for _ in range(2):
        for bias in (inputs.routing_bias.float(), inputs.routing_bias):
            given = inputs._replace(routing_bias=bias)
            again = HybridMoE.from_inputs(given, DEEPSEEK_V3, backend=choice)
            assert torch.equal(again(*activations(inputs)), wanted)
    # Little but the bias decides, of which bfloat16 would leave three values.
    spread = torch.rand(256, generator=torch.Generator().manual_seed(1)).cuda() / 64
    spread[96:98] = 1 / 64  # two local experts are the best of all
    fine = inputs._replace(routing_bias=1 + spread, routing_logits=inputs.routing_logits / 100)
    output = HybridMoE.from_inputs(fine, DEEPSEEK_V3, backend=TRITON)(*activations(fine))
    work = has_local_work(fine, DEEPSEEK_V3)
    assert bool(work.any())
    assert check(output, moe_reference(fine, DEEPSEEK_V3), work, Tolerance()).failures == ()
