"""The entry points on the CPU: what runs, what is refused and how, and that nothing is loaded before it is needed."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import hybrid_moe
from hybrid_moe import (
    BackendUnsupportedError,
    Candidate,
    DeviceKey,
    HybridMoE,
    MoEProblem,
    NoBackendError,
    Policy,
    PolicyError,
    PolicyMismatchWarning,
    api,
    backends,
    fused_moe,
    release_quarantine,
    save_policy,
)
from hybrid_moe.backends import Backend, Runner
from hybrid_moe.kernels import interpreter
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import Tolerance
from hybrid_moe.policy import resolve
from hybrid_moe.policy.schema import LearnerOptions, Regime, RegretSummary
from hybrid_moe.policy.store import policy_path, user_policy_dir
from hybrid_moe.reference import moe_reference
from hybrid_moe.serving import call as calling

ROOT = Path(__file__).parents[1]
PROBLEM = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=3, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
ROUTING = dict(top_k=3, n_group=4, topk_group=2)
REFERENCE = Candidate("torch_reference")
ACTIVATIONS = ("routing_logits", "hidden_states", "hidden_states_scale")


def forget():
    """Empty what the library remembers of problems, devices and policies."""
    for memo in (backends.not_supported_reasons, backends.prepare, calling._cached_dispatch):
        memo.cache_clear()
    release_quarantine()


@pytest.fixture(autouse=True)
def nothing_remembered():
    forget()
    yield
    forget()


@pytest.fixture
def no_interpreter(monkeypatch):
    """As serving has it: the kernels were decorated without TRITON_INTERPRET."""
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)


class Spy(Backend):
    """Fills the output with a number of its own, and counts."""

    def __init__(self, name, value, reasons=()):
        self.name, self.value, self.reasons, self.runs, self.prepared = name, value, list(reasons), [], 0

    def not_supported_reasons(self, problem, device, config):
        return self.reasons

    def prepare(self, problem, device, config):
        self.refuse_if_unsupported(problem, device, config)
        self.prepared += 1
        return _SpyRunner(self)


class _SpyRunner(Runner):
    def __init__(self, spy):
        self.spy = spy

    def run(self, inputs, output):
        self.spy.runs.append(inputs)
        output.fill_(self.spy.value)

    def workspace_bytes(self, num_tokens):
        return 10 * num_tokens


@pytest.fixture
def spies(monkeypatch):
    """Two backends beside the real ones."""
    pair = Spy("one", 1.0), Spy("two", 2.0)
    for spy in pair:
        monkeypatch.setitem(backends.BACKENDS, spy.name, spy)
    return pair


def make_policy(problem=PROBLEM, device="cpu", **changes):
    """``one`` up to 4 tokens, ``two`` from 5 to 9, and the reference elsewhere."""

    def regime(low, high, name):
        fields = dict(verdict="best", verified="measured", reason="r", expected_regret=0.0, evidence=[])
        return Regime(min_tokens=low, max_tokens=high, choice=Candidate(name), **fields)

    fields = dict(
        device=device,
        problem=problem,
        definition=problem.definition,
        candidates=[Candidate("one"), Candidate("two"), REFERENCE],
        default=REFERENCE,
        default_reason="measured most",
        default_evidence=[],
        regimes=[regime(0, 4, "one"), regime(5, 9, "two")],
        training_regret=RegretSummary(mean=0.0, worst=0.0, worst_num_tokens=1, num_tokens=1),
        leave_one_out_regret=None,
        learner=LearnerOptions(),
        tolerance=Tolerance(),
        inputs=[],
        environment={},
    )
    return Policy(**(fields | changes))


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


@pytest.fixture
def inputs(weights):
    return inputs_of(weights, 7)


def inputs_of(weights, tokens, seed=0):
    return make_inputs(Workload(tokens, 5, seed=seed), PROBLEM, weights)


def layer_of(inputs, gate_first=False, **options):
    return HybridMoE.from_inputs(inputs, dataclasses.replace(PROBLEM, gate_first=gate_first), **options)


def call(layer, inputs, **options):
    return layer(*(getattr(inputs, name) for name in ACTIVATIONS), **options)


# Imports


def in_a_fresh_process(code):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_it_loads_no_kernel_library():
    loaded = in_a_fresh_process(
        """
        import json, sys
        import hybrid_moe, hybrid_moe.api, hybrid_moe.backends, hybrid_moe.measure.workloads
        wanted = ("hybrid_moe.kernels.pipeline", "flashinfer", "sgl_kernel", "deep_gemm", "triton", "torch._dynamo")
        print(json.dumps([m for m in sys.modules if m.startswith(wanted)]))
        """
    )
    assert loaded == []


def test_a_process_without_the_interpreter():
    found = in_a_fresh_process(
        """
        import json, sys
        from hybrid_moe import BackendUnsupportedError, DeviceKey, MoEProblem, backends
        from hybrid_moe.policy import resolve
        table = resolve.decision_table(MoEProblem(), DeviceKey("cpu"))
        try:
            backends.prepare(MoEProblem(), DeviceKey("cpu"), resolve.as_candidate("triton_fused"))
        except BackendUnsupportedError as error:
            reasons = error.reasons
        print(json.dumps([str(table.choice(16)), reasons, "hybrid_moe.kernels.pipeline" in sys.modules]))
        """
    )
    assert found[0] == "torch_reference"
    assert "TRITON_INTERPRET" in found[1][0]
    assert found[2] is False


def test_all_that_is_exported_is_there():
    assert all(hasattr(hybrid_moe, name) for name in hybrid_moe.__all__)


# What runs


def test_the_cpu_runs_the_reference_by_default(no_interpreter, inputs):
    decision = layer_of(inputs).explain(7)
    assert (decision.choice, decision.source) == (REFERENCE, "no_policy")
    assert decision.reasons[0] == "policy: none for cpu"
    assert ["flashinfer_trtllm" in r or "triton_fused" in r for r in decision.reasons] == [False, False]
    output = fused_moe(*inputs, **ROUTING)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, moe_reference(inputs, PROBLEM).bfloat16())


def test_the_cpu_needs_no_policy(no_interpreter, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_moe(*inputs, **ROUTING)


def test_a_gpu_without_a_policy_says_how_to_get_one():
    with pytest.warns(
        UserWarning, match="no policy for device nvidia_x .*`hybrid-moe regenerate --num-experts 16 .*` makes one"
    ) as caught:
        table = resolve.decision_table(PROBLEM, DeviceKey("nvidia_x", (9, 0)))
    assert len(caught) == 1
    assert table.choice(1).backend == "triton_fused"
    for choice in resolve.DEFAULT_ORDER:
        assert str(choice) in str(caught[0].message)


@pytest.mark.parametrize("backend", ["triton_fused", "flashinfer_trtllm", "triton_fused[gemm=triton]"])
@pytest.mark.parametrize("tokens", [0, 7])
def test_an_explicit_backend_never_falls_back(no_interpreter, weights, backend, tokens):
    inputs = inputs_of(weights, tokens)
    for run in (lambda: fused_moe(*inputs, **ROUTING, backend=backend), lambda: layer_of(inputs, backend=backend)):
        with pytest.raises(BackendUnsupportedError) as caught:
            run()
        assert caught.value.choice == resolve.as_candidate(backend)
        assert caught.value.reasons
        assert any("10.0" in reason for reason in caught.value.reasons)
        for reason in [backend.split("[")[0], "cpu", *caught.value.reasons]:
            assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "error", "words"),
    [
        ("triton", ValueError, ["'triton'", "flashinfer_trtllm, triton_fused, flashinfer_cutlass, torch_reference"]),
        (Candidate("nothing"), ValueError, ["'nothing'", "expected one of"]),
        ("torch_reference[", ValueError, ["]"]),
        ("torch_reference[x]", ValueError, ["'x'", "key=value"]),
        ("torch_reference[x=1]", BackendUnsupportedError, ["option 'x' is unknown"]),
        (
            Candidate("triton_fused", {"gemm": "cublas"}),
            BackendUnsupportedError,
            ["gemm='cublas' is unknown", "triton"],
        ),
    ],
    ids=str,
)
def test_a_backend_that_is_none(inputs, backend, error, words):
    for run in (lambda: fused_moe(*inputs, **ROUTING, backend=backend), lambda: layer_of(inputs, backend=backend)):
        with pytest.raises(error) as caught:
            run()
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("backend", ["one", "one[]", Candidate("one")], ids=str)
def test_an_explicit_backend_comes_before_the_policy(spies, inputs, backend):
    assert bool((fused_moe(*inputs, **ROUTING, backend=backend, policy=make_policy()) == 1).all())
    assert bool((call(layer_of(inputs, backend=backend, policy=make_policy()), inputs) == 1).all())
    assert len(spies[0].runs) == 2 and not spies[1].runs


@pytest.mark.parametrize("where", ["object", "file", "text", "folder", "user"])
def test_a_policy_decides_by_the_number_of_tokens(spies, weights, tmp_path, where):
    path = policy_path(user_policy_dir() if where == "user" else tmp_path, "cpu", PROBLEM)
    save_policy(make_policy(), path)
    policy = dict(object=make_policy(), file=path, text=str(path), folder=tmp_path, user=None)[where]
    layer = layer_of(inputs_of(weights, 10), policy=policy)
    for tokens, value in ((1, 1), (4, 1), (5, 2), (9, 2)):
        inputs = inputs_of(weights, tokens)
        assert bool((fused_moe(*inputs, **ROUTING, policy=policy) == value).all())
        assert bool((call(layer, inputs) == value).all())
    inputs = inputs_of(weights, 10)
    wanted = moe_reference(inputs, PROBLEM).bfloat16()
    assert torch.equal(fused_moe(*inputs, **ROUTING, policy=policy), wanted)
    assert torch.equal(call(layer, inputs), wanted)


def test_another_policy_object_is_another_policy(spies, inputs):
    assert bool((fused_moe(*inputs, **ROUTING, policy=make_policy()) == 2).all())
    assert bool((fused_moe(*inputs, **ROUTING, policy=make_policy(default=Candidate("one"), regimes=[])) == 1).all())


def test_a_regime_that_cannot_run_gives_way_to_the_default(spies, inputs):
    spies[1].reasons = ["no such card"]
    layer = layer_of(inputs, policy=make_policy(default=Candidate("one")))
    assert bool((call(layer, inputs) == 1).all())
    decision = layer.explain(7)
    assert (decision.choice, decision.source, decision.regime) == (Candidate("one"), "default", (5, 9))
    assert any("two passed over" in reason and "no such card" in reason for reason in decision.reasons)


def test_nothing_of_the_policy_can_run(spies, inputs):
    for spy in spies:
        spy.reasons = ["asleep"]
    policy = make_policy(candidates=[Candidate("one"), Candidate("two")], default=Candidate("one"))
    resolve.warn_once.cache_clear()
    with pytest.warns(PolicyMismatchWarning, match="none of its candidates can run here. torch_reference runs instead"):
        layer = layer_of(inputs, policy=policy)
    assert {layer.explain(tokens).source for tokens in (1, 7, 20)} == {"unmeasured"}
    assert torch.equal(call(layer, inputs), fused_moe(*inputs, **ROUTING, backend=REFERENCE))


def test_a_b200_with_a_plain_install_runs_this_packages_own_kernels(monkeypatch):
    asked = backends.not_supported_reasons

    def plain(problem, device, choice):
        own = choice in (Candidate("triton_fused", {"gemm": "triton"}), REFERENCE)
        return asked(problem, device, choice) if own else ("not installed",)

    resolve.warn_once.cache_clear()
    with (
        monkeypatch.context() as patch,
        pytest.warns(PolicyMismatchWarning, match=r"triton_fused\[gemm=triton\] runs instead, which nobody measured"),
    ):
        patch.setattr(backends, "not_supported_reasons", plain)
        table = resolve.decision_table(MoEProblem(), DeviceKey("nvidia_b200", (10, 0)))
    assert table.choices == (Candidate("triton_fused", {"gemm": "triton"}),)
    assert {decision.source for decision in table.decisions} == {"unmeasured"}


def test_the_reference_says_that_it_is_slow_where_that_is_felt():
    resolve.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="torch_reference runs on nvidia_a100: .*it is slow.*8.9 have no FP8.*Marlin"):
        resolve.decision_table(MoEProblem(), DeviceKey("nvidia_a100", (8, 0)))
    with pytest.warns(UserWarning, match="torch_reference runs on cpu: .*it is slow"):
        resolve.decision_table(MoEProblem(), DeviceKey("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve.decision_table(PROBLEM, DeviceKey("cpu"))
        resolve.decision_table(MoEProblem(), DeviceKey("cpu"))  # once in a process


@pytest.mark.parametrize("capability", [(8, 9), (12, 0), (12, 1)])
def test_our_kernels_run_where_nothing_was_measured(capability):
    with pytest.warns(UserWarning, match="no policy for device nvidia_l40s"):
        table = resolve.decision_table(MoEProblem(), DeviceKey("nvidia_l40s", capability))
    assert table.choices == (Candidate("triton_fused", {"gemm": "triton"}),)


def test_nothing_can_run(spies, inputs, no_interpreter, monkeypatch):
    for spy in spies:
        spy.reasons = [f"{spy.name} is asleep", "and old"]
    policy = make_policy(candidates=[Candidate("one"), Candidate("two")], default=Candidate("one"))
    reference = type(backends.BACKENDS["torch_reference"])
    monkeypatch.setattr(reference, "not_supported_reasons", lambda *_: ["no torch_reference today"])
    backends.not_supported_reasons.cache_clear()
    for run in (lambda: fused_moe(*inputs, **ROUTING, policy=policy), lambda: layer_of(inputs, policy=policy)):
        with pytest.raises(NoBackendError) as caught:
            run()
        for word in ("one is asleep", "two is asleep", "and old", "torch_reference"):
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (make_policy(device="nvidia_b200"), ["nvidia_b200", "cpu"]),
        (make_policy(dataclasses.replace(PROBLEM, gate_first=True)), ["gate_first=True", "gate_first=False"]),
        (make_policy(dataclasses.replace(PROBLEM, num_experts=32)), ["num_experts=32", "num_experts=16"]),
    ],
    ids=["device", "gate_first", "num_experts"],
)
def test_a_policy_for_something_else(inputs, tmp_path, policy, words):
    save_policy(policy, tmp_path / "p.json")
    for given in (policy, tmp_path / "p.json", tmp_path):
        for run in (
            lambda p=given: fused_moe(*inputs, **ROUTING, policy=p),
            lambda p=given: layer_of(inputs, policy=p),
        ):
            with pytest.raises(PolicyError) as caught:
                run()
            for word in words:
                assert word in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: None, "doesn't exist"),
        (lambda text: text[: len(text) // 2], "isn't whole JSON"),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
            "expected schema_version 1, got schema_version 2",
        ),
    ],
    ids=["missing", "cut", "version"],
)
def test_a_policy_file_that_cannot_be_used(inputs, tmp_path, spoil, message):
    path = tmp_path / "p.json"
    save_policy(make_policy(), path)
    text = spoil(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    for run in (lambda: fused_moe(*inputs, **ROUTING, policy=path), lambda: layer_of(inputs, policy=path)):
        with pytest.raises(PolicyError, match=message) as caught:
            run()
        assert str(path) in str(caught.value)


def test_a_broken_policy_of_the_user_is_no_silent_default(inputs):
    path = policy_path(user_policy_dir(), "cpu", PROBLEM)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(PolicyError, match="isn't whole JSON"):
        fused_moe(*inputs, **ROUTING)


# Outputs


@pytest.mark.parametrize("run", ["function", "layer"])
def test_a_given_output_is_written_and_returned(inputs, run):
    output = torch.full((7, 256), float("nan"), dtype=torch.bfloat16)
    if run == "function":
        result = fused_moe(*inputs, **ROUTING, backend=REFERENCE, output=output)
    else:
        result = call(layer_of(inputs, backend=REFERENCE), inputs, output=output)
    assert result is output
    assert torch.equal(output, moe_reference(inputs, PROBLEM).bfloat16())


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.zeros(7, 256), TypeError, "output: expected dtype torch.bfloat16, got torch.float32"),
        (torch.zeros(6, 256, dtype=torch.bfloat16), ValueError, r"output: expected shape \[7, 256\], got \[6, 256\]"),
        (
            torch.zeros(7, 512, dtype=torch.bfloat16)[:, ::2],
            ValueError,
            "output: expected a? ?contiguous (tensor|rows), got strides",
        ),
        (
            torch.zeros(7, 256, dtype=torch.bfloat16, device="meta"),
            ValueError,
            "output: expected it on cpu, where gemm1_weights is, got meta",
        ),
        (None, None, None),
    ],
    ids=["dtype", "shape", "strides", "device", "none"],
)
def test_a_wrong_output_is_refused_before_anything_runs(spies, inputs, output, error, message):
    layer = layer_of(inputs, backend="one")
    for run in (
        lambda: fused_moe(*inputs, **ROUTING, backend="one", output=output),
        lambda: call(layer, inputs, output=output),
    ):
        if error is None:
            assert run().shape == (7, 256)
            continue
        with pytest.raises(error, match=message):
            run()
        assert not spies[0].runs


def test_each_call_returns_a_tensor_of_its_own(inputs):
    layer = layer_of(inputs, backend=REFERENCE)
    one, two = call(layer, inputs), call(layer, inputs)
    assert one.data_ptr() != two.data_ptr()
    assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["torch_reference", None])
def test_no_tokens(no_interpreter, weights, backend):
    inputs = inputs_of(weights, 0)
    layer = layer_of(inputs, backend=backend)
    output = torch.empty((0, 256), dtype=torch.bfloat16)
    for result in (fused_moe(*inputs, **ROUTING, backend=backend), call(layer, inputs)):
        assert result.shape == (0, 256) and result.dtype == torch.bfloat16
    assert fused_moe(*inputs, **ROUTING, backend=backend, output=output) is output
    assert layer.workspace_bytes(0) == 0
    assert layer.explain(0).choice == REFERENCE


def test_no_tokens_run_nothing(spies, weights):
    inputs = inputs_of(weights, 0)
    fused_moe(*inputs, **ROUTING, backend="one")
    call(layer_of(inputs, policy=make_policy()), inputs)
    assert not spies[0].runs and not spies[1].runs


# Inputs: all their checks are in test_problem.py


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("hidden_states", lambda t: t.half(), TypeError, "hidden_states: expected dtype .*, got torch.float16"),
        ("routing_logits", lambda t: t.bfloat16(), TypeError, "routing_logits: expected dtype .*, got torch.bfloat16"),
        ("routing_logits", lambda t: t[:-1], ValueError, r"routing_logits: expected shape \[7, 16\], got \[6, 16\]"),
        (
            "hidden_states_scale",
            lambda t: t.t(),
            ValueError,
            r"hidden_states_scale: expected shape \[2, 7\], got \[7, 2\]",
        ),
        (
            "hidden_states_scale",
            lambda t: t.to("meta"),
            ValueError,
            "hidden_states_scale: expected it on cpu, where gemm1_weights is, got meta",
        ),
        (
            "hidden_states",
            lambda t: t.repeat(1, 2)[:, ::2],
            ValueError,
            "hidden_states: expected a? ?contiguous (tensor|rows), got strides",
        ),
        (
            "hidden_states",
            lambda t: t.float().numpy(),
            TypeError,
            "hidden_states: expected a torch.Tensor",
        ),
    ],
)
def test_wrong_activations(spies, inputs, name, change, error, message):
    wrong = inputs._replace(**{name: change(getattr(inputs, name))})
    layer = layer_of(inputs, backend="one")
    for run in (lambda: fused_moe(*wrong, **ROUTING, backend="one"), lambda: call(layer, wrong)):
        with pytest.raises(error, match=message):
            run()
    assert not spies[0].runs


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(local_expert_offset=13), ValueError, "local_expert_offset: expected 0 to 12, got 13"),
        (dict(local_expert_offset=-1), ValueError, "local_expert_offset: expected 0 to 12, got -1"),
        (
            dict(local_expert_offset=0.5),
            TypeError,
            "local_expert_offset: expected an int.*got 0.5",
        ),
        (
            dict(gemm1_weights=torch.zeros(4, 256, 256)),
            TypeError,
            "gemm1_weights: expected dtype .*, got torch.float32",
        ),
        (
            dict(gemm2_weights_scale=torch.zeros(4, 1, 2)),
            ValueError,
            r"gemm2_weights_scale: expected shape .*, got \[4, 1, 2\]",
        ),
        (
            dict(routing_bias=torch.zeros(16).half()),
            TypeError,
            "routing_bias: expected dtype torch.bfloat16 or torch.float32, got torch.float16",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_layer(inputs, changes, error, message):
    wrong = inputs._replace(**changes)
    for run in (lambda: fused_moe(*wrong, **ROUTING), lambda: layer_of(wrong)):
        with pytest.raises(error, match=message):
            run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_k=9), "top_k: expected at most the 8 experts of topk_group=2 groups, got 9"),
        (dict(n_group=3), "n_group: expected a divisor of num_experts=16, got 3"),
        (dict(topk_group=5), "topk_group: expected at most n_group=4, got 5"),
        (dict(top_k=2.0), "top_k: expected a positive integer, got 2.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_routing_options(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        fused_moe(*inputs, **(ROUTING | options))


# The layer


@pytest.mark.parametrize("gate_first", [False, True])
def test_the_layer_is_the_function(weights, gate_first):
    first = inputs_of(weights, 1)
    layer = layer_of(first, gate_first=gate_first, backend=REFERENCE)
    assert layer.problem == dataclasses.replace(PROBLEM, gate_first=gate_first)
    assert layer.device == DeviceKey("cpu")
    problem = layer.problem
    for tokens in (1, 6, 33):
        inputs = inputs_of(weights, tokens, seed=tokens)._replace(routing_bias=first.routing_bias)
        wanted = fused_moe(*inputs, **ROUTING, gate_first=gate_first, backend=REFERENCE)
        assert torch.equal(call(layer, inputs), wanted)
        assert torch.equal(wanted, moe_reference(inputs, problem).bfloat16())


def test_a_softmax_layer(weights):
    problem = dataclasses.replace(PROBLEM, n_group=1, topk_group=1, routing_method="softmax")
    inputs = inputs_of(weights, 30)
    layer = HybridMoE.from_inputs(inputs, problem, backend=REFERENCE)
    assert layer.problem == problem
    wanted = moe_reference(inputs, problem).bfloat16()
    sigmoid = moe_reference(inputs, dataclasses.replace(problem, routing_method="deepseek_v3")).bfloat16()
    assert not torch.equal(wanted, sigmoid)
    assert torch.equal(call(layer, inputs), wanted)
    assert torch.equal(call(copy.deepcopy(layer), inputs), wanted)
    options = dict(top_k=problem.top_k, n_group=1, topk_group=1, routing_method="softmax", backend=REFERENCE)
    assert torch.equal(fused_moe(*inputs, **options), wanted)
    with pytest.raises(ValueError, match="n_group: expected 1 .*, got 4"):
        fused_moe(*inputs, **(options | {"n_group": 4}))


def test_the_layer_holds_its_weights_and_copies_none(spies, inputs):
    call(layer_of(inputs, backend="one"), inputs)
    (seen,) = spies[0].runs
    for name in seen._fields:
        assert getattr(seen, name) is getattr(inputs, name)


def test_the_layer_prepares_once_all_that_can_be_chosen(spies, inputs):
    layer = layer_of(inputs, policy=make_policy())
    assert [spy.prepared for spy in spies] == [1, 1]
    for _ in range(3):
        call(layer, inputs)
    layer_of(inputs, policy=make_policy())
    assert [spy.prepared for spy in spies] == [1, 1]
    assert len(spies[1].runs) == 3


def test_the_layer_explains_itself(spies, inputs):
    layer = layer_of(inputs, policy=make_policy())
    for tokens, choice, source, regime in (
        (0, Candidate("one"), "regime", (0, 4)),
        (7, Candidate("two"), "regime", (5, 9)),
        (10, REFERENCE, "default", None),
    ):
        decision = layer.explain(tokens)
        assert (decision.choice, decision.source, decision.regime) == (choice, source, regime)
        assert decision.num_tokens == tokens and decision.reasons
        assert layer.choice(tokens) == choice
        json.dumps(decision.to_dict())
    assert layer.workspace_bytes(7) == 70
    with pytest.raises(ValueError, match="num_tokens: expected an integer of at least 0, got -1"):
        layer.explain(-1)


def test_the_layer_explains_an_explicit_backend(inputs):
    decision = layer_of(inputs, backend="torch_reference").explain(3)
    assert (decision.choice, decision.source, decision.regime) == (REFERENCE, "explicit", None)
    assert decision.to_dict()["backend"] == "torch_reference"


def test_another_default_dtype(inputs):
    """Serving code loads models under a default dtype of bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        output = call(layer_of(inputs, backend=REFERENCE), inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output, fused_moe(*inputs, **ROUTING, backend=REFERENCE))


def test_a_backend_that_refuses_to_be_prepared_is_passed_over(no_interpreter, inputs, monkeypatch):
    """A library may be installed and not load: that is known when it is prepared, and the next candidate runs."""

    def refuse(self, problem, device, config):
        raise BackendUnsupportedError(Candidate(self.name, config), ["its library doesn't load"])

    stub = backends.BACKENDS["flashinfer_trtllm"]
    monkeypatch.setattr(type(stub), "not_supported_reasons", lambda *_: [])
    monkeypatch.setattr(type(stub), "prepare", refuse)
    monkeypatch.setattr(resolve, "CPU_ORDER", (Candidate("flashinfer_trtllm"), resolve.as_candidate("torch_reference")))
    backends.not_supported_reasons.cache_clear()
    try:
        decision = layer_of(inputs).explain(7)
    finally:
        backends.not_supported_reasons.cache_clear()
    assert decision.choice == resolve.as_candidate("torch_reference")
    assert any("its library doesn't load" in reason for reason in decision.reasons)


# ---- The problem, said outright or by its parts ----


def test_the_problem_said_outright(weights):
    inputs = inputs_of(weights, 7)
    wanted = fused_moe(*inputs, **ROUTING, backend=REFERENCE)
    assert torch.equal(fused_moe(*inputs, problem=PROBLEM, backend=REFERENCE), wanted)
    layer = HybridMoE(
        *inputs[4:8],
        inputs.routing_bias,
        local_expert_offset=5,
        routed_scaling_factor=np.float64(2.5),
        problem=PROBLEM,
        backend=REFERENCE,
    )
    assert layer.problem == PROBLEM and torch.equal(call(layer, inputs), wanted)
    by_parts = fused_moe(*inputs, **{name: np.int64(value) for name, value in ROUTING.items()}, backend=REFERENCE)
    assert torch.equal(by_parts, wanted)
    fraction = inputs._replace(local_expert_offset=np.int32(5), routed_scaling_factor=Fraction(5, 2))
    assert torch.equal(fused_moe(*fraction, problem=PROBLEM, backend=REFERENCE), wanted)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "hidden_size", "intermediate_size"])
def test_tensors_of_another_problem_are_named(weights, name):
    inputs = inputs_of(weights, 7)
    other = dataclasses.replace(PROBLEM, **{name: getattr(PROBLEM, name) * 2})
    for run in (
        lambda: fused_moe(*inputs, problem=other, backend=REFERENCE),
        lambda: HybridMoE.from_inputs(inputs, other, backend=REFERENCE),
    ):
        with pytest.raises(ValueError, match="expected shape .*, got"):
            run()


@pytest.mark.parametrize("option", ["top_k", "n_group", "topk_group", "num_experts", "gate_first", "routing_method"])
def test_a_problem_and_a_part_of_it(weights, option):
    inputs, given = inputs_of(weights, 7), {option: getattr(PROBLEM, option)}
    numbers = dict(local_expert_offset=5, routed_scaling_factor=2.5)
    for run in (
        lambda: fused_moe(*inputs, problem=PROBLEM, **given),
        lambda: HybridMoE(*inputs[4:8], inputs.routing_bias, problem=PROBLEM, **numbers, **given),
    ):
        with pytest.raises(TypeError, match=f"{option}: expected None with problem, which says it"):
            run()
    with pytest.raises(TypeError, match="problem: expected a MoEProblem, got 'deepseek-v3'"):
        fused_moe(*inputs, problem="deepseek-v3")


def test_a_forgotten_routing_is_told():
    problem = MoEProblem(num_experts=64, num_local_experts=8, hidden_size=128, intermediate_size=128)
    inputs = make_inputs(Workload(3), problem, random_weights(problem, "cpu"))
    with pytest.warns(UserWarning, match="routing_logits has 64 experts, and neither problem nor top_k, n_group"):
        output = fused_moe(*inputs, backend=REFERENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fused_moe(*inputs, problem=problem, backend=REFERENCE), output)
        assert torch.equal(fused_moe(*inputs, top_k=8, backend=REFERENCE), output)
        # The definition's own size needs no word.
        definition = MoEProblem(num_local_experts=2, hidden_size=128, intermediate_size=128)
        inputs = make_inputs(Workload(3), definition, random_weights(definition, "cpu"))
        assert torch.equal(
            fused_moe(*inputs, backend=REFERENCE), fused_moe(*inputs, problem=definition, backend=REFERENCE)
        )


def test_groups_that_do_not_matter_need_not_be_said():
    problem = MoEProblem(
        num_experts=257,
        num_local_experts=8,
        n_group=1,
        topk_group=1,
        top_k=3,
        hidden_size=128,
        intermediate_size=128,
    )
    inputs = make_inputs(Workload(3), problem, random_weights(problem, "cpu"))
    ids, factors = torch.arange(9, dtype=torch.int32).view(3, 3), torch.rand(3, 3)
    chosen = dict(topk_ids=ids, topk_weights=factors, backend=REFERENCE)
    wanted = fused_moe(None, None, *inputs[2:], problem=problem, **chosen)
    assert torch.equal(fused_moe(None, None, *inputs[2:], num_experts=257, **chosen), wanted)
    numbers = dict(local_expert_offset=0, routed_scaling_factor=1.0)
    assert HybridMoE(*inputs[4:8], None, num_experts=257, top_k=3, **numbers, backend=REFERENCE).problem == problem
    softmax = dataclasses.replace(problem, routing_method="softmax")
    output = fused_moe(*inputs, top_k=3, routing_method="softmax", backend=REFERENCE)
    assert torch.equal(output, fused_moe(*inputs, problem=softmax, backend=REFERENCE))
    with pytest.raises(ValueError, match="n_group: expected a divisor of num_experts=257, got 8"):
        fused_moe(*inputs, top_k=3, backend=REFERENCE)


# ---- The checks of every call ----


def test_what_is_plainly_right_is_taken_without_the_slow_checks(monkeypatch, weights):
    inputs = inputs_of(weights, 7)
    layer = layer_of(inputs, backend="torch_reference")
    wanted = call(layer, inputs)
    for name in ("check_activations", "check_output"):
        monkeypatch.setattr(api, name, lambda *arguments: pytest.fail("checked slowly"))
    output = torch.full_like(wanted, torch.nan)
    assert layer(inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale, output=output) is output
    assert torch.equal(output, wanted) and torch.equal(call(layer, inputs), wanted)


@pytest.mark.parametrize("wrong", [None, 7, torch.tensor(1.0)], ids=["none", "number", "scalar"])
@pytest.mark.parametrize("position", range(3))
def test_activations_that_are_no_matrices_are_named(weights, position, wrong):
    inputs = inputs_of(weights, 3)
    layer = layer_of(inputs, backend=REFERENCE)
    given = [getattr(inputs, name) for name in ACTIVATIONS]
    given[position] = wrong
    if wrong is None and position == 2:  # no scales: hidden states in bfloat16 are expected
        with pytest.raises(
            TypeError, match="hidden_states: expected hidden_states_scale with it, got torch.float8_e4m3fn"
        ):
            layer(*given)
        return
    with pytest.raises((TypeError, ValueError), match=f"^{ACTIVATIONS[position]}: expected"):
        layer(*given)
    everything = inputs._replace(**{ACTIVATIONS[position]: wrong})
    with pytest.raises((TypeError, ValueError), match=f"^{ACTIVATIONS[position]}: expected"):
        fused_moe(*everything, **ROUTING, backend=REFERENCE)


def test_what_is_right_but_not_plainly_gives_the_same(weights):
    inputs = inputs_of(weights, 7)
    layer = layer_of(inputs, backend="torch_reference")
    wanted = call(layer, inputs)
    parameters = inputs._replace(routing_logits=torch.nn.Parameter(inputs.routing_logits, requires_grad=False))
    assert torch.equal(call(layer, parameters), wanted)
    strided = inputs._replace(hidden_states_scale=inputs.hidden_states_scale.t().contiguous().t())
    assert torch.equal(call(layer, strided), wanted)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("hidden_states", lambda t: t.float(), TypeError),
        ("hidden_states", lambda t: t[:, ::2], ValueError),
        ("hidden_states", lambda t: t.t().contiguous().t(), ValueError),
        ("hidden_states", lambda t: t[:3], ValueError),
        ("routing_logits", lambda t: t.double(), TypeError),
        ("routing_logits", lambda t: t[:, :-1], ValueError),
        ("routing_logits", lambda t: t.t().contiguous().t(), ValueError),
        ("routing_logits", lambda t: t.to("meta"), ValueError),
        ("routing_logits", lambda t: None, TypeError),
        ("hidden_states_scale", lambda t: t.half(), TypeError),
        ("hidden_states_scale", lambda t: t.t(), ValueError),
        ("output", lambda t: t.float(), TypeError),
        ("output", lambda t: t[:-1], ValueError),
        ("output", lambda t: t.t().contiguous().t(), ValueError),
        ("output", lambda t: t.to("meta"), ValueError),
    ],
)
def test_what_is_wrong_is_named_in_a_prepared_layer(weights, name, change, error):
    inputs = inputs_of(weights, 7)
    layer = layer_of(inputs, backend="torch_reference")
    arguments = {n: getattr(inputs, n) for n in ("routing_logits", "hidden_states", "hidden_states_scale")}
    arguments["output"] = torch.empty(inputs.hidden_states.shape, dtype=torch.bfloat16)
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match="output|hidden_states|routing_logits") as caught:
        layer(**arguments)
    assert name in str(caught.value) or name == "hidden_states"  # T is its: another T shows in what comes after it
