"""FP8 pipelines in torch that are right, each with the roundings of a backend.

`hybrid_moe.reference` is the specification; here the same layer is computed pair by pair of (token, local expert), so
that a corruption can change one expert, one pair or one rounding and leave the rest as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hybrid_moe.inputs import MoEInputs
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import chosen_experts, dequantize_blocks, dequantize_rows, quantize_rows


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    """Stored as bfloat16 and read back."""
    return x.bfloat16().float()


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Stored as e4m3 with one scale for 128 columns of a row and read back."""
    return dequantize_rows(*quantize_rows(x))


def to_bf16_and_fp8(x: torch.Tensor) -> torch.Tensor:
    """Stored as bfloat16 and quantised from that."""
    return to_fp8(to_bf16(x))


def cut_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """Stored as bfloat16 without rounding."""
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32)


def keep(x: torch.Tensor) -> torch.Tensor:
    """Not rounded."""
    return x


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a pipeline rounds on the way; all store the rows of GEMM2 as bfloat16.

    Attributes
    ----------
    inputs, gemm1, activation, weights, output
        Rounding of the hidden states, of GEMM1's result, of SwiGLU's, of the routing weights and of the output.
    own
        Whether it is judged as a kernel of this package.
    """

    name: str
    inputs: Callable[[torch.Tensor], torch.Tensor] = keep
    gemm1: Callable[[torch.Tensor], torch.Tensor] = keep
    activation: Callable[[torch.Tensor], torch.Tensor] = to_fp8
    weights: Callable[[torch.Tensor], torch.Tensor] = keep
    output: Callable[[torch.Tensor], torch.Tensor] = to_bf16
    own: bool = True


FUSED = Pipeline("GEMM1 in float32 (triton)")
PIPELINES = (
    FUSED,
    Pipeline("GEMM1 in bfloat16 (sgl_kernel, deep_gemm)", gemm1=to_bf16),
    Pipeline("output cut off to bfloat16", output=cut_to_bf16),
    Pipeline(
        "bfloat16 in and between (flashinfer_cutlass)",
        inputs=to_bf16_and_fp8,
        gemm1=to_bf16,
        activation=to_bf16_and_fp8,
        own=False,
    ),
    Pipeline("GEMM1 in e4m3 (flashinfer_trtllm)", gemm1=to_fp8, weights=to_bf16, own=False),
)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (token, local expert) pairs of a call, sorted by expert: ``[P]`` each."""

    token: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, inputs: MoEInputs, problem: MoEProblem) -> Pairs:
        """As the routing chooses them."""
        ids, weights = chosen_experts(inputs, problem)
        local = ids - inputs.local_expert_offset
        token, position = ((local >= 0) & (local < problem.num_local_experts)).nonzero(as_tuple=True)
        order = local[token, position].sort(stable=True).indices
        token, position = token[order], position[order]
        return cls(token, local[token, position], weights[token, position])

    def of_expert(self, expert: int) -> torch.Tensor:
        """Numbers of an expert's pairs."""
        return (self.expert == expert).nonzero().flatten()


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's weights in float32: ``[2I, H]`` and ``[H, I]``."""

    w13: torch.Tensor
    w2: torch.Tensor

    @classmethod
    def of(cls, inputs: MoEInputs, number: int) -> Expert:
        """Expanded from e4m3."""
        return cls(
            dequantize_blocks(inputs.gemm1_weights[number], inputs.gemm1_weights_scale[number]),
            dequantize_blocks(inputs.gemm2_weights[number], inputs.gemm2_weights_scale[number]),
        )

    def gemm1(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 2I]``."""
        return x @ self.w13.t()

    def gemm2(self, activated: torch.Tensor) -> torch.Tensor:
        """``[n, H]``."""
        return activated @ self.w2.t()


def swiglu(hidden: torch.Tensor) -> torch.Tensor:
    """``[n, 2I]``, up half first, to ``[n, I]``."""
    up, gate = hidden.chunk(2, dim=1)
    return gate / (1.0 + torch.exp(-gate)) * up


def hidden_rows(inputs: MoEInputs, token: torch.Tensor) -> torch.Tensor:
    """``[n, H]`` float32."""
    return dequantize_rows(inputs.hidden_states[token], inputs.hidden_states_scale[:, token])


def rows_of(x: torch.Tensor, expert: Expert, pipeline: Pipeline) -> torch.Tensor:
    """What GEMM2 stores for these rows: ``[n, H]``."""
    activated = pipeline.activation(swiglu(pipeline.gemm1(expert.gemm1(pipeline.inputs(x)))))
    return to_bf16(expert.gemm2(activated))


def combined(rows: torch.Tensor, pairs: Pairs, num_tokens: int, pipeline: Pipeline) -> torch.Tensor:
    """``[T, H]``."""
    output = torch.zeros((num_tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
    return pipeline.output(output.index_add_(0, pairs.token, rows * pipeline.weights(pairs.weight).unsqueeze(1)))


def results(
    inputs: MoEInputs, problem: MoEProblem, pipelines: Sequence[Pipeline] = PIPELINES
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The definition's result, each pipeline's by name, and which tokens have local work."""
    pairs, tokens = Pairs.of(inputs, problem), inputs.num_tokens
    zeros = torch.zeros((tokens, problem.hidden_size), dtype=torch.float32, device=pairs.token.device)
    reference, outputs = zeros, {p.name: zeros.clone() for p in pipelines}
    for number in range(problem.num_local_experts):
        mine = pairs.of_expert(number)
        if not len(mine):
            continue
        token, weight = pairs.token[mine], pairs.weight[mine].unsqueeze(1)
        expert, x = Expert.of(inputs, number), hidden_rows(inputs, token)
        hidden = expert.gemm1(x)
        reference.index_add_(0, token, expert.gemm2(swiglu(hidden)) * weight)
        rows: dict[object, torch.Tensor] = {}
        for p in pipelines:
            same = (p.inputs, p.gemm1, p.activation)
            if same not in rows:
                mid = hidden if p.inputs is keep else expert.gemm1(p.inputs(x))
                rows[same] = to_bf16(expert.gemm2(p.activation(swiglu(p.gemm1(mid)))))
            outputs[p.name].index_add_(0, token, rows[same] * p.weights(weight))
    work = torch.zeros(tokens, dtype=torch.bool, device=pairs.token.device)
    work[pairs.token] = True
    return reference, {p.name: p.output(outputs[p.name]) for p in pipelines}, work
