"""The parts of SGLang and vLLM around the experts' call, as far as examples/*_layer.py use them, on the CPU.

Each `*_modules` gives modules by name to put into `sys.modules`, so that an example can be imported; each `*_layer` a
model with one MoE layer. Names, parameters and fields are those recorded in ``data/dropin_interfaces.json``
(test_examples_dropin.py compares them); what is done follows the recorded release. `dropin_packages.py` does the same
with the packages themselves.
"""

from __future__ import annotations

import types
from collections import defaultdict
from enum import Enum, IntEnum, auto
from typing import Any, NamedTuple

import torch

from hybrid_moe.measure.workloads import LayerWeights

LAYERS, SRT = "vllm.model_executor.layers", "sglang.srt"


def modules(*contents: tuple[str, dict[str, Any]]) -> dict[str, types.ModuleType]:
    """Modules with these contents, and the packages above them."""
    made: dict[str, types.ModuleType] = {}
    for name, members in contents:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            module = made.setdefault(path, types.ModuleType(path))
            module.__path__ = []  # a package, for imports of what is below
            if end > 1:
                setattr(made[".".join(parts[: end - 1])], parts[end - 1], module)
        vars(made[name]).update(members)
    return made


def register_weights(layer: torch.nn.Module, weights: LayerWeights) -> None:
    """Under the names that both frameworks give them; gate half first."""
    for name, tensor in (
        ("w13_weight", weights.gemm1_weights),
        ("w13_weight_scale_inv", weights.gemm1_weights_scale),
        ("w2_weight", weights.gemm2_weights),
        ("w2_weight_scale_inv", weights.gemm2_weights_scale),
    ):
        layer.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))


# --- vLLM ---


def vllm_modules() -> dict[str, types.ModuleType]:
    """Those that examples/vllm_layer.py imports."""

    class QuantizeMethodBase:
        def process_weights_after_loading(self, layer):
            return None

    class QuantizationConfig:
        @classmethod
        def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
            return None

    class FusedMoEMethodBase(QuantizeMethodBase):
        def __init__(self, moe):
            self.moe, self.moe_quant_config, self.moe_kernel = moe, None, None

        def create_weights(
            self,
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            **extra_weight_attrs,
        ):
            raise NotImplementedError

        def get_fused_moe_quant_config(self, layer):
            raise NotImplementedError

        @property
        def is_monolithic(self):
            return False

        def apply_monolithic(self, layer, x, router_logits, input_ids=None):
            raise NotImplementedError

    class Fp8MoeBackend(Enum):
        TRITON = "TRITON"
        FLASHINFER_CUTLASS = "FLASHINFER_CUTLASS"

    class Fp8MoEMethod(FusedMoEMethodBase):
        def __init__(self, quant_config, layer):
            super().__init__(layer.moe_config)
            self.quant_config, self.fp8_backend = quant_config, Fp8MoeBackend.TRITON

        def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, *_, **__):
            layer.weight_block_size = self.quant_config.weight_block_size
            layer.created = (num_experts, hidden_size, intermediate_size_per_partition)

        def process_weights_after_loading(self, layer):
            raise AssertionError("this may change the weights' layout")

    class Fp8Config(QuantizationConfig):
        def __init__(self, weight_block_size=None):
            self.weight_block_size = weight_block_size

        @classmethod
        def get_name(cls):
            return "fp8"

        def get_quant_method(self, layer, prefix):
            return Fp8MoEMethod(self, layer) if isinstance(layer, RoutedExperts) else None

    class RoutedExperts(torch.nn.Module):
        def forward_monolithic(self, x, router_logits=None, input_ids=None):
            assert self.quant_method.is_monolithic
            return self.quant_method.apply_monolithic(layer=self, x=x, router_logits=router_logits, input_ids=input_ids)

        def _replace_quant_method(self, quant_method):
            self.quant_method = quant_method

    registered = {}

    def register_quantization_config(quantization):
        def register(config):
            registered[quantization] = config
            return config

        return register

    return modules(
        (
            f"{LAYERS}.quantization",
            {"register_quantization_config": register_quantization_config, "registered": registered},
        ),
        (
            f"{LAYERS}.quantization.base_config",
            {"QuantizeMethodBase": QuantizeMethodBase, "QuantizationConfig": QuantizationConfig},
        ),
        (f"{LAYERS}.quantization.fp8", {"Fp8Config": Fp8Config, "Fp8MoEMethod": Fp8MoEMethod}),
        (f"{LAYERS}.fused_moe.fused_moe_method_base", {"FusedMoEMethodBase": FusedMoEMethodBase}),
        (f"{LAYERS}.fused_moe.oracle.fp8", {"Fp8MoeBackend": Fp8MoeBackend}),
        (f"{LAYERS}.fused_moe.routed_experts", {"RoutedExperts": RoutedExperts}),
    )


class VllmLayer(torch.nn.Module):
    """A `MoERunner` of one rank after loading, called as `_apply_quant_method` does."""

    def __init__(
        self, found: dict[str, types.ModuleType], weights: LayerWeights, bias: torch.Tensor | None, offset: int
    ) -> None:
        super().__init__()
        fp8 = found[f"{LAYERS}.quantization.fp8"]
        experts = found[f"{LAYERS}.fused_moe.routed_experts"].RoutedExperts()
        register_weights(experts, weights)
        local, total = weights.gemm1_weights.shape[0], 16
        expert_map = torch.full((total,), -1, dtype=torch.int32)
        expert_map[offset : offset + local] = torch.arange(local, dtype=torch.int32)
        experts.moe_config = types.SimpleNamespace(
            in_dtype=torch.bfloat16,
            has_bias=False,
            require_decomposed_backend=False,
            num_logical_experts=total,
            moe_parallel_config=types.SimpleNamespace(
                enable_eplb=False,
                all2all_backend="allgather_reducescatter",
                use_all2all_kernels=True,
                use_ag_rs_all2all_kernels=True,
            ),
        )
        for name, value in dict(
            weight_block_size=[128, 128],
            expert_map=None if local == total else expert_map,
            global_num_experts=total,
            local_num_experts=local,
            top_k=4,
            num_expert_group=4,
            topk_group=2,
            renormalize=True,
            use_grouped_topk=True,
            scoring_func="sigmoid",
            routed_scaling_factor=2.5,
            activation=Enum("MoEActivation", {"SILU": "silu", "GELU": "gelu"}).SILU,
            e_score_correction_bias=bias,
            apply_router_weight_on_input=False,
            custom_routing_function=None,
            hash_indices_table=None,
            swiglu_limit=None,
            swiglu_alpha=None,
            swiglu_beta=None,
        ).items():
            setattr(experts, name, value)
        experts.quant_method = fp8.Fp8MoEMethod(fp8.Fp8Config([128, 128]), experts)
        self.routed_experts = experts

    @property
    def routing(self) -> Any:
        """Where the routing is configured."""
        return self.routed_experts

    def forward(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        assert self.routed_experts.quant_method.is_monolithic, "its own kernels aren't here"
        return self.routed_experts.forward_monolithic(x=hidden_states, router_logits=router_logits, input_ids=None)


# --- SGLang ---


def sglang_modules() -> dict[str, types.ModuleType]:
    """Those that examples/sglang_layer.py imports."""

    class QuantizeMethodBase:
        def process_weights_after_loading(self, layer):
            return None

    class FusedMoEMethodBase(QuantizeMethodBase):
        runner = None

        def create_weights(
            self,
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            **extra_weight_attrs,
        ):
            raise NotImplementedError

        def create_moe_runner(self, layer, moe_runner_config):
            raise NotImplementedError

        def get_moe_runner_backend(self, layer):
            return None

    class Fp8MoEMethod(FusedMoEMethodBase):
        def __init__(self, backend="triton"):
            self.weight_block_size, self.use_mxfp8, self.is_fp4_expert = [128, 128], False, False
            self._moe_runner_backend = types.SimpleNamespace(is_triton=lambda: backend == "triton")

        def get_moe_runner_backend(self, layer):
            return self._moe_runner_backend

        def create_weights(self, layer, *sizes, **extra_weight_attrs):
            layer.created = sizes

        def process_weights_after_loading(self, layer):
            layer.processed = True

        def apply(self, layer, dispatch_output):
            raise AssertionError("its own kernels aren't here")

    class StandardDispatchOutput(NamedTuple):
        hidden_states: torch.Tensor
        hidden_states_scale: Any
        topk_output: Any
        hidden_states_pre_quant: Any = None

    class StandardCombineInput(NamedTuple):
        hidden_states: torch.Tensor

    class StandardDispatcher:
        def dispatch(self, hidden_states, topk_output):
            return StandardDispatchOutput(hidden_states, None, topk_output)

        def combine(self, combine_input):
            (hidden_states,) = combine_input
            return hidden_states

    class FusedMoE(torch.nn.Module):
        def forward(self, hidden_states, topk_output, pre_quant_input=None):
            output = self.dispatcher.dispatch(hidden_states=hidden_states, topk_output=topk_output)
            return self.dispatcher.combine(combine_input=self.run_moe_core(dispatch_output=output))

        def run_moe_core(self, dispatch_output):
            return self.quant_method.apply(layer=self, dispatch_output=dispatch_output)

    class TopKOutputFormat(IntEnum):
        STANDARD = auto()
        TRITON_KERNEL = auto()
        BYPASSED = auto()
        PACKED = auto()

    class StandardTopKOutput(NamedTuple):
        topk_weights: torch.Tensor
        topk_ids: torch.Tensor
        router_logits: torch.Tensor

    class BypassedTopKOutput(NamedTuple):
        hidden_states: torch.Tensor
        raw_router_logits: torch.Tensor
        topk_config: Any
        num_token_non_padded: Any = None
        expert_location_dispatch_info: Any = None

        @property
        def router_logits(self):
            return self.raw_router_logits

    class TopK(torch.nn.Module):
        def forward_cuda(self, hidden_states, router_logits):
            if self.topk_config.output_format != TopKOutputFormat.BYPASSED:
                raise AssertionError("its own routing isn't here")
            return BypassedTopKOutput(hidden_states, router_logits, self.topk_config)

        def empty_topk_output(self, device):
            none = torch.empty((0, self.topk_config.top_k), device=device)
            return StandardTopKOutput(none, none.int(), none)

    def is_expert_remapping_enabled():
        return False

    class DefaultModelLoader:
        def load_model(self, *, model_config, device_config):
            raise AssertionError

    class HookType(Enum):
        AFTER = "after"

    class HookRegistry:
        _hooks = defaultdict(list)

        @classmethod
        def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
            cls._hooks[target].append((hook_type, hook))

    moe = f"{SRT}.layers.moe"
    return modules(
        (f"{moe}.fused_moe_triton.layer", {"FusedMoE": FusedMoE}),
        (
            f"{moe}.token_dispatcher.standard",
            {
                "StandardDispatchOutput": StandardDispatchOutput,
                "StandardCombineInput": StandardCombineInput,
                "StandardDispatcher": StandardDispatcher,
            },
        ),
        (
            f"{moe}.topk",
            {
                "TopK": TopK,
                "TopKOutputFormat": TopKOutputFormat,
                "StandardTopKOutput": StandardTopKOutput,
                "BypassedTopKOutput": BypassedTopKOutput,
                "is_expert_remapping_enabled": is_expert_remapping_enabled,
            },
        ),
        (
            f"{SRT}.layers.quantization.base_config",
            {"QuantizeMethodBase": QuantizeMethodBase, "FusedMoEMethodBase": FusedMoEMethodBase},
        ),
        (f"{SRT}.layers.quantization.fp8", {"Fp8MoEMethod": Fp8MoEMethod}),
        (f"{SRT}.model_loader.loader", {"DefaultModelLoader": DefaultModelLoader}),
        (f"{SRT}.plugins.hook_registry", {"HookRegistry": HookRegistry, "HookType": HookType}),
    )


class SglangLayer(torch.nn.Module):
    """A `DeepseekV2MoE` of one rank after loading: experts and router, called as `forward_normal` does."""

    def __init__(
        self, found: dict[str, types.ModuleType], weights: LayerWeights, bias: torch.Tensor | None, offset: int
    ) -> None:
        super().__init__()
        topk, total = found[f"{SRT}.layers.moe.topk"], 16
        experts = found[f"{SRT}.layers.moe.fused_moe_triton.layer"].FusedMoE()
        register_weights(experts, weights)
        experts.num_experts, experts.num_local_experts = total, weights.gemm1_weights.shape[0]
        experts.moe_ep_rank = offset // experts.num_local_experts
        experts.with_bias, experts.weight_load_method = False, None
        experts.moe_runner_config = types.SimpleNamespace(
            num_fused_shared_experts=0,
            activation="silu",
            is_gated=True,
            apply_router_weight_on_input=False,
            no_combine=False,
            routed_scaling_factor=2.5,
            gemm1_alpha=None,
            gemm1_clamp_limit=None,
            swiglu_limit=None,
        )
        experts.dispatcher = found[f"{SRT}.layers.moe.token_dispatcher.standard"].StandardDispatcher()
        experts.quant_method = found[f"{SRT}.layers.quantization.fp8"].Fp8MoEMethod()
        self.experts = experts
        self.topk = topk.TopK()
        self.topk.topk_config = types.SimpleNamespace(
            top_k=4,
            use_grouped_topk=True,
            topk_group=2,
            num_expert_group=4,
            renormalize=True,
            custom_routing_function=None,
            correction_bias=bias,
            apply_routed_scaling_factor_on_output=False,
            output_format=topk.TopKOutputFormat.STANDARD,
            scoring_func="sigmoid",
            num_shared_topk_slots=0,
        )

    @property
    def routing(self) -> Any:
        """Where the routing is configured."""
        return self.topk.topk_config

    def forward(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[0]:
            return self.experts(hidden_states, self.topk.forward_cuda(hidden_states, router_logits))
        return self.experts(hidden_states, self.topk.empty_topk_output(hidden_states.device))
