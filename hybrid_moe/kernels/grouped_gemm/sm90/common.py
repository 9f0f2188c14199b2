"""What the warp-specialised kernels share: pipeline stages, and what they are compiled for."""

import functools
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ....problem import MoEProblem
from ...aggregate import aggregate
from ...launcher import Constants, DeviceLimits
from ...plan import LaunchKey
from ...shapes import max_local_rows, pow2
from ...steps import Operand, Tiles
from ..completion import Signals
from .share import Share

# Renamed between the Triton releases 3.6 and 3.9.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

COPY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 128 a row
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
E4M3 = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@aggregate
class Pipeline:
    """STAGES of a 128 block of the sum each. A step counts blocks over all tiles of a program."""

    x: gl.shared_memory_descriptor  # [STAGES, rows, 128] e4m3
    x_scale: gl.shared_memory_descriptor  # [STAGES, rows] float32
    weight: gl.shared_memory_descriptor  # [STAGES * parts, weight rows, 128] e4m3
    full: gl.shared_memory_descriptor  # 129 arrivals: the bytes of TMA, and 128 threads' cp.async
    empty: gl.shared_memory_descriptor  # an arrival of each consumer that reads the stage
    STAGES: gl.constexpr

    @gluon.jit
    def producer_acquire(self, step, BYTES: gl.constexpr):
        """Wait until a step's stage is empty, and say how many bytes TMA will bring."""
        stage = step % self.STAGES
        mbarrier.wait(self.empty.index(stage), ((step // self.STAGES) & 1) ^ 1)
        mbarrier.expect(self.full.index(stage), BYTES)

    @gluon.jit
    def producer_commit(self, step):
        """The stage is full when the copies that this thread has started are through (cp.async)."""
        async_copy.mbarrier_arrive(self.full.index(step % self.STAGES), increment_count=False)

    @gluon.jit
    def consumer_wait(self, step, pred=True):
        """Wait until a step's stage is full."""
        mbarrier.wait(self.full.index(step % self.STAGES), (step // self.STAGES) & 1, pred=pred)

    @gluon.jit
    def consumer_release(self, step):
        """The stage may be filled again."""
        mbarrier.arrive(self.empty.index(step % self.STAGES), count=1)


@gluon.jit
def make_pipeline(
    ROWS: gl.constexpr, WEIGHT_ROWS: gl.constexpr, PARTS: gl.constexpr, READERS: gl.constexpr, STAGES: gl.constexpr
):
    """A `Pipeline` with PARTS of WEIGHT_ROWS weight rows in a stage, which READERS consumers read."""
    x = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, 128], E4M3)
    x_scale = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN)
    weight = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * PARTS, WEIGHT_ROWS, 128], E4M3)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=129)
        mbarrier.init(empty.index(stage), count=READERS)
    return Pipeline(x=x, x_scale=x_scale, weight=weight, full=full, empty=empty, STAGES=STAGES)


class Resources(NamedTuple):
    """Of a program: a producer and two consumers, four warps each.

    Parameters
    ----------
    stages
        128 blocks of the sum in shared memory at once.
    consumer_registers, producer_registers
        Of each thread, once the groups have shared what the program started with. The first consumer has what is left.
    registers
        Of each thread at the start; None for a program that has all 65,536 of a multiprocessor.
    """

    stages: int
    consumer_registers: int
    producer_registers: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": 4} | ({} if self.registers is None else {"maxnreg": self.registers})


class SwizzledTiles(Tiles):
    """Tiles of all matrices' rows under one another, with the layout in shared memory that Gluon wants to be told."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""
        return self.matrices * self.rows, self.inner

    @property
    def strides(self) -> tuple[int, ...]:
        """Of all rows."""
        return self.inner, 1

    def descriptor(self, base: Any) -> TensorDescriptor:
        """Gluon's description of it."""
        return TensorDescriptor(base, list(self.shape), list(self.strides), [self.box_rows, 128], E4M3.value)


@functools.lru_cache(maxsize=256)
def gemm1_constants(
    problem: MoEProblem, limits: DeviceLimits, resources: Resources, stride_hidden: int, **more: int
) -> Constants:
    """What the first GEMM's kernels are compiled for; ``more`` is some kernel's own, and its last."""
    arguments = {
        "STRIDE_HIDDEN": stride_hidden,
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "GATE_FIRST": problem.gate_first,
        **_shared_arguments(problem, limits, resources),
        **more,
    }
    return Constants(arguments, {**limits.options, **resources.options})


@functools.lru_cache(maxsize=256)
def gemm2_constants(
    problem: MoEProblem, limits: DeviceLimits, resources: Resources, columns: int, first: Signals, **more: bool
) -> Constants:
    """The same for the second GEMM; ``first`` are the signals of the step that computed the activation."""
    arguments = {
        "HIDDEN": problem.hidden_size,
        "INTERMEDIATE": problem.intermediate_size,
        "COLUMNS": columns,
        "FIRST_M": first.block_m,
        "SIGNALS": first.per_row_tile,
        **_shared_arguments(problem, limits, resources),
        **more,
    }
    return Constants(arguments, {**limits.options, **resources.options})


def gemm2_operands(
    problem: MoEProblem, key: LaunchKey, first_column: int, share: Share, row_tile: int | None, weight_rows: int
) -> tuple[Operand, ...]:
    """Of the second GEMM's kernels, which copy ``row_tile`` rows of the activation at once, ``weight_rows`` of weights.

    ``row_tile`` of None: the activation is read by pointer.
    """
    e, inner, max_rows = problem.num_local_experts, problem.intermediate_size, max_local_rows(problem, key.num_tokens)
    return (
        "activated" if row_tile is None else SwizzledTiles("activated", 1, max_rows, inner, 1, row_tile),
        "activated_scale",
        SwizzledTiles("gemm2_weights", e, problem.hidden_size, inner, 1, weight_rows),
        "gemm2_weights_scale",
        "tokens_per_expert",
        share.counter("finished"),
        "rows",
        share.counter("gemm2_tile_counter"),
        first_column,
        max_rows,
        share.bound,
        int(share.busy),
    )


def _shared_arguments(problem: MoEProblem, limits: DeviceLimits, resources: Resources) -> dict[str, int | bool]:
    return {
        "E": problem.num_local_experts,
        # Shorter than a warp, the vectors would cost registers.
        "E_POW2": max(32, pow2(problem.num_local_experts)),
        "STAGES": resources.stages,
        "CONSUMER_REGISTERS": resources.consumer_registers,
        "PRODUCER_REGISTERS": resources.producer_registers,
        "PDL": limits.pdl,
    }
