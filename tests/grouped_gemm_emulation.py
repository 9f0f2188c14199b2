"""The grouped GEMMs of sgl-kernel and DeepGEMM in torch: their checks, layouts and addresses, read as they lie there.

Written from the libraries' sources, and apart from the descriptions of values from nothing of this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import types
from collections.abc import Iterator
from unittest import mock

import torch

from hybrid_moe.inputs import FP8
from hybrid_moe.kernels.grouped_gemm import libraries
from hybrid_moe.reference import dequantize_blocks, dequantize_rows

SGL_SCHEMA = (
    "fp8_blockwise_scaled_grouped_mm(Tensor output, Tensor a_ptrs, Tensor b_ptrs, Tensor out_ptrs, "
    "Tensor a_scales_ptrs, Tensor b_scales_ptrs, Tensor a, Tensor b, Tensor scales_a, Tensor scales_b, "
    "Tensor stride_a, Tensor stride_b, Tensor stride_c, Tensor layout_sfa, Tensor layout_sfb, "
    "Tensor problem_sizes, Tensor expert_offsets, Tensor workspace) -> ()"
)


def memory(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What lies at an address, rows packed."""
    items = torch.Size(shape).numel()
    if items == 0:
        return torch.empty(shape, dtype=dtype)
    buffer = (ctypes.c_uint8 * (items * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def emulated_sgl(
    output,
    a_ptrs,
    b_ptrs,
    out_ptrs,
    a_scales_ptrs,
    b_scales_ptrs,
    a,
    b,
    scales_a,
    scales_b,
    stride_a,
    stride_b,
    stride_c,
    layout_sfa,
    layout_sfb,
    problem_sizes,
    expert_offsets,
    workspace,
):
    """sgl-kernel's checks; its addresses, from the first elements and the sizes alone; then the product, by address."""
    experts = expert_offsets.shape[0]
    assert problem_sizes.dtype == torch.int32 and tuple(problem_sizes.shape) == (experts, 3)
    assert a.dtype == FP8 and b.dtype == FP8 and output.dtype == torch.bfloat16
    assert scales_a.dtype == scales_b.dtype == torch.float32
    assert {s.dtype for s in (stride_a, stride_b, stride_c)} == {torch.int64}
    assert layout_sfa.dtype == layout_sfb.dtype == expert_offsets.dtype == torch.int32
    assert (output.dim(), a.dim(), b.dim(), scales_a.dim(), scales_b.dim()) == (2, 2, 3, 2, 3)
    assert layout_sfa.dim() == layout_sfb.dim() == 2 and workspace.dim() == 1
    assert output.shape[1] % 128 == 0 and a.shape[1] % 128 == 0
    # The kernels read these as packed arrays.
    for packed in (problem_sizes, expert_offsets, stride_a, stride_b, stride_c, layout_sfa, layout_sfb, a_ptrs):
        assert packed.is_contiguous()
    assert layout_sfa.nbytes >= experts * 20 and workspace.nbytes >= 90_000
    for e in range(experts):
        _, n, k = problem_sizes[e].tolist()
        offset = int(expert_offsets[e])
        a_ptrs[e] = a.data_ptr() + offset * k
        b_ptrs[e] = b.data_ptr() + e * k * n
        out_ptrs[e] = output.data_ptr() + offset * n * 2
        a_scales_ptrs[e] = scales_a.data_ptr() + offset * k // 128 * 4
        b_scales_ptrs[e] = scales_b.data_ptr() + e * k * n // 128 // 128 * 4
    for e in range(experts):
        m, n, k = problem_sizes[e].tolist()
        assert (int(stride_a[e]), int(stride_b[e]), int(stride_c[e])) == (k, k, n)
        x = memory(int(a_ptrs[e]), (m, k), FP8)
        x_scale = memory(int(a_scales_ptrs[e]), (m, k // 128), torch.float32)
        w = memory(int(b_ptrs[e]), (n, k), FP8)
        w_scale = memory(int(b_scales_ptrs[e]), (n // 128, k // 128), torch.float32)
        product = dequantize_rows(x, x_scale.t()) @ dequantize_blocks(w, w_scale).t()
        memory(int(out_ptrs[e]), (m, n), torch.bfloat16).copy_(product)


def emulated_deep_gemm(
    a,
    b,
    d,
    grouped_layout,
    recipe=None,
    recipe_a=None,
    recipe_b=None,
    compiled_dims="nk",
    disable_ue8m0_cast=False,
    use_psum_layout=False,
    ensure_zero_padding=True,
    expected_m_for_psum_layout=None,
    own_transposition=False,
):
    """DeepGEMM's checks on Hopper, and its whole tiles: what is in the rows of padding comes out of them as well."""
    (x, sfa), (w, sfb) = a, b
    assert recipe is recipe_a is recipe_b is None and compiled_dims == "nk"
    assert type(expected_m_for_psum_layout) is (int if use_psum_layout else type(None))
    (m, k), (groups, n, _) = x.shape, w.shape
    assert x.dtype == w.dtype == FP8 and sfa.dtype == sfb.dtype == torch.float32 and d.dtype == torch.bfloat16
    assert x.stride(1) == 1 and w.stride() == (n * k, k, 1) and tuple(d.shape) == (m, n) and d.stride(1) == 1
    # MN-major and aligned for TMA, or else the library launches a transposition of its own.
    assert tuple(sfa.shape) == (m, k // 128)
    assert sfa.stride() == (1, -(-m // 4) * 4) or (own_transposition and sfa.is_contiguous())
    assert tuple(sfb.shape) == (groups, n // 128, k // 128) and sfb.is_contiguous()
    for tensor in (x, w, sfa, d):
        assert tensor.data_ptr() % 16 == 0
    assert grouped_layout.dtype == torch.int32 and grouped_layout.is_contiguous()
    assert tuple(grouped_layout.shape) == ((groups,) if use_psum_layout else (m,))
    if not use_psum_layout:
        for start in range(0, m, 64):
            group = int(grouped_layout[start])  # the first row of a warp group's 64 speaks for all
            if group >= 0:
                assert int(grouped_layout[start // 128 * 128]) == group
                x_rows = dequantize_rows(x[start : start + 64], sfa[start : start + 64].t())
                d[start : start + 64] = (x_rows @ dequantize_blocks(w[group], sfb[group]).t()).bfloat16()
        return
    last = 0
    for group, end in enumerate(grouped_layout.tolist()):
        start = -(-last // 128) * 128
        assert end >= start  # the number of tiles is unsigned
        tiles = -(-(end - start) // 128)
        stop = start + tiles * 128
        assert stop <= m
        x_rows = dequantize_rows(x[start:stop], sfa[start:stop].t())
        d[start:stop] = (x_rows @ dequantize_blocks(w[group], sfb[group]).t()).bfloat16()
        last = end


@contextlib.contextmanager
def sgl_kernel() -> Iterator[None]:
    """As if sgl-kernel were installed."""
    libraries._sgl_load_reasons.cache_clear()
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define(SGL_SCHEMA)
    library.impl("fp8_blockwise_scaled_grouped_mm", emulated_sgl, "CPU")
    yield
    library._destroy()
    libraries._sgl_load_reasons.cache_clear()


@contextlib.contextmanager
def deep_gemm() -> Iterator[None]:
    """As if DeepGEMM were installed, and could compile."""
    module = types.SimpleNamespace(
        m_grouped_fp8_gemm_nt_contiguous=emulated_deep_gemm, get_mk_alignment_for_contiguous_layout=lambda: 128
    )
    with mock.patch.multiple(libraries, deep_gemm=lambda: module, _deep_gemm_load_reasons=functools.cache(lambda: ())):
        yield
