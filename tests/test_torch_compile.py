"""Calls inside of torch.compile: one graph for every T, the results of calls outside, and layers that come and go."""

import copy
import dataclasses
import gc
import io
import threading

import pytest
import torch
from given_routing import routed_of
from test_api import ACTIVATIONS, PROBLEM, REFERENCE, ROUTING, call, forget, inputs_of, layer_of, make_policy, spies  # noqa: F401

from hybrid_moe import Candidate, HybridMoE, fused_moe, save_policy
from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.serving import call as calling
from hybrid_moe.serving import custom_ops

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    forget()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


def activations(inputs):
    return tuple(getattr(inputs, name) for name in ACTIVATIONS)


def dynamic(tensors):
    """T of logits, hidden states and scales is any."""
    for tensor, dim in zip(tensors, (0, 0, 1), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensors


def saved_and_loaded(layer):
    """By pickle as torch has it: Python's own can't take tensors in float8."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def operators(graph):
    return [str(node.target) for node in graph.graph.nodes if "hybrid_moe" in str(node.target)]


def compiled(function, backend="aot_eager"):
    """The function compiled without breaks, and the operators of each graph that this took."""
    graphs = []

    def watch(graph, inputs):
        graphs.append(operators(graph))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return torch.compile(function, backend=watch, fullgraph=True), graphs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [False, True], ids=["new", "output"])
def test_one_graph_of_a_layer_serves_every_t(weights, backend, given):
    layer = layer_of(inputs_of(weights, 5), backend=REFERENCE)

    def step(logits, hidden, scale, output=None):
        return layer(logits * 1.0, hidden, scale, output=output) + 1.0

    run, graphs = compiled(step, backend)
    for tokens in (5, 1000, 2, 33):
        inputs = inputs_of(weights, tokens, seed=tokens)
        output = torch.full((tokens, 256), torch.nan, dtype=torch.bfloat16) if given else None
        if given:
            torch._dynamo.mark_dynamic(output, 0)
        wanted = call(layer, inputs)
        assert torch.equal(run(*dynamic(activations(inputs)), output), wanted + 1.0)
        if given:
            assert torch.equal(output, wanted)
    assert graphs == [["hybrid_moe.layer_out.default" if given else "hybrid_moe.layer.default"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [False, True], ids=["new", "output"])
def test_one_graph_of_the_function_serves_every_t(weights, backend, given):
    def step(inputs, output=None):
        return fused_moe(*inputs, **ROUTING, backend="torch_reference", output=output) + 1.0

    run, graphs = compiled(step, backend)
    for tokens in (5, 1000, 2, 33):
        inputs = inputs_of(weights, tokens, seed=tokens)
        dynamic(activations(inputs))
        output = torch.full((tokens, 256), torch.nan, dtype=torch.bfloat16) if given else None
        if given:
            torch._dynamo.mark_dynamic(output, 0)
        assert torch.equal(run(inputs, output), fused_moe(*inputs, **ROUTING, backend=REFERENCE) + 1.0)
    assert len(graphs) == 1 and len(graphs[0]) == 1


def test_softmax_routing(weights):
    options = ROUTING | {"n_group": 1, "topk_group": 1, "routing_method": "softmax"}
    run, graphs = compiled(lambda inputs: fused_moe(*inputs, **options, backend="torch_reference"))
    inputs = inputs_of(weights, 9)
    wanted = fused_moe(*inputs, **options, backend=REFERENCE)
    assert torch.equal(run(inputs), wanted) and len(graphs) == 1
    assert not torch.equal(
        wanted, fused_moe(*inputs, **(options | {"routing_method": "deepseek_v3"}), backend=REFERENCE)
    )


def test_the_inductor(weights):
    layer = layer_of(inputs_of(weights, 5), backend=REFERENCE)

    def step(logits, hidden, scale, output):
        output = layer(logits, hidden, scale, output=output)
        return layer(logits, hidden, scale) + output

    run = torch.compile(step, backend="inductor", fullgraph=True)
    for tokens in (5, 40):
        inputs = inputs_of(weights, tokens)
        output = torch.full((tokens, 256), torch.nan, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(output, 0)
        wanted = call(layer, inputs)
        with torch.compiler.set_stance("default" if tokens == 5 else "fail_on_recompile"):
            assert torch.equal(run(*dynamic(activations(inputs)), output), wanted * 2)
        assert torch.equal(output, wanted)


def test_outside_of_compiled_code_no_operator_is_called(weights, monkeypatch):
    inputs = inputs_of(weights, 5)
    for name in ("call_layer", "call_fused_moe"):
        monkeypatch.setattr(custom_ops, name, lambda *arguments: pytest.fail("called the operator"))
    call(layer_of(inputs, backend=REFERENCE), inputs)
    fused_moe(*inputs, **ROUTING, backend=REFERENCE)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("routed", [False, True], ids=["logits", "routed"])
@pytest.mark.parametrize("name", ["layer", "layer_out", "fused_moe", "fused_moe_out"])
def test_torchs_own_checks_of_the_operators(weights, tokens, name, routed):
    inputs = inputs_of(weights, tokens)
    wanted = call(layer_of(inputs, backend=REFERENCE), inputs)
    if routed:
        inputs, name = routed_of(inputs, PROBLEM), f"routed_{name}"
    layer = layer_of(inputs, backend=REFERENCE)
    options = [layer._handle]
    if "fused_moe" in name:
        options = [calling.handle_of("torch_reference", None, None, None), 3, 4, 2, False, None, 16 if routed else None]
    if name.endswith("_out"):
        options.append(torch.full((tokens, 256), 7.0, dtype=torch.bfloat16))
    operator, before = getattr(custom_ops, name), copy.deepcopy(inputs)
    # test_schema compares what isn't mutated, which torch can't in float8: below.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (*inputs, *options), test_utils=checks)
    result = operator(*inputs, *options)
    assert torch.equal(options[-1] if name.endswith("_out") else result, wanted)
    for one, other in zip(inputs[:8], before[:8], strict=True):
        assert torch.equal(one.float(), other.float())


def test_layers_share_a_compiled_function_and_keep_their_results(weights):
    """As a model's layers do, which are all called from the same line."""
    first = inputs_of(weights, 5)
    others = [random_weights(PROBLEM, "cpu", seed=seed) for seed in range(3)]
    layers = [layer_of(inputs_of(each, 5), backend=REFERENCE) for each in others]

    class Block(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *tensors):
            return self.layer(*tensors)

    blocks = [Block(layer) for layer in layers]
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    wanted = [call(layer, first) for layer in layers]
    assert not torch.equal(wanted[0], wanted[1])
    for _ in range(2):
        for block, one in zip(blocks, wanted, strict=True):
            assert torch.equal(block(*dynamic(activations(first))), one)

    stack, graphs = compiled(lambda *tensors: [layer(*tensors) for layer in layers])
    for one, other in zip(stack(*activations(first)), wanted, strict=True):
        assert torch.equal(one, other)
    assert graphs == [["hybrid_moe.layer.default"] * 3]


@pytest.mark.parametrize("given", [False, True], ids=["new", "output"])
@pytest.mark.parametrize("kind", ["layer", "fused_moe"])
def test_experts_chosen_before_the_call(weights, kind, given):
    layer = layer_of(routed_of(inputs_of(weights, 5), PROBLEM), backend=REFERENCE)

    def step(inputs, output=None):
        chosen = dict(topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights * 1.0, output=output)
        if kind == "layer":
            return layer(None, inputs.hidden_states, inputs.hidden_states_scale, **chosen)
        return fused_moe(None, None, *inputs[2:], **ROUTING, num_experts=16, backend="torch_reference", **chosen)

    run, graphs = compiled(step)
    for tokens in (5, 1000, 2, 33):
        inputs = inputs_of(weights, tokens, seed=tokens)
        routed = routed_of(inputs, PROBLEM)
        for tensor, dim in zip(routed[:4], (0, 0, 0, 1), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        output = torch.full((tokens, 256), torch.nan, dtype=torch.bfloat16) if given else None
        if given:
            torch._dynamo.mark_dynamic(output, 0)
        wanted = fused_moe(*inputs, **ROUTING, backend=REFERENCE)
        assert torch.equal(run(routed, output), wanted)
        assert not given or torch.equal(output, wanted)
    assert graphs == [[f"hybrid_moe.routed_{kind}{'_out' if given else ''}.default"]]


@pytest.mark.usefixtures("spies")
def test_compiled_code_takes_the_choice_of_each_t(weights):
    layer = layer_of(inputs_of(weights, 5), policy=make_policy())
    run, graphs = compiled(lambda *tensors: layer(*tensors))
    for tokens, value in ((2, 1.0), (7, 2.0), (4, 1.0), (9, 2.0)):
        assert bool((run(*dynamic(activations(inputs_of(weights, tokens)))) == value).all())
    assert len(graphs) == 1


@pytest.mark.usefixtures("spies")
@pytest.mark.parametrize("kind", ["object", "text", "path"])
def test_the_function_compiled_with_policies(weights, tmp_path, kind):
    policies = [make_policy(), make_policy(default=Candidate("one"), regimes=[])]
    given = []
    for number, policy in enumerate(policies):
        path = tmp_path / f"{number}.json"
        save_policy(policy, path)
        given.append({"object": policy, "text": str(path), "path": path}[kind])
    run, _ = compiled(lambda inputs, policy: fused_moe(*inputs, **ROUTING, policy=policy))
    inputs = inputs_of(weights, 7)
    for _ in range(2):
        for policy, value in zip(given, (2.0, 1.0), strict=True):
            assert bool((run(inputs, policy) == value).all())


@pytest.mark.usefixtures("spies")
def test_the_function_compiled_with_backends(weights):
    run, _ = compiled(lambda inputs, backend: fused_moe(*inputs, **ROUTING, backend=backend))
    inputs = inputs_of(weights, 7)
    for backend, value in (("one", 1.0), (Candidate("two"), 2.0), (Candidate("one"), 1.0), ("two", 2.0)):
        assert bool((run(inputs, backend) == value).all())


def test_the_function_compiled_with_other_routing(weights):
    inputs = inputs_of(weights, 7)
    run, _ = compiled(
        lambda inputs, top_k: fused_moe(*inputs, **(ROUTING | {"top_k": top_k}), backend="torch_reference")
    )
    for top_k in (3, 2, 4, 3):
        wanted = fused_moe(*inputs, **(ROUTING | {"top_k": top_k}), backend="torch_reference")
        assert torch.equal(run(inputs, top_k), wanted)


@pytest.mark.parametrize("dynamic_shapes", [None, True])
def test_the_function_compiled_with_problems(weights, dynamic_shapes):
    inputs = inputs_of(weights, 7)

    def step(inputs, problem):
        return fused_moe(*inputs, problem=problem, backend="torch_reference")

    run = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic_shapes)
    for top_k in (3, 2, 3):
        problem = dataclasses.replace(PROBLEM, top_k=top_k)
        assert torch.equal(run(inputs, problem), step(inputs, problem))


def test_what_is_wrong_is_named_by_compiled_code_as_well(weights):
    inputs = inputs_of(weights, 5)
    layer = layer_of(inputs, backend=REFERENCE)
    run = torch.compile(lambda *tensors: layer(*tensors), backend="aot_eager", fullgraph=True)
    with pytest.raises(TypeError, match="routing_logits: expected dtype torch.float32, got torch.float64"):
        run(inputs.routing_logits.double(), inputs.hidden_states, inputs.hidden_states_scale)


def test_a_layer_that_is_gone_is_named(weights):
    inputs = inputs_of(weights, 5)
    layer = layer_of(inputs, backend=REFERENCE)
    handle = layer._handle
    assert torch.equal(custom_ops.layer(*inputs, handle), call(layer, inputs))
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match=f"handle: expected that of a living layer, got {handle}: keep"):
        custom_ops.layer(*inputs, handle)


@pytest.mark.usefixtures("spies")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, saved_and_loaded])
def test_a_copy_of_a_layer_has_a_handle_of_its_own(weights, copied):
    inputs = inputs_of(weights, 7)
    layer = layer_of(inputs, policy=make_policy())
    wanted = call(layer, inputs)
    other = copied(layer)
    assert type(other) is HybridMoE and other.problem == layer.problem and other._handle != layer._handle
    assert other.explain(7) == layer.explain(7) and other.explain(2) == layer.explain(2)
    shared = other._held[0].data_ptr() == layer._held[0].data_ptr()
    assert shared == (copied is copy.copy)
    del layer
    gc.collect()
    run = torch.compile(lambda *tensors: other(*tensors), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(*activations(inputs)), wanted)
    explicit = copied(layer_of(inputs, backend="one"))
    assert explicit.explain(7).source == "explicit" and explicit.choice(7) == Candidate("one")


def test_threads_register_and_call_layers_at_once(weights):
    inputs = inputs_of(weights, 3)
    wanted = fused_moe(*inputs, **ROUTING, backend=REFERENCE)
    handles, wrong = [], []

    def work():
        for _ in range(20):
            layer = layer_of(inputs, backend=REFERENCE)
            handles.append(layer._handle)
            if not torch.equal(custom_ops.layer(*inputs, layer._handle), wanted):
                wrong.append(layer._handle)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(handles)) == 80 and not wrong


def test_it_can_be_exported(weights):
    inputs = inputs_of(weights, 5)
    layer = layer_of(inputs, backend=REFERENCE)

    class Model(torch.nn.Module):
        def forward(self, logits, hidden, scale):
            return layer(logits, hidden, scale)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    shapes = ({0: tokens}, {0: tokens}, {1: tokens})
    program = torch.export.export(Model(), activations(inputs), dynamic_shapes=shapes)
    other = inputs_of(weights, 9)
    assert torch.equal(program.module()(*activations(other)), call(layer, other))
