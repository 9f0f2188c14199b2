"""The MoE layer that a model's ``config.json`` describes, on one rank: `MoEProblem.from_hf_config`.

Read are the fields that Hugging Face's configurations share; what differs by ``model_type`` is in `_FAMILIES`. Anything
that this package can't compute is a reason, and all reasons are reported together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .files import decode, parse_json, read_whole

__all__ = ["ModelLayer", "UnsupportedModelError", "read_hf_config"]

Scoring = Literal["sigmoid", "softmax"]
BLOCK = 128


class UnsupportedModelError(ValueError):
    """A model's layer can't be expressed; the message lists why.

    Attributes
    ----------
    reasons
        One sentence each.
    """

    def __init__(self, model: str, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"the MoE layer of {model} can't be expressed: {'; '.join(self.reasons)}")


@dataclass(frozen=True, slots=True)
class ModelLayer:
    """What `read_hf_config` found.

    Attributes
    ----------
    fields
        Of the rank's `MoEProblem`, by name.
    routed_scaling_factor
        Factor on the routing weights.
    has_routing_bias
        Whether the checkpoint has a bias for the choice; zeros stand for none.
    shared_experts
        Shared experts besides the routed ones: part of the problem by ``fuse_shared_experts``, else the framework's.
    unpadded_size
        Width of the rank's shard before `shards.tensor_parallel_shard` pads it to whole blocks.
    """

    fields: Mapping[str, Any]
    routed_scaling_factor: float
    has_routing_bias: bool
    shared_experts: int
    unpadded_size: int


@dataclass(frozen=True, slots=True)
class _Family:
    """Where a family's names or defaults differ from the common ones."""

    experts: str = "n_routed_experts num_experts num_local_experts num_routed_experts"
    width: str = "moe_intermediate_size expert_intermediate_size"
    scoring: Scoring | None = None  # where the configuration doesn't say
    renormalize: bool = True  # where the configuration doesn't say
    bias: bool = False
    weight_on_input: bool = False
    shared_experts: int = 0  # where the configuration doesn't say
    reasons: tuple[str, ...] = ()


_FAMILIES: Mapping[str, _Family] = {
    "deepseek_v2": _Family(scoring="softmax", renormalize=False),
    "deepseek_v3": _Family(scoring="sigmoid", bias=True),
    "kimi_k2": _Family(scoring="sigmoid", bias=True),
    "glm4_moe": _Family(scoring="sigmoid", bias=True),
    "glm4v_moe_text": _Family(scoring="sigmoid", bias=True),
    "glm_moe_dsa": _Family(scoring="sigmoid", bias=True),
    "minimax_m2": _Family(width="intermediate_size", scoring="sigmoid", bias=True),
    "mixtral": _Family(width="intermediate_size", scoring="softmax"),
    "phimoe": _Family(width="intermediate_size", reasons=("routing is sparsemixer, which jitters its scores",)),
    "olmoe": _Family(width="intermediate_size", scoring="softmax", renormalize=False),
    "qwen2_moe": _Family(scoring="softmax", renormalize=False),
    "qwen3_moe": _Family(scoring="softmax"),
    "qwen3_next": _Family(scoring="softmax"),
    "llama4_text": _Family(
        width="intermediate_size", scoring="sigmoid", renormalize=False, weight_on_input=True, shared_experts=1
    ),
    "gpt_oss": _Family(
        width="intermediate_size", reasons=("SwiGLU has a limit and an alpha, and experts have biases",)
    ),
    "dbrx": _Family(reasons=("the configuration keeps its experts in ffn_config, in bfloat16",)),
}


def read_hf_config(
    config: Mapping[str, Any] | str | Path | Any,
    *,
    tp: int = 1,
    ep: int = 1,
    gate_first: bool = False,
    fuse_shared_experts: bool = False,
    check_quantization: bool = True,
) -> ModelLayer:
    """The routed experts of a model on one rank.

    Parameters
    ----------
    config
        A ``config.json`` or the folder that holds it, its content, or a ``transformers.PretrainedConfig``.
    tp
        Ranks among which the width of every expert is cut. A shard that is no multiple of 128 wide is padded.
    ep
        Ranks among which the experts are spread.
    gate_first
        See `MoEProblem`.
    fuse_shared_experts
        Have the shared experts in the problem (``num_shared_experts``), where a rank has all routed ones. Several are
        one MLP in a checkpoint, to be cut into experts of ``moe_intermediate_size`` columns.
    check_quantization
        Refuse what isn't FP8 in 128x128 blocks; ``False`` for a checkpoint that will be quantised so.

    Returns
    -------
    ModelLayer
        ``MoEProblem(**layer.fields)`` is its problem.

    Raises
    ------
    UnsupportedModelError
        The layer can't be expressed; the message has every reason.
    ValueError
        ``tp`` or ``ep`` don't divide the model, or the file is no configuration.
    """
    fields = _fields(config)
    name = str(fields.get("_name_or_path") or _model_type(fields) or "the model")
    for nested in ("text_config", "language_config", "llm_config"):
        if isinstance(fields.get(nested), Mapping) and not _first(fields, "num_experts_per_tok moe_topk"):
            quantization = fields.get("quantization_config")
            fields = {"quantization_config": quantization} | dict(fields[nested])
    model_type = _model_type(fields)
    family = _FAMILIES.get(model_type, _Family())
    reasons = list(family.reasons)

    def number(names: str, what: str) -> int:
        value = _first(fields, names)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            reasons.append(f"expected the {what} as {' or '.join(names.split())}, got {value!r}")
            return 0
        return value

    experts = number(family.experts, "number of experts")
    top_k = number("num_experts_per_tok moe_topk num_experts_per_token", "experts of a token")
    width = number(family.width, "width of an expert")
    hidden = number("hidden_size", "hidden size")

    scoring = fields.get("scoring_func") or family.scoring
    if scoring not in ("sigmoid", "softmax"):
        reasons.append(f"expected sigmoid or softmax scores, got {scoring!r}")
    renormalize = fields.get("norm_topk_prob")
    renormalize = family.renormalize if renormalize is None else bool(renormalize)
    n_group, topk_group = (int(fields.get(key) or 1) for key in ("n_group", "topk_group"))
    method = fields.get("topk_method")
    if method in ("greedy", None) and scoring == "softmax":
        n_group = topk_group = 1
    if scoring == "softmax" and n_group > 1:
        reasons.append(f"expected softmax scores without groups, got {n_group} groups ranked by {method!r}")
    if scoring == "sigmoid" and not renormalize and n_group > 1:
        reasons.append("expected sigmoid scores in groups normalised over the chosen experts, got norm_topk_prob false")
    if family.weight_on_input and top_k > 1:
        reasons.append(f"expected one expert of a token, with routing weights on the input, got {top_k}")
    activation = fields.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        reasons.append(f"expected SwiGLU (hidden_act silu), got {activation!r}")
    for key in ("swiglu_limit", "swiglu_alpha"):
        if fields.get(key) is not None:
            reasons.append(f"expected SwiGLU as it is, got {key} {fields[key]}")
    if fields.get("zero_expert_num"):
        reasons.append(f"expected experts that compute, got {fields['zero_expert_num']} that pass their input on")
    shared = int(_first(fields, "n_shared_experts num_shared_experts") or family.shared_experts)
    if fuse_shared_experts:
        shared_width = _first(fields, "shared_expert_intermediate_size moe_shared_expert_intermediate_size")
        if not shared:
            reasons.append("expected n_shared_experts to fuse, got none")
        elif family.weight_on_input:
            reasons.append("expected weights on the experts' results, to fuse shared experts, got them on the input")
        elif shared_width not in (None, shared * width):
            reasons.append(
                f"expected shared experts as wide as the routed ones, to fuse them, got {shared_width} columns"
            )
        if ep != 1:
            reasons.append(f"expected all routed experts on a rank that shared ones are fused on, got ep={ep}")
    if check_quantization:
        reasons += _quantization_reasons(fields.get("quantization_config"))
    for key, value in (("tp", tp), ("ep", ep)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: expected a positive integer, got {value!r}")
    if hidden % BLOCK:
        reasons.append(f"expected a hidden size that is a multiple of {BLOCK}, got {hidden}")
    if reasons:
        raise UnsupportedModelError(name, reasons)
    if experts % ep:
        raise ValueError(f"ep: expected a divisor of the {experts} experts of {name}, got {ep}")
    if width % tp:
        raise ValueError(f"tp: expected a divisor of the {width} columns of an expert of {name}, got {tp}")
    routing = ("softmax" if scoring == "softmax" else "deepseek_v3") if renormalize else f"{scoring}_no_renorm"
    problem = dict(
        num_experts=experts,
        num_local_experts=experts // ep,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        hidden_size=hidden,
        intermediate_size=padded_width(width, tp),
        routing_method=routing,
        gate_first=gate_first,
        num_shared_experts=shared if fuse_shared_experts else 0,
        weight_on_input=family.weight_on_input,
    )
    factor = fields.get("routed_scaling_factor")
    bias = bool(fields.get("use_routing_bias", family.bias or method == "noaux_tc"))
    return ModelLayer(problem, 1.0 if factor is None else float(factor), bias, shared, width // tp)


def padded_width(width: int, tp: int) -> int:
    """Width of the widest rank's shard in whole blocks: a shard is cut where the scales' blocks of 128 begin.

    ``ceil`` of the shard's width where shards begin with a block; 1536 among 8 ranks gives shards of 192, of which
    every other one begins in the middle of a block: 256 for all.
    """
    shard = width // tp
    blocks = (-(-(rank + 1) * shard // BLOCK) - rank * shard // BLOCK for rank in range(tp))
    return BLOCK * max(blocks)


def _fields(config: Any) -> dict[str, Any]:
    if isinstance(config, (str, Path)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            found = parse_json(decode(read_whole(path)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: expected a model's config.json, got {type(error).__name__}: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
        return found
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    raise TypeError(f"config: expected a path, a mapping or a PretrainedConfig, got {type(config).__name__}")


def _model_type(fields: Mapping[str, Any]) -> str:
    return str(fields.get("model_type") or "")


def _first(fields: Mapping[str, Any], names: str) -> Any:
    return next((fields[name] for name in names.split() if fields.get(name) is not None), None)


def _quantization_reasons(found: Any) -> list[str]:
    wanted = "expected FP8 weights in 128x128 blocks with dynamic activation scales"
    if not isinstance(found, Mapping):
        return [f"{wanted}, got no quantization_config"]
    method, blocks = found.get("quant_method"), found.get("weight_block_size")
    if method != "fp8" or list(blocks or ()) != [BLOCK, BLOCK]:
        return [f"{wanted}, got quant_method {method!r} with weight_block_size {blocks}"]
    if found.get("activation_scheme", "dynamic") != "dynamic":
        return [f"{wanted}, got activation_scheme {found['activation_scheme']!r}"]
    return []
