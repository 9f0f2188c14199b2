"""What the tests of flashinfer's two backends share: a package in its place, recorded signatures, inputs."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch

from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.problem import MoEProblem

TRTLLM = "from trtllm_emulation import trtllm_fp8_block_scale_moe"
CUTLASS = "from cutlass_emulation import cutlass_fused_moe"
JIT = """
from pathlib import Path

class Spec:
    name = "fused_moe_90"
    is_aot, is_compiled, sources = {is_aot}, {is_compiled}, [Path(p) for p in {sources}]

    def get_library_path(self):
        return Path("/somewhere/fused_moe_90.so")

def gen_cutlass_fused_moe_sm90_module():
    {before}
    return Spec()
"""
CPP_EXT = """
def get_cuda_version():
    return "{cuda}"

def is_cuda_version_at_least(wanted):
    return [int(n) for n in "{cuda}".split(".")] >= [int(n) for n in wanted.split(".")]
"""


def signature_of(rows: Sequence[Mapping[str, str]]) -> inspect.Signature:
    """A recorded signature; defaults are their source text."""
    return inspect.Signature(
        [
            inspect.Parameter(
                row["name"], inspect._ParameterKind[row["kind"]], default=row.get("default", inspect.Parameter.empty)
            )
            for row in rows
        ]
    )


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Nothing of flashinfer is imported at the start; what was is back at the end."""
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "flashinfer"}

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
            del sys.modules[name]

    forget()
    yield
    forget()
    sys.modules.update(saved)


def write_package(folder: Path, code: str, version: str, package: str = "flashinfer-python") -> Path:
    """Install ``flashinfer`` with this code as ``flashinfer.fused_moe``; the package's folder."""
    inside = folder / "flashinfer"
    inside.mkdir()
    (inside / "__init__.py").write_text("")
    (inside / "fused_moe.py").write_text(textwrap.dedent(code))
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return inside


def write_cutlass_package(
    folder: Path,
    code: str = CUTLASS,
    version: str = "0.7.2",
    *,
    is_aot: bool = True,
    is_compiled: bool = False,
    sources: tuple[str, ...] = (),
    cuda: str = "13.0",
    before: str = "pass",
) -> None:
    """Install ``flashinfer`` with the state of its CUTLASS module, and CUDA."""
    jit = write_package(folder, code, version) / "jit"
    jit.mkdir()
    (jit / "__init__.py").write_text("")
    spec = JIT.format(is_aot=is_aot, is_compiled=is_compiled, sources=list(sources), before=before)
    (jit / "fused_moe.py").write_text(spec)
    (jit / "cpp_ext.py").write_text(CPP_EXT.format(cuda=cuda))


@contextlib.contextmanager
def tools_in(folder: Path) -> Iterator[Path]:
    """A machine whose only programs are nvcc and ninja, in this folder."""
    folder.mkdir()
    for name in ("nvcc", "ninja"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    others = ("CUDA_HOME", "TRTLLM_DG_NVCC_COMPILER", "FLASHINFER_DISABLE_JIT")
    with mock.patch.dict(os.environ, {"PATH": str(folder)}):
        for name in others:
            os.environ.pop(name, None)
        yield folder


@contextlib.contextmanager
def imported_from(folder: Path) -> Iterator[None]:
    """What is installed in the folder comes first, and nothing of flashinfer is imported before or after."""
    with forgotten(), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        importlib.invalidate_caches()
        yield


def inputs_of_any_sign(
    tokens: int, offset: int, problem: MoEProblem, seed: int = 0, device: torch.device | str = "cpu"
) -> MoEInputs:
    """Random inputs; the scales have both signs, as flashinfer-bench's."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    e, h, i = problem.num_local_experts, problem.hidden_size, problem.intermediate_size
    return MoEInputs(
        routing_logits=randn(tokens, problem.num_experts),
        routing_bias=(0.1 * randn(problem.num_experts)).bfloat16(),
        hidden_states=randn(tokens, h).clamp(-2, 2).to(FP8),
        hidden_states_scale=randn(h // 128, tokens),
        gemm1_weights=randn(e, 2 * i, h).clamp(-2, 2).to(FP8),
        gemm1_weights_scale=0.1 * randn(e, 2 * i // 128, h // 128),
        gemm2_weights=randn(e, h, i).clamp(-2, 2).to(FP8),
        gemm2_weights_scale=0.1 * randn(e, h // 128, i // 128),
        local_expert_offset=offset,
        routed_scaling_factor=2.5,
    )
