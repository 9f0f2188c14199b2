"""The ten inputs of a call, and every check of them.

The tensor layouts are those of the flashinfer-bench definition
``moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048``.
"""

from __future__ import annotations

import numbers
import operator
import warnings
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch

from .problem import MoEProblem, RoutingMethod

FP8 = torch.float8_e4m3fn
_FLOAT32, _BFLOAT16 = torch.float32, torch.bfloat16  # looked up in every call
_LARGEST = torch.finfo(torch.float32).max


class MoEInputs(NamedTuple):
    """The ten inputs of the definition, in its order.

    Attributes
    ----------
    routing_logits
        ``[T, num_experts]`` float32.
    routing_bias
        ``[num_experts]`` bfloat16 or float32, all zeros for none.
    hidden_states
        ``[T, H]`` float8_e4m3fn.
    hidden_states_scale
        ``[H/128, T]`` float32, any strides.
    gemm1_weights, gemm1_weights_scale
        ``[E, 2I, H]`` float8_e4m3fn and ``[E, 2I/128, H/128]`` float32. E: local experts, then shared ones.
    gemm2_weights, gemm2_weights_scale
        ``[E, H, I]`` float8_e4m3fn and ``[E, H/128, I/128]`` float32.
    local_expert_offset
        Global index of the first local expert.
    routed_scaling_factor
        Factor on the normalised routing weights.
    """

    routing_logits: torch.Tensor
    routing_bias: torch.Tensor
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor
    gemm1_weights: torch.Tensor
    gemm1_weights_scale: torch.Tensor
    gemm2_weights: torch.Tensor
    gemm2_weights_scale: torch.Tensor
    local_expert_offset: int
    routed_scaling_factor: float

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return self.hidden_states.shape[0]


class RoutedInputs(NamedTuple):
    """The ten inputs of a call whose experts are chosen already: `MoEInputs` but for the first two.

    Attributes
    ----------
    topk_ids
        ``[T, top_k]`` int32, global numbers of the chosen experts, in the order in which a token's parts are added up.
        -1, or any number that is no expert's, is none. An expert that a token names twice gets the sum of the weights.
    topk_weights
        ``[T, top_k]`` float32, applied as they are; that of no expert is never used.
    routed_scaling_factor
        Not applied: ``topk_weights`` are final.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor
    gemm1_weights: torch.Tensor
    gemm1_weights_scale: torch.Tensor
    gemm2_weights: torch.Tensor
    gemm2_weights_scale: torch.Tensor
    local_expert_offset: int
    routed_scaling_factor: float

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return self.hidden_states.shape[0]


# Alike from the third field on, with numbers in the last two and tensors before.
Inputs: TypeAlias = MoEInputs | RoutedInputs


_RANKS = {
    "routing_logits": 2,
    "routing_bias": 1,
    "topk_ids": 2,
    "topk_weights": 2,
    "hidden_states": 2,
    "hidden_states_scale": 2,
    "gemm1_weights": 3,
    "gemm1_weights_scale": 3,
    "gemm2_weights": 3,
    "gemm2_weights_scale": 3,
}


def check_ranks(arguments: Mapping[str, object]) -> None:
    """Check that those of the definition's tensors that are given are tensors with the right number of dimensions."""
    for name, ndim in _RANKS.items():
        if name not in arguments:
            continue
        tensor = arguments[name]
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got a {type(tensor).__name__}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: expected {ndim} dimensions, got shape {list(tensor.shape)}")


def check_unquantized(hidden_states: torch.Tensor) -> None:
    """Check hidden states that are given without scales: bfloat16, ``[T, H]``, in whole 128 blocks."""
    check_ranks({"hidden_states": hidden_states})
    if hidden_states.dtype != torch.bfloat16:
        wanted = "hidden_states_scale with it" if hidden_states.dtype == FP8 else "torch.bfloat16"
        raise TypeError(
            f"hidden_states: expected {wanted}, got {hidden_states.dtype} without hidden_states_scale: "
            "hidden states without scales are bfloat16, and quantised here"
        )
    if hidden_states.shape[1] % 128:
        raise ValueError(
            f"hidden_states: expected a last size that is a multiple of 128, got shape {list(hidden_states.shape)}"
        )
    if hidden_states.shape[0] and hidden_states.stride(1) != 1:
        raise ValueError(f"hidden_states: expected contiguous rows, got strides {list(hidden_states.stride())}")


def _check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = False,
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got a {type(tensor).__name__}")
    if tensor.dtype != dtype and not (isinstance(dtype, tuple) and tensor.dtype in dtype):
        wanted = " or ".join(map(str, dtype)) if isinstance(dtype, tuple) else dtype
        raise TypeError(f"{name}: expected dtype {wanted}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device}, where gemm1_weights is, got {tensor.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}: call .contiguous()"
        )


class Stated(NamedTuple):
    """What a caller says of the problem where it isn't given whole; the tensors' shapes say the rest.

    ``None`` is not said: DeepSeek-V3's value is taken.
    """

    top_k: int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    gate_first: bool | None = None
    routing_method: RoutingMethod | None = None
    num_experts: int | None = None


def stated(problem: MoEProblem | None, options: Stated) -> MoEProblem | Stated:
    """The problem if it is given, else the options; TypeError if both are."""
    if problem is None:
        return options
    if not isinstance(problem, MoEProblem):
        raise TypeError(f"problem: expected a MoEProblem, got {problem!r}")
    for name, value in zip(options._fields, options, strict=True):
        if value is not None:
            raise TypeError(f"{name}: expected None with problem, which says it, got {value!r}")
    return problem


def problem_of(inputs: Inputs, given: MoEProblem | Stated) -> MoEProblem:
    """The problem of a call, given whole or derived from the tensors' shapes, with all ten inputs checked against it.

    Warns where the number of experts isn't DeepSeek-V3's and nothing is said of the routing.

    Raises
    ------
    ValueError
        A shape, device, contiguity or range is wrong.
    TypeError
        An argument is no tensor, or has the wrong dtype; or there are neither logits nor ``num_experts``.
    """
    # The four whose shapes say what the problem is; the others are then checked against it.
    sources = (inputs._fields[0], "hidden_states", "gemm1_weights", "gemm2_weights")
    check_ranks({name: getattr(inputs, name) for name in sources})
    problem = given if isinstance(given, MoEProblem) else _derived(inputs, given)
    check_weights(inputs, problem)
    check_activations(inputs, problem)
    return problem


def _derived(inputs: Inputs, given: Stated) -> MoEProblem:
    top_k, n_group, topk_group, gate_first, routing_method, num_experts = given
    routing_method = "deepseek_v3" if routing_method is None else routing_method
    routed = isinstance(inputs, RoutedInputs)
    if isinstance(inputs, RoutedInputs):
        if num_experts is None:
            raise TypeError("num_experts: expected the number of the model's experts with topk_ids, got None")
        top_k = inputs.topk_ids.shape[1] if top_k is None else top_k
    else:
        width = inputs.routing_logits.shape[1]
        if num_experts not in (None, width):
            raise ValueError(f"num_experts: expected {width}, the width of routing_logits, got {num_experts}")
        num_experts = width
        if width != MoEProblem.__dataclass_fields__["num_experts"].default and given[:3] == (None, None, None):
            warnings.warn(
                f"routing_logits has {width} experts, and neither problem nor top_k, n_group and topk_group are given: "
                "DeepSeek-V3's 8, 8 and 4 are taken. Say problem=MoEProblem(...), or these three",
                stacklevel=4,
            )
    if n_group is None and topk_group is None:
        # Experts that are chosen already have no groups to be chosen from.
        ungrouped = routing_method != "deepseek_v3" or (routed and num_experts % 8)
        n_group, topk_group = (1, 1) if ungrouped else (8, 4)
    for name, size in (("hidden_states", inputs.hidden_states), ("gemm2_weights", inputs.gemm2_weights)):
        if size.shape[-1] % 128:
            raise ValueError(f"{name}: expected a last size that is a multiple of 128, got shape {list(size.shape)}")
    experts, hidden_size = inputs.gemm1_weights.shape[0], inputs.hidden_states.shape[1]
    if inputs.gemm2_weights.shape[:2] != (experts, hidden_size):
        wanted = [experts, hidden_size, inputs.gemm2_weights.shape[2]]
        raise ValueError(f"gemm2_weights: expected shape {wanted}, got {list(inputs.gemm2_weights.shape)}")
    return MoEProblem(
        num_experts=num_experts,
        num_local_experts=experts,
        top_k=8 if top_k is None else top_k,
        n_group=8 if n_group is None else n_group,
        topk_group=4 if topk_group is None else topk_group,
        hidden_size=hidden_size,
        intermediate_size=inputs.gemm2_weights.shape[2],
        routing_method=routing_method,
        gate_first=False if gate_first is None else gate_first,
    )


def with_python_numbers(inputs: Inputs) -> Inputs:
    """The same with an int and a float, as kernels and operators take them; the numbers were checked before."""
    offset, factor = inputs[-2:]
    if type(offset) is int and type(factor) is float:
        return inputs
    return inputs._replace(local_expert_offset=operator.index(offset), routed_scaling_factor=float(factor))


def check_weights(inputs: Inputs, problem: MoEProblem) -> None:
    """Check the tensors that belong to the layer, its offset and its scaling factor."""
    device = inputs.gemm1_weights.device
    e, h, i, b = problem.all_routed.num_local_experts, problem.hidden_size, problem.intermediate_size, problem.block
    _check("gemm1_weights", inputs.gemm1_weights, (e, 2 * i, h), FP8, device, contiguous=True)
    _check("gemm1_weights_scale", inputs.gemm1_weights_scale, (e, 2 * i // b, h // b), torch.float32, device, True)
    _check("gemm2_weights", inputs.gemm2_weights, (e, h, i), FP8, device, contiguous=True)
    _check("gemm2_weights_scale", inputs.gemm2_weights_scale, (e, h // b, i // b), torch.float32, device, True)
    if isinstance(inputs, MoEInputs):
        either = (torch.bfloat16, torch.float32)
        _check("routing_bias", inputs.routing_bias, (problem.num_experts,), either, device, contiguous=True)
    local, offset = problem.num_local_experts, inputs.local_expert_offset
    last = problem.num_experts - local
    # A tensor has __index__ too, but reading it back would wait for the GPU at every call.
    if isinstance(offset, bool | torch.Tensor) or not hasattr(offset, "__index__"):
        raise TypeError(f"local_expert_offset: expected an int, as it decides the launch, got {offset!r}")
    offset = operator.index(offset)
    if not 0 <= offset <= last:
        raise ValueError(
            f"local_expert_offset: expected 0 to {last}, got {offset}: "
            f"{local} of {problem.num_experts} experts are local"
        )
    factor = inputs.routed_scaling_factor
    if isinstance(factor, bool | torch.Tensor) or not isinstance(factor, numbers.Real):
        raise TypeError(f"routed_scaling_factor: expected a float, got {factor!r}")
    if not abs(factor) <= _LARGEST:  # NaN isn't either
        raise ValueError(f"routed_scaling_factor: expected a number that is finite in float32, got {factor}")


def plain_num_tokens(
    problem: MoEProblem,
    hidden_states: torch.Tensor,
    routing_logits: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    output: torch.Tensor | None,
    device: torch.device,
) -> int | None:
    """T if what changes from call to call is plainly right; ``None`` if it needs the checks that say what is wrong.

    Every call pays for this: it takes a microsecond, and `check_activations` with `check_output` three.
    """
    if not type(hidden_states) is type(routing_logits) is type(hidden_states_scale) is torch.Tensor:
        return None
    shape = hidden_states.shape
    if len(shape) != 2:
        return None
    tokens, hidden = shape
    plain = (
        hidden == problem.hidden_size
        and hidden_states.dtype is FP8
        and routing_logits.dtype is _FLOAT32
        and hidden_states_scale.dtype is _FLOAT32
        and routing_logits.shape == (tokens, problem.num_experts)
        and hidden_states_scale.shape == (hidden // problem.block, tokens)
        and hidden_states.device == device
        and routing_logits.device == device
        and hidden_states_scale.device == device
        and hidden_states.stride()[1] == 1
        and routing_logits.stride()[1] == 1
        and (
            output is None
            or type(output) is torch.Tensor
            and output.dtype is _BFLOAT16
            and output.shape == shape
            and output.device == device
            and output.is_contiguous()
            and not output.requires_grad
            and not output.is_inference()
            and (memory := output.untyped_storage().data_ptr()) != hidden_states.untyped_storage().data_ptr()
            and memory != routing_logits.untyped_storage().data_ptr()
            and memory != hidden_states_scale.untyped_storage().data_ptr()
        )
    )
    return tokens if plain else None


def check_activations(inputs: Inputs, problem: MoEProblem) -> None:
    """Check the tensors that change from call to call; without scales, hidden states are bfloat16."""
    check_ranks({"hidden_states": inputs.hidden_states})
    device = inputs.gemm1_weights.device
    tokens, dtype = inputs.hidden_states.shape[0], inputs.hidden_states.dtype
    unquantized = inputs.hidden_states_scale is None and dtype == torch.bfloat16
    if dtype == torch.bfloat16 and not unquantized:
        raise TypeError(
            f"hidden_states: expected dtype {FP8} with hidden_states_scale, got torch.bfloat16: leave the scale out, "
            "and they are quantised here"
        )
    wanted = torch.bfloat16 if unquantized else FP8
    _check("hidden_states", inputs.hidden_states, (tokens, problem.hidden_size), wanted, device)
    rows = {"hidden_states": inputs.hidden_states}
    if isinstance(inputs, MoEInputs):
        _check("routing_logits", inputs.routing_logits, (tokens, problem.num_experts), torch.float32, device)
        rows["routing_logits"] = inputs.routing_logits
    else:
        if isinstance(inputs.topk_ids, torch.Tensor) and inputs.topk_ids.dtype == torch.int64:
            # Taking both would be two kernels to compile before serving, for what a caller converts or never has.
            raise TypeError("topk_ids: expected dtype torch.int32, got torch.int64: call .int()")
        _check("topk_ids", inputs.topk_ids, (tokens, problem.top_k), torch.int32, device)
        _check("topk_weights", inputs.topk_weights, (tokens, problem.top_k), torch.float32, device)
        rows |= {"topk_ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}
    if not unquantized:
        blocks = problem.hidden_size // problem.block
        _check("hidden_states_scale", inputs.hidden_states_scale, (blocks, tokens), torch.float32, device)
    for name, tensor in rows.items():
        if tokens and tensor.stride(1) != 1:
            raise ValueError(f"{name}: expected contiguous rows, got strides {list(tensor.stride())}")


def check_output(output: torch.Tensor, inputs: Inputs, problem: MoEProblem) -> None:
    """Check a tensor given for the result: bf16, ``[T, hidden_size]``, contiguous, on the inputs' device, of its own.

    It may be the hidden states themselves where they are bfloat16: they are quantised before anything is written.
    """
    shape = (inputs.hidden_states.shape[0], problem.hidden_size)
    _check("output", output, shape, torch.bfloat16, inputs.hidden_states.device, contiguous=True)
    if output.requires_grad:
        raise ValueError("output: expected a tensor that doesn't require grad, got one that does: give output.detach()")
    if output.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            "output: expected a tensor made outside of torch.inference_mode(), or the call inside, got an "
            "inference tensor"
        )
    start, end = _extent(output)
    for name, tensor in zip(inputs._fields, inputs[:-2], strict=False):
        if tensor is None or (name == "hidden_states" and inputs.hidden_states_scale is None):
            continue
        first, last = _extent(tensor)
        if first < end and start < last:
            raise ValueError(f"output: expected memory of its own, as it is written, got that of {name}")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its first byte is, and the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():  # by far the most, and every call of `fused_moe` asks for nine
        return start, start + tensor.nbytes
    if not tensor.numel():
        return start, start
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.element_size()
