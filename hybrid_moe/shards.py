"""One rank's part of a layer: some of its experts, or a shard of each, padded to whole blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .hf_config import BLOCK, padded_width

__all__ = ["ExpertShard", "expert_parallel_shard", "tensor_parallel_shard"]


class ExpertShard(NamedTuple):
    """Weights as `fused_moe` takes them, with an intermediate size of whole blocks."""

    gemm1_weights: torch.Tensor
    gemm1_weights_scale: torch.Tensor
    gemm2_weights: torch.Tensor
    gemm2_weights_scale: torch.Tensor


def expert_parallel_shard(
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    *,
    rank: int,
    ep: int,
) -> ExpertShard:
    """A rank's experts, whose offset is ``rank * E // ep``: views of the tensors that `tensor_parallel_shard` cuts.

    Raises
    ------
    ValueError
        ``ep`` doesn't divide the experts, or there is no such rank.
    """
    experts = gemm1_weights.shape[0]
    if ep < 1 or experts % ep:
        raise ValueError(f"ep: expected a divisor of the {experts} experts, got {ep}")
    if not 0 <= rank < ep:
        raise ValueError(f"rank: expected 0 to {ep - 1}, got {rank}")
    own = slice(rank * experts // ep, (rank + 1) * experts // ep)
    return ExpertShard(gemm1_weights[own], gemm1_weights_scale[own], gemm2_weights[own], gemm2_weights_scale[own])


def tensor_parallel_shard(
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    *,
    rank: int,
    tp: int,
) -> ExpertShard:
    """Cut a rank's columns of the activation out of whole experts: rows of both halves of GEMM1, columns of GEMM2.

    A shard may begin or end within a scale's block of 128, as 1536 columns among 8 ranks do. Its pieces, cut at the
    blocks' ends, are padded with zeros to blocks of their own, so that each keeps its scale. Zero rows of GEMM1 give a
    zero activation, and zero columns of GEMM2 take none: the result is the unpadded shard's. The sum of all ranks'
    outputs is the layer's.

    Parameters
    ----------
    gemm1_weights, gemm1_weights_scale
        ``[E, 2I, H]`` float8_e4m3fn and ``[E, 2I/128, H/128]`` float32, either half first.
    gemm2_weights, gemm2_weights_scale
        ``[E, H, I]`` float8_e4m3fn and ``[E, H/128, I/128]`` float32.
    rank, tp
        Of the ranks that share every expert.

    Returns
    -------
    ExpertShard
        Copies, of ``padded_width(I, tp)`` columns: the same on every rank.

    Raises
    ------
    ValueError
        ``tp`` doesn't divide the width, or there is no such rank.
    """
    experts, double, hidden = gemm1_weights.shape
    width = double // 2
    if tp < 1 or width % tp:
        raise ValueError(f"tp: expected a divisor of the intermediate size {width}, got {tp}")
    if not 0 <= rank < tp:
        raise ValueError(f"rank: expected 0 to {tp - 1}, got {rank}")
    padded, shard = padded_width(width, tp), width // tp
    start, stop = rank * shard, (rank + 1) * shard
    gemm1 = gemm1_weights.new_zeros((experts, 2, padded, hidden))
    gemm1_scale = gemm1_weights_scale.new_ones((experts, 2, padded // BLOCK, hidden // BLOCK))
    gemm2 = gemm2_weights.new_zeros((experts, hidden, padded))
    gemm2_scale = gemm2_weights_scale.new_ones((experts, hidden // BLOCK, padded // BLOCK))
    halves = gemm1_weights.view(experts, 2, width, hidden)
    half_scales = gemm1_weights_scale.view(experts, 2, -1, hidden // BLOCK)
    for place, block in enumerate(range(start // BLOCK, -(-stop // BLOCK))):
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        to = slice(place * BLOCK, place * BLOCK + last - first)
        gemm1[:, :, to] = halves[:, :, first:last]
        gemm1_scale[:, :, place] = half_scales[:, :, block]
        gemm2[:, :, to] = gemm2_weights[:, :, first:last]
        gemm2_scale[:, :, place] = gemm2_weights_scale[:, :, block]
    return ExpertShard(gemm1.flatten(1, 2), gemm1_scale.flatten(1, 2), gemm2, gemm2_scale)
