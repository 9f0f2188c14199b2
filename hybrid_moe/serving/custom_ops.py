"""The layer as operators of torch, for `torch.compile` and `torch.export`: a graph takes a call in without a break.

``hybrid_moe::layer`` and ``hybrid_moe::fused_moe`` return a new tensor, ``hybrid_moe::layer_out`` and
``hybrid_moe::fused_moe_out`` write into one that is given; those that begin with ``routed_`` take experts that are
chosen already. They take every tensor as an argument, weights too, so that functionalisation, freezing and lifting see
them. What is no tensor and no number is found by ``handle``, which stands for a `Routine` for as long as that lives.
Calls outside of compiled code don't go through here: an operator's own dispatch costs more than the choice.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..inputs import Inputs, MoEInputs, RoutedInputs


class Routine(Protocol):
    """What a handle stands for: a layer, or the backend, policy and problem of a `fused_moe`."""

    def run(self, inputs: Inputs, output: torch.Tensor | None, *options: Any) -> torch.Tensor:
        """Check the inputs and run; makes the output if there is none."""


_handles = itertools.count(1)
_routines: weakref.WeakValueDictionary[int, Routine] = weakref.WeakValueDictionary()


def register(routine: Routine) -> int:
    """A handle for ``routine``, never used before in this process. It doesn't keep it alive."""
    handle = next(_handles)
    _routines[handle] = routine
    return handle


def _routine(handle: int) -> Routine:
    routine = _routines.get(handle)
    if routine is None:
        raise RuntimeError(
            f"handle: expected that of a living layer, got {handle}: keep the HybridMoE for as long as code that was "
            "compiled with it runs, and in the process that made it"
        )
    return routine


# In the order of MoEInputs' and RoutedInputs' fields, which begin with two tensors each. SymInts, so that layers and
# routings share a compiled graph.
_INPUTS = (
    "Tensor {}, Tensor? {}, Tensor hidden_states, Tensor? hidden_states_scale, "
    "Tensor gemm1_weights, Tensor gemm1_weights_scale, Tensor gemm2_weights, Tensor gemm2_weights_scale, "
    "SymInt local_expert_offset, float routed_scaling_factor"
)
_LAYER = "SymInt handle"
# What `inputs.Stated` has: all none where the handle knows the problem.
_FUSED_MOE = (
    "SymInt handle, SymInt? top_k, SymInt? n_group, SymInt? topk_group, bool? gate_first, str? routing_method, "
    "SymInt? num_experts"
)


def _operators(
    name: str, kind: type[MoEInputs] | type[RoutedInputs], options: str
) -> tuple[Callable[..., torch.Tensor], Callable[..., None]]:
    """The operators ``name`` and ``name_out``: the ten inputs, ``options`` with the handle first, and the output."""
    number = len(kind._fields)
    taken = f"{_INPUTS.format(*kind._fields)}, {options}"

    @torch.library.custom_op(f"hybrid_moe::{name}", mutates_args=(), schema=f"({taken}) -> Tensor")
    def functional(*arguments: Any) -> torch.Tensor:
        handle, *rest = arguments[number:]
        return _routine(handle).run(kind(*arguments[:number]), None, *rest)

    @functional.register_fake
    def _(*arguments: Any) -> torch.Tensor:
        # Wrong inputs are named when the call runs, in the words of a call that isn't compiled.
        hidden_states = kind(*arguments[:number]).hidden_states
        return torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)

    @torch.library.custom_op(
        f"hybrid_moe::{name}_out",
        mutates_args=("output",),
        schema=f"({taken}, Tensor(a!) output) -> ()",
    )
    def out(*arguments: Any) -> None:
        handle, *rest, output = arguments[number:]
        _routine(handle).run(kind(*arguments[:number]), output, *rest)

    @out.register_fake
    def _(*arguments: Any) -> None:
        return None

    return functional, out


layer, layer_out = _operators("layer", MoEInputs, _LAYER)
fused_moe, fused_moe_out = _operators("fused_moe", MoEInputs, _FUSED_MOE)
routed_layer, routed_layer_out = _operators("routed_layer", RoutedInputs, _LAYER)
routed_fused_moe, routed_fused_moe_out = _operators("routed_fused_moe", RoutedInputs, _FUSED_MOE)


def call_layer(inputs: Inputs, output: torch.Tensor | None, handle: int) -> torch.Tensor:
    """What a layer's call is in code under compilation."""
    routed = isinstance(inputs, RoutedInputs)
    if output is None:
        return (routed_layer if routed else layer)(*inputs, handle)
    (routed_layer_out if routed else layer_out)(*inputs, handle, output)
    return output


def call_fused_moe(inputs: Inputs, output: torch.Tensor | None, handle: int, *options: Any) -> torch.Tensor:
    """What `hybrid_moe.fused_moe` is in code under compilation; ``options`` are those of the operator."""
    routed = isinstance(inputs, RoutedInputs)
    if output is None:
        return (routed_fused_moe if routed else fused_moe)(*inputs, handle, *options)
    (routed_fused_moe_out if routed else fused_moe_out)(*inputs, handle, *options, output)
    return output
