"""Which experts' activations are there: GEMM2 starts an expert once GEMM1 is through with that one, not with all.

GEMM1's programs end one after the other, over several microseconds, and what each leaves idle GEMM2's programs take:
they are let in early (programmatic dependent launch), when all of GEMM1's have started, so that none waits for one that
can't run. GEMM1 counts its finished tiles, by expert and all together, and GEMM2 waits for the counts.

A program looks at a count with one thread, which tells the others: warps that looked for themselves would see different
ones, and meet at different barriers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Signals(NamedTuple):
    """How GEMM1 counts: an expert with so many rows is finished after ``ceil(rows / block_m) * per_row_tile`` signals.

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
    """How many programs arrived before this one; what their threads stored before that can be loaded from now on."""
    tl.debug_barrier()
    return tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def signal(finished_ptr, expert, E: tl.constexpr):
    """Count what all threads of this program, or of this warp group, have stored: ``finished`` is ``[E + 1]`` int32."""
    tl.debug_barrier()
    tl.atomic_add(finished_ptr + expert, 1, sem="release", scope="gpu")
    tl.atomic_add(finished_ptr + E, 1, sem="release", scope="gpu")


@triton.jit
def signals_seen(finished_ptr, at):
    """Of one expert, or, at E, of all; what was stored before them can be loaded from now on."""
    return tl.atomic_add(finished_ptr + at, 0, sem="acquire", scope="gpu")


@triton.jit
def all_finished(finished_ptr, count, FIRST_M: tl.constexpr, SIGNALS: tl.constexpr, E: tl.constexpr):
    """Whether GEMM1 is through with all experts, who have ``count`` rows; see `Signals` for the two numbers."""
    return signals_seen(finished_ptr, E) >= tl.sum((count + (FIRST_M - 1)) // FIRST_M, axis=0) * SIGNALS


@triton.jit
def await_expert(finished_ptr, expert, rows, FIRST_M: tl.constexpr, SIGNALS: tl.constexpr):
    """Wait until GEMM1 is through with an expert, who has so many rows."""
    await_signals(finished_ptr, expert, (rows + (FIRST_M - 1)) // FIRST_M * SIGNALS)


@triton.jit
def await_signals(finished_ptr, at, wanted):
    """Wait until so many are seen."""
    while signals_seen(finished_ptr, at) < wanted:
        pass


@triton.jit
def let_async_copies_see(PDL: tl.constexpr):
    """What a thread sees of other threads' stores, its bulk copies (TMA) from global memory see from here on."""
    if PDL:  # not in the interpreter
        tl.inline_asm_elementwise("fence.proxy.async.global; // dummy $0", "=r", [], tl.int32, is_pure=False, pack=1)
