"""Peers: the layer as a user of another library gets it, from that library's own pieces.

They take what our candidates work out themselves as given, all in their favour: the experts and weights of each token
and activations in FP8; weights with the gate half first, as they are loaded by SGLang; and DeepGEMM's contiguous layout
the counts of rows on the host. Where a library is missing the candidate is refused.
"""

from __future__ import annotations

from hybrid_moe.candidate import Candidate
from hybrid_moe.measure.bench import Prepare, preparing
from hybrid_moe.problem import MoEProblem

from . import sglang_deep_gemm, sglang_triton

CANDIDATES = (*sglang_triton.CANDIDATES, *sglang_deep_gemm.CANDIDATES)


def prepare_of(problem: MoEProblem, choice: Candidate) -> Prepare:
    """How a candidate is prepared, a peer or one of ours."""
    for peer in (sglang_triton, sglang_deep_gemm):
        if choice.backend == peer.NAME:
            return lambda inputs: peer.prepare(inputs, problem, choice)
    return preparing(problem, choice)
