"""vLLM's routed experts by `HybridMoE`: ``--quantization hybrid_moe``.

    pip install hybrid-moe
    vllm serve deepseek-ai/DeepSeek-V3 --quantization hybrid_moe --enable-expert-parallel -tp 8

vLLM finds `register` by the entry point ``hybrid_moe`` of group ``vllm.general_plugins``. Without the option it changes
nothing. With it, vLLM reads a checkpoint in FP8 as ever, and the quantisation method of each MoE layer in 128x128
blocks calls a `HybridMoE` on the layer's own weights: no copy, and no other layout. Gate, shared experts, EPLB's
renumbering, the gathering of data-parallel ranks' tokens and the reduction over ranks stay vLLM's.

vLLM 0.33 has no registry of MoE kernels (`select_fp8_moe_backend` has a closed list) but one of quantisation methods,
and asks a layer's method for one of two hooks:

- monolithic, where `HybridMoE` has the layer's routing: logits go in, and the experts are chosen in the same call;
- modular, for any other routing and for EPLB: vLLM's router chooses, ids and weights go in.

Without ``moe_kernel`` `MoERunner` gathers and reduces over ranks itself, which wants all-gather and reduce-scatter.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import time
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod

from .. import backends
from ..api import HybridMoE
from ..candidate import Candidate
from ..device import DeviceKey
from ..problem import MoEProblem, RoutingMethod

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["NAME", "HybridMoEConfig", "HybridMoEMethod", "check_interface", "register"]

NAME = "hybrid_moe"
VERSION = "0.33.0"  # what this was written for
# vLLM's `RoutingMethodType` by name, of those that `HybridMoE` has.
_ROUTING: dict[str, RoutingMethod] = {
    "DeepSeekV3": "deepseek_v3",
    "MiniMax2": "deepseek_v3",  # without groups
    "SigmoidRenorm": "deepseek_v3",  # without a bias
    "RenormalizeNaive": "softmax",
    "Default": "softmax_no_renorm",
}

_log = init_logger("vllm.hybrid_moe")  # vLLM shows what is below its own logger


def register() -> None:
    """Add ``hybrid_moe`` to vLLM's quantisation methods. Called by vLLM in each of its processes."""
    register_quantization_config(NAME)(HybridMoEConfig)


class HybridMoEConfig(Fp8Config):
    """vLLM's configuration of an FP8 checkpoint, with other experts.

    Attributes
    ----------
    warmed_up : set of MoEProblem or None
        Of the model's layers so far. ``None``: vLLM made it without a checkpoint's configuration.
    """

    warmed_up: set[MoEProblem] | None = None

    @classmethod
    def get_name(cls) -> str:
        """What ``--quantization`` calls it."""
        return NAME

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a checkpoint that says ``fp8``, if the user asks for it."""
        return NAME if user_quant == NAME and hf_quant_cfg.get("quant_method") == "fp8" else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HybridMoEConfig:
        """As vLLM's; RuntimeError in a vLLM with another interface."""
        check_interface()
        made = super().from_config(config)
        made.warmed_up = set()
        return made

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """`HybridMoEMethod` for experts that it can run, else vLLM's method."""
        if self.warmed_up is None:  # vLLM would read weights in bfloat16 as if they were in FP8
            raise ValueError(
                f"--quantization {NAME}: expected a checkpoint whose quantization_config has quant_method fp8, got one "
                "without"
            )
        method = super().get_quant_method(layer, prefix)
        if type(method) is not Fp8MoEMethod:
            return method
        reasons = _not_supported_reasons(layer, method)
        if not reasons:
            return HybridMoEMethod(self, layer)
        config = layer.moe_config
        sizes = f"{config.num_experts} experts of {config.hidden_dim} x {config.intermediate_size_per_partition}"
        _log.warning_once("vLLM's own kernels run MoE layers of %s: %s can't: %s", sizes, NAME, "; ".join(reasons))
        return method


class HybridMoEMethod(Fp8MoEMethod):
    """vLLM's method for experts in FP8, which makes and loads the weights, with `HybridMoE` for its kernel.

    Attributes
    ----------
    hybrid_moe : HybridMoE or None
        Made when the weights are loaded.
    """

    def __init__(self, quant_config: Fp8Config, layer: Any) -> None:
        super().__init__(quant_config, layer)
        self.hybrid_moe: HybridMoE | None = None
        self._takes_logits = _takes_logits(layer)
        self._options = _options()

    @property
    def is_monolithic(self) -> bool:
        """Whether logits go in, and not experts that are chosen already."""
        return self._takes_logits

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        """Of chosen experts' ids."""
        return torch.int32

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: it is for vLLM's kernels."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave the weights as the checkpoint has them; vLLM's method brings them into its kernel's layout."""
        bias, offset = layer.e_score_correction_bias, _local_expert_offset(layer)
        assert offset is not None, "HybridMoEConfig leaves such a layer to vLLM"
        if not self._takes_logits:
            bias = None
        elif bias is None:
            bias = torch.zeros(layer.global_num_experts, device=layer.w13_weight.device, dtype=torch.float32)
        self.hybrid_moe = HybridMoE(
            layer.w13_weight.data,
            layer.w13_weight_scale_inv.data,
            layer.w2_weight.data,
            layer.w2_weight_scale_inv.data,
            None if bias is None else bias.data,
            local_expert_offset=offset,
            routed_scaling_factor=layer.routed_scaling_factor,  # vLLM's router has applied it to experts that it chose
            problem=_problem(layer),
            group=_ranks(layer),
            **self._options,
        )
        if self.hybrid_moe.problem not in self.quant_config.warmed_up:
            self.quant_config.warmed_up.add(self.hybrid_moe.problem)
            self._warm_up(self.hybrid_moe)

    def _warm_up(self, layer: HybridMoE) -> None:
        """Compile what layers of its problem will run: before vLLM measures memory and captures its graphs."""
        start = time.perf_counter()
        warmed = layer.warm_up(max_num_tokens=self.moe.max_num_tokens)
        _log.info(
            "MoE layers by %s, %s, %s: %s; warm-up of %d token counts %.1f s",
            NAME,
            layer.problem.definition,
            "from logits" if self._takes_logits else "experts chosen by vLLM",
            ", ".join(f"T = {tokens}: {layer.choice(tokens)}" for tokens in (1, 64, 1024, 8192)),
            len(warmed),
            time.perf_counter() - start,
        )

    def apply_monolithic(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[T, H]`` bfloat16 and ``[T, num_experts]`` to ``[T, H]`` bfloat16, this rank's part of the sum."""
        assert self.hybrid_moe is not None, "process_weights_after_loading comes first"
        return self.hybrid_moe(router_logits.float(), x)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same with ``[T, top_k]`` weights and ids. Shared experts are run by the runner."""
        assert self.hybrid_moe is not None, "process_weights_after_loading comes first"
        return self.hybrid_moe(None, x, topk_ids=topk_ids, topk_weights=topk_weights.float())


def check_interface() -> None:
    """Compare what is overridden here with the installed vLLM.

    Raises
    ------
    RuntimeError
        A method isn't there or has other parameters; the message names it and both releases.
    """
    for kind in (HybridMoEConfig, HybridMoEMethod):
        base = kind.__mro__[1]
        for name, member in vars(kind).items():
            if name.startswith("_") and name != "__init__" or not (callable(member) or hasattr(member, "__get__")):
                continue
            ours, theirs = _parameters(kind, name), _parameters(base, name)
            if ours != theirs:
                raise RuntimeError(
                    f"expected {base.__name__}.{name}{ours}, got {theirs or 'none'}: {__name__} was written for vLLM "
                    f"{VERSION}, and {importlib.metadata.version('vllm')} is installed"
                )


def _parameters(kind: type, name: str) -> str:
    member = getattr(kind, name, None)
    if member is None or isinstance(member, property):
        return "" if member is None else "()"
    return f"({', '.join(inspect.signature(member).parameters)})"


def _options() -> dict[str, Any]:
    """Of `HybridMoE`: ``--additional-config '{"hybrid_moe": {"policy": "...", "max_num_tokens": 8192}}'``."""
    config = get_current_vllm_config().additional_config
    return dict(config.get(NAME, {})) if isinstance(config, dict) else {}


def _ranks(layer: Any) -> ProcessGroup | None:
    """Those with layers of the same problem, which are to choose alike; ``None`` for one."""
    ranks = get_tp_group()
    even = layer.global_num_experts % layer.moe_config.moe_parallel_config.ep_size == 0
    return ranks.cpu_group if ranks.world_size > 1 and even else None


def _not_supported_reasons(layer: Any, method: Fp8MoEMethod) -> list[str]:
    config, parallel = layer.moe_config, layer.moe_config.moe_parallel_config
    block = list(method.moe_block_shape or ())
    gathers = parallel.use_ag_rs_all2all_kernels or not parallel.use_all2all_kernels
    checks = {
        f"expected 128x128 FP8 weight blocks, got {block or 'none'}": block != [128, 128],
        f"expected bfloat16 activations, got {config.in_dtype}": config.in_dtype != torch.bfloat16,
        f"expected gated SiLU, got {layer.activation.value!r}": layer.activation.value != "silu",
        "a SwiGLU limit, alpha or beta": any(
            value is not None for value in (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
        ),
        "router weights on the input": layer.apply_router_weight_on_input,
        "experts with biases": config.has_bias,
        "LoRA": config.is_lora_enabled,
        f"expected --all2all-backend allgather_reducescatter, got {parallel.all2all_backend}": (
            not gathers or parallel.use_passthrough_all2all
        ),
        "prefill context parallelism of experts": parallel.use_all2all_kernels and parallel.pcp_size > 1,
        "elastic expert parallelism": get_current_vllm_config().parallel_config.enable_elastic_ep,
        "expected a range of experts on each rank (--expert-placement-strategy linear)": (
            _local_expert_offset(layer) is None
        ),
        "VLLM_BATCH_INVARIANT": envs.VLLM_BATCH_INVARIANT,
    }
    reasons = [reason for reason, holds in checks.items() if holds]
    try:
        problem = _problem(layer)
    except ValueError as error:
        return [*reasons, str(error)]
    if "backend" not in _options():  # the reference, which can run anywhere, is for checks
        device = DeviceKey.of(torch.device(config.device))
        reasons += backends.not_supported_reasons(problem, device, Candidate("triton_fused"))
    return reasons


def _problem(layer: Any) -> MoEProblem:
    """What a `RoutedExperts` computes. For experts that vLLM chooses, the routing says whose policy it is, no more."""
    config = layer.moe_config
    routing = _ROUTING.get(config.routing_method.name, "deepseek_v3")
    n_group, topk_group = _groups(layer)
    if routing != "deepseek_v3" or layer.global_num_experts % n_group:
        n_group = topk_group = 1
    return MoEProblem(
        num_experts=layer.global_num_experts,
        num_local_experts=layer.local_num_experts,
        top_k=layer.top_k,
        n_group=n_group,
        topk_group=topk_group,
        hidden_size=config.hidden_dim,
        intermediate_size=config.intermediate_size_per_partition,
        routing_method=routing,
        gate_first=True,
    )


def _groups(layer: Any) -> tuple[int, int]:
    return (layer.num_expert_group, layer.topk_group) if layer.use_grouped_topk else (1, 1)


def _takes_logits(layer: Any) -> bool:
    """Whether `HybridMoE` chooses as vLLM's router does, and nobody asks the router about its choice."""
    config = layer.moe_config
    routing, bias = config.routing_method.name, layer.e_score_correction_bias
    problem, groups = _problem(layer), _groups(layer)
    return (
        routing in _ROUTING
        and groups == (problem.n_group, problem.topk_group)
        # Without a bias vLLM ranks groups by their best expert, not by their two best.
        and (routing == "DeepSeekV3" or problem.topk_group == problem.n_group)
        # Nor does it apply the factor then, unless there are groups.
        and (bias is not None or layer.use_grouped_topk or layer.routed_scaling_factor == 1.0)
        and layer.custom_routing_function is None
        and not (config.has_hash_routing or config.require_decomposed_backend)
        and not config.moe_parallel_config.enable_eplb
        and config.num_logical_experts == layer.global_num_experts
        and not get_current_vllm_config().aux_output_config.enable_return_routed_experts
    )


def _local_expert_offset(layer: Any) -> int | None:
    """The rank's first expert; ``None`` if its experts are no range in order."""
    expert_map = layer.expert_map_manager.expert_map  # [num_experts] local index or -1; None on one rank
    if expert_map is None:
        return 0
    held = {expert: local for expert, local in enumerate(expert_map.tolist()) if local >= 0}
    first = min(held, default=0)
    return first if held == {first + i: i for i in range(layer.local_num_experts)} else None
