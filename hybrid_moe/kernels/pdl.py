"""Programmatic dependent launch: a kernel's blocks are scheduled while the one before it still works."""

from __future__ import annotations

import triton.language as tl
from triton import jit
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the kernel before this one has finished and its writes are visible."""
    if PDL:
        gdc_wait()


@jit
def let_next_kernel_start(PDL: tl.constexpr):
    """Allow the next kernel's blocks to be scheduled: they set up, then wait."""
    if PDL:
        gdc_launch_dependents()
