"""What every kernel of the pipeline shares: programmatic dependent launch, and small shape arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the kernel before this one has finished and its writes are visible (programmatic dependent launch)."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_kernel_start(PDL: tl.constexpr):
    """Allow the next kernel's blocks to be scheduled: they set up while this one still works, then wait."""
    if PDL:
        gdc_launch_dependents()
