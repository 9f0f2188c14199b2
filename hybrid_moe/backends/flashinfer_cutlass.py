"""flashinfer's `cutlass_fused_moe` with DeepSeek's FP8 block scales, for SM90, behind this package's routing.

What follows was read in the sources of the released wheels; ``kernels`` is
``csrc/fused_moe/cutlass_backend/cutlass_fused_moe_kernels.cuh``, ``binding`` the
``flashinfer_cutlass_fused_moe_binding.cu`` next to it, ``gemm`` and ``gemm_kernel`` ``fp8_blockscale_gemm.cu`` and
``fp8_blockscale_gemm_kernel.cuh``, ``deep_gemm`` the folder ``csrc/nv_internal/tensorrt_llm/deep_gemm``, and line
numbers are those of 0.7.2.post1.

**What it takes.** Activations in bf16, and the routing's result: experts int32 ``[T, top_k]``, weights float32
``[T, top_k]``, applied as they are when the rows are added up (``kernels`` 1965-2033), so with the scaling factor in
them. `kernels.external` makes both, in two launches, or numbers experts again that were chosen before the call.

**Layouts.** The definition's own: GEMM1's first half is linear and its second the gate, ``silu(x2) * x1`` (``kernels``
2504-2533), so ``gate_first`` is refused: the halves of one expert can't be swapped by a view. ``quant_scales`` are the
weights' scales ``[E, 2I/128, H/128]`` and ``[E, H/128, I/128]`` (``binding`` 1543), read as packed.

**Expert parallelism.** To flashinfer a rank holds the experts from ``ep_rank * E`` to ``ep_rank * E + E - 1`` of
``ep_size * E``. Experts are numbered here so that the local ones are the first E, and ``ep_rank`` is 0: any offset will
do, and any number of experts. Ids outside are passed over, whatever they are, and a token without a local expert gets
zeros.

**Roundings.** The bf16 activations are quantised again, with a scale from their own largest value (``gemm_kernel``
894-985). GEMM1's result is bf16; SwiGLU is float32, stored as bf16 and quantised for GEMM2, whose result is bf16
(``kernels`` 3349-3417). Activations that were quantised with their own largest values, as a layer's are, come through
the first of these unharmed: the emulation's relative L2 against the definition is then 0.024, as with kernels that
round once. Others, as random e4m3 values that don't reach 448, give 0.045 there. No atomics are in this path (the fused
finalisation is for the other ones): same input, same bits.

**Compiling, twice.** flashinfer's module ``fused_moe_90`` is 248 units, over ten minutes on 16 cores, unless it was
built ahead: by ``flashinfer-jit-cache``, by an earlier call, or into the package's own ``data/aot``. And DeepGEMM
compiles its kernels with nvcc at run time, up to two for a T that calls for a tile not met before (``deep_gemm``,
``jit_utils.cuh`` 137: the tile depends on T itself), into ``TRTLLM_DG_CACHE_DIR`` or ``~/.tensorrt_llm``: a few
seconds each. So nvcc is wanted in any case, and each T has to be called once before it is timed, served or captured in
a CUDA graph; `bench.measure` does. Nothing is compiled by `prepare`.

**Memory.** Buffers have room for all ``T * top_k`` rows, local or not. The runner, one for the process, keeps the
largest T that it has seen and takes that much for the quantised activations ever after (``gemm`` 219): a call at T = 1
behind one at T = 14107 takes 0.8 GB.

**Tuning.** There is none in this path: profiling returns at once, and the tactics are a constant (``binding`` 694,
1064). Where the function has ``profile_ids`` (0.6.16 on) they are given, which spares the host two look-ups in a call.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..candidate import BackendUnsupportedError, Candidate, ConfigValue
from ..device import DeviceKey
from ..inputs import Inputs
from ..problem import MoEProblem
from . import flashinfer_package
from .base import Backend, Runner
from .flashinfer_package import PACKAGE

CAPABILITIES: tuple[tuple[int, int] | None, ...] = ((9, 0),)
# The block-scale path is left out of a module that is built with less.
CUDA = "12.8"

# What a call passes that isn't the same in every call of a layer.
_INPUTS = (
    "input",
    "token_selected_experts",
    "token_final_scales",
    "fc1_expert_weights",
    "fc2_expert_weights",
    "quant_scales",
    "output",
)


class FlashinferCutlass(Backend):
    """flashinfer's CUTLASS MoE around DeepGEMM. Needs the extra ``[flashinfer]``, SM90, CUDA 12.8 and nvcc."""

    name = "flashinfer_cutlass"

    def packages(self, config: Mapping[str, ConfigValue]) -> tuple[str, ...]:
        """The kernels are flashinfer's; the routing before them is Triton's."""
        return ("torch", "triton", PACKAGE)

    def not_supported_reasons(
        self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]
    ) -> list[str]:
        """Every reason against it: the device, flashinfer, the problem, the options, the compilers.

        flashinfer is imported only where the device is right and its version in range, and compiles nothing.
        """
        reasons = []
        if device.capability not in CAPABILITIES:
            have = ".".join(map(str, device.capability)) if device.capability else "unknown"
            reasons.append(f"compute capability of {device.name}: expected 9.0, got {have}")
        reasons += flashinfer_package.package_reasons()
        usable = not reasons
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed: pip install triton")
        if problem.weight_on_input:
            reasons.append("weight_on_input is True; the kernels weigh an expert's result")
        if problem.gate_first:
            reasons.append("gate_first is True; the kernels read the up half first")
        reasons += self.unknown_config_reasons(config, {})
        if usable:
            reasons += _compiler_reasons()
        return reasons

    def remarks(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> list[str]:
        """Whether flashinfer's module is built, or by the first call."""
        return [module_state()]

    def prepare(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> Runner:
        """Check the function's signature against the call, and make the runner. Compiles nothing: see the module.

        Raises
        ------
        BackendUnsupportedError
            With all of `not_supported_reasons`; or if flashinfer's function can't be called as this backend does.
        """
        self.refuse_if_unsupported(problem, device, config)
        moe, reasons = flashinfer_package.load("cutlass_fused_moe", passed(problem))
        if moe is None or reasons:
            raise BackendUnsupportedError(Candidate(self.name, config), reasons)
        return _CutlassRunner(moe, problem)


def layer_arguments(problem: MoEProblem) -> dict[str, Any]:
    """The keyword arguments that are the same in every call of a layer."""
    return {
        "output_dtype": torch.bfloat16,
        "ep_size": -(-problem.num_experts // problem.num_local_experts),
        "ep_rank": 0,
        "use_deepseek_fp8_block_scale": True,
        # flashinfer would choose the same on this device, after asking the capability in each call.
        "enable_pdl": True,
    }


def passed(problem: MoEProblem) -> set[str]:
    """Names of the arguments that every call passes."""
    return {*_INPUTS, *layer_arguments(problem)}


class _CutlassRunner(Runner):
    def __init__(self, moe: Callable[..., Any], problem: MoEProblem) -> None:
        from ..kernels import external, interpreter, launcher

        self._moe = moe
        self._problem = problem
        self._layer_arguments = layer_arguments(problem)
        if flashinfer_package.takes(moe, "profile_ids"):
            self._layer_arguments["profile_ids"] = [-1, -1]  # what its tuner answers without a surrounding autotune()
        self._external_inputs = external.external_inputs
        self._limits_of = launcher.limits_of
        if interpreter.interpreting():
            interpreter.repair()

    def run(self, inputs: Inputs, output: torch.Tensor) -> None:
        """Route, dequantise, and call flashinfer.

        Raises
        ------
        ValueError
            Weights don't start at a multiple of 16 bytes, which the hardware's block copies want.
        """
        for name in ("gemm1_weights", "gemm2_weights"):
            if getattr(inputs, name).data_ptr() % 16:
                raise ValueError(
                    f"{name} doesn't start at a multiple of 16 bytes, as flashinfer_cutlass wants: call .clone()"
                )
        with torch.cuda.device_of(output):  # Triton launches on the current device
            external = self._external_inputs(inputs, self._problem, self._limits_of(output.device))
            self._moe(
                input=external.hidden_states,
                token_selected_experts=external.experts,
                token_final_scales=external.weights,
                fc1_expert_weights=inputs.gemm1_weights,
                fc2_expert_weights=inputs.gemm2_weights,
                quant_scales=[inputs.gemm1_weights_scale, inputs.gemm2_weights_scale],
                output=output,
                **self._layer_arguments,
            )

    def workspace_bytes(self, num_tokens: int) -> int:
        """What `run` allocates, and flashinfer without what depends on neither T nor the widths (some MB).

        As ``getWorkspaceDeviceBufferSizes`` has it (``kernels`` 2978), in a process that has seen no larger T.
        """
        p = self._problem.all_routed
        e, h, i = p.num_local_experts, p.hidden_size, p.intermediate_size
        rows = num_tokens * p.top_k
        external = num_tokens * h * 2 + rows * 8
        maps = 4 * (4 * rows + 2 * e * num_tokens)  # permutations, sorted experts, each expert's tokens and scores
        gemm1_and_2 = rows * 2 * max(h, i) + rows * 2 * (2 * i)
        padded = (rows + e * 31) // 32 * 32
        quantized = max((rows + 3) // 4 * 4 * width + padded * (width // p.block) * 4 for width in (h, i))
        return external + maps + gemm1_and_2 + quantized


def _nvcc() -> str | None:
    """The compiler that flashinfer's DeepGEMM will start (``deep_gemm``, ``compiler.cuh`` 97-120)."""
    named = os.environ.get("TRTLLM_DG_NVCC_COMPILER")
    home = os.environ.get("CUDA_HOME")
    return shutil.which(named or (str(Path(home) / "bin" / "nvcc") if home else "nvcc"))


def _spec() -> Any:
    """The module as flashinfer describes it; RuntimeError or OSError where it can't.

    Writes the sources that it generates into flashinfer's cache; compiles nothing.
    """
    return importlib.import_module("flashinfer.jit.fused_moe").gen_cutlass_fused_moe_sm90_module()


def _compiler_reasons() -> list[str]:
    reasons = []
    if _nvcc() is None:
        reasons.append(
            "nvcc isn't found, with which flashinfer compiles DeepGEMM's kernels at run time: set CUDA_HOME to a CUDA "
            f"toolkit {CUDA} or newer"
        )
    try:
        toolkit = importlib.import_module("flashinfer.jit.cpp_ext")
        if not toolkit.is_cuda_version_at_least(CUDA):
            reasons.append(f"CUDA: expected {CUDA} or newer, got {toolkit.get_cuda_version()}")
        spec = _spec()
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: neither CUDA nor a GPU, as flashinfer puts it
        return [*reasons, f"{PACKAGE} {flashinfer_package.installed_version()} can't be used: {error}"]
    if not spec.is_aot:
        lacking = [] if shutil.which("ninja") else ["ninja isn't found: pip install ninja"]
        if os.environ.get("FLASHINFER_DISABLE_JIT"):
            lacking.append("FLASHINFER_DISABLE_JIT is set")
        lacking += [f"its source {path} is missing" for path in spec.sources if not Path(path).exists()][:1]
        if lacking:
            reasons.append(
                f"flashinfer's module {spec.name} isn't built ahead (as by flashinfer-jit-cache), and can't be built: "
                + "; ".join(lacking)
            )
    return reasons


def module_state() -> str:
    """Whether flashinfer's module is built ahead, built on this machine, or will be by the first call."""
    spec = _spec()
    if spec.is_aot:
        return f"flashinfer's module {spec.name} is built ahead: {spec.get_library_path()}"
    if spec.is_compiled:
        return f"flashinfer's module {spec.name} was built here: {spec.get_library_path()}"
    build = "from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module as m; m().build_and_load()"
    return (
        f"flashinfer's module {spec.name} isn't built: the first call does it, in ten minutes or more "
        f"({len(spec.sources)} units). Do it before, by python -c '{build}', or install flashinfer-jit-cache"
    )
