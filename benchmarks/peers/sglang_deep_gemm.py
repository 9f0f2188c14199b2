"""Peer ``sglang_deep_gemm``: DeepGEMM as SGLang's runner drives it (``moe_runner/deep_gemm.py``), on Hopper.

Its two ways (``layout``):

``masked``
    What ``--moe-runner-backend deep_gemm`` does without DeepEP: each expert has room for all tokens, and its count is
    read on the device.
``contiguous``
    What it does with DeepEP's normal dispatch, for prefill: the experts' rows one after the other, each padded to 128.
    The host has to know the counts. DeepEP tells them; here they are known before the call.

SwiGLU with quantisation is a Triton kernel of SGLang's in the masked layout, which its runner takes where the one that
it compiles at first use can't; in the contiguous one `silu_and_mul` and the quantisation of sgl-kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.kernels.grouped_gemm import libraries
from hybrid_moe.problem import MoEProblem

from . import sglang
from .sglang import BLOCK, Layer

NAME = "peer:sglang_deep_gemm"
CANDIDATES = tuple(Candidate(NAME, {"layout": name}) for name in ("masked", "contiguous"))


def prepare(inputs: MoEInputs, problem: MoEProblem, choice: Candidate) -> Callable[[torch.Tensor], None]:
    """The call for one layer and its inputs.

    Raises
    ------
    BackendUnsupportedError
        A library isn't there, or the masked layout doesn't fit in memory twice: for the calls before the graph, and
        for the graph.
    """
    device = inputs.hidden_states.device
    reasons = libraries.deep_gemm_reasons(DeviceKey.of(device)) or sglang.not_supported_reasons()
    masked = choice.config["layout"] == "masked"
    if not reasons and masked:
        wanted, free = 2 * masked_bytes(problem, inputs.num_tokens), torch.cuda.mem_get_info(device)[0]
        if wanted > free:
            reasons.append(
                f"the masked layout takes {wanted / 1e9:.0f} GB, twice its buffers; {free / 1e9:.0f} are free"
            )
    if reasons:
        raise BackendUnsupportedError(choice, reasons)
    layer = Layer.of(inputs, problem)
    if masked:
        return lambda output: run_masked(layer, output)
    weights, counts = layer.topk_weights * layer.factor, padded_counts(layer)
    total = int(counts.sum())
    return lambda output: run_contiguous(layer, weights, counts, total, output)


def rows_of_expert(num_tokens: int) -> int:
    """What the masked layout reserves for each."""
    return (num_tokens // 256 + 1) * 256


def masked_bytes(problem: MoEProblem, num_tokens: int) -> int:
    """Of the masked layout's four buffers."""
    h, i = problem.hidden_size, problem.intermediate_size
    return problem.num_local_experts * rows_of_expert(num_tokens) * (h + 2 * 2 * i + i + 2 * h)


def padded_counts(layer: Layer) -> torch.Tensor:
    """``[E]`` int32: rows of each expert in whole tiles, as DeepEP counts them."""
    ids = layer.topk_ids.flatten()
    counts = torch.bincount(ids[ids >= 0], minlength=layer.w13.shape[0])
    return ((counts + BLOCK - 1) // BLOCK * BLOCK).int()


def run_masked(layer: Layer, output: torch.Tensor) -> None:
    """Write the layer's result into ``output``."""
    library, kernels = libraries.deep_gemm(), sglang.kernels("ep_moe_kernels")
    layout = importlib.import_module("deep_gemm.utils.layout")
    (tokens, top_k), (experts, width, hidden) = layer.topk_ids.shape, layer.w13.shape
    counts, expected, places, rows, scale = kernels.moe_ep_deepgemm_preprocess(
        layer.topk_ids, experts, layer.hidden, top_k, [BLOCK, BLOCK]
    )
    size = rows.shape[:2]

    def gemm(a: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
        c = torch.empty((*size, b.shape[1]), dtype=torch.bfloat16, device=a.device)
        aligned = layout.get_mn_major_tma_aligned_tensor(scale)
        library.fp8_m_grouped_gemm_nt_masked((a, aligned), (b, b_scale), c, counts, expected)
        return c

    gate_up = gemm(rows, scale, layer.w13, layer.w13_scale)
    del rows, scale  # as the runner does: the largest buffers there are
    activated = torch.empty((*size, width // 2), dtype=FP8, device=gate_up.device)
    scale = torch.empty((*size, width // 2 // BLOCK), dtype=torch.float32, device=gate_up.device)
    kernels.silu_and_mul_masked_post_quant_fwd(gate_up, activated, scale, BLOCK, counts)
    del gate_up
    down = gemm(activated, scale, layer.w2, layer.w2_scale)
    kernels.post_reorder_deepgemm(
        down, output, places, layer.topk_ids, layer.topk_weights, top_k, tokens, hidden, layer.factor
    )


def run_contiguous(layer: Layer, weights: torch.Tensor, counts: torch.Tensor, total: int, output: torch.Tensor) -> None:
    """Write the layer's result into ``output``.

    ``weights`` have the factor in them; ``counts`` and ``total`` are `padded_counts` and their sum.
    """
    library, kernels, ops = libraries.deep_gemm(), sglang.kernels("ep_moe_kernels"), sglang.ops()
    device, (_, width, hidden) = output.device, layer.w13.shape
    rows = torch.empty((total, hidden), dtype=FP8, device=device)
    scale = torch.empty((total, hidden // BLOCK), dtype=torch.float32, device=device)
    expert_of_row, places = counts.new_empty(total), torch.empty_like(layer.topk_ids)
    kernels.ep_scatter(
        layer.hidden, layer.hidden.block_scale, layer.topk_ids, counts, torch.empty_like(counts), rows, scale,
        expert_of_row, places,
    )  # fmt: skip

    def gemm(a: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
        c = torch.empty((total, b.shape[1]), dtype=torch.bfloat16, device=device)
        aligned = kernels.tma_align_input_scale(scale)
        library.m_grouped_fp8_gemm_nt_contiguous((a, aligned), (b, b_scale), c, expert_of_row)
        return c

    gate_up = gemm(rows, scale, layer.w13, layer.w13_scale)
    activated = torch.empty((total, width // 2), dtype=torch.bfloat16, device=device)
    ops.silu_and_mul.default(activated, gate_up)
    down = gemm(*sglang.quantize(activated), layer.w2, layer.w2_scale)
    kernels.ep_gather(down, layer.topk_ids, weights, places, output)
