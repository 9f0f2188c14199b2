"""The steps around another library's two grouped GEMMs, and the memory that they share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ...problem import FP8, Inputs, MoEProblem
from ..gather import gather_kernel
from ..launch import Constants, Kernel
from ..pipeline import Launch, Routed, pow2
from ..swiglu import swiglu_quantize_kernel

# Programs of the SwiGLU that a multiprocessor runs at once.
SWIGLU_PROGRAMS = 8


@dataclass(slots=True)
class Rows:
    """One call's rows in expert order; those of an expert start at a multiple of ``align``.

    Attributes
    ----------
    gathered, gathered_scale
        ``[capacity, H]`` e4m3 and ``[capacity, H/128]`` float32: the first GEMM's input.
    gemm1
        ``[capacity, 2I]`` bfloat16, for the first GEMM's result.
    activated, activated_scale
        ``[capacity, I]`` e4m3 and ``[capacity, I/128]`` float32: the second GEMM's input.
    gemm2
        ``[capacity, H]`` bfloat16, for the second GEMM's result; the memory of ``gathered`` and ``gemm1``, whose last
        reader comes before.
    align
        1, or the row tile of a library that wants none to hold two experts.
    """

    gathered: torch.Tensor
    gathered_scale: torch.Tensor
    gemm1: torch.Tensor
    activated: torch.Tensor
    activated_scale: torch.Tensor
    gemm2: torch.Tensor
    align: int

    @classmethod
    def allocate(
        cls, problem: MoEProblem, capacity: int, device: torch.device, *, align: int, row_major_scales: bool
    ) -> Rows:
        """Reserve them, nothing written. Scales have a row's blocks, or else a block's rows, side by side."""
        h, i, b = problem.hidden_size, problem.intermediate_size, problem.block
        shared = torch.empty(capacity * _shared_bytes_per_row(problem), dtype=torch.uint8, device=device)

        def scales(blocks: int) -> torch.Tensor:
            if row_major_scales:
                return torch.empty((capacity, blocks), dtype=torch.float32, device=device)
            return torch.empty((blocks, capacity), dtype=torch.float32, device=device).t()

        return cls(
            gathered=shared[: capacity * h].view(FP8).view(capacity, h),
            gathered_scale=scales(h // b),
            gemm1=shared[capacity * h : capacity * (h + 4 * i)].view(torch.bfloat16).view(capacity, 2 * i),
            activated=torch.empty((capacity, i), dtype=FP8, device=device),
            activated_scale=scales(i // b),
            gemm2=shared[: capacity * 2 * h].view(torch.bfloat16).view(capacity, h),
            align=align,
        )


def rows_bytes(problem: MoEProblem, capacity: int) -> int:
    """Device memory of `Rows`: 17.7 KB a row for DeepSeek-V3."""
    h, i, b = problem.hidden_size, problem.intermediate_size, problem.block
    return capacity * (_shared_bytes_per_row(problem) + i + (h + i) // b * 4)


def _shared_bytes_per_row(problem: MoEProblem) -> int:
    h, i = problem.hidden_size, problem.intermediate_size
    return max(h + 4 * i, 2 * h)


@dataclass(slots=True)
class Tables:
    """Where the experts' rows are, in the ways the libraries ask for it, all on the device.

    Attributes
    ----------
    start, end
        ``[E + 1]`` and ``[E]`` int32: each expert's first row (the last element: where one more would start), and the
        row after its last.
    problem_sizes
        ``[2, E, 3]`` int32: rows, columns and sum length of each expert's GEMM1, then of its GEMM2; None if unwanted.
    strides
        ``[3, E]`` int64: H, I and 2I, each E times; None if unwanted.
    """

    start: torch.Tensor
    end: torch.Tensor
    problem_sizes: torch.Tensor | None = None
    strides: torch.Tensor | None = None


def require_alignment(inputs: Inputs, routed: Routed) -> None:
    """Raise ValueError with the names of inputs that don't start at a multiple of 16 bytes."""
    if routed.aligned:
        return
    tensors = inputs._asdict().items()
    names = [name for name, value in tensors if isinstance(value, torch.Tensor) and value.data_ptr() % 16]
    raise ValueError(
        f"{', '.join(names)} don't start at a multiple of 16 bytes, as the grouped GEMM's library wants: "
        "give tensors of their own, or backend='triton_fused[gemm=triton]'"
    )


def gather(
    inputs: Inputs, routed: Routed, problem: MoEProblem, launch: Launch, rows: Rows, *, problem_tables: bool
) -> Tables:
    """Launch the copy of the tokens into ``rows``, which fills the tables as well."""
    e, device = problem.num_local_experts, rows.gathered.device
    # A buffer of its own: the binary that `GATHER` keeps assumes the alignment of the bounds, the same for each E.
    bounds = torch.empty(2 * e + 1, dtype=torch.int32, device=device)
    tables = Tables(bounds[: e + 1], bounds[e + 1 :])
    if problem_tables:
        tables.problem_sizes = torch.empty((2, e, 3), dtype=torch.int32, device=device)
        tables.strides = torch.empty((3, e), dtype=torch.int64, device=device)
    arguments = (
        inputs.hidden_states,
        inputs.hidden_states_scale,
        routed.counts,
        routed.pair,
        rows.gathered,
        rows.gathered_scale,
        tables.start,
        tables.end,
        bounds if tables.problem_sizes is None else tables.problem_sizes,
        bounds if tables.strides is None else tables.strides,
        inputs.hidden_states_scale.stride(0),
        inputs.hidden_states_scale.stride(1),
        rows.gathered_scale.stride(0),
        rows.gathered_scale.stride(1),
    )
    constants = _gather_constants(problem, launch, rows.align, inputs.hidden_states.stride(0), problem_tables)
    GATHER.launch((inputs.num_tokens,), arguments, constants, device, routed.aligned)
    return tables


def swiglu(routed: Routed, problem: MoEProblem, launch: Launch, rows: Rows) -> None:
    """Launch SwiGLU and quantisation of ``rows.gemm1`` into ``rows.activated``."""
    blocks = problem.intermediate_size // problem.block
    capacity = rows.gemm1.shape[0]
    # A row is cut into pieces where there are too few rows to occupy the GPU.
    most = 2 if capacity < 8 * launch.multiprocessors else 8
    piece = next(n for n in (8, 4, 2, 1) if n <= most and blocks % n == 0)
    pieces = capacity * (blocks // piece)
    arguments = (
        rows.gemm1,
        routed.counts,
        rows.activated,
        rows.activated_scale,
        rows.activated_scale.stride(0),
        rows.activated_scale.stride(1),
    )
    grid = (min(pieces, launch.multiprocessors * SWIGLU_PROGRAMS),)
    constants = _swiglu_constants(problem, launch, rows.align, piece)
    SWIGLU.launch(grid, arguments, constants, rows.gemm1.device, True)


GATHER, SWIGLU = Kernel(gather_kernel), Kernel(swiglu_quantize_kernel)


@functools.lru_cache(maxsize=256)
def _gather_constants(problem: MoEProblem, launch: Launch, align: int, stride_hidden: int, tables: bool) -> Constants:
    hidden_pow2 = pow2(problem.hidden_size)
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "HIDDEN": problem.hidden_size,
        "HIDDEN_POW2": hidden_pow2,
        "INTERMEDIATE": problem.intermediate_size,
        "ALIGN": align,
        "TABLES": tables,
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 8 if hidden_pow2 >= 4096 else 4})


@functools.lru_cache(maxsize=256)
def _swiglu_constants(problem: MoEProblem, launch: Launch, align: int, blocks: int) -> Constants:
    arguments = {
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "ALIGN": align,
        "BLOCKS": blocks,
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 1 if blocks < 8 else 4})
