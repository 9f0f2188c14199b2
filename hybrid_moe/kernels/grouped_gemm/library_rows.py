"""The steps around another library's two grouped GEMMs, and the memory that they share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ...inputs import FP8
from ...problem import MoEProblem
from ..arena import Layout
from ..gather import gather_kernel
from ..launch import Constants, Kernel
from ..pipeline import Launch, pow2
from ..plan import Form
from ..steps import Step
from ..swiglu import swiglu_quantize_kernel

# Programs of the SwiGLU that a multiprocessor runs at once.
SWIGLU_PROGRAMS = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """How one call's rows lie in expert order, and the tables that say where; all on the device.

    The tensors, by name:

    ``gathered``, ``gathered_scale``
        ``[capacity, H]`` e4m3 and its scales, float32: the first GEMM's input.
    ``gemm1``
        ``[capacity, 2I]`` bfloat16, for the first GEMM's result.
    ``activated``, ``activated_scale``
        ``[capacity, I]`` e4m3 and its scales: the second GEMM's input.
    ``rows``
        ``[capacity, H]`` bfloat16, for the second GEMM's result; the memory of ``gathered`` and ``gemm1``, whose last
        reader comes before.
    ``start``, ``end``
        ``[E + 1]`` and ``[E]`` int32: each expert's first row (the last element: where one more would start), and the
        row after its last.
    ``problem_sizes``, ``strides``
        If wanted: ``[2, E, 3]`` int32, rows, columns and sum length of each expert's GEMM1, then of its GEMM2; and
        ``[3, E]`` int64, H, I and 2I, each E times.

    Parameters
    ----------
    problem
        Of the layer.
    capacity
        Rows that there is room for.
    align
        Each expert's rows start at a multiple of it: 1, or the row tile of a library that wants none to hold two
        experts.
    row_major_scales
        Whether scales are ``[capacity, blocks]``, or else ``[blocks, capacity]``.
    tables
        Whether ``problem_sizes`` and ``strides`` are wanted.
    """

    problem: MoEProblem
    capacity: int
    align: int
    row_major_scales: bool
    tables: bool

    def reserve(self, layout: Layout) -> None:
        """Add the tensors: 17.7 KB a row for DeepSeek-V3."""
        p, capacity = self.problem, self.capacity
        e, h, i = p.num_local_experts, p.hidden_size, p.intermediate_size
        shared = layout.bytes
        layout.reserve("shared", (capacity * max(h + 4 * i, 2 * h),), torch.uint8)
        layout.overlay("gathered", shared, (capacity, h), FP8)
        layout.overlay("gemm1", shared + capacity * h, (capacity, 2 * i), torch.bfloat16)
        layout.overlay("rows", shared, (capacity, h), torch.bfloat16)
        layout.reserve("gathered_scale", self._scales(h), torch.float32)
        layout.reserve("activated", (capacity, i), FP8)
        layout.reserve("activated_scale", self._scales(i), torch.float32)
        layout.reserve("start", (e + 1,), torch.int32)
        layout.reserve("end", (e,), torch.int32)
        if self.tables:
            layout.reserve("problem_sizes", (2, e, 3), torch.int32)
            layout.reserve("strides", (3, e), torch.int64)

    def _scales(self, width: int) -> tuple[int, int]:
        blocks = width // self.problem.block
        return (self.capacity, blocks) if self.row_major_scales else (blocks, self.capacity)

    def _scale_strides(self, width: int) -> tuple[int, int]:
        """From row to row, and from block to block."""
        return (width // self.problem.block, 1) if self.row_major_scales else (1, self.capacity)

    def gather(self, launch: Launch, form: Form) -> Step:
        """The copy of the tokens into ``gathered``, which fills the tables as well."""
        operands = (
            "hidden_states",
            "hidden_states_scale",
            "counts",
            "pair",
            "gathered",
            "gathered_scale",
            "start",
            "end",
            "problem_sizes" if self.tables else "start",
            "strides" if self.tables else "start",
            form.stride_scale_k,
            form.stride_scale_t,
            *self._scale_strides(self.problem.hidden_size),
        )
        constants = _gather_constants(self.problem, launch, self.align, form.stride_hidden, self.tables)
        return Step(GATHER, (form.num_tokens,), operands, constants, form.aligned)

    def swiglu(self, launch: Launch) -> Step:
        """SwiGLU and quantisation of ``gemm1`` into ``activated``."""
        blocks = self.problem.intermediate_size // self.problem.block
        # A row is cut into pieces where there are too few rows to occupy the GPU.
        most = 2 if self.capacity < 8 * launch.multiprocessors else 8
        piece = next(n for n in (8, 4, 2, 1) if n <= most and blocks % n == 0)
        pieces = self.capacity * (blocks // piece)
        strides = self._scale_strides(self.problem.intermediate_size)
        grid = (min(pieces, launch.multiprocessors * SWIGLU_PROGRAMS),)
        constants = _swiglu_constants(self.problem, launch, self.align, piece)
        return Step(SWIGLU, grid, ("gemm1", "counts", "activated", "activated_scale", *strides), constants, True)


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
