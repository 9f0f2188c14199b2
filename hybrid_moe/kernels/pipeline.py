"""The fused pipeline from routing to the combined output, and the steps that every grouped GEMM shares."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch

from ..device import DeviceKey
from ..inputs import Inputs, RoutedInputs
from ..problem import MoEProblem
from .arena import Layout
from .combine import combine_kernel
from .launch import Constants, Kernel
from .plan import Form, Plan, addresses_of
from .routing import clear_kernel, route_kernel, scatter_kernel
from .steps import AnyStep, Operand, Step

# A column chunk of the second GEMM's result stays under this many bytes where one 128 block of columns does: that of
# T = 14107, 1.6 GB, is in one piece, as the libraries have it. Seven chunks of 256 MiB cost 10% of that call.
MAX_ROWS_BYTES = 2**31
# Programs of the combine that a multiprocessor runs at once; more of them share a token's columns only up to this.
COMBINE_PROGRAMS = 16
# Of a token's column blocks that one program adds up at once: as many loads are in flight together.
COMBINE_BLOCKS = 8
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


class GroupedGemm(ABC):
    """A provider of the experts' two GEMMs: gathered rows in, one row for each (token, local expert) pair out."""

    name: ClassVar[str]
    # Whether all inputs have to start at multiples of 16 bytes.
    wants_alignment: ClassVar[bool] = False
    # `row_alignment`, unless this process has changed it.
    usual_row_alignment: ClassVar[int] = 1

    @abstractmethod
    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """Every reason why it can't run; an empty list means that it can."""

    @abstractmethod
    def reserve(self, layout: Layout, problem: MoEProblem, num_tokens: int, row_alignment: int) -> None:
        """Add the intermediate tensors of `steps`."""

    @abstractmethod
    def steps(self, problem: MoEProblem, launch: Launch, form: Form) -> list[AnyStep]:
        """From routed tokens to the layer's output: GEMM1, SwiGLU, quantisation, GEMM2, `combine`."""

    def num_tickets(self, problem: MoEProblem, num_tokens: int) -> int:
        """How many int32 zeros it wants as ``tickets``; `route` clears them."""
        return 0

    def row_alignment(self) -> int:
        """Each expert's rows have to start at a multiple of it in the next call."""
        return self.usual_row_alignment


def pow2(value: int) -> int:
    """The least power of two that is not below ``value``: Triton's vectors have such lengths."""
    return 1 << (value - 1).bit_length()


def row_capacity(problem: MoEProblem, num_tokens: int) -> int:
    """Most rows that any routing can give: rows are decided on the device and never read back."""
    return num_tokens * problem.max_local_rows_per_token


def max_row_tiles(problem: MoEProblem, num_tokens: int, block_m: int) -> int:
    """Most row tiles that any routing of ``num_tokens`` can need over the local experts."""
    rows = row_capacity(problem, num_tokens)
    active = min(problem.num_local_experts, rows)
    # Each active expert rounds up once: at most active partly filled tiles beside the full ones.
    return active + (rows - active) // block_m


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


def reserve_routing(layout: Layout, problem: MoEProblem, num_tokens: int, num_tickets: int = 0) -> None:
    """Add the result of `route`: for each local expert its tokens, for each token its pairs. See `kernels.routing`.

    ``counters`` are ``counts`` ``[E]`` with ``finished`` ``[E + 1]`` and ``tickets`` behind, zeros for the grouped GEMM
    to count with; each starts at a multiple of 16 bytes. ``slot_token`` is ``[E, T]``, ``pair`` and ``pair_weight``
    ``[T, top_k]``.
    """
    e = problem.num_local_experts
    finished = (e + 3) // 4 * 4
    tickets = finished + (e + 1 + 3) // 4 * 4
    start = layout.bytes
    layout.reserve("counters", (tickets + num_tickets,), torch.int32)
    layout.overlay("counts", start, (e,), torch.int32)
    layout.overlay("finished", start + 4 * finished, (e + 1,), torch.int32)
    layout.overlay("tickets", start + 4 * tickets if num_tickets else start, (num_tickets,), torch.int32)
    layout.reserve("slot_token", (e, num_tokens), torch.int32)
    layout.reserve("pair", (num_tokens, problem.top_k), torch.int32)
    layout.reserve("pair_weight", (num_tokens, problem.top_k), torch.float32)


def route(problem: MoEProblem, launch: Launch, form: Form, layout: Layout) -> list[AnyStep]:
    """The routing, and before it the clearing of its counts and the grouped GEMM's tickets; one kernel for one token.

    Where the experts are chosen already, it only sorts.
    """
    counters = layout.places["counters"].shape[0]
    alone = form.num_tokens == 1
    results = ("counts", "slot_token", "pair", "pair_weight")
    numbers: tuple[Operand, ...] = (form.num_tokens, counters, "local_expert_offset")
    if form.kind is RoutedInputs:
        kernel, constants = SCATTER, _scatter_constants(problem, launch, alone)
        numbers += (form.stride_routing, form.stride_weights)
    else:
        kernel, constants = ROUTE, _route_constants(problem, launch, form.stride_routing, form.dtype_routing, alone)
        numbers += ("routed_scaling_factor",)
    operands = (*form.kind._fields[:2], *results, *numbers)
    clear = Step(CLEAR, (1,), ("counters", counters), _clear_constants(launch), True)
    step = Step(kernel, (form.num_tokens,), operands, constants, form.aligned)
    return [step] if alone else [clear, step]


@functools.lru_cache(maxsize=256)
def _clear_constants(launch: Launch) -> Constants:
    return Constants({"BLOCK": 1024, "PDL": launch.pdl}, {**launch.options, "num_warps": 4})


@functools.lru_cache(maxsize=256)
def _scatter_constants(problem: MoEProblem, launch: Launch, alone: bool) -> Constants:
    arguments = {
        "NUM_EXPERTS": problem.num_experts,
        "E": problem.num_local_experts,
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "ALONE": alone,
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 1})


@functools.lru_cache(maxsize=256)
def _route_constants(
    problem: MoEProblem, launch: Launch, stride_logits: int, bias_dtype: torch.dtype, alone: bool
) -> Constants:
    # One for each dtype of the bias, as a binary is kept for each and reads what it was compiled for.
    arguments = {
        "STRIDE_LOGITS": stride_logits,
        "E": problem.num_local_experts,
        **selection_constants(problem),
        "ALONE": alone,
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
        "SOFTMAX": problem.softmax,
        "RENORMALIZE": problem.renormalize,
    }


def combine(problem: MoEProblem, launch: Launch, form: Form, columns: int, first_column: int) -> Step:
    """The weighted sum for the columns that ``rows`` holds, ``[capacity, columns]`` bfloat16."""
    tokens = form.num_tokens
    # The largest power of two that divides the columns, up to what spreads few tokens over the device.
    block_n = min(512 if tokens < launch.multiprocessors // 4 else 1024, columns & -columns)
    blocks = columns // block_n
    programs = max(1, min(blocks, launch.multiprocessors * COMBINE_PROGRAMS // tokens))
    blocks_each = min(pow2(-(-blocks // programs)), COMBINE_BLOCKS)
    grid = (tokens, -(-blocks // blocks_each))
    branch = tokens >= COMBINE_BRANCH_TOKENS
    constants = _combine_constants(problem, launch, columns, block_n, blocks_each, form.row_alignment, branch)
    operands = ("rows", "counts", "pair", "pair_weight", "output", first_column // problem.block)
    return Step(COMBINE, grid, operands, constants, form.output_aligned)


@functools.lru_cache(maxsize=256)
def _combine_constants(
    problem: MoEProblem, launch: Launch, columns: int, block_n: int, blocks: int, align: int, branch: bool
) -> Constants:
    arguments = {
        "E": problem.num_local_experts,
        "E_POW2": pow2(problem.num_local_experts),
        "TOP_K": problem.top_k,
        "TOP_K_POW2": pow2(problem.top_k),
        "HIDDEN": problem.hidden_size,
        "COLUMNS": columns,
        "ALIGN": align,
        "BRANCH": branch,
        "BLOCKS": blocks,
        "BLOCK_N": block_n,
        "PDL": launch.pdl,
    }
    return Constants(arguments, {**launch.options, "num_warps": 4})


class Pipeline:
    """All steps of the layer around one grouped GEMM, planned once for each form of call.

    Safe to call from any thread. Its plans hold no memory of the device.
    """

    def __init__(self, problem: MoEProblem, gemm: GroupedGemm) -> None:
        self._problem = problem
        self._gemm = gemm
        # Serving meets few forms again and again: T of its steps, in tensors with the same strides.
        self._plan = functools.lru_cache(maxsize=1024)(self._make_plan)

    def layout(self, num_tokens: int, row_alignment: int | None = None) -> Layout:
        """Where the intermediate tensors of a call lie."""
        problem, gemm, layout = self._problem, self._gemm, Layout()
        reserve_routing(layout, problem, num_tokens, gemm.num_tickets(problem, num_tokens))
        gemm.reserve(layout, problem, num_tokens, gemm.usual_row_alignment if row_alignment is None else row_alignment)
        return layout

    def plan(self, form: Form, device: torch.device, launch: Launch) -> Plan:
        """The steps of a call."""
        layout = self.layout(form.num_tokens, form.row_alignment)
        steps = [*route(self._problem, launch, form, layout), *self._gemm.steps(self._problem, launch, form)]
        return Plan(form, layout, steps, device)

    def _make_plan(self, form: Form, device: torch.device) -> Plan:
        return self.plan(form, device, launch_on(device))

    def run(self, inputs: Inputs, output: torch.Tensor, memory: torch.Tensor | None = None) -> None:
        """Launch all steps on the current stream.

        Parameters
        ----------
        inputs, output
            As `Runner.run` has them.
        memory
            Bytes on the device for the intermediate tensors, which nobody else uses until the launches are through;
            by default, or if they are too few, some are reserved for this call.

        Raises
        ------
        ValueError
            An input doesn't start at a multiple of 16 bytes, and the grouped GEMM's library wants it.
        """
        device = output.device
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):  # Triton launches on the current one
                self._run(inputs, output, device, memory)
        else:
            self._run(inputs, output, device, memory)

    def _run(self, inputs: Inputs, output: torch.Tensor, device: torch.device, memory: torch.Tensor | None) -> None:
        addresses = addresses_of(inputs)
        form = Form.of(inputs, addresses, output, self._gemm.row_alignment())
        if self._gemm.wants_alignment and not form.aligned:
            _refuse_unaligned(inputs, addresses)
        plan = self._plan(form, device)
        if memory is None or memory.numel() < plan.layout.bytes:
            memory = torch.empty(plan.layout.bytes, dtype=torch.uint8, device=device)
        plan.run(inputs, addresses, output, memory)


def _refuse_unaligned(inputs: Inputs, addresses: Sequence[int]) -> NoReturn:
    names = [name for name, address in zip(inputs._fields, addresses, strict=False) if address % 16]
    raise ValueError(
        f"{', '.join(names)} don't start at a multiple of 16 bytes, as the grouped GEMM's library wants: "
        "give tensors of their own, or backend='triton_fused[gemm=triton]'"
    )
