"""examples/vllm_layer.py: the recorded interfaces, and runs on stand-ins with them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import dropin_standins as standins
import pytest
import torch

from hybrid_moe.measure.workloads import LayerWeights, random_weights
from hybrid_moe.numerics import check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import dequantize_blocks

EXAMPLES = Path(__file__).parents[1] / "examples"
RECORDED = json.loads((Path(__file__).parent / "data" / "dropin_interfaces.json").read_text())
PROBLEM = MoEProblem(
    num_experts=16, num_local_experts=16, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
WEIGHTS = random_weights(PROBLEM, "cpu", seed=5)
# About 8, where bfloat16 has steps of 1/16: in it most of these would be the same.
BIAS = 8 + torch.tensor([-9, 4, 2, -1, 7, -3, 0, 5, -6, 1, 3, -2, 6, -4, -5, 2], dtype=torch.float32) / 64


@dataclass
class Framework:
    """An example loaded over the stand-ins of its package."""

    package: str
    found: dict[str, types.ModuleType]
    example: types.ModuleType
    Layer: type[torch.nn.Module]

    def layer(self, offset: int = 0, local: int = 16, bias: torch.Tensor | None = BIAS) -> torch.nn.Module:
        tensors = {name: getattr(WEIGHTS, name)[offset : offset + local] for name in WEIGHTS.__slots__}
        return self.Layer(self.found, LayerWeights(**tensors), bias, offset)

    def replace(self, layer: torch.nn.Module):
        return self.example.replace_experts(layer, backend="torch_reference")

    def experts(self, layer: torch.nn.Module) -> torch.nn.Module:
        return layer.routed_experts


def load(package: str, monkeypatch) -> Framework:
    found = standins.vllm_modules()
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == package else version(name))
    name = f"{package}_layer"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return Framework(package, found, example, standins.VllmLayer)


@pytest.fixture(params=["vllm"])
def framework(request, monkeypatch):
    return load(request.param, monkeypatch)


@pytest.fixture
def vllm(monkeypatch):
    return load("vllm", monkeypatch)


def route(logits: torch.Tensor, bias: torch.Tensor, topk_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both packages' own routing in torch (`biased_grouped_topk_impl`, `grouped_topk`), with the bias in float32."""
    scores = logits.sigmoid()
    biased = scores + bias
    group_scores = biased.view(-1, 4, 4).topk(2, dim=-1)[0].sum(dim=-1)
    mask = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(topk_group, dim=-1)[1], 1)
    biased = biased.masked_fill(~mask.repeat_interleave(4, dim=1).bool(), -torch.inf)
    ids = biased.topk(4, dim=-1)[1]
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(dim=-1, keepdim=True) * 2.5


def expected(
    hidden: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor = BIAS, topk_group: int = 2, experts=range(16)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer as the model defines it, in float32: down(silu(gate(x)) * up(x)); and who has work in ``experts``."""
    ids, weights = route(logits, bias, topk_group)
    output, has_work = torch.zeros(hidden.shape), torch.zeros(len(hidden), dtype=torch.bool)
    for expert in experts:
        gate, up = dequantize_blocks(WEIGHTS.gemm1_weights[expert], WEIGHTS.gemm1_weights_scale[expert]).chunk(2)
        down = dequantize_blocks(WEIGHTS.gemm2_weights[expert], WEIGHTS.gemm2_weights_scale[expert])
        x = hidden.float()
        result = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
        output += result * (weights * (ids == expert)).sum(dim=1, keepdim=True)
        has_work |= (ids == expert).any(dim=1)
    return output, has_work


def tokens(number: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn((number, 256), generator=generator).bfloat16()
    return hidden, torch.randn((number, 16), generator=generator).to(dtype)


# --- The interface ---


def recorded(package: str, target: str) -> str:
    """The parameters recorded of ``module:name`` or ``module:class.method``."""
    module, name = target.split(":")
    owner, _, method = name.partition(".")
    record = RECORDED[package]["modules"][module]["names"][owner]
    if method:
        return record["methods"][method]
    return record["parameters"] if "parameters" in record else " ".join(tuple_fields(record))


def tuple_fields(record) -> list[str]:
    assert record["bases"] == ["NamedTuple"]
    return [name for name in record["fields"].split() if name not in ("format", "router_logits")] + [
        name
        for name in record["fields"].split()
        if name == "router_logits" and "raw_router_logits" not in record["fields"]
    ]


def fields(package: str, module: str, *names: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        record = RECORDED[package]["modules"][module]["names"][name]
        found |= set(record["fields"].replace("{self.weight_scale_name}", "weight_scale_inv").split())
    return found


def test_the_interface_is_that_of_the_recorded_release(framework):
    example, package = framework.example, framework.package
    assert RECORDED[package]["version"] == example.VERSION
    (name,) = re.findall(rf"Written against ((?:SGLang|vLLM) {re.escape(example.VERSION)})\.", example.__doc__)
    assert f"| {name} |" in (EXAMPLES.parent / "docs" / "serving.md").read_text()
    assert example.INTERFACE
    for target, parameters in example.INTERFACE.items():
        assert parameters == recorded(package, target), target
    example.check_interface()  # the stand-ins have it too


def test_the_fields_are_those_of_the_recorded_release_of_vllm(vllm):
    example, layers = vllm.example, standins.LAYERS
    own = fields("vllm", f"{layers}.fused_moe.routed_experts", "RoutedExperts")
    weights = {f.removeprefix("layer.") for f in fields("vllm", f"{layers}.quantization.fp8", "Fp8MoEMethod")}
    assert set(example.FIELDS) <= own | weights
    config = fields("vllm", f"{layers}.fused_moe.config", "FusedMoEConfig")
    assert set(example.CONFIG_FIELDS) <= config
    parallel = {"enable_eplb", "all2all_backend", "use_all2all_kernels", "use_ag_rs_all2all_kernels"}
    assert parallel <= fields("vllm", f"{layers}.fused_moe.config", "FusedMoEParallelConfig")
    assert "fp8_backend" in weights
    assert set(example.UNCHANGED) <= fields("vllm", f"{layers}.fused_moe.oracle.fp8", "Fp8MoeBackend")
    method = fields("vllm", f"{layers}.fused_moe.fused_moe_method_base", "FusedMoEMethodBase")
    assert {"moe", "moe_kernel", "moe_quant_config", "is_monolithic"} <= method


def test_other_parameters_are_an_error(framework, monkeypatch):
    method = framework.found[next(m for m in framework.found if m.endswith("quantization.base_config"))]
    base = method.QuantizeMethodBase
    monkeypatch.setattr(base, "process_weights_after_loading", lambda self, layer, device: None)
    layer = framework.layer()
    with pytest.raises(RuntimeError, match=r"expected \(self layer\), got \(self layer device\)") as error:
        framework.replace(layer)
    assert framework.example.VERSION in str(error.value) and "99.0 is installed" in str(error.value)


def test_what_is_gone_is_an_error(framework, monkeypatch):
    fp8 = framework.found[next(m for m in framework.found if m.endswith("quantization.fp8"))]
    name = "Fp8Config" if framework.package == "vllm" else "Fp8MoEMethod"
    monkeypatch.delattr(fp8, name)
    with pytest.raises(RuntimeError, match=rf"fp8:{name}\.\w+ isn't there .* was written against"):
        framework.example.check_interface()


def test_a_field_that_is_gone_is_an_error(framework):
    layer = framework.layer()
    delattr(framework.experts(layer), "w2_weight_scale_inv")
    del layer.routing.topk_group
    with pytest.raises(RuntimeError, match=r"w2_weight_scale_inv, .*topk_group isn't there: this was written against"):
        framework.replace(layer)


# --- The layer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 logits", "bfloat16 logits"])
@pytest.mark.parametrize("number", [1, 33])
def test_the_swapped_layer_is_the_layer(framework, number, dtype):
    layer = framework.layer()
    hybrid = framework.replace(layer)
    assert [h.problem.gate_first for h in hybrid.values()] == [True]
    hidden, logits = tokens(number, dtype)
    before = hidden.clone()
    output = layer(hidden, logits)
    reference, has_work = expected(hidden, logits.float())
    assert output.dtype == torch.bfloat16 and has_work.all()
    correctness = check(output, reference, has_work)
    assert correctness.passed, correctness.failures
    assert torch.equal(hidden, before)  # the shared experts may read them afterwards


def test_the_weights_are_the_layers_own(framework):
    """No copy: what the layer's weights are changed to shows."""
    layer = framework.layer()
    framework.replace(layer)
    hidden, logits = tokens(5)
    framework.experts(layer).w2_weight.data.view(torch.uint8).zero_()
    assert not layer(hidden, logits).any()


def test_the_ranks_add_up(framework):
    hidden, logits = tokens(40)
    total = torch.zeros(hidden.shape)
    idle = 0
    for offset in range(0, 16, 4):
        layer = framework.layer(offset, 4)
        framework.replace(layer)
        output = layer(hidden, logits)
        reference, has_work = expected(hidden, logits, experts=range(offset, offset + 4))
        correctness = check(output, reference, has_work)
        assert correctness.passed, (offset, correctness.failures)
        idle += int((~has_work).sum())
        total += output.float()
    assert idle  # tokens without work on a rank are there, and were zeros
    reference, has_work = expected(hidden, logits)
    assert check(total, reference, has_work).passed


def test_no_tokens(framework):
    layer = framework.layer(4, 4)
    framework.replace(layer)
    output = layer(*tokens(0))
    assert output.shape == (0, 256) and output.dtype == torch.bfloat16


def test_no_bias_and_all_groups(framework):
    layer = framework.layer(bias=None)
    layer.routing.topk_group = 4
    framework.replace(layer)
    hidden, logits = tokens(20)
    reference, has_work = expected(hidden, logits, torch.zeros(16), topk_group=4)
    assert check(layer(hidden, logits), reference, has_work).passed


def test_the_bias_is_not_rounded(framework):
    generator = torch.Generator().manual_seed(3)
    bias = 8 + 0.05 * torch.randn(16, generator=generator)
    logits = torch.randn((200, 16), generator=generator)
    layer = framework.layer(bias=bias)
    framework.replace(layer)
    hidden, _ = tokens(200)
    reference, has_work = expected(hidden, logits, bias)
    assert check(layer(hidden, logits), reference, has_work).passed
    # Rounding would show: it changes the choice of more than one token in ten.
    chosen, rounded = (
        torch.zeros(logits.shape).scatter_(1, route(logits, b, 2)[0], 1) for b in (bias, bias.bfloat16())
    )
    assert float((chosen == rounded).all(dim=1).float().mean()) < 0.9
    assert not check(layer(hidden, logits), expected(hidden, logits, bias.bfloat16())[0], has_work).passed


# --- What can't be computed ---

REFUSED = {
    "both": [
        (
            lambda f, la: setattr(la.routing, "scoring_func", "softmax"),
            "scoring_func: expected 'sigmoid', got 'softmax'",
        ),
        (lambda f, la: setattr(la.routing, "renormalize", False), "renormalize is False"),
        (lambda f, la: setattr(la.routing, "use_grouped_topk", False), "use_grouped_topk is False"),
        (lambda f, la: setattr(la.routing, "custom_routing_function", len), "a custom_routing_function"),
    ],
    "vllm": [
        (lambda f, la: setattr(la.routing, "e_score_correction_bias", None), "no e_score_correction_bias"),
        (lambda f, la: setattr(la.routing, "swiglu_limit", 7.0), "a SwiGLU limit"),
        (lambda f, la: setattr(la.routing, "swiglu_beta", 1.0), "a SwiGLU limit, alpha or beta"),
        (
            lambda f, la: setattr(la.routing, "activation", type(la.routing.activation).GELU),
            "activation: .* got 'gelu'",
        ),
        (lambda f, la: setattr(la.routing, "apply_router_weight_on_input", True), "apply_router_weight_on_input"),
        (lambda f, la: setattr(la.routing, "hash_indices_table", torch.zeros(1)), "routing by a hash table"),
        (lambda f, la: setattr(la.routing, "weight_block_size", None), "weight_block_size: .* got None"),
        (lambda f, la: setattr(la.routing.moe_config, "in_dtype", torch.float16), "in_dtype: .* got torch.float16"),
        (lambda f, la: setattr(la.routing.moe_config, "has_bias", True), "experts with biases"),
        (lambda f, la: setattr(la.routing.moe_config, "require_decomposed_backend", True), "choose the experts itself"),
        (lambda f, la: setattr(la.routing.moe_config, "num_logical_experts", 14), "by EPLB"),
        (lambda f, la: setattr(la.routing.moe_config.moe_parallel_config, "enable_eplb", True), "by EPLB"),
        (
            lambda f, la: setattr(la.routing.moe_config.moe_parallel_config, "use_ag_rs_all2all_kernels", False),
            "--all2all-backend: expected allgather_reducescatter",
        ),
        (
            lambda f, la: setattr(la.routing, "expert_map", torch.tensor([0, -1, -1, -1, 1, -1, -1, -1] * 2)),
            r"expert_map: expected .*, got \[0, 4, 8, 12\]: --expert-placement-strategy linear",
        ),
        (
            lambda f, la: setattr(
                la.routing.quant_method,
                "fp8_backend",
                f.found[f"{standins.LAYERS}.fused_moe.oracle.fp8"].Fp8MoeBackend.FLASHINFER_CUTLASS,
            ),
            "got that of FLASHINFER_CUTLASS: .*--moe-backend triton",
        ),
    ],
}


@pytest.mark.parametrize(
    ("package", "change", "message"),
    [(p, *case) for p in ("vllm",) for case in REFUSED["both"] + REFUSED[p]],
)
def test_other_layers_are_refused(package, change, message, monkeypatch):
    framework = load(package, monkeypatch)
    layer = framework.layer(0, 4)
    change(framework, layer)
    method = framework.experts(layer).quant_method
    with pytest.raises(ValueError, match=message):
        framework.replace(layer)
    assert framework.experts(layer).quant_method is method


def test_every_reason_is_named(framework):
    layer = framework.layer()
    layer.routing.renormalize, layer.routing.use_grouped_topk = False, False
    with pytest.raises(ValueError, match="renormalize is False; use_grouped_topk is False"):
        framework.replace(layer)


def test_all_layers_or_none(framework):
    good, bad = framework.layer(), framework.layer()
    bad.routing.renormalize = False
    methods = [framework.experts(x).quant_method for x in (good, bad)]
    with pytest.raises(ValueError, match="renormalize"):
        framework.replace(torch.nn.ModuleList([good, bad]))
    assert [framework.experts(x).quant_method for x in (good, bad)] == methods


def test_every_layer_by_its_name(framework):
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2), "a": framework.layer(), "b": framework.layer(8, 8)})
    hybrid = framework.replace(model)
    assert list(hybrid) == ["a.routed_experts", "b.routed_experts"]
    assert [h.problem.num_local_experts for h in hybrid.values()] == [16, 8]


def test_a_model_without_such_layers(framework):
    with pytest.raises(ValueError, match="expected a DeepSeek-V3 checkpoint in FP8"):
        framework.replace(torch.nn.Linear(2, 2))


# --- In a server ---


def test_vllm_plugin(vllm):
    """The method that a server gets: made by the config, weights loaded, then prepared; nothing of vLLM's runs."""
    vllm.example.register()
    (config,) = vllm.found[f"{standins.LAYERS}.quantization"].registered.values()
    assert config.get_name() == "hybrid_moe"
    assert config.override_quantization_method({"quant_method": "fp8"}, "hybrid_moe") == "hybrid_moe"
    assert config.override_quantization_method({"quant_method": "fp8"}, None) is None
    assert config.override_quantization_method({"quant_method": "awq"}, "hybrid_moe") is None

    layer = vllm.layer(8, 4)
    experts = layer.routed_experts
    assert config([128, 128]).get_quant_method(torch.nn.Linear(2, 2), "lm_head") is None
    method = config([128, 128]).get_quant_method(experts, "model.layers.3.mlp.experts")
    assert type(method).__name__ == "HybridMoEMethod" and method.moe is experts.moe_config
    method.create_weights(experts, 4, 256, 128, torch.bfloat16, weight_loader=None)
    assert experts.created == (4, 256, 128)
    assert method.moe_kernel is None and method.get_fused_moe_quant_config(experts) is None
    experts.quant_method, method.options = method, {"backend": "torch_reference"}
    method.process_weights_after_loading(experts)
    hidden, logits = tokens(12)
    reference, has_work = expected(hidden, logits, experts=range(8, 12))
    assert check(layer(hidden, logits), reference, has_work).passed


@pytest.mark.parametrize("package", ["vllm"])
def test_the_stand_ins_have_no_other_fields(package, monkeypatch):
    """What a stand-in has and the release hasn't would hide a mistake."""
    framework = load(package, monkeypatch)
    layer = framework.layer()
    own = set(vars(framework.experts(layer))) - set(vars(torch.nn.Module()))
    config = set(vars(layer.routing.moe_config))
    assert own <= fields("vllm", f"{standins.LAYERS}.fused_moe.routed_experts", "RoutedExperts") | {
        f.removeprefix("layer.") for f in fields("vllm", f"{standins.LAYERS}.quantization.fp8", "Fp8MoEMethod")
    }
    assert config <= fields("vllm", f"{standins.LAYERS}.fused_moe.config", "FusedMoEConfig")
