"""The experts' call of a DeepSeek-V3 layer in SGLang by HybridMoE. Written against SGLang 0.5.23.

SGLang's `TopK` chooses the experts before the experts' call, which gets their ids and weights. HybridMoE routes in the
same call, and `TopK` can leave the choice to the kernel, as for flashinfer's TRT-LLM kernels: told to bypass, it hands
the router's logits on. So `replace_experts` tells it so, and swaps the experts' quantisation method for
`HybridMoEMethod`. SGLang goes on loading the checkpoint, running the gate and the shared experts, and summing over the
ranks.

In a server, as a plugin: an entry point ``hybrid_moe = "sglang_layer:register"`` of group ``sglang.srt.plugins`` in the
package that holds this file, and

    python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --tp 8 --ep 8 --moe-runner-backend triton
        --disable-shared-experts-fusion

With ``--moe-runner-backend triton`` the weights stay as the checkpoint has them.

Of SGLang 0.5.23 it relies on (``sglang/srt/``):

- ``layers/moe/topk.py``: `TopK.forward_cuda` returns a `BypassedTopKOutput` for
  ``topk_config.output_format = TopKOutputFormat.BYPASSED``; all its outputs have ``router_logits``.
- ``layers/moe/token_dispatcher/standard.py``: `StandardDispatcher.dispatch` passes that and the bfloat16 hidden states
  on as they are, and `combine` returns what is in `StandardCombineInput`.
- ``layers/moe/fused_moe_triton/layer.py``: `FusedMoE.run_moe_core` calls ``quant_method.apply(layer=,
  dispatch_output=)``; the fields in `FIELDS`.
- ``layers/quantization/fp8.py``: `Fp8MoEMethod.create_weights` registers ``w13_weight`` (gate half first),
  ``w2_weight`` and their ``_scale_inv``.
- ``models/deepseek_v2.py``: on CUDA `DeepseekV2MoE.forward_normal` takes the experts' output with
  ``routed_scaling_factor`` in it, adds the shared experts' and sums over the ranks.
- ``plugins/hook_registry.py``: `HookRegistry`.

Not done: all-to-all dispatchers (DeepEP), which need the choice first; EPLB; shared experts fused into the routed ones;
the capture of routed experts.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch

try:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatcher
    from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat, is_expert_remapping_enabled
    from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    raise SystemExit(f"{error.name} is not installed: pip install sglang") from None

from hybrid_moe import HybridMoE

VERSION = "0.5.23"

SRT = "sglang.srt"
# The parameters of what is called here, and of what is overridden.
INTERFACE = {
    f"{SRT}.layers.moe.fused_moe_triton.layer:FusedMoE.run_moe_core": "self dispatch_output",
    f"{SRT}.layers.moe.token_dispatcher.standard:StandardDispatchOutput": (
        "hidden_states hidden_states_scale topk_output hidden_states_pre_quant"
    ),
    f"{SRT}.layers.moe.token_dispatcher.standard:StandardCombineInput": "hidden_states",
    f"{SRT}.layers.moe.topk:BypassedTopKOutput": (
        "hidden_states raw_router_logits topk_config num_token_non_padded expert_location_dispatch_info"
    ),
    f"{SRT}.layers.moe.topk:StandardTopKOutput": "topk_weights topk_ids router_logits",
    f"{SRT}.layers.moe.topk:is_expert_remapping_enabled": "",
    f"{SRT}.layers.quantization.base_config:QuantizeMethodBase.process_weights_after_loading": "self layer",
    f"{SRT}.layers.quantization.base_config:FusedMoEMethodBase.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype extra_weight_attrs"
    ),
    f"{SRT}.layers.quantization.base_config:FusedMoEMethodBase.create_moe_runner": "self layer moe_runner_config",
    f"{SRT}.layers.quantization.base_config:FusedMoEMethodBase.get_moe_runner_backend": "self layer",
    f"{SRT}.layers.quantization.fp8:Fp8MoEMethod.apply": "self layer dispatch_output",
    f"{SRT}.model_loader.loader:DefaultModelLoader.load_model": "self model_config device_config",
    f"{SRT}.plugins.hook_registry:HookRegistry.register": "target hook hook_type source",
}
# What is read from the experts, their `MoeRunnerConfig`, the `TopKConfig` and the `Fp8MoEMethod`.
FIELDS = (
    "w13_weight w13_weight_scale_inv w2_weight w2_weight_scale_inv num_experts num_local_experts moe_ep_rank "
    "moe_runner_config dispatcher with_bias weight_load_method"
).split()
RUNNER_FIELDS = (
    "num_fused_shared_experts activation is_gated apply_router_weight_on_input no_combine routed_scaling_factor "
    "gemm1_alpha gemm1_clamp_limit swiglu_limit"
).split()
TOPK_FIELDS = (
    "top_k use_grouped_topk topk_group num_expert_group renormalize custom_routing_function correction_bias "
    "apply_routed_scaling_factor_on_output output_format scoring_func num_shared_topk_slots"
).split()
METHOD_FIELDS = "weight_block_size use_mxfp8 is_fp4_expert".split()


def check_interface() -> None:
    """Compare the installed SGLang with what this was written against.

    Raises
    ------
    RuntimeError
        A function or tuple that is used here isn't there, or has other parameters.
    """
    for target, wanted in INTERFACE.items():
        try:
            found = " ".join(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (ImportError, AttributeError) as error:
            raise _drift(f"{target} isn't there ({error})") from error
        if found != wanted:
            raise _drift(f"{target} takes ({found}); ({wanted}) is wanted")


class HybridMoEMethod(FusedMoEMethodBase):
    """From logits to this rank's part of the sum in one call.

    Parameters
    ----------
    fp8
        SGLang's method for the same layer: the weights that the checkpoint is loaded into stay its own.
    topk
        The layer's `TopK`, whose configuration says how to route.
    options
        ``backend`` and ``policy`` of `HybridMoE`.
    """

    def __init__(self, fp8: Fp8MoEMethod, topk: TopK, **options: Any) -> None:
        self.fp8, self.topk_config, self.options = fp8, topk.topk_config, options
        self.experts: HybridMoE | None = None

    def create_weights(self, layer: FusedMoE, *sizes: Any, **extra_weight_attrs: Any) -> None:
        """As the checkpoint has them."""
        self.fp8.create_weights(layer, *sizes, **extra_weight_attrs)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: Any) -> None:
        """SGLang's own runner, which isn't called."""
        self.fp8.create_moe_runner(layer, moe_runner_config)

    def get_moe_runner_backend(self, layer: FusedMoE) -> Any:
        """That of SGLang's own runner: the weights' layout hangs on it."""
        return self.fp8.get_moe_runner_backend(layer)

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Prepare anew, as after weights were updated in a running server."""
        self.fp8.process_weights_after_loading(layer)
        self.prepare(layer)

    def prepare(self, layer: FusedMoE) -> None:
        """Prepare on weights that are loaded and processed."""
        self.experts = prepare(layer, self.fp8, self.topk_config, **self.options)

    def apply(self, layer: FusedMoE, dispatch_output: Any) -> StandardCombineInput:
        """``[T, H]`` bfloat16 and ``[T, num_experts]`` to ``[T, H]`` bfloat16."""
        assert self.experts is not None, "prepare comes first"
        hidden_states = dispatch_output.hidden_states
        if not hidden_states.shape[0]:  # the logits of TopK.empty_topk_output have another width
            return StandardCombineInput(hidden_states=torch.empty_like(hidden_states))
        logits = dispatch_output.topk_output.router_logits
        return StandardCombineInput(hidden_states=self.experts(logits.float(), hidden_states))


def prepare(layer: FusedMoE, fp8: Fp8MoEMethod, topk_config: Any, **options: Any) -> HybridMoE:
    """The `HybridMoE` on the experts' own weights, without a copy.

    Raises
    ------
    RuntimeError
        The experts or their configurations lack a field: another SGLang.
    ValueError
        The layer is none that HybridMoE can compute; the message names every reason.
    """
    missing = [f"FusedMoE.{name}" for name in FIELDS if not hasattr(layer, name)]
    for owner, names in (
        (getattr(layer, "moe_runner_config", None), RUNNER_FIELDS),
        (topk_config, TOPK_FIELDS),
        (fp8, METHOD_FIELDS),
    ):
        missing += [f"{type(owner).__name__}.{name}" for name in names if not hasattr(owner, name)]
    if missing:
        raise _drift(f"{', '.join(missing)} isn't there")
    runner, bias = layer.moe_runner_config, topk_config.correction_bias
    backend = fp8.get_moe_runner_backend(layer)
    reasons = {
        "weights in another layout than the checkpoint's: --moe-runner-backend triton is wanted": (
            backend is None or not backend.is_triton()
        ),
        f"tokens are dispatched by {type(layer.dispatcher).__name__}; --moe-a2a-backend none is wanted": (
            not isinstance(layer.dispatcher, StandardDispatcher)
        ),
        "shared experts among the routed ones: --disable-shared-experts-fusion is wanted": bool(
            runner.num_fused_shared_experts or topk_config.num_shared_topk_slots
        ),
        "experts moved or copied by EPLB": is_expert_remapping_enabled(),
        f"scoring_func is {topk_config.scoring_func!r}; 'sigmoid' is wanted": topk_config.scoring_func != "sigmoid",
        "renormalize is False": not topk_config.renormalize,
        "use_grouped_topk is False": not topk_config.use_grouped_topk,
        "no correction_bias: SGLang then ranks groups by their best expert, not by their two best": (
            bias is None and topk_config.topk_group != topk_config.num_expert_group
        ),
        "a custom_routing_function": topk_config.custom_routing_function is not None,
        "the routing applies routed_scaling_factor": topk_config.apply_routed_scaling_factor_on_output,
        f"activation is {runner.activation!r}; gated 'silu' is wanted": (
            runner.activation != "silu" or not runner.is_gated
        ),
        "a SwiGLU limit or alpha": not (runner.swiglu_limit is runner.gemm1_alpha is runner.gemm1_clamp_limit is None),
        "apply_router_weight_on_input": runner.apply_router_weight_on_input,
        "no_combine": runner.no_combine,
        "experts with biases": layer.with_bias,
        f"weight_block_size is {fp8.weight_block_size}; [128, 128] of FP8 is wanted": (
            list(fp8.weight_block_size or ()) != [128, 128] or fp8.use_mxfp8 or fp8.is_fp4_expert
        ),
    }
    if any(reasons.values()):
        raise ValueError(
            f"layer can't be computed by HybridMoE: {'; '.join(r for r, holds in reasons.items() if holds)}"
        )
    factor = runner.routed_scaling_factor
    return HybridMoE(
        layer.w13_weight.data,
        layer.w13_weight_scale_inv.data,
        layer.w2_weight.data,
        layer.w2_weight_scale_inv.data,
        routing_bias(bias, layer.num_experts, layer.w13_weight.device),
        local_expert_offset=layer.moe_ep_rank * layer.num_local_experts,
        routed_scaling_factor=1.0 if factor is None else factor,
        top_k=topk_config.top_k,
        n_group=topk_config.num_expert_group,
        topk_group=topk_config.topk_group,
        gate_first=True,
        **options,
    )


def routing_bias(bias: torch.Tensor | None, num_experts: int, device: torch.device) -> torch.Tensor:
    """The correction bias as SGLang has it, in float32; zeros for none."""
    if bias is None:
        return torch.zeros(num_experts, dtype=torch.float32, device=device)
    return bias.detach().to(device, torch.float32)


def replace_experts(model: torch.nn.Module, **options: Any) -> dict[str, HybridMoE]:
    """Swap the method of every FP8 MoE layer of a loaded model; all of them or, after an error, none.

    Parameters
    ----------
    model
        With its weights loaded and processed, before CUDA graphs are captured.
    options
        ``backend`` and ``policy`` of `HybridMoE`.

    Returns
    -------
    dict
        The layers by module name. One `HybridMoE.warm_up` is enough for layers of the same sizes.

    Raises
    ------
    RuntimeError
        Another SGLang than this was written against.
    ValueError
        There is no such layer, or one can't be computed.
    """
    check_interface()
    swaps = []
    for name, block in moe_blocks(model):
        method = HybridMoEMethod(block.experts.quant_method, block.topk, **options)
        method.prepare(block.experts)
        swaps.append((name, block, method))
    if not swaps:
        raise ValueError(
            "model has no MoE block of a FusedMoE with Fp8MoEMethod and a TopK; "
            "a DeepSeek-V3 checkpoint in FP8 is wanted"
        )
    for _, block, method in swaps:
        block.experts.weight_load_method = method.fp8  # for loaders that ask the method what it is
        block.experts.quant_method = method
        block.topk.topk_config.output_format = TopKOutputFormat.BYPASSED
    return {f"{name}.experts": method.experts for name, _, method in swaps}


def moe_blocks(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The blocks of experts and router (`DeepseekV2MoE`) that are SGLang's own, by module name."""
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if (
            isinstance(experts, FusedMoE)
            and isinstance(experts.quant_method, Fp8MoEMethod)
            and isinstance(getattr(block, "topk", None), TopK)
        ):
            yield name, block


def register() -> None:
    """Have every model's experts replaced when it is loaded. For a plugin's entry point.

    SGLang logs an error in a plugin and goes on; one in the hook stops it, so that no server runs without what it was
    started with.
    """
    HookRegistry.register(f"{SRT}.model_loader.loader.DefaultModelLoader.load_model", after_loading, HookType.AFTER)


def after_loading(model: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
    """The hook: the same model with its experts replaced. One without any, as a dense draft model, is left alone."""
    log = logging.getLogger("hybrid_moe")
    if any(True for _ in moe_blocks(model)):
        log.info("%d MoE layers of %s by HybridMoE", len(replace_experts(model)), type(model).__name__)
    else:
        log.warning("%s has no FP8 MoE layers", type(model).__name__)
    return model


def _drift(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what}: this was written against SGLang {VERSION}, and {importlib.metadata.version('sglang')} is installed"
    )


if __name__ == "__main__":
    check_interface()
    print(f"SGLang {importlib.metadata.version('sglang')} has the interface of {VERSION} that this relies on")
