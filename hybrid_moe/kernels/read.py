"""Reading memory and nothing else: what the floor's bandwidth is measured with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_kernel(source_ptr, sink_ptr, num_blocks, BLOCK: tl.constexpr):
    """Grid: any number of programs; they share the blocks of BLOCK int32 at ``source_ptr``."""
    total = tl.zeros((BLOCK,), tl.int32)
    at = tl.arange(0, BLOCK)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        total += tl.load(source_ptr + block.to(tl.int64) * BLOCK + at)
    # Never true, but the compiler can't know: the loads stay.
    tl.store(sink_ptr + at, total, mask=total == 123456789)
