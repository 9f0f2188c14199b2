"""The experts' call of a DeepSeek-V3 layer in vLLM by HybridMoE. Written against vLLM 0.33.0.

vLLM's `MoERunner` asks the layer's quantisation method whether it is monolithic. If so it hands it the router's logits
and bfloat16 hidden states, and routes by no kernel of its own; if not, the method gets experts that are already chosen.
HybridMoE routes in the same call, so `HybridMoEMethod` is a monolithic method. vLLM goes on loading the checkpoint,
running the gate and the shared experts, and summing over the ranks.

In a server, as a plugin: an entry point ``hybrid_moe = "vllm_layer:register"`` of group ``vllm.general_plugins`` in the
package that holds this file, and

    vllm serve deepseek-ai/DeepSeek-V3 --quantization hybrid_moe --enable-expert-parallel -tp 8

Nothing else holds the weights then. `replace_experts` is for a model that is loaded already, before CUDA graphs are
captured; it wants ``--moe-backend triton``, as other backends of vLLM change the weights' layout.

Of vLLM 0.33.0 it relies on (``vllm/model_executor/layers/``):

- ``fused_moe/runner/moe_runner.py``: `MoERunner._apply_quant_method` calls ``forward_monolithic`` of the experts; where
  ``moe_kernel`` is None, `_maybe_dispatch` gathers the logits of all data-parallel ranks, and
  `_maybe_reduce_final_output` sums over the ranks; a factor that the runner applies isn't in `RoutedExperts` too.
- ``fused_moe/routed_experts.py``: `RoutedExperts.forward_monolithic` calls ``apply_monolithic(layer=, x=,
  router_logits=, input_ids=)``; the fields in `FIELDS`.
- ``fused_moe/fused_moe_method_base.py``: `FusedMoEMethodBase`, above all ``is_monolithic``.
- ``quantization/fp8.py``: `Fp8MoEMethod.create_weights` registers ``w13_weight`` (gate half first), ``w2_weight`` and
  their ``_scale_inv``; `Fp8Config.get_quant_method` makes the method.
- ``quantization/__init__.py``: `register_quantization_config`.

Not done: all-to-all kernels (DeepEP), which want the choice first; experts placed otherwise than in one range for each
rank (EPLB, round robin); the capture of routed experts.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
from typing import Any

import torch

try:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    raise SystemExit(f"{error.name} is not installed: pip install vllm") from None

from hybrid_moe import HybridMoE

VERSION = "0.33.0"
NAME = "hybrid_moe"

LAYERS = "vllm.model_executor.layers"
# The parameters of what is called here, and of what is overridden.
INTERFACE = {
    f"{LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase.__init__": "self moe",
    f"{LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype extra_weight_attrs"
    ),
    f"{LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase.get_fused_moe_quant_config": "self layer",
    f"{LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase.apply_monolithic": (
        "self layer x router_logits input_ids"
    ),
    f"{LAYERS}.fused_moe.routed_experts:RoutedExperts.forward_monolithic": "self x router_logits input_ids",
    f"{LAYERS}.fused_moe.routed_experts:RoutedExperts._replace_quant_method": "self quant_method",
    f"{LAYERS}.quantization.base_config:QuantizeMethodBase.process_weights_after_loading": "self layer",
    f"{LAYERS}.quantization.base_config:QuantizationConfig.override_quantization_method": (
        "hf_quant_cfg user_quant hf_config"
    ),
    f"{LAYERS}.quantization.fp8:Fp8Config.get_quant_method": "self layer prefix",
    f"{LAYERS}.quantization.fp8:Fp8Config.get_name": "",
    f"{LAYERS}.quantization:register_quantization_config": "quantization",
}
# What is read from the experts and from their `FusedMoEConfig`.
FIELDS = (
    "w13_weight w13_weight_scale_inv w2_weight w2_weight_scale_inv weight_block_size expert_map top_k "
    "num_expert_group topk_group renormalize use_grouped_topk scoring_func routed_scaling_factor activation "
    "e_score_correction_bias apply_router_weight_on_input custom_routing_function hash_indices_table swiglu_limit "
    "swiglu_alpha swiglu_beta moe_config global_num_experts local_num_experts"
).split()
CONFIG_FIELDS = "in_dtype has_bias require_decomposed_backend num_logical_experts moe_parallel_config".split()
# Those of `Fp8MoeBackend` whose weights stay as the checkpoint has them.
UNCHANGED = ("TRITON", "BATCHED_TRITON", "VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS")


def check_interface() -> None:
    """Compare the installed vLLM with what this was written against.

    Raises
    ------
    RuntimeError
        A function that is called or overridden here isn't there, or has other parameters.
    """
    for target, wanted in INTERFACE.items():
        try:
            found = " ".join(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (ImportError, AttributeError) as error:
            raise _drift(f"{target} isn't there ({error})") from error
        if found != wanted:
            raise _drift(f"{target}: expected ({wanted}), got ({found})")


class HybridMoEMethod(FusedMoEMethodBase):
    """From logits to this rank's part of the sum in one call.

    Parameters
    ----------
    fp8
        vLLM's method for the same layer: it makes the weights that the checkpoint is loaded into.
    options
        ``backend`` and ``policy`` of `HybridMoE`.
    """

    def __init__(self, fp8: Fp8MoEMethod, **options: Any) -> None:
        super().__init__(fp8.moe)
        self.fp8, self.options = fp8, options
        self.experts: HybridMoE | None = None

    @property
    def is_monolithic(self) -> bool:
        """The runner hands logits over, not chosen experts."""
        return True

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As the checkpoint has them."""
        self.fp8.create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
        )

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """The weights stay as they are: vLLM's own method would bring them into its kernel's layout."""
        self.experts = prepare(layer, **self.options)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: that is for vLLM's own kernels."""
        return None

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[T, H]`` bfloat16 and ``[T, num_experts]`` to ``[T, H]`` bfloat16."""
        assert self.experts is not None, "process_weights_after_loading comes first"
        return self.experts(router_logits.float(), x)


def prepare(layer: RoutedExperts, **options: Any) -> HybridMoE:
    """The `HybridMoE` on the experts' own weights, without a copy.

    Raises
    ------
    RuntimeError
        The experts lack a field: another vLLM.
    ValueError
        The layer is none that HybridMoE can compute; the message names every reason.
    """
    missing = [f"RoutedExperts.{name}" for name in FIELDS if not hasattr(layer, name)]
    missing += [f"FusedMoEConfig.{name}" for name in CONFIG_FIELDS if not hasattr(layer.moe_config, name)]
    if missing:
        raise _drift(f"{', '.join(missing)} isn't there")
    config, bias = layer.moe_config, layer.e_score_correction_bias
    parallel = config.moe_parallel_config
    reasons = {
        f"scoring_func: expected 'sigmoid', got {layer.scoring_func!r}": layer.scoring_func != "sigmoid",
        "renormalize is False": not layer.renormalize,
        "use_grouped_topk is False": not layer.use_grouped_topk,
        "no e_score_correction_bias: vLLM then ranks groups by their best expert, not by their two best": (
            bias is None and layer.topk_group != layer.num_expert_group
        ),
        f"activation: expected 'silu', got {layer.activation.value!r}": layer.activation.value != "silu",
        "a SwiGLU limit, alpha or beta": not (layer.swiglu_limit is layer.swiglu_alpha is layer.swiglu_beta is None),
        "apply_router_weight_on_input": layer.apply_router_weight_on_input,
        "a custom_routing_function": layer.custom_routing_function is not None,
        "routing by a hash table": layer.hash_indices_table is not None,
        "a router that has to choose the experts itself": config.require_decomposed_backend,
        "experts with biases": config.has_bias,
        f"--all2all-backend: expected allgather_reducescatter, got {parallel.all2all_backend}": (
            parallel.use_all2all_kernels and not parallel.use_ag_rs_all2all_kernels
        ),
        f"in_dtype: expected torch.bfloat16, got {config.in_dtype}": config.in_dtype != torch.bfloat16,
        f"weight_block_size: expected [128, 128], got {layer.weight_block_size}": (
            list(layer.weight_block_size or ()) != [128, 128]
        ),
        "experts moved or copied by EPLB": (
            parallel.enable_eplb or config.num_logical_experts != layer.global_num_experts
        ),
    }
    if any(reasons.values()):
        raise ValueError(
            f"layer can't be computed by HybridMoE: {'; '.join(r for r, holds in reasons.items() if holds)}"
        )
    return HybridMoE(
        layer.w13_weight.data,
        layer.w13_weight_scale_inv.data,
        layer.w2_weight.data,
        layer.w2_weight_scale_inv.data,
        routing_bias(bias, layer.global_num_experts, layer.w13_weight.device),
        local_expert_offset=local_expert_offset(layer.expert_map, layer.local_num_experts),
        routed_scaling_factor=layer.routed_scaling_factor,
        top_k=layer.top_k,
        n_group=layer.num_expert_group,
        topk_group=layer.topk_group,
        gate_first=True,
        **options,
    )


def routing_bias(bias: torch.Tensor | None, num_experts: int, device: torch.device) -> torch.Tensor:
    """The correction bias as vLLM has it, in float32; zeros for none."""
    if bias is None:
        return torch.zeros(num_experts, dtype=torch.float32, device=device)
    return bias.detach().to(device, torch.float32)


def local_expert_offset(expert_map: torch.Tensor | None, num_local_experts: int) -> int:
    """Where this rank's experts begin.

    Parameters
    ----------
    expert_map
        ``[num_experts]`` int32, local index or -1; ``None`` without expert parallelism.
    num_local_experts
        Experts of this rank.

    Raises
    ------
    ValueError
        They are no range of experts in order, as with round-robin placement.
    """
    if expert_map is None:
        return 0
    held = (expert_map >= 0).nonzero().flatten().tolist()
    if expert_map[held].tolist() != list(range(num_local_experts)) or held != list(range(held[0], held[-1] + 1)):
        raise ValueError(
            f"expert_map: expected experts of this rank in a row and in order, got {held}: "
            "--expert-placement-strategy linear"
        )
    return held[0]


def replace_experts(model: torch.nn.Module, **options: Any) -> dict[str, HybridMoE]:
    """Swap the method of every FP8 MoE layer of a loaded model; all of them or, after an error, none.

    Parameters
    ----------
    model
        With its weights loaded and processed.
    options
        ``backend`` and ``policy`` of `HybridMoE`.

    Returns
    -------
    dict
        The layers by module name. One `HybridMoE.warm_up` is enough for layers of the same sizes.

    Raises
    ------
    RuntimeError
        Another vLLM than this was written against.
    ValueError
        There is no such layer, or one can't be computed.
    """
    check_interface()
    swaps = []
    for name, module in model.named_modules():
        if not isinstance(module, RoutedExperts) or not isinstance(module.quant_method, Fp8MoEMethod):
            continue
        layout = module.quant_method.fp8_backend.name
        if layout not in UNCHANGED:
            raise ValueError(
                f"{name}: expected weights in the layout of the checkpoint, got that of {layout}: start vLLM with "
                "--moe-backend triton, or with this as a plugin"
            )
        method = HybridMoEMethod(module.quant_method, **options)
        method.process_weights_after_loading(module)
        swaps.append((name, module, method))
    if not swaps:
        raise ValueError("model: expected a DeepSeek-V3 checkpoint in FP8, got no RoutedExperts with Fp8MoEMethod")
    for _, module, method in swaps:
        module._replace_quant_method(method)
    return {name: method.experts for name, _, method in swaps}


def register() -> None:
    """Make ``--quantization hybrid_moe`` known: vLLM's FP8, but for the experts' call. For a plugin's entry point."""
    check_interface()

    @register_quantization_config(NAME)
    class HybridMoEConfig(Fp8Config):
        @classmethod
        def get_name(cls) -> str:
            return NAME

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            return NAME if user_quant == NAME and hf_quant_cfg.get("quant_method") == "fp8" else None

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            method = super().get_quant_method(layer, prefix)
            return HybridMoEMethod(method) if isinstance(method, Fp8MoEMethod) else method


def _drift(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what}: this was written against vLLM {VERSION}, and {importlib.metadata.version('vllm')} is installed"
    )


if __name__ == "__main__":
    check_interface()
    print(f"vLLM {importlib.metadata.version('vllm')} has the interface of {VERSION} that this relies on")
