"""What the steps of the fused pipeline hand to one another, and the launches that every grouped GEMM shares."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..problem import DeviceKey, Inputs, MoEProblem, RoutedInputs
from .combine import combine_kernel
from .launch import Constants, Kernel
from .routing import clear_kernel, route_kernel, scatter_kernel

# A column chunk of the second GEMM's result stays under this many bytes where one 128 block of columns does: without
# chunks the worst case of T = 14107 would reserve 1.6 GB, though seldom touch it.
MAX_ROWS_BYTES = 256 * 2**20
# Programs of the combine that a multiprocessor runs at once; more of them share a token's columns only up to this.
COMBINE_PROGRAMS = 16
# From so many tokens on, other programs hide a load's latency, and skipping the choices of other ranks saves work.
COMBINE_BRANCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Launch:
    """What decides how kernels are launched on this device.

    Parameters
    ----------
    multiprocessors
        Of the device; bounds the grids.
    pdl
        Programmatic dependent launch (compute capability 9.0 on).
    """

    multiprocessors: int
    pdl: bool

    @property
    def options(self) -> dict[str, bool]:
        """Launch options of every kernel; fused multiply-add is said outright, as Triton's default is changing."""
        return {"launch_pdl": self.pdl, "enable_fp_fusion": True}


@functools.cache
def launch_on(device: torch.device) -> Launch:
    """Of the device that a call's tensors are on; of no GPU in the interpreter."""
    if device.type != "cuda":
        return Launch(multiprocessors=4, pdl=False)
    return Launch(torch.cuda.get_device_properties(device).multi_processor_count, pdl=True)


@dataclass(slots=True)
class Routed:
    """Result of `route`: for each local expert its tokens, for each token its pairs. See `kernels.routing`."""

    counts: torch.Tensor  # [E] int32
    slot_token: torch.Tensor  # [E, T] int32
    pair: torch.Tensor  # [T, top_k] int32
    pair_weight: torch.Tensor  # [T, top_k] float32
    tickets: torch.Tensor  # [GroupedGemm.num_tickets] int32 zeros, for the grouped GEMM to count with
    aligned: bool  # whether all inputs of the call start at multiples of 16 bytes


class GroupedGemm(ABC):
    """A provider of the experts' two GEMMs: gathered rows in, one row for each (token, local expert) pair out."""

    name: ClassVar[str]

    @abstractmethod
    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """Every reason why it can't run; an empty list means that it can."""

    @abstractmethod
    def run(self, inputs: Inputs, routed: Routed, problem: MoEProblem, launch: Launch, output: torch.Tensor) -> None:
        """From routed tokens to the layer's output: GEMM1, SwiGLU, quantisation, GEMM2, `combine`."""

    def num_tickets(self, problem: MoEProblem, num_tokens: int) -> int:
        """How many zeros `run` wants in ``routed.tickets``; `route` clears them."""
        return 0

    @abstractmethod
    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        """Device memory in bytes that `run` takes."""


def pow2(value: int) -> int:
    """The least power of two that is not below ``value``: Triton's vectors have such lengths."""
    return 1 << (value - 1).bit_length()


def row_capacity(problem: MoEProblem, num_tokens: int) -> int:
    """Most rows that any routing can give: rows are decided on the device and never read back."""
    return num_tokens * problem.max_local_rows_per_token


def column_chunk(problem: MoEProblem, rows: int) -> int:
    """Columns of the result computed at a time: a divisor of the hidden size, in 128 blocks.

    Cutting by columns re-reads no weights; each chunk costs two more launches and re-reads the activation, which is
    small.
    """
    blocks = problem.hidden_size // problem.block
    for chunks in range(1, blocks + 1):
        if blocks % chunks == 0 and rows * (problem.hidden_size // chunks) * 2 <= MAX_ROWS_BYTES:
            return problem.hidden_size // chunks
    return problem.block


CLEAR, ROUTE, COMBINE = Kernel(clear_kernel), Kernel(route_kernel), Kernel(combine_kernel)
SCATTER = Kernel(scatter_kernel)


def are_aligned(inputs: Inputs) -> bool:
    """Whether all tensors start at multiples of 16 bytes, as fresh ones do and slices may not."""
    addresses = 0
    for tensor in inputs[:8]:
        addresses |= tensor.data_ptr()
    return addresses % 16 == 0


def route(inputs: Inputs, problem: MoEProblem, launch: Launch, num_tickets: int = 0) -> Routed:
    """Launch the routing, and before it the clearing of its counts and of ``num_tickets`` for the grouped GEMM.

    Where the experts are chosen already, it only sorts.
    """
    tokens, device, e = inputs.num_tokens, inputs.hidden_states.device, problem.num_local_experts
    aligned = are_aligned(inputs)
    counts_length = (e + 3) // 4 * 4  # the tickets behind them stay aligned to 16 bytes
    counters = torch.empty(counts_length + num_tickets, dtype=torch.int32, device=device)
    counts, tickets = counters[:e], counters[counts_length:]
    slot_token = torch.empty((e, tokens), dtype=torch.int32, device=device)
    pair = torch.empty((tokens, problem.top_k), dtype=torch.int32, device=device)
    pair_weight = torch.empty((tokens, problem.top_k), dtype=torch.float32, device=device)
    CLEAR.launch((1,), (counters, counters.numel()), _clear_constants(launch), device, True)
    if isinstance(inputs, RoutedInputs):
        ids, weights = inputs.topk_ids, inputs.topk_weights
        sizes = (tokens, int(inputs.local_expert_offset), ids.stride(0), weights.stride(0))
        given = (ids, weights, counts, slot_token, pair, pair_weight, *sizes)
        SCATTER.launch((tokens,), given, _scatter_constants(problem, launch), device, aligned)
        return Routed(counts, slot_token, pair, pair_weight, tickets, aligned)
    constants = _route_constants(problem, launch, inputs.routing_logits.stride(0), inputs.routing_bias.dtype)
    arguments = (
        inputs.routing_logits,
        inputs.routing_bias,
        counts,
        slot_token,
        pair,
        pair_weight,
        tokens,
        int(inputs.local_expert_offset),
        float(inputs.routed_scaling_factor),
    )
    ROUTE.launch((tokens,), arguments, constants, device, aligned)
    return Routed(counts, slot_token, pair, pair_weight, tickets, aligned)


@functools.lru_cache(maxsize=256)
def _clear_constants(launch: Launch) -> Constants:
    return Constants({"BLOCK": 1024, "PDL": launch.pdl}, {**launch.options, "num_warps": 4})


@functools.lru_cache(maxsize=256)
def _scatter_constants(problem: MoEProblem, launch: Launch) -> Constants:
    arguments = {
        "NUM_EXPERTS": problem.num_experts,
        "E": problem.num_local_experts,
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 1})


@functools.lru_cache(maxsize=256)
def _route_constants(problem: MoEProblem, launch: Launch, stride_logits: int, bias_dtype: torch.dtype) -> Constants:
    # One for each dtype of the bias, as a binary is kept for each and reads what it was compiled for.
    arguments = {
        "STRIDE_LOGITS": stride_logits,
        "E": problem.num_local_experts,
        **selection_constants(problem),
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 1})


def selection_constants(problem: MoEProblem) -> dict[str, int | bool]:
    """How experts are selected: the last compile-time arguments of `routing.select_experts`, in its order."""
    return {
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "N_GROUP": problem.n_group,
        "N_GROUP_POW2": pow2(problem.n_group),
        "TOPK_GROUP": problem.topk_group,
        "GROUP_SIZE": problem.group_size,
        "GROUP_SIZE_POW2": pow2(problem.group_size),
        "SOFTMAX": problem.routing_method == "softmax",
    }


def combine(
    rows: torch.Tensor,
    routed: Routed,
    problem: MoEProblem,
    launch: Launch,
    output: torch.Tensor,
    first_column: int,
    align: int = 1,
) -> None:
    """Launch the weighted sum for the columns that ``rows`` holds, ``[capacity, columns]`` bfloat16.

    Each expert's rows start at a multiple of ``align``.
    """
    tokens, columns = output.shape[0], rows.shape[1]
    # The largest power of two that divides the columns, up to what spreads few tokens over the device.
    block_n = min(512 if tokens < launch.multiprocessors else 1024, columns & -columns)
    blocks = columns // block_n
    grid = (tokens, max(1, min(blocks, launch.multiprocessors * COMBINE_PROGRAMS // tokens)))
    constants = _combine_constants(problem, launch, columns, block_n, align, tokens >= COMBINE_BRANCH_TOKENS)
    arguments = (rows, routed.counts, routed.pair, routed.pair_weight, output, first_column // problem.block)
    COMBINE.launch(grid, arguments, constants, output.device, output.data_ptr() % 16 == 0)


@functools.lru_cache(maxsize=256)
def _combine_constants(
    problem: MoEProblem, launch: Launch, columns: int, block_n: int, align: int, branch: bool
) -> Constants:
    arguments = {
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "TOP_K": problem.top_k,
        "HIDDEN": problem.hidden_size,
        "COLUMNS": columns,
        "ALIGN": align,
        "BRANCH": branch,
        "BLOCK_N": block_n,
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 4})
