"""The parts of vLLM around the experts' call, as far as examples/vllm_layer.py uses them, on the CPU.

Each `*_modules` gives modules by name to put into `sys.modules`, so that an example can be imported; each `*_layer` a
model with one MoE layer. Names, parameters and fields are those recorded in ``data/dropin_interfaces.json``
(test_examples_dropin.py compares them); what is done follows the recorded release. `dropin_packages.py` does the same
with the packages themselves.
"""

from __future__ import annotations

import types
from enum import Enum
from typing import Any

import torch

from hybrid_moe.measure.workloads import LayerWeights

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
