"""GEMM2 starts an expert once GEMM1 has finished that one, not all of them.

GEMM1's programs end over several microseconds, and GEMM2's take the SMs that they leave: by programmatic dependent
launch they are scheduled early, once all of GEMM1's have started, so that none waits for one that can't run. GEMM1
counts finished tiles, for each expert and for all, and GEMM2 waits for the counts.

One thread polls and tells the others: warps that polled for themselves could see different counts, and wait at
different barriers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Signals(NamedTuple):
    """GEMM1 has finished an expert after ``ceil(rows / block_m) * per_row_tile`` signals.

    Parameters
    ----------
    block_m
        Rows of its tiles.
    per_row_tile
        Signals from all tiles of the same rows.
    """

    block_m: int
    per_row_tile: int


@triton.jit
def count_arrival(arrivals_ptr):
    """How many programs arrived before this one; what they stored before that can be loaded from here on."""
    tl.debug_barrier()
    return tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def signal(finished_ptr, expert, E: tl.constexpr):
    """Count a signal of the expert, after this program's or warp group's stores; ``finished`` is ``[E + 1]`` int32."""
    tl.debug_barrier()
    tl.atomic_add(finished_ptr + expert, 1, sem="release", scope="gpu")
    tl.atomic_add(finished_ptr + E, 1, sem="release", scope="gpu")


@triton.jit
def signals_seen(finished_ptr, at):
    """Signals of an expert, or of all at E; what was stored before them can be loaded from here on."""
    return tl.atomic_add(finished_ptr + at, 0, sem="acquire", scope="gpu")


@triton.jit
def all_finished(finished_ptr, count, FIRST_M: tl.constexpr, SIGNALS: tl.constexpr, E: tl.constexpr):
    """Whether GEMM1 has finished all experts, which have ``count`` rows; FIRST_M and SIGNALS are those of `Signals`."""
    return signals_seen(finished_ptr, E) >= tl.sum((count + (FIRST_M - 1)) // FIRST_M, axis=0) * SIGNALS


@triton.jit
def await_expert(finished_ptr, expert, rows, FIRST_M: tl.constexpr, SIGNALS: tl.constexpr):
    """Wait until GEMM1 has finished an expert with so many rows."""
    await_signals(finished_ptr, expert, (rows + (FIRST_M - 1)) // FIRST_M * SIGNALS)


@triton.jit
def await_signals(finished_ptr, at, wanted):
    """Wait for so many signals."""
    while signals_seen(finished_ptr, at) < wanted:
        pass


@triton.jit
def let_async_copies_see(PDL: tl.constexpr):
    """From here on this thread's TMA loads see what the thread itself sees of others' stores."""
    if PDL:  # not in the interpreter
        tl.inline_asm_elementwise("fence.proxy.async.global; // dummy $0", "=r", [], tl.int32, is_pure=False, pack=1)
