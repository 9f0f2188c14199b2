"""The parts of vLLM 0.33 around the experts' call, as far as hybrid_moe.integrations.vllm uses them, on the CPU.

Modules by name to put into `sys.modules`. Names, parameters and fields are vLLM's: test_integrations_vllm.py compares
them with its files where it is installed. `dropin_packages.py` does the same as the tests with the package itself.
"""

from __future__ import annotations

import logging
import types
from enum import Enum
from typing import Any

import torch

LAYERS = "vllm.model_executor.layers"


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


def vllm_modules(vllm_config: Any, ranks: Any) -> dict[str, types.ModuleType]:
    """Those that hybrid_moe.integrations.vllm imports, and those whose classes it is given."""

    class QuantizeMethodBase:
        def process_weights_after_loading(self, layer):
            return

    class QuantizationConfig:
        @classmethod
        def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
            return None

    class FusedMoEMethodBase(QuantizeMethodBase):
        def __init__(self, moe):
            self.moe, self.moe_quant_config, self.moe_kernel = moe, None, None

        @property
        def topk_indices_dtype(self):
            return None

        @property
        def is_monolithic(self):
            return False

    class Fp8MoEMethod(FusedMoEMethodBase):
        def __init__(self, quant_config, layer):
            super().__init__(layer.moe_config)
            self.quant_config, self.moe_block_shape = quant_config, quant_config.weight_block_size

        def create_weights(
            self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
        ):
            hidden, inner = hidden_size, intermediate_size_per_partition
            for name, shape in {
                "w13_weight": (2 * inner, hidden),
                "w13_weight_scale_inv": (2 * inner // 128, hidden // 128),
                "w2_weight": (hidden, inner),
                "w2_weight_scale_inv": (hidden // 128, inner // 128),
            }.items():
                dtype = torch.float32 if "scale" in name else torch.float8_e4m3fn
                tensor = torch.empty((num_experts, *shape), dtype=dtype)
                layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

        def process_weights_after_loading(self, layer):
            raise AssertionError("this may change the weights' layout")

        def get_fused_moe_quant_config(self, layer):
            raise NotImplementedError

        def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
            raise NotImplementedError

        def apply_monolithic(self, layer, x, router_logits, input_ids=None):
            raise NotImplementedError

    class Fp8Config(QuantizationConfig):
        def __init__(
            self,
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            ignored_layers=None,
            weight_block_size=None,
            store_dtype=None,
        ):
            self.weight_block_size = weight_block_size

        @classmethod
        def get_name(cls):
            return "fp8"

        @classmethod
        def from_config(cls, config):
            return cls(weight_block_size=config.get("weight_block_size"))

        def get_quant_method(self, layer, prefix):
            return Fp8MoEMethod(self, layer) if isinstance(layer, RoutedExperts) else None

    class RoutedExperts(torch.nn.Module):
        def __init__(
            self,
            layer_name,
            params_dtype,
            moe_config,
            quant_config,
            expert_map_manager,
            ckpt_gate_proj_name="gate_proj",
            ckpt_down_proj_name="down_proj",
            ckpt_up_proj_name="up_proj",
            is_fused_checkpoint_transposed=False,
            renormalize=True,
            use_grouped_topk=False,
            num_expert_group=None,
            topk_group=None,
            custom_routing_function=None,
            scoring_func="softmax",
            routed_scaling_factor=1.0,
            swiglu_limit=None,
            swiglu_alpha=None,
            swiglu_beta=None,
            e_score_correction_bias=None,
            apply_router_weight_on_input=False,
            hash_indices_table=None,
        ):
            super().__init__()
            self.layer_name, self.moe_config, self.expert_map_manager = layer_name, moe_config, expert_map_manager
            self.global_num_experts, self.local_num_experts = moe_config.num_experts, moe_config.num_local_experts
            self.top_k, self.activation = moe_config.experts_per_token, moe_config.activation
            self.use_grouped_topk, self.num_expert_group, self.topk_group = (
                use_grouped_topk,
                num_expert_group,
                topk_group,
            )
            self.renormalize, self.scoring_func = renormalize, scoring_func
            self.custom_routing_function, self.routed_scaling_factor = custom_routing_function, routed_scaling_factor
            self.swiglu_limit, self.swiglu_alpha, self.swiglu_beta = swiglu_limit, swiglu_alpha, swiglu_beta
            self.e_score_correction_bias = e_score_correction_bias
            self.apply_router_weight_on_input = apply_router_weight_on_input
            self.quant_method = quant_config.get_quant_method(self, layer_name)
            self.quant_method.create_weights(
                layer=self,
                num_experts=moe_config.num_local_experts,
                hidden_size=moe_config.hidden_dim,
                intermediate_size_per_partition=moe_config.intermediate_size_per_partition,
                params_dtype=params_dtype,
            )

        def forward_modular(self, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None):
            assert not self.quant_method.is_monolithic
            return self.quant_method.apply(
                layer=self,
                x=x,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                shared_experts=shared_experts,
                shared_experts_input=shared_experts_input,
            )

        def forward_monolithic(self, x, router_logits=None, input_ids=None):
            assert self.quant_method.is_monolithic
            return self.quant_method.apply_monolithic(layer=self, x=x, router_logits=router_logits, input_ids=input_ids)

    registered: dict[str, type] = {}

    def register_quantization_config(quantization):
        def register(config):
            registered[quantization] = config
            return config

        return register

    def init_logger(name):
        logger = logging.getLogger(name)
        logger.warning_once = logger.warning
        return logger

    return modules(
        ("vllm", {"envs": types.SimpleNamespace(VLLM_BATCH_INVARIANT=False)}),
        ("vllm.config", {"get_current_vllm_config": lambda: vllm_config}),
        ("vllm.distributed", {"get_tp_group": lambda: ranks}),
        ("vllm.logger", {"init_logger": init_logger}),
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
        (f"{LAYERS}.fused_moe.routed_experts", {"RoutedExperts": RoutedExperts}),
    )


def vllm_config() -> Any:
    """A `VllmConfig` that has the layers run by the reference, as nothing else runs on a CPU."""
    return types.SimpleNamespace(
        additional_config={"hybrid_moe": {"backend": "torch_reference"}},
        parallel_config=types.SimpleNamespace(enable_elastic_ep=False),
        aux_output_config=types.SimpleNamespace(enable_return_routed_experts=False),
    )


# vLLM's RoutingMethodType.
ROUTING = Enum(
    "RoutingMethodType",
    {"Default": 0, "DeepSeekV3": 2, "RenormalizeNaive": 4, "SigmoidRenorm": 6, "MiniMax2": 7, "Unspecified": 9},
)
ACTIVATION = Enum("MoEActivation", {"SILU": "silu", "GELU": "gelu"})


def moe_config(num_experts: int, local: int, hidden: int, inner: int, top_k: int, routing: str) -> Any:
    """A `FusedMoEConfig` of one rank."""
    return types.SimpleNamespace(
        num_experts=num_experts,
        experts_per_token=top_k,
        hidden_dim=hidden,
        num_local_experts=local,
        num_logical_experts=num_experts,
        intermediate_size_per_partition=inner,
        activation=ACTIVATION["SILU"],
        device="cpu",
        routing_method=ROUTING[routing],
        in_dtype=torch.bfloat16,
        max_num_tokens=2,
        has_bias=False,
        is_lora_enabled=False,
        has_hash_routing=False,
        require_decomposed_backend=False,
        moe_parallel_config=types.SimpleNamespace(
            pcp_size=1,
            ep_size=num_experts // local,
            all2all_backend="allgather_reducescatter",
            enable_eplb=False,
            use_all2all_kernels=False,
            use_ag_rs_all2all_kernels=False,
            use_passthrough_all2all=False,
        ),
    )
