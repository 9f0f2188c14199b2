"""Provider ``triton``: the two Triton GEMMs with their tiles; needs no other library."""

from __future__ import annotations

import functools

import torch

from ....device import DeviceKey
from ....inputs import FP8
from ....problem import MoEProblem
from ...arena import Layout
from ...launch import Constants, Kernel
from ...pipeline import GroupedGemm, Launch, column_chunk, combine, max_row_tiles, pow2, row_capacity
from ...plan import Form
from ...steps import AnyStep, Operand, Step, Tiles
from ..completion import Signals
from ..sm90 import few_rows, many_rows
from ..tiles import Specialized, Tile, TilePlan, tile_plan
from .kernels import gemm1_swiglu_kernel, gemm2_kernel


class TritonGroupedGemm(GroupedGemm):
    """Two launches: GEMM1 with gather, SwiGLU and quantisation; GEMM2."""

    name = "triton"

    def __init__(self, capability: tuple[int, int] | None = None) -> None:
        self._capability = capability

    def plan(self, problem: MoEProblem, num_tokens: int) -> TilePlan:
        """The tiles that `steps` uses."""
        return tile_plan(problem, num_tokens, self._capability)

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """None: what Triton needs is asked by the backend."""
        return []

    def reserve(self, layout: Layout, problem: MoEProblem, num_tokens: int, row_alignment: int) -> None:
        """The activation with its scales (twice over in float32 for narrow tiles), and one chunk of result columns."""
        rows = row_capacity(problem, num_tokens)
        # Kernels for few rows take the place of narrow tiles alone, and want what these do.
        reserve_activation(layout, problem, rows, self.plan(problem, num_tokens).gemm1)
        layout.reserve("rows", (rows, column_chunk(problem, rows)), torch.bfloat16)

    def num_tickets(self, problem: MoEProblem, num_tokens: int) -> int:
        """Those of the plan's GEMM1, or of the specialised ones."""
        plan = self.plan(problem, num_tokens)
        columns = column_chunk(problem, row_capacity(problem, num_tokens))
        tickets = [tickets_of(problem, num_tokens, plan.gemm1)]
        if Specialized.MANY in plan.specialized:
            tickets.append(many_rows.num_tickets(problem, columns))
        if Specialized.FEW in plan.specialized:
            tickets.append(few_rows.num_tickets(problem, num_tokens, columns))
        return max(tickets)

    def steps(self, problem: MoEProblem, launch: Launch, form: Form) -> list[AnyStep]:
        """GEMM1, then GEMM2 and the combine for each chunk of columns."""
        plan = self.plan(problem, form.num_tokens)
        columns = column_chunk(problem, row_capacity(problem, form.num_tokens))
        first, second = plan.specialized if form.aligned else (None, None)
        if form.stride_hidden % 16:  # each row is copied 16 bytes at a time
            first = None
            if second is Specialized.FEW:  # it draws its tiles by a ticket that `gemm1` quantises by
                second = None
        steps: list[AnyStep] = []
        if first is Specialized.MANY:
            steps.append(many_rows.gemm1(problem, launch, form))
            signals = many_rows.signals(problem)
        elif first is Specialized.FEW:
            steps.append(few_rows.gemm1(problem, launch, form, columns))
            signals = few_rows.signals(problem)
        else:
            steps.append(gemm1(problem, launch, form, plan.gemm1))
            signals = signals_of(problem, plan.gemm1)
        for first_column in range(0, problem.hidden_size, columns):
            if second is Specialized.MANY and columns % many_rows.COLUMNS == 0:
                steps.append(many_rows.gemm2(problem, launch, form, columns, first_column, signals))
            elif second is Specialized.FEW:
                steps.append(few_rows.gemm2(problem, launch, form, columns, first_column, signals))
            else:
                steps.append(gemm2(problem, launch, form, plan.gemm2, columns, first_column, signals))
            steps.append(combine(problem, launch, form, columns, first_column))
        return steps


def tickets_of(problem: MoEProblem, num_tokens: int, tile: Tile) -> int:
    """One for each row tile and 128 block of the activation, where several tiles of `gemm1` share a block."""
    if tile.block_n == problem.block:
        return 0
    return max_row_tiles(problem, num_tokens, tile.block_m) * (problem.intermediate_size // problem.block)


def signals_of(problem: MoEProblem, tile: Tile) -> Signals:
    """Of `gemm1`: one for each row tile and 128 block of the activation."""
    return Signals(tile.block_m, problem.intermediate_size // problem.block)


def reserve_activation(layout: Layout, problem: MoEProblem, rows: int, tile: Tile) -> None:
    """Add the result of `gemm1`, and what it gathers in float32 where its tiles are narrower than a 128 block."""
    width = problem.intermediate_size
    layout.reserve("activated", (rows, width), FP8)
    layout.reserve("activated_scale", (width // problem.block, rows), torch.float32)
    if tile.block_n < problem.block:
        layout.reserve("unquantized", (rows, width), torch.float32)


def gemm1(problem: MoEProblem, launch: Launch, form: Form, tile: Tile) -> Step:
    """SwiGLU of the first GEMM: ``[capacity, I]`` e4m3 and ``[I/128, capacity]`` scales.

    ``tickets`` must be zeros if the tile is narrower than 128 columns.
    """
    tokens, width = form.num_tokens, problem.intermediate_size
    narrow = tile.block_n < problem.block
    operands = (
        "hidden_states",
        "hidden_states_scale",
        weights_operand("gemm1_weights", problem, form, (width, problem.hidden_size), 2, 1 + tile.joined, tile.block_n),
        "gemm1_weights_scale",
        "counts",
        "slot_token",
        "activated",
        "activated_scale",
        "unquantized" if narrow else "activated_scale",
        "tickets" if narrow else "counts",
        "finished",
        form.stride_scale_k,
        form.stride_scale_t,
        tokens,
        row_capacity(problem, tokens),
    )
    tiles = max_row_tiles(problem, tokens, tile.block_m) * (width // tile.block_n)
    grid = (min(tiles, launch.multiprocessors * tile.programs_per_multiprocessor),)
    constants = _gemm1_constants(problem, launch, tile, form.stride_hidden, form.aligned)
    return Step(GEMM1, grid, operands, constants, form.aligned)


def gemm2(
    problem: MoEProblem, launch: Launch, form: Form, tile: Tile, columns: int, first_column: int, signals: Signals
) -> Step:
    """Columns ``[first_column, first_column + columns)`` of the second GEMM into ``rows`` bfloat16.

    ``signals`` are those of the step that computed the activation.
    """
    block_n = tile.block_n if columns % tile.block_n == 0 else problem.block
    tiles = max_row_tiles(problem, form.num_tokens, tile.block_m) * (columns // block_n)
    box_rows = block_n if tile.joined else block_n // 2
    shape = (problem.hidden_size, problem.intermediate_size)
    operands = (
        "activated",
        "activated_scale",
        weights_operand("gemm2_weights", problem, form, shape, 1, 1, box_rows),
        "gemm2_weights",
        "gemm2_weights_scale",
        "counts",
        "finished",
        "rows",
        first_column,
        row_capacity(problem, form.num_tokens),
    )
    grid = (min(tiles, launch.multiprocessors * tile.programs_per_multiprocessor),)
    constants = _gemm2_constants(problem, launch, tile, columns, block_n, form.aligned, signals)
    return Step(GEMM2, grid, operands, constants, form.aligned)


def weights_operand(
    name: str, problem: MoEProblem, form: Form, shape: tuple[int, int], parts: int, box_parts: int, box_rows: int
) -> Operand:
    """Each expert's weights as ``parts`` matrices of ``shape``, in tiles; the tensor itself where TMA can't read.

    A tile is ``box_rows`` rows by 128 columns of each of ``box_parts`` neighbouring parts.
    """
    return Tiles(name, problem.num_local_experts * parts, *shape, box_parts, box_rows) if form.aligned else name


GEMM1, GEMM2 = Kernel(gemm1_swiglu_kernel), Kernel(gemm2_kernel)


@functools.lru_cache(maxsize=256)
def _gemm1_constants(problem: MoEProblem, launch: Launch, tile: Tile, stride_hidden: int, tma: bool) -> Constants:
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "JOINED": tile.joined,
        "TIERS": _tiers(tile),
        "TMA": tma,
        "PDL": launch.pdl,
    }
    return Constants(arguments, _options(launch, tile))


@functools.lru_cache(maxsize=256)
def _gemm2_constants(
    problem: MoEProblem, launch: Launch, tile: Tile, columns: int, block_n: int, tma: bool, signals: Signals
) -> Constants:
    arguments = {
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "COLUMNS": columns,
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": block_n,
        "JOINED": tile.joined,
        "TIERS": _tiers(tile),
        "FIRST_M": signals.block_m,
        "SIGNALS": signals.per_row_tile,
        "TMA": tma,
        "PDL": launch.pdl,
    }
    return Constants(arguments, _options(launch, tile))


def _tiers(tile: Tile) -> tuple[tuple[int, int, int, int], ...]:
    """Each tier as the kernels want it: the rows above which and up to which it is taken, stages, unrolling."""
    above = (0, *(tier.block_m for tier in tile.tiers))
    return tuple((low, t.block_m, t.num_stages, t.k_unroll) for low, t in zip(above, tile.tiers, strict=False))


def _options(launch: Launch, tile: Tile) -> dict[str, int | bool]:
    limit = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {**launch.options, "num_warps": tile.num_warps, **limit}
