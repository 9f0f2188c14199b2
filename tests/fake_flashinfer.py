"""What the tests of flashinfer's two backends share: a package in its place, recorded signatures, inputs."""

from __future__ import annotations

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.problem import MoEProblem


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
