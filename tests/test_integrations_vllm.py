"""hybrid_moe.integrations.vllm on stand-ins for the parts of vLLM that it touches, compared with vLLM's own files."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import logging
import re
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import dropin_standins as standins
import pytest
import torch

from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.numerics import check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import dequantize_blocks

ROOT = Path(__file__).parents[1]
E, TOP_K, HIDDEN, INNER, FACTOR = 16, 4, 256, 128, 2.5
PROBLEM = MoEProblem(
    num_experts=E, num_local_experts=E, top_k=TOP_K, n_group=4, topk_group=2, hidden_size=HIDDEN,
    intermediate_size=INNER,
)  # fmt: skip
WEIGHTS = random_weights(PROBLEM, "cpu", seed=5)
# About 8, where bfloat16 has steps of 1/16: in it most of these would be the same.
BIAS = 8 + torch.tensor([-9, 4, 2, -1, 7, -3, 0, 5, -6, 1, 3, -2, 6, -4, -5, 2], dtype=torch.float32) / 64
GROUPS = dict(use_grouped_topk=True, num_expert_group=4, topk_group=2)
DEEPSEEK = dict(scoring_func="sigmoid", e_score_correction_bias=BIAS, routed_scaling_factor=FACTOR, **GROUPS)

# vLLM's name of a routing, and a layer's arguments: what `HybridMoE` chooses by itself, and what vLLM's router chooses.
LOGITS = {
    "DeepSeek-V3": ("DeepSeekV3", DEEPSEEK),
    "Kimi-K2": ("DeepSeekV3", DEEPSEEK | dict(num_expert_group=1, topk_group=1)),
    "MiniMax-M2": ("MiniMax2", DEEPSEEK | dict(use_grouped_topk=False, num_expert_group=None, topk_group=None)),
    "no bias, all groups": ("SigmoidRenorm", DEEPSEEK | dict(e_score_correction_bias=None, topk_group=4)),
    "no bias, no groups": ("SigmoidRenorm", dict(scoring_func="sigmoid")),
    "Qwen3": ("RenormalizeNaive", dict()),
    "OLMoE": ("Default", dict(renormalize=False)),
}
CHOSEN = {
    "groups by their best": ("SigmoidRenorm", DEEPSEEK | dict(e_score_correction_bias=None)),
    "DeepSeek-V2": ("Default", dict(renormalize=False, routed_scaling_factor=FACTOR, **GROUPS)),
    "not renormalised": ("Unspecified", DEEPSEEK | dict(renormalize=False)),
    "custom": ("SigmoidRenorm", dict(custom_routing_function=len, scoring_func="sigmoid")),
    "a factor that vLLM's router leaves out": ("RenormalizeNaive", dict(routed_scaling_factor=FACTOR)),
}


class Vllm:
    """The integration imported over the stand-ins."""

    def __init__(self, monkeypatch) -> None:
        self.config = standins.vllm_config()
        self.ranks = types.SimpleNamespace(world_size=1, cpu_group="gloo")
        self.found = standins.vllm_modules(self.config, self.ranks)
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in self.found.items():
            monkeypatch.setitem(sys.modules, name, module)
        version = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == "vllm" else version(name))
        monkeypatch.delitem(sys.modules, "hybrid_moe.integrations.vllm", raising=False)
        self.plugin = importlib.import_module("hybrid_moe.integrations.vllm")
        self.plugin.register()
        self.quantization = self.found[f"{standins.LAYERS}.quantization"].registered["hybrid_moe"]
        self.fp8 = self.found[f"{standins.LAYERS}.quantization.fp8"]

    def experts(
        self,
        routing: str = "DeepSeek-V3",
        offset: int = 0,
        local: int = E,
        change=lambda config: None,
        **arguments: Any,
    ) -> torch.nn.Module:
        """A `RoutedExperts` as vLLM makes it and loads it."""
        name, routed = (LOGITS | CHOSEN)[routing]
        config = standins.moe_config(E, local, HIDDEN, INNER, TOP_K, name)
        change(config)
        expert_map = torch.full((E,), -1, dtype=torch.int32)
        expert_map[offset : offset + local] = torch.arange(local, dtype=torch.int32)
        experts = self.found[f"{standins.LAYERS}.fused_moe.routed_experts"].RoutedExperts(
            "model.layers.3.mlp.experts",
            torch.bfloat16,
            config,
            arguments.pop("quant_config", None) or self.quantization.from_config({"weight_block_size": [128, 128]}),
            types.SimpleNamespace(expert_map=arguments.pop("expert_map", None if local == E else expert_map)),
            **(routed | arguments),
        )
        if not self.ours(experts):
            return experts
        for ours, theirs in (
            ("gemm1_weights", "w13_weight"), ("gemm1_weights_scale", "w13_weight_scale_inv"),
            ("gemm2_weights", "w2_weight"), ("gemm2_weights_scale", "w2_weight_scale_inv"),
        ):  # fmt: skip
            getattr(experts, theirs).data.copy_(getattr(WEIGHTS, ours)[offset : offset + local])
        experts.quant_method.process_weights_after_loading(experts)
        return experts

    def ours(self, experts: torch.nn.Module) -> bool:
        return isinstance(experts.quant_method, self.plugin.HybridMoEMethod)


@pytest.fixture
def vllm(monkeypatch):
    yield Vllm(monkeypatch)
    sys.modules.pop("hybrid_moe.integrations.vllm", None)


def route(experts: torch.nn.Module, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's routing in torch (`grouped_topk`, `fused_topk_bias`, `fused_topk`), with the bias in float32."""
    scores = logits.float().sigmoid() if experts.scoring_func == "sigmoid" else logits.float().softmax(dim=-1)
    bias = experts.e_score_correction_bias
    biased = scores if bias is None else scores + bias
    if experts.use_grouped_topk:
        groups = biased.unflatten(1, (experts.num_expert_group, -1))
        ranked = groups.amax(dim=-1) if bias is None else groups.topk(2, dim=-1)[0].sum(dim=-1)
        kept = torch.zeros_like(ranked).scatter_(1, ranked.topk(experts.topk_group, dim=-1)[1], 1)
        biased = groups.masked_fill(~kept.bool().unsqueeze(-1), -torch.inf).flatten(1)
    ids = biased.topk(TOP_K, dim=-1)[1]
    weights = scores.gather(1, ids)
    if experts.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if experts.use_grouped_topk or bias is not None:
        weights = weights * experts.routed_scaling_factor
    return weights, ids


def run(experts: torch.nn.Module, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """As `MoERunner._apply_quant_method` does."""
    method = experts.quant_method
    if method.is_monolithic:
        return experts.forward_monolithic(x=hidden, router_logits=logits, input_ids=None)
    weights, ids = route(experts, logits)
    if method.topk_indices_dtype is not None:
        ids = ids.to(method.topk_indices_dtype)
    return experts.forward_modular(x=hidden, topk_weights=weights, topk_ids=ids)


def expected(
    experts: torch.nn.Module, hidden: torch.Tensor, logits: torch.Tensor, local: range = range(E)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer as the model defines it, in float32: down(silu(gate(x)) * up(x)); and who has work in ``local``."""
    weights, ids = route(experts, logits)
    output, has_work = torch.zeros(hidden.shape), torch.zeros(len(hidden), dtype=torch.bool)
    for expert in local:
        gate, up = dequantize_blocks(WEIGHTS.gemm1_weights[expert], WEIGHTS.gemm1_weights_scale[expert]).chunk(2)
        down = dequantize_blocks(WEIGHTS.gemm2_weights[expert], WEIGHTS.gemm2_weights_scale[expert])
        x = hidden.float()
        result = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
        output += result * (weights * (ids == expert)).sum(dim=1, keepdim=True)
        has_work |= (ids == expert).any(dim=1)
    return output, has_work


def tokens(number: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn((number, HIDDEN), generator=generator).bfloat16()
    return hidden, torch.randn((number, E), generator=generator).to(dtype)


# --- The layer ---


@pytest.mark.parametrize("routing", [*LOGITS, *CHOSEN])
def test_it_computes_what_vllm_does(vllm, routing):
    experts = vllm.experts(routing)
    assert experts.quant_method.is_monolithic == (routing in LOGITS)
    assert experts.quant_method.get_fused_moe_quant_config(experts) is None
    hidden, logits = tokens(33)
    before = hidden.clone()
    output = run(experts, hidden, logits)
    assert output.dtype == torch.bfloat16
    correctness = check(output, *expected(experts, hidden, logits))
    assert correctness.passed, correctness.failures
    assert torch.equal(hidden, before)  # the shared experts may read them afterwards


def test_logits_in_bfloat16(vllm):
    experts = vllm.experts()
    hidden, logits = tokens(1, torch.bfloat16)
    assert check(run(experts, hidden, logits), *expected(experts, hidden, logits)).passed


@pytest.mark.parametrize("routing", ["DeepSeek-V3", "DeepSeek-V2"])
def test_the_ranks_add_up(vllm, routing):
    hidden, logits = tokens(20)
    total = torch.zeros(hidden.shape)
    idle = 0
    for offset in range(0, E, 4):
        experts = vllm.experts(routing, offset, 4)
        output = run(experts, hidden, logits)
        reference, has_work = expected(experts, hidden, logits, range(offset, offset + 4))
        correctness = check(output, reference, has_work)
        assert correctness.passed, (offset, correctness.failures)
        idle += int((~has_work).sum())
        total += output.float()
    assert idle  # tokens without work on a rank are there, and were zeros
    assert check(total, *expected(experts, hidden, logits)).passed


@pytest.mark.parametrize("routing", ["DeepSeek-V3", "DeepSeek-V2"])
def test_no_tokens(vllm, routing):
    output = run(vllm.experts(routing, 4, 4), *tokens(0))
    assert output.shape == (0, HIDDEN) and output.dtype == torch.bfloat16


def test_the_weights_are_the_layers_own(vllm):
    """No copy: what the layer's weights are changed to shows, as when EPLB moves experts."""
    experts = vllm.experts()
    experts.w2_weight.data.view(torch.uint8).zero_()
    assert not run(experts, *tokens(5)).any()


def test_the_bias_is_not_rounded(vllm):
    generator = torch.Generator().manual_seed(3)
    bias = 8 + 0.05 * torch.randn(E, generator=generator)
    logits, hidden = torch.randn((60, E), generator=generator), tokens(60)[0]
    exact, rounded = (vllm.experts(e_score_correction_bias=b) for b in (bias, bias.bfloat16().float()))
    output = run(exact, hidden, logits)
    assert check(output, *expected(exact, hidden, logits)).passed
    assert not check(output, *expected(rounded, hidden, logits)).passed


def test_who_asks_the_router_about_its_choice_has_it_choose(vllm):
    def eplb(config):
        config.moe_parallel_config.enable_eplb = True

    def redundant(config):
        config.num_logical_experts = E - 2

    def hashed(config):
        config.has_hash_routing = True

    def decomposed(config):
        config.require_decomposed_backend = True

    for change in (eplb, redundant, hashed, decomposed):
        experts = vllm.experts(change=change)
        assert vllm.ours(experts) and not experts.quant_method.is_monolithic, change.__name__
    vllm.config.aux_output_config.enable_return_routed_experts = True
    assert not vllm.experts().quant_method.is_monolithic


# --- What can't be computed ---


def with_config(name: str, value: Any):
    return dict(change=lambda config: setattr(config, name, value))


def with_parallel(**values: Any):
    return dict(change=lambda config: vars(config.moe_parallel_config).update(values))


REFUSED = [
    (dict(swiglu_limit=7.0), "a SwiGLU limit, alpha or beta"),
    (dict(swiglu_beta=1.0), "a SwiGLU limit, alpha or beta"),
    (dict(apply_router_weight_on_input=True), "router weights on the input"),
    (dict(expert_map=torch.tensor([0, -1, -1, -1, 1, -1, -1, -1] * 2)), "--expert-placement-strategy linear"),
    (dict(expert_map=torch.tensor([1, 0, 2, 3] + [-1] * 12)), "--expert-placement-strategy linear"),
    (with_config("activation", standins.ACTIVATION["GELU"]), "expected gated SiLU, got 'gelu'"),
    (with_config("in_dtype", torch.float16), "expected bfloat16 activations, got torch.float16"),
    (with_config("has_bias", True), "experts with biases"),
    (with_config("is_lora_enabled", True), "LoRA"),
    (
        with_config("intermediate_size_per_partition", 192),
        "intermediate_size: expected a multiple of block=128, got 192",
    ),
    (
        with_parallel(use_all2all_kernels=True, all2all_backend="deepep_high_throughput"),
        "expected --all2all-backend allgather_reducescatter, got deepep_high_throughput",
    ),
    (
        with_parallel(use_passthrough_all2all=True, all2all_backend="passthrough"),
        "expected --all2all-backend allgather_reducescatter, got passthrough",
    ),
    (
        with_parallel(use_all2all_kernels=True, use_ag_rs_all2all_kernels=True, pcp_size=2),
        "prefill context parallelism",
    ),
]


@pytest.mark.parametrize(("arguments", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_other_layers_are_left_to_vllm(vllm, arguments, reason, caplog):
    experts = vllm.experts(local=4, **arguments)
    assert type(experts.quant_method) is vllm.fp8.Fp8MoEMethod
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name.startswith("vllm.")
    assert "vLLM's own kernels run MoE layers of 16 experts of 256 x" in record.message and reason in record.message


def test_every_reason_is_named(vllm, caplog):
    vllm.config.parallel_config.enable_elastic_ep = True
    vllm.plugin.envs.VLLM_BATCH_INVARIANT = True
    vllm.experts(quant_config=vllm.quantization.from_config({"weight_block_size": None}), swiglu_alpha=1.0)
    assert caplog.records[0].message.endswith(
        "expected 128x128 FP8 weight blocks, got none; a SwiGLU limit, alpha or beta; elastic expert parallelism; "
        "VLLM_BATCH_INVARIANT"
    )


def test_data_parallel_ranks_by_allgather_are_taken(vllm):
    assert vllm.ours(vllm.experts(**with_parallel(use_all2all_kernels=True, use_ag_rs_all2all_kernels=True)))


def test_where_our_kernels_cannot_run_vllms_do(vllm, caplog):
    vllm.config.additional_config = {}
    assert not vllm.ours(vllm.experts(**with_config("device", torch.device("meta"))))
    assert "CUDA" in caplog.records[0].message or "compute capability" in caplog.records[0].message


# --- In a server ---


def test_the_entry_point_and_the_option(vllm):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"hybrid_moe": "hybrid_moe.integrations.vllm:register"}
    (requirement,) = project["optional-dependencies"]["vllm"]
    assert requirement.startswith(f"vllm>={vllm.plugin.VERSION.rpartition('.')[0]}")
    assert f"vLLM {vllm.plugin.VERSION}" in (ROOT / "docs" / "vllm.md").read_text()
    asked, fp8 = vllm.quantization.override_quantization_method, {"quant_method": "fp8"}
    assert vllm.quantization.get_name() == "hybrid_moe" == asked(fp8, "hybrid_moe", hf_config=None)
    assert asked(fp8, None) is None and asked({"quant_method": "awq"}, "hybrid_moe") is None
    config = vllm.quantization.from_config({"weight_block_size": [128, 128]})
    assert config.get_quant_method(torch.nn.Linear(2, 2), "lm_head") is None


def test_a_checkpoint_that_is_not_quantised_is_an_error(vllm):
    """vLLM makes the configuration without arguments then."""
    with pytest.raises(ValueError, match="--quantization hybrid_moe: expected a checkpoint .* fp8, got one without"):
        vllm.experts(quant_config=vllm.quantization())


def test_options_reach_the_layer(vllm):
    vllm.config.additional_config["hybrid_moe"]["max_num_tokens"] = 32
    assert vllm.experts().quant_method.hybrid_moe.max_num_tokens == 32
    vllm.config.additional_config["hybrid_moe"]["tiles"] = 1
    with pytest.raises(TypeError, match="tiles"):
        vllm.experts()


def test_layers_of_a_problem_are_warmed_up_once(vllm, caplog):
    caplog.set_level(logging.INFO, "vllm.hybrid_moe")
    config = vllm.quantization.from_config({"weight_block_size": [128, 128]})
    for routing in ("DeepSeek-V3", "DeepSeek-V3", "Qwen3"):
        vllm.experts(routing, quant_config=config)
    messages = [record.message for record in caplog.records if record.name == "vllm.hybrid_moe"]
    assert len(messages) == 2 and all("from logits: T = 1: torch_reference" in message for message in messages)
    assert re.search(r"_e16_h256_i128.*warm-up of [1-9] token counts", messages[0])


def test_ranks_choose_alike(vllm, monkeypatch):
    groups = []
    made = vllm.plugin.HybridMoE

    def make(*tensors, group, **options):
        groups.append(group)
        return made(*tensors, **options)

    monkeypatch.setattr(vllm.plugin, "HybridMoE", make)
    vllm.experts(local=4)
    vllm.ranks.world_size = 4
    vllm.experts(local=4)
    vllm.experts(local=3, **with_parallel(ep_size=5))  # ranks with other problems
    assert groups == [None, "gloo", None]


# --- The interface ---


def test_other_parameters_are_an_error(vllm, monkeypatch):
    monkeypatch.setattr(vllm.fp8.Fp8MoEMethod, "apply", lambda self, layer, x, routing: None)
    with pytest.raises(
        RuntimeError, match=r"expected Fp8MoEMethod.apply\(self, layer, x, topk_weights, .*\), got \(self, layer, x, ro"
    ) as error:
        vllm.experts()
    assert f"written for vLLM {vllm.plugin.VERSION}, and 99.0 is installed" in str(error.value)


def test_what_is_gone_is_an_error(vllm, monkeypatch):
    monkeypatch.delattr(vllm.fp8.Fp8Config, "get_quant_method")
    with pytest.raises(RuntimeError, match=r"expected Fp8Config.get_quant_method\(self, layer, prefix\), got none"):
        vllm.plugin.check_interface()


class Source:
    """A class in vLLM's files: parameters of its methods, and what it has beside them, with its bases' in that file."""

    def __init__(self, file: Path, name: str) -> None:
        classes = {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}
        self.methods: dict[str, str] = {}
        self.fields: set[str] = set()
        for node in ast.walk(classes[name]):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs]
                names = [argument.arg for argument in [*every, arguments.kwarg] if argument is not None]
                self.methods.setdefault(node.name, " ".join(names))
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                every = [t for target in targets for t in getattr(target, "elts", [target])]
                self.fields |= {t.attr if isinstance(t, ast.Attribute) else getattr(t, "id", "") for t in every}
        self.fields |= set(self.methods)


def test_the_stand_ins_are_vllms(vllm):
    """What a stand-in has and the release hasn't would hide a mistake."""
    package = installed_vllm()
    if package is None:
        pytest.skip("vLLM isn't installed")

    def source(module: str, name: str) -> Source:
        stem = package.parent / module.replace(".", "/")
        return Source(stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py"), name)

    compared = 0
    for module, found in vllm.found.items():
        for name, kind in vars(found).items():
            if not isinstance(kind, type) or not module.startswith(standins.LAYERS):
                continue
            theirs = source(module, name)
            for method, function in vars(kind).items():
                function = getattr(function, "__func__", function)
                if isinstance(function, types.FunctionType):
                    code = function.__code__
                    count = code.co_argcount + bool(code.co_flags & 8)  # **kwargs
                    assert theirs.methods[method] == " ".join(code.co_varnames[:count]), f"{module}.{name}.{method}"
                    compared += 1
                elif isinstance(function, property):
                    assert method in theirs.methods, f"{module}.{name}.{method}"
    assert compared > 15

    layers = f"{standins.LAYERS}.fused_moe"
    own = set(vars(vllm.experts())) - set(vars(torch.nn.Module()))
    assert own <= source(f"{layers}.routed_experts", "RoutedExperts").fields
    config = standins.moe_config(E, E, HIDDEN, INNER, TOP_K, "Default")
    assert set(vars(config)) <= source(f"{layers}.config", "FusedMoEConfig").fields
    assert set(vars(config.moe_parallel_config)) <= source(f"{layers}.config", "FusedMoEParallelConfig").fields
    assert {r.name for r in standins.ROUTING} <= source(f"{layers}.config", "RoutingMethodType").fields
    assert set(vllm.plugin._ROUTING) <= {r.name for r in standins.ROUTING}
    assert {a.name for a in standins.ACTIVATION} <= source(f"{layers}.activation", "MoEActivation").fields
    assert set(vars(vllm.config)) <= source("vllm.config.vllm", "VllmConfig").fields
    assert "moe_block_shape" in source(f"{standins.LAYERS}.quantization.fp8", "Fp8MoEMethod").fields
    assert "enable_elastic_ep" in source("vllm.config.parallel", "ParallelConfig").fields
    assert "enable_return_routed_experts" in source("vllm.config.aux_output", "AuxOutputConfig").fields


def installed_vllm() -> Path | None:
    for entry in sys.path:
        if (Path(entry) / "vllm" / "__init__.py").is_file():
            return Path(entry) / "vllm"
    return None
