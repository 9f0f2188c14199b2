"""What is computed: the frozen problem, apart from its tensors.

The field names are those of the flashinfer-bench definition
``moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048``.
"""

from __future__ import annotations

import functools
import numbers
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from .hf_config import read_hf_config

RoutingMethod = Literal["deepseek_v3", "softmax", "softmax_no_renorm", "sigmoid_no_renorm"]
ROUTING_METHODS: tuple[str, ...] = get_args(RoutingMethod)
# What flashinfer's definition names call them.
_ROUTING_NAMES: dict[RoutingMethod, str] = {
    "deepseek_v3": "ds",
    "softmax": "renormalize_naive",
    "softmax_no_renorm": "default",
    "sigmoid_no_renorm": "sigmoid",
}
_ROUTING_BY_NAME: dict[str, RoutingMethod] = {name: method for method, name in _ROUTING_NAMES.items()}


@dataclass(frozen=True, slots=True)
class MoEProblem:
    """Everything that distinguishes one MoE layer from another, without its tensors.

    Parameters
    ----------
    num_experts
        Experts of the whole model, over which the router chooses.
    num_local_experts
        Experts whose weights this rank holds, a contiguous range of the above.
    top_k
        Experts chosen for each token.
    n_group, topk_group
        Experts form ``n_group`` equal groups, of which ``topk_group`` stay eligible for a token.
    hidden_size, intermediate_size
        Widths of the layer's input and of the expert's inner activation, multiples of ``block``.
    block
        Edge of a weight scale's block, and length of an activation scale's block.
    routing_method
        ``"deepseek_v3"``: sigmoid scores, bias added for the choice only, groups ranked by the sum
        of their two best, weights normalised over the chosen experts. ``"softmax"``: the scores are the softmax over
        all experts, and there are no groups (``n_group = topk_group = 1``); else the same. Qwen3 has no bias.
        ``"softmax_no_renorm"``: the same with the weights as the softmax gives them (OLMoE, DeepSeek-V2-Lite).
        ``"sigmoid_no_renorm"``: sigmoid scores without groups, which are the weights (Llama 4).
    gate_first
        Order of the halves of ``gemm1_weights``: ``False`` (the definition) stores ``up`` in rows
        ``[0, I)`` and ``gate`` in rows ``[I, 2I)``; ``True`` (SGLang, vLLM) the other way round.
    num_shared_experts
        Experts that every token has besides its ``top_k``, with weight one: neither the normalisation nor the scaling
        factor is theirs. The weights' tensors have them behind the routed ones. Only where all routed experts are
        local.
    weight_on_input
        Multiply a token's activations by its expert's weight, not the expert's result; ``top_k = 1`` alone (Llama 4).

    Raises
    ------
    ValueError
        If the fields contradict one another; the message names the field.
    """

    num_experts: int = 256
    num_local_experts: int = 32
    top_k: int = 8
    n_group: int = 8
    topk_group: int = 4
    hidden_size: int = 7168
    intermediate_size: int = 2048
    block: int = 128
    routing_method: RoutingMethod = "deepseek_v3"
    gate_first: bool = False
    num_shared_experts: int = 0
    weight_on_input: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_experts",
            "num_local_experts",
            "top_k",
            "n_group",
            "topk_group",
            "hidden_size",
            "intermediate_size",
            "block",
            "num_shared_experts",
        ):
            value, least = getattr(self, name), int(name != "num_shared_experts")
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                wanted = "a positive integer" if least else "an integer of at least 0"
                raise ValueError(f"{name}: expected {wanted}, got {value!r}")
            object.__setattr__(self, name, int(value))  # numpy's integers are no JSON
        if self.block != 128:
            raise ValueError(f"block is {self.block}; only 128 is supported: give weights quantised in 128x128 blocks")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % self.block:
                raise ValueError(f"{name}: expected a multiple of block={self.block}, got {getattr(self, name)}")
        if self.routing_method not in ROUTING_METHODS:
            known = ", ".join(ROUTING_METHODS)
            raise ValueError(f"routing_method: expected one of {known}, got {self.routing_method!r}")
        for name in ("gate_first", "weight_on_input"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.weight_on_input and (self.top_k > 1 or self.num_shared_experts):
            raise ValueError(
                f"weight_on_input: expected False with top_k={self.top_k} and num_shared_experts="
                f"{self.num_shared_experts}, got True: a token with several experts has an input for each"
            )
        if self.num_local_experts > self.num_experts:
            raise ValueError(
                f"num_local_experts: expected at most num_experts={self.num_experts}, got {self.num_local_experts}"
            )
        if self.num_shared_experts and self.num_local_experts < self.num_experts:
            raise ValueError(
                f"num_shared_experts: expected 0 with {self.num_local_experts} of {self.num_experts} experts local, "
                f"got {self.num_shared_experts}: every rank would add them to the sum. Run them beside the routed "
                "experts, each rank for its own tokens"
            )
        if self.num_experts % self.n_group:
            raise ValueError(f"n_group: expected a divisor of num_experts={self.num_experts}, got {self.n_group}")
        if self.routing_method != "deepseek_v3" and self.n_group != 1:
            raise ValueError(
                f"n_group: expected 1 with routing_method={self.routing_method!r}, and topk_group=1, got "
                f"{self.n_group}: models with groups rank them in other ways"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group: expected at most n_group={self.n_group}, got {self.topk_group}")
        if self.n_group > 1 and self.group_size < 2:
            raise ValueError(f"n_group: expected groups of at least two experts, to rank them, got {self.n_group}")
        if self.top_k > self.topk_group * self.group_size:
            raise ValueError(
                f"top_k: expected at most the {self.topk_group * self.group_size} experts of "
                f"topk_group={self.topk_group} groups, got {self.top_k}"
            )

    @property
    def group_size(self) -> int:
        """Experts in each group."""
        return self.num_experts // self.n_group

    @property
    def softmax(self) -> bool:
        """Whether the scores are a softmax over all experts."""
        return self.routing_method in ("softmax", "softmax_no_renorm")

    @property
    def renormalize(self) -> bool:
        """Whether the weights of the chosen experts are divided by their sum."""
        return self.routing_method in ("deepseek_v3", "softmax")

    @property
    def all_routed(self) -> MoEProblem:
        """The same layer as what follows the choice sees it: shared experts are routed ones, which all tokens chose.

        Of a layer without any it is the layer itself.
        """
        return _all_routed(self) if self.num_shared_experts else self

    @property
    def max_local_rows_per_token(self) -> int:
        """Most (token, local expert) pairs that one token can have."""
        return min(self.top_k, self.num_local_experts)

    @classmethod
    def from_hf_config(
        cls, config: Any, *, tp: int = 1, ep: int = 1, gate_first: bool = False, fuse_shared_experts: bool = False
    ) -> MoEProblem:
        """The routed experts that a model's ``config.json`` describes, on one rank.

        Parameters, errors and more of what the configuration says: `hybrid_moe.hf_config.read_hf_config`.
        """
        layer = read_hf_config(config, tp=tp, ep=ep, gate_first=gate_first, fuse_shared_experts=fuse_shared_experts)
        return cls(**layer.fields)

    @property
    def definition(self) -> str:
        """The flashinfer-bench definition name; for people and file names, not a key."""
        groups = f"_ng{self.n_group}_kg{self.topk_group}" if self.routing_method == "deepseek_v3" else ""
        shared = f"_s{self.num_shared_experts}" if self.num_shared_experts else ""
        on_input = "_wi" if self.weight_on_input else ""
        return (
            f"moe_fp8_block_scale_{_ROUTING_NAMES[self.routing_method]}_routing_topk{self.top_k}{groups}"
            f"{on_input}_e{self.num_local_experts}{shared}_h{self.hidden_size}_i{self.intermediate_size}"
        )


@functools.lru_cache(maxsize=256)
def _all_routed(problem: MoEProblem) -> MoEProblem:
    experts = problem.num_experts + problem.num_shared_experts
    return replace(
        problem,
        num_experts=experts,
        num_local_experts=experts,
        top_k=problem.top_k + problem.num_shared_experts,
        n_group=1,
        topk_group=1,
        num_shared_experts=0,
    )


def sizes_of_definition(name: str) -> dict[str, Any]:
    """What a definition name says of a problem, by the names of the fields of `MoEProblem`.

    Raises
    ------
    ValueError
        If it isn't such a name.
    """
    number = "([0-9]{1,9})"
    match = re.fullmatch(
        f"moe_fp8_block_scale_(?:ds_routing_topk{number}_ng{number}_kg{number}|"
        f"(renormalize_naive|default|sigmoid)_routing_topk{number})(_wi)?_e{number}(?:_s{number})?_h{number}_i{number}",
        name,
    )
    if match is None:
        raise ValueError(
            f"definition is {name!r:.200}; a name as moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048 is "
            "wanted, or as moe_fp8_block_scale_renormalize_naive_routing_topk8_e16_h4096_i1536"
        )
    routing = _ROUTING_BY_NAME[match[4] or "ds"]
    grouped, n_group, topk_group, ungrouped, local, shared, hidden, inter = (
        int(match[group] or 0) for group in (1, 2, 3, 5, 7, 8, 9, 10)
    )
    return {
        "num_local_experts": local,
        "top_k": grouped or ungrouped,
        "n_group": n_group if grouped else 1,
        "topk_group": topk_group if grouped else 1,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "routing_method": routing,
        "num_shared_experts": shared,
        "weight_on_input": match[6] is not None,
    }


@functools.lru_cache(maxsize=256)  # asked for every record of a file
def problem_of_definition(name: str, *, num_experts: int = 256, gate_first: bool = False) -> MoEProblem:
    """The problem that a definition name stands for; the name leaves out what the keyword arguments give.

    Raises
    ------
    ValueError
        If it isn't such a name, or its fields contradict one another.
    """
    return MoEProblem(num_experts=num_experts, gate_first=gate_first, **sizes_of_definition(name))
