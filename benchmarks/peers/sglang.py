"""SGLang's kernels and what its MoE runners are given.

Of SGLang two files are loaded, by themselves: `fused_moe_triton_kernels` and `ep_moe_kernels`. So an installed
``sglang`` will do, and so will its unpacked wheel on ``PYTHONPATH`` without the packages that it requires. What the
two import from the rest of SGLang gets stand-ins that answer as on a Hopper GPU with default settings.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import route

BLOCK = 128


def package_dir(name: str) -> Path | None:
    """Folder of a package that is installed or unpacked on ``PYTHONPATH``, found without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def not_supported_reasons() -> list[str]:
    """Why SGLang's kernels can't run here; empty if they can."""
    reasons = []
    root = package_dir("sglang")
    if root is None:
        reasons.append("sglang isn't there: install it, or put its unpacked wheel on PYTHONPATH")
    elif not _file(root, "fused_moe_triton_kernels").is_file():
        reasons.append(f"sglang in {root} has no kernels/ops/moe/fused_moe_triton_kernels.py: expected release 0.5.16")
    try:
        ops()
    except (ImportError, OSError, RuntimeError) as error:
        reasons.append(f"sgl_kernel doesn't load: {error}; pip install sglang-kernel")
    return reasons


def ops() -> Any:
    """The operators of sgl-kernel, which its import registers; unless a library with them was loaded before."""
    if not hasattr(torch.ops.sgl_kernel, "moe_align_block_size"):
        importlib.import_module("sgl_kernel")
    return torch.ops.sgl_kernel


@functools.cache
def kernels(name: str) -> ModuleType:
    """A module of ``sglang/kernels/ops/moe``, loaded by itself."""
    root = package_dir("sglang")
    if root is None:
        raise ModuleNotFoundError("sglang isn't there")
    spec = importlib.util.spec_from_file_location(f"{__package__}._{name}", _file(root, name))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton asks for the module of a kernel
    with _stand_ins():
        spec.loader.exec_module(module)
    return module


def _file(root: Path, name: str) -> Path:
    return root / "kernels" / "ops" / "moe" / f"{name}.py"


def quantize(x: torch.Tensor, group: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """1 x ``group`` e4m3 and row-major scales by sgl-kernel; values that are FP8 bring theirs, see `Layer`."""
    if x.dtype == FP8:
        return x, x.block_scale
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty((x.shape[0], x.shape[1] // group), dtype=torch.float32, device=x.device)
    ops().sgl_per_token_group_quant_8bit_v2.default(x, values, scale, group, 1e-10, -448.0, 448.0, False, False, None)
    return values, scale


@contextmanager
def _stand_ins() -> Iterator[None]:
    def no(*_: object) -> bool:
        return False

    modules = {
        "sglang.kernels.ops.quantization.fp8_kernel": {
            "per_token_group_quant_fp8": quantize,
            "sglang_per_token_group_quant_fp8": quantize,
            "scaled_fp8_quant": None,
        },
        "sglang.kernels.ops.quantization.int8_kernel": dict.fromkeys(
            ("per_token_group_quant_int8", "per_token_quant_int8", "sglang_per_token_group_quant_int8")
        ),
        "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": no},
        "sglang.srt.layers.moe.utils": {"get_moe_padding_size": lambda _: 0},
        "sglang.srt.utils": {
            "ceil_div": lambda a, b: -(-a // b),
            "cpu_has_amx_support": no,
            "get_bool_env_var": no,
            "is_cpu": no,
            "is_cuda": lambda: True,
            "is_hip": no,
            "is_musa": no,
            "is_sm90_supported": lambda: True,
        },
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update({name: SimpleNamespace(**names) for name, names in modules.items()})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@dataclass(frozen=True, slots=True)
class Layer:
    """What SGLang's MoE runners are given.

    Attributes
    ----------
    hidden
        ``[T, H]`` e4m3; its attribute ``block_scale`` is ``[T, H/128]`` float32, row-major.
    topk_ids
        ``[T, top_k]`` int32: local experts from 0, -1 for those of other ranks.
    topk_weights
        ``[T, top_k]`` float32, without ``factor``.
    w13, w13_scale, w2, w2_scale
        The gate half first.
    """

    hidden: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    factor: float
    is_whole: bool

    @classmethod
    def of(cls, inputs: MoEInputs, problem: MoEProblem) -> Layer:
        """Route, and do what loading does."""
        ids, weights = route(inputs.routing_logits, inputs.routing_bias, 1.0, problem)
        local = ids - inputs.local_expert_offset
        local = torch.where((local >= 0) & (local < problem.num_local_experts), local, -1).int()
        hidden = inputs.hidden_states.contiguous()
        hidden.block_scale = inputs.hidden_states_scale.t().contiguous()
        w13, scale = inputs.gemm1_weights, inputs.gemm1_weights_scale
        if not problem.gate_first:
            w13 = w13.view(torch.uint8).roll(problem.intermediate_size, dims=1).view(FP8)
            scale = scale.roll(problem.intermediate_size // BLOCK, dims=1)
        return cls(
            hidden,
            local.contiguous(),
            weights.float().contiguous(),
            w13,
            scale,
            inputs.gemm2_weights,
            inputs.gemm2_weights_scale,
            float(inputs.routed_scaling_factor),
            problem.num_local_experts == problem.num_experts,
        )
