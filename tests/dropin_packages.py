"""Run the plugin for SGLang or vLLM inside of the package itself, on the CPU, by hand.

    python tests/dropin_packages.py vllm
    python tests/dropin_packages.py sglang

The package has to be importable; its Python files alone (a wheel unpacked on ``PYTHONPATH``, and what they import) are
enough, as none of its kernels runs: vLLM's `MoERunner` with gate, shared experts and factor, and SGLang's `FusedMoE`,
`TopK` and dispatcher, around the experts' call by `torch_reference`. The results are checked against the reference on
the layer's own weights and the bias in float32. No server is started.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from hybrid_moe.inputs import MoEInputs
from hybrid_moe.measure.workloads import LayerWeights, random_weights
from hybrid_moe.numerics import check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work, moe_reference, quantize_rows

TOTAL, HIDDEN, INNER, TOP_K, GROUPS, KEPT, FACTOR = 16, 256, 128, 4, 4, 2, 2.5
# About 8, and exact in bfloat16 when their mean is off.
BIAS = 8 + torch.tensor([-9, 4, 2, -1, 7, -3, 0, 5, -6, 1, 3, -2, 6, -4, -5, 2], dtype=torch.float32) / 64
FP8 = dict(activation_scheme="dynamic", weight_block_size=[128, 128])
NAMES = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")


def problem(local: int) -> MoEProblem:
    """The layer of a rank with ``local`` experts, as both packages store it."""
    return MoEProblem(
        num_experts=TOTAL,
        num_local_experts=local,
        top_k=TOP_K,
        n_group=GROUPS,
        topk_group=KEPT,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        gate_first=True,
    )


def fill(experts: torch.nn.Module, weights: LayerWeights) -> None:
    """As a checkpoint would."""
    for name, field in zip(NAMES, weights.__slots__, strict=True):
        getattr(experts, name).data.copy_(getattr(weights, field))


@torch.inference_mode()
def judge(
    what: str,
    weights: LayerWeights,
    offset: int,
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    added: Callable[[torch.Tensor], torch.Tensor] | None = None,
    token_counts: tuple[int, ...] = (0, 1, 40),
) -> None:
    """Run at some T and check; ``added`` is what the package adds to the routed experts' part."""
    layer = problem(weights.gemm1_weights.shape[0])
    for tokens in token_counts:
        hidden = torch.randn((tokens, HIDDEN), dtype=torch.bfloat16)
        logits = logits_of(hidden)
        output = run(hidden, logits)
        assert output.shape == hidden.shape and output.dtype == torch.bfloat16
        inputs = MoEInputs(
            logits.float(),
            BIAS,
            *quantize_rows(hidden),
            *(getattr(weights, name) for name in weights.__slots__),
            offset,
            FACTOR,
        )
        expected, has_work = moe_reference(inputs, layer), has_local_work(inputs, layer)
        if added is not None:
            expected, has_work = expected + added(hidden), torch.ones(tokens, dtype=torch.bool)
        correctness = check(output, expected, has_work)
        print(f"{what}, T = {tokens}: relative L2 {correctness.relative_l2:.4f}")
        assert correctness.passed, correctness.failures


def vllm() -> None:
    """The plugin, found by its entry point, in a real `MoERunner` of one rank; the expert maps of four ranks."""
    from types import SimpleNamespace

    from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_plugins_by_group

    from hybrid_moe.integrations import vllm as plugin

    load_plugins_by_group("vllm.general_plugins")[plugin.NAME]()
    quantization = get_quantization_config(plugin.NAME)
    with tempfile.TemporaryDirectory() as folder:
        fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        described = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "quantization_config": fp8}
        Path(folder, "config.json").write_text(json.dumps(described))
        for asked, taken in ((plugin.NAME, plugin.NAME), (None, "fp8")):
            model = ModelConfig(model=folder, quantization=asked, skip_tokenizer_init=True)
            assert model.quantization == taken
    assert quantization is plugin.HybridMoEConfig
    plugin.check_interface()

    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn((TOTAL, HIDDEN)) * HIDDEN**-0.5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x @ self.weight.t(), None

    config = VllmConfig(
        device_config=DeviceConfig(device="cpu"), additional_config={plugin.NAME: {"backend": "torch_reference"}}
    )
    config.scheduler_config.max_num_batched_tokens = 16
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        gate, shared = Gate(), torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        cases = (("logits", False), ("logits", True), ("chosen experts", False), ("chosen experts", True))
        for number, (hook, applied_by_runner) in enumerate(cases):
            # What is asked about its choice chooses by itself.
            config.aux_output_config.enable_return_routed_experts = hook == "chosen experts"
            runner = FusedMoEFactory(
                num_experts=TOTAL,
                top_k=TOP_K,
                hidden_size=HIDDEN,
                intermediate_size=INNER,
                use_grouped_topk=True,
                num_expert_group=GROUPS,
                topk_group=KEPT,
                quant_config=quantization.from_config({"quant_method": "fp8", **FP8}),
                prefix=f"model.layers.{number}.mlp.experts",
                scoring_func="sigmoid",
                routed_scaling_factor=FACTOR,
                apply_routed_scale_to_output=applied_by_runner,
                e_score_correction_bias=torch.nn.Parameter(BIAS),
                gate=gate,
                shared_experts=shared,
            )
            experts = runner.routed_experts
            assert type(experts.quant_method) is plugin.HybridMoEMethod
            assert experts.quant_method.is_monolithic == (hook == "logits")
            weights = random_weights(problem(TOTAL), "cpu", seed=number)
            fill(experts, weights)
            experts.quant_method.process_weights_after_loading(experts)

            def run(hidden: torch.Tensor, _: torch.Tensor, runner: torch.nn.Module = runner) -> torch.Tensor:
                with set_forward_context(None, config, num_tokens=len(hidden)):
                    return runner(hidden_states=hidden, router_logits=hidden)

            what = f"vLLM, {hook}, factor applied by {'runner' if applied_by_runner else 'experts'}"
            # vLLM's router can't choose for no tokens.
            token_counts = (0, 1, 40) if hook == "logits" else (1, 40)
            judge(what, weights, 0, run, lambda x: gate(x)[0], lambda x: shared(x).float(), token_counts)

        config.aux_output_config.enable_return_routed_experts = False
        routings = {
            "Kimi-K2": dict(scoring_func="sigmoid", use_grouped_topk=True, num_expert_group=1, topk_group=1),
            "MiniMax-M2": dict(scoring_func="sigmoid"),
            "Qwen3": dict(),
            "OLMoE": dict(renormalize=False),
            "DeepSeek-V2": dict(renormalize=False, use_grouped_topk=True, num_expert_group=GROUPS, topk_group=KEPT),
        }
        for name, routing in routings.items():
            bias = torch.nn.Parameter(BIAS) if routing.get("scoring_func") else None
            runner = FusedMoEFactory(
                num_experts=TOTAL,
                top_k=TOP_K,
                hidden_size=HIDDEN,
                intermediate_size=INNER,
                quant_config=quantization.from_config({"quant_method": "fp8", **FP8}),
                prefix=f"model.layers.3.{name}.experts",
                e_score_correction_bias=bias,
                **routing,
            )
            method = runner.routed_experts.quant_method
            made = plugin._problem(runner.routed_experts)
            print(f"vLLM, {name}: {made.definition}, {'logits' if method.is_monolithic else 'chosen experts'}")
            assert method.is_monolithic == (name != "DeepSeek-V2") and made.n_group == 1
            assert made.softmax == (bias is None)

    for rank in range(4):
        local, expert_map, _ = determine_expert_map(4, rank, TOTAL)
        held = SimpleNamespace(expert_map_manager=SimpleNamespace(expert_map=expert_map), local_num_experts=local)
        assert plugin._local_expert_offset(held) == 4 * rank


def sglang() -> None:
    """The plugin on a real `FusedMoE`, `TopK` and dispatcher, of one rank and of each of four; its hooks, applied."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
    from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_context, get_parallel
    from sglang.srt.server_args import MOE_RUNNER_BACKEND_CHOICES, ServerArgs

    from hybrid_moe.integrations import sglang as plugin

    get_context().override_server_args(model_path="dummy", device="cpu", moe_runner_backend="triton").install()
    initialize_moe_config()
    torch.set_default_dtype(torch.bfloat16)
    config = Fp8Config(is_checkpoint_fp8_serialized=True, **FP8)

    class Block(torch.nn.Module):
        """The parts of `DeepseekV2MoE` around the experts' call, made as it makes them."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = FusedMoE(
                num_experts=TOTAL,
                top_k=TOP_K,
                hidden_size=HIDDEN,
                intermediate_size=INNER,
                layer_id=3,
                quant_config=config,
                routed_scaling_factor=FACTOR,
                prefix="model.layers.3.mlp.experts",
            )
            self.topk = TopK(
                top_k=TOP_K,
                layer_id=3,
                renormalize=True,
                use_grouped_topk=True,
                num_expert_group=GROUPS,
                topk_group=KEPT,
                scoring_func="sigmoid",
                correction_bias=torch.nn.Parameter(BIAS),
                quant_config=config,
                routed_scaling_factor=FACTOR,
                apply_routed_scaling_factor_on_output=self.experts.should_fuse_routed_scaling_factor_in_topk,
            )
            self.topk.bind_runner_backend(
                self.experts.runner_backend, routing_method_type=self.experts.routing_method_type
            )

        def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            if len(hidden):
                return self.experts(hidden, self.topk.forward_native(hidden, logits))
            return self.experts(hidden, self.topk.empty_topk_output(hidden.device))

    for ranks in (1, 4):
        for rank in range(ranks):
            get_parallel().override_permanently(
                moe_ep_rank=rank,
                moe_ep_size=ranks,
                moe_tp_rank=0,
                moe_tp_size=1,
                tp_rank=rank,
                tp_size=ranks,
                tp_group=None,
                attn_tp_size=ranks,
                attn_tp_rank=rank,
            )
            block, weights = Block(), random_weights(problem(TOTAL // ranks), "cpu", seed=rank)
            fill(block.experts, weights)
            # The dispatcher makes it at its first call, on a GPU.
            mapping = torch.full((TOTAL,), -1, dtype=torch.int32)
            mapping[rank * TOTAL // ranks : (rank + 1) * TOTAL // ranks] = torch.arange(TOTAL // ranks)
            block.experts.dispatcher.local_expert_mapping = mapping
            (name,) = plugin.replace_runners(torch.nn.ModuleDict({"mlp": block}), backend="torch_reference")
            assert name == "mlp.experts"
            judge(
                f"SGLang, rank {rank} of {ranks}",
                weights,
                rank * TOTAL // ranks,
                block,
                lambda x: torch.randn((len(x), TOTAL), dtype=torch.float32),
            )

    def hooked() -> list[object]:
        return [
            ModelRunner.load_model,
            ServerArgs.__post_init__,
            DecodeCudaGraphRunner.execute,
            SchedulerMetricsCollector.log_stats,
        ]

    before = hooked()
    plugin.register()
    HookRegistry.apply_hooks()
    assert plugin.NAME in MOE_RUNNER_BACKEND_CHOICES
    assert all(now is not then for now, then in zip(hooked(), before, strict=True))
    for name in ("self.captured_req_width", "self.bs = "):  # read there after a replay
        assert name in inspect.getsource(DecodeCudaGraphRunner)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.manual_seed(0)
    {"sglang": sglang, "vllm": vllm}[sys.argv[1]]()
