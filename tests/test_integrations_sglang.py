"""hybrid_moe.integrations.sglang on stand-ins for the parts of SGLang that it touches."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from typing import Any, NamedTuple

import dropin_standins as standins
import prometheus_client
import pytest
import torch

from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.numerics import check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import dequantize_blocks
from hybrid_moe.serving import prometheus

E, TOP_K, HIDDEN, INNER, FACTOR = 16, 4, 256, 128, 2.5
WEIGHTS = random_weights(
    MoEProblem(
        num_experts=E, num_local_experts=E, top_k=TOP_K, n_group=4, topk_group=2, hidden_size=HIDDEN,
        intermediate_size=INNER,
    ),
    "cpu",
    seed=3,
)  # fmt: skip


class Triton:
    """`MoeRunnerBackend.TRITON`."""

    def is_triton(self) -> bool:
        return True


class StandardCombineInput(NamedTuple):
    hidden_states: torch.Tensor


class FusedMoE(torch.nn.Module):
    def __init__(self, method: Any, offset: int = 0, local: int = E, **config: Any) -> None:
        super().__init__()
        for ours, theirs in (
            ("gemm1_weights", "w13_weight"), ("gemm1_weights_scale", "w13_weight_scale_inv"),
            ("gemm2_weights", "w2_weight"), ("gemm2_weights_scale", "w2_weight_scale_inv"),
        ):  # fmt: skip
            self.register_parameter(
                theirs, torch.nn.Parameter(getattr(WEIGHTS, ours)[offset : offset + local], requires_grad=False)
            )
        self.quant_method = method
        defaults = dict(
            num_experts=E, num_local_experts=local, top_k=TOP_K, activation="silu", is_gated=True,
            apply_router_weight_on_input=False, no_combine=False, routed_scaling_factor=FACTOR, gemm1_alpha=None,
            gemm1_clamp_limit=None, swiglu_limit=None,
        )  # fmt: skip
        self.moe_runner_config = types.SimpleNamespace(**defaults | config)


class Fp8MoEMethod:
    def __init__(self, block: list[int] | None = None) -> None:
        self.weight_block_size, self.use_mxfp8 = block or [128, 128], False
        self.runner = types.SimpleNamespace(runner_backend=Triton(), lora_enabled=False, fused_func=None)


class Block(torch.nn.Module):
    def __init__(self, experts: FusedMoE, **topk: Any) -> None:
        super().__init__()
        self.experts = experts
        defaults = dict(use_grouped_topk=True, num_expert_group=4, topk_group=2, scoring_func="sigmoid")
        self.topk = types.SimpleNamespace(topk_config=types.SimpleNamespace(**defaults | topk))


@pytest.fixture
def plugin(monkeypatch):
    """The integration imported over the stand-ins, the choices that it adds and the hooks that it registers."""
    choices: list[str] = []
    hooks: dict[str, Any] = {}

    class HookRegistry:
        @classmethod
        def register(cls, target, hook, hook_type):
            hooks[target] = hook

    made = standins.modules(
        ("sglang.srt.server_args", {"add_moe_runner_backend_choices": choices.extend}),
        (
            "sglang.srt.plugins.hook_registry",
            {"HookRegistry": HookRegistry, "HookType": types.SimpleNamespace(BEFORE="before", AFTER="after")},
        ),
        (
            "sglang.srt.distributed",
            {"get_tp_group": lambda: types.SimpleNamespace(world_size=1, cpu_group=None)},
        ),
        ("sglang.srt.layers.moe.fused_moe_triton.layer", {"FusedMoE": FusedMoE}),
        ("sglang.srt.layers.quantization.fp8", {"Fp8MoEMethod": Fp8MoEMethod}),
        ("sglang.srt.layers.moe.token_dispatcher.standard", {"StandardCombineInput": StandardCombineInput}),
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    monkeypatch.delitem(sys.modules, "hybrid_moe.integrations.sglang", raising=False)
    module = importlib.import_module("hybrid_moe.integrations.sglang")
    module.register()
    yield types.SimpleNamespace(module=module, choices=choices, hooks=hooks)
    sys.modules.pop("hybrid_moe.integrations.sglang", None)


def dispatched(tokens: int, offset: int = 0, local: int = E) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """What SGLang's dispatcher hands on: ids counted from the rank's first expert, -1 for others'; and the truth."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn((tokens, HIDDEN), generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=generator)[:TOP_K] for _ in range(tokens)]).int()
    weights = torch.rand((tokens, TOP_K), generator=generator)
    expected, has_work = torch.zeros((tokens, HIDDEN)), torch.zeros(tokens, dtype=torch.bool)
    for expert in range(offset, offset + local):
        gate, up = dequantize_blocks(WEIGHTS.gemm1_weights[expert], WEIGHTS.gemm1_weights_scale[expert]).chunk(2)
        down = dequantize_blocks(WEIGHTS.gemm2_weights[expert], WEIGHTS.gemm2_weights_scale[expert])
        x = hidden.float()
        result = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
        expected += result * (FACTOR * weights * (ids == expert)).sum(dim=1, keepdim=True)
        has_work |= (ids == expert).any(dim=1)
    local_ids = torch.where((ids >= offset) & (ids < offset + local), ids - offset, -1).int()
    topk = (weights, local_ids, torch.empty(0))
    return types.SimpleNamespace(hidden_states=hidden, topk_output=topk), expected, has_work


@pytest.mark.parametrize("offset, local", [(0, E), (4, 4)])
def test_it_computes_what_sglang_does(plugin, offset, local):
    block = Block(FusedMoE(Fp8MoEMethod(), offset, local))
    layers = plugin.module.replace_runners(torch.nn.ModuleDict({"mlp": block}), backend="torch_reference")
    assert list(layers) == ["mlp.experts"]
    assert layers["mlp.experts"].problem.n_group == 4
    run = block.experts.quant_method.runner.fused_func
    for tokens in (1, 33):
        dispatch, expected, has_work = dispatched(tokens, offset, local)
        before = dispatch.topk_output[0].clone()
        output = run(dispatch, None, block.experts.moe_runner_config).hidden_states
        assert check(output, expected, has_work).passed
        assert torch.equal(dispatch.topk_output[0], before)  # others read the weights too
    empty = types.SimpleNamespace(hidden_states=torch.empty((0, HIDDEN)).bfloat16(), topk_output=(None, None, None))
    assert run(empty, None, None).hidden_states.shape == (0, HIDDEN)


def test_a_fused_shared_expert_is_one_more_expert(plugin):
    """17 experts are in no 4 groups: chosen experts need none."""
    block = Block(FusedMoE(Fp8MoEMethod(), num_experts=E + 1, top_k=TOP_K + 1))
    problem = plugin.module.problem_of(block.experts, block.topk.topk_config)
    assert (problem.num_experts, problem.n_group, problem.top_k) == (E + 1, 1, TOP_K + 1)


def test_softmax_layers_get_the_policy_of_softmax(plugin):
    block = Block(FusedMoE(Fp8MoEMethod()), use_grouped_topk=False, scoring_func="softmax")
    assert plugin.module.problem_of(block.experts, block.topk.topk_config).routing_method == "softmax"


@pytest.mark.parametrize(
    "method, config, reason",
    [
        (Fp8MoEMethod([64, 128]), {}, r"expected 128x128 FP8 weight blocks, got \[64, 128\]"),
        (Fp8MoEMethod(), {"activation": "gelu"}, "expected gated SiLU, got 'gelu'"),
        (Fp8MoEMethod(), {"swiglu_limit": 7.0}, "SwiGLU limit"),
        (Fp8MoEMethod(), {"apply_router_weight_on_input": True}, "router weights on the input"),
    ],
)
def test_a_layer_that_cannot_be_computed_stops_the_server(plugin, method, config, reason):
    good, bad = Block(FusedMoE(Fp8MoEMethod())), Block(FusedMoE(method, **config))
    with pytest.raises(ValueError, match=rf"(?s)bad\.experts: .*{reason}"):
        plugin.module.replace_runners(torch.nn.ModuleDict({"good": good, "bad": bad}), backend="torch_reference")
    assert good.experts.quant_method.runner.fused_func is None  # all layers or none


def test_only_the_option_changes_anything(plugin, monkeypatch):
    assert plugin.choices == ["hybrid_moe"]
    request = plugin.hooks["sglang.srt.server_args.ServerArgs.__post_init__"]
    after_load = plugin.hooks["sglang.srt.model_executor.model_runner.ModelRunner.load_model"]
    seen = []
    monkeypatch.setattr(plugin.module, "replace_runners", lambda model: seen.append(model) or {})
    for asked in ("auto", "hybrid_moe"):
        args = types.SimpleNamespace(moe_runner_backend=asked)
        request(args)
        assert args.moe_runner_backend == ("triton" if asked == "hybrid_moe" else "auto")
        after_load(None, types.SimpleNamespace(server_args=args, model=asked))
    assert seen == ["hybrid_moe"]


def test_ranks_choose_alike(plugin, monkeypatch):
    seen = []
    monkeypatch.setattr(plugin.module, "replace_runners", lambda model, **options: seen.append(options) or {})
    args = types.SimpleNamespace(moe_runner_backend="hybrid_moe")
    plugin.hooks["sglang.srt.server_args.ServerArgs.__post_init__"](args)
    for size in (1, 2):
        ranks = types.SimpleNamespace(world_size=size, cpu_group="gloo")
        monkeypatch.setattr(sys.modules["sglang.srt.distributed"], "get_tp_group", lambda ranks=ranks: ranks)
        plugin.hooks[AFTER["load"]](None, types.SimpleNamespace(server_args=args, model=""))
    assert seen == [{}, {"group": "gloo"}]


AFTER = {
    "load": "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
    "replay": "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute",
    "log_stats": "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
}


def test_a_served_model_is_warmed_up_and_its_replays_are_counted_and_exported(plugin, monkeypatch, caplog):
    on_cpu = functools.partial(plugin.module.replace_runners, backend="torch_reference")
    monkeypatch.setattr(plugin.module, "replace_runners", on_cpu)
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus, "Mirror", functools.partial(prometheus.Mirror, registry))

    def calls() -> float:
        text = prometheus_client.generate_latest(registry).decode()
        ours = [
            line for line in text.splitlines() if line.startswith("hybrid_moe_calls_total{") and f"h{HIDDEN}" in line
        ]
        return sum(float(line.split()[-1]) for line in ours)

    args = types.SimpleNamespace(moe_runner_backend="hybrid_moe", chunked_prefill_size=16)
    plugin.hooks["sglang.srt.server_args.ServerArgs.__post_init__"](args)
    model = torch.nn.ModuleDict({name: Block(FusedMoE(Fp8MoEMethod())) for name in ("first", "second")})
    runner = types.SimpleNamespace(server_args=args, model=model)
    with caplog.at_level("INFO", "hybrid_moe"):
        plugin.hooks[AFTER["load"]](None, runner)
    assert "2 MoE layers of ModuleDict by hybrid_moe" in caplog.text and "5 token counts to T = 16" in caplog.text
    graphs = types.SimpleNamespace(model_runner=runner, bs=8, captured_req_width=1)
    plugin.hooks[AFTER["log_stats"]](None, None)
    before = calls()
    plugin.hooks[AFTER["replay"]](None, graphs)
    plugin.hooks[AFTER["log_stats"]](None, None)
    assert calls() == before + 2  # one of each layer
    plugin.hooks[AFTER["replay"]](None, types.SimpleNamespace(model_runner=types.SimpleNamespace(), bs=8))
    plugin.hooks[AFTER["log_stats"]](None, None)
    assert calls() == before + 2
