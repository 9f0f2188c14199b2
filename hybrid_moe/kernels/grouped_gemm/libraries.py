"""How the libraries of other people's grouped GEMMs are found, loaded and checked. Nothing is imported until asked."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...device import DeviceKey

SGL_OP = "fp8_blockwise_scaled_grouped_mm"
DEEP_GEMM_FUNCTION = "m_grouped_fp8_gemm_nt_contiguous"
# What an installed library raises if it doesn't fit torch, CUDA or the machine; DeepGEMM asserts that it finds CUDA.
LOAD_ERRORS = (ImportError, OSError, RuntimeError, AssertionError)


def sgl_grouped_mm() -> Callable[..., Any]:
    """The op ``torch.ops.sgl_kernel.fp8_blockwise_scaled_grouped_mm``, its library loaded if it isn't yet.

    Raises
    ------
    ImportError, OSError, RuntimeError
        If the library isn't there or doesn't load.
    AttributeError
        If it has no such op.
    """
    if not _sgl_registered():
        importlib.import_module("sgl_kernel")
    return getattr(torch.ops.sgl_kernel, SGL_OP).default


def deep_gemm() -> ModuleType:
    """The package ``deep_gemm``, loaded; raises what its import raises."""
    return importlib.import_module("deep_gemm")


def sgl_reasons(device: DeviceKey) -> list[str]:
    """Why sgl-kernel's grouped GEMM can't run on ``device``; the capability is asked before the library."""
    reasons = _capability_reasons(device, ((9, 0), (10, 0), (10, 3)))
    return reasons or list(_sgl_load_reasons(_sgl_registered()))


def deep_gemm_reasons(device: DeviceKey) -> list[str]:
    """Why DeepGEMM can't run on ``device``; the capability is asked before the library."""
    # Its Blackwell kernels take other scales.
    reasons = _capability_reasons(device, ((9, 0),))
    return reasons or list(_deep_gemm_load_reasons())


def _capability_reasons(device: DeviceKey, capabilities: tuple[tuple[int, int], ...]) -> list[str]:
    if device.capability in capabilities:
        return []
    has = "none" if device.capability is None else "{}.{}".format(*device.capability)
    wanted = " or ".join("{}.{}".format(*capability) for capability in capabilities)
    return [f"device {device.name}: expected compute capability {wanted}, got {has}"]


def _sgl_registered() -> bool:
    # The ops are there as soon as the shared library is loaded, by whomever.
    return hasattr(torch.ops.sgl_kernel, SGL_OP)


@functools.cache
def _sgl_load_reasons(registered: bool) -> tuple[str, ...]:
    if registered:
        return ()
    if importlib.util.find_spec("sgl_kernel") is None:
        return ("sgl_kernel is not installed: pip install 'hybrid-moe[sgl]'",)
    try:
        sgl_grouped_mm()
    except LOAD_ERRORS as error:
        return (f"sgl_kernel doesn't load: {_first_line(error)}",)
    except AttributeError:
        return (f"this sgl_kernel has no op {SGL_OP}: pip install -U 'hybrid-moe[sgl]'",)
    return ()


@functools.cache
def _deep_gemm_load_reasons() -> tuple[str, ...]:
    if importlib.util.find_spec("deep_gemm") is None:
        return ("deep_gemm is not installed: pip install 'hybrid-moe[deepgemm]'",)
    try:
        function = getattr(deep_gemm(), DEEP_GEMM_FUNCTION, None)
    except LOAD_ERRORS as error:
        return (f"deep_gemm doesn't load: {_first_line(error)}",)
    if function is None or "use_psum_layout" not in _parameters(function):
        return (
            f"this deep_gemm has no {DEEP_GEMM_FUNCTION} with use_psum_layout: pip install -U 'hybrid-moe[deepgemm]'",
        )
    if not _has_nvcc():
        return ("deep_gemm compiles its kernels with nvcc, which is not found: install CUDA, set CUDA_HOME",)
    return ()


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a compiled function may not say
        return ()


def _has_nvcc() -> bool:
    if os.environ.get("DG_JIT_USE_NVRTC", "0") != "0" or shutil.which("nvcc"):
        return True
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return (Path(home) / "bin" / "nvcc").is_file()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
