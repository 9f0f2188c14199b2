"""Peer ``sglang_triton``: SGLang's default MoE runner on Hopper (``moe_runner/triton_utils/fused_moe.py``).

Sorting by `moe_align_block_size`, GEMM1, SwiGLU, quantisation, GEMM2, and the sum over a token's experts. Two steps are
other kernels of SGLang's own than its runner starts, which compiles these at first use: `act_and_mul_triton` where some
experts are elsewhere and `silu_and_mul` of sgl-kernel where none is, for a CUDA kernel that does the same; and
`moe_sum_reduce` at T <= 32 too, where the runner has torch.compile.

Its tiles (``tiles``):

``default``
    SGLang's for block scales, whatever T is.
``sglang``, ``vllm``
    A tuned file of their wheels, see `tiles.shipped`.
``tuned``
    The best of a sweep on this GPU, see `tiles.tuned`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.inputs import MoEInputs
from hybrid_moe.measure.bench import Case, Rotation, poisoned_output
from hybrid_moe.measure.timing import time_graph
from hybrid_moe.numerics import DEFAULT_TOLERANCE
from hybrid_moe.problem import MoEProblem

from . import sglang, tiles
from .sglang import BLOCK, Layer
from .tiles import Tile

NAME = "peer:sglang_triton"
CANDIDATES = tuple(Candidate(NAME, {"tiles": name}) for name in ("default", "sglang", "vllm", "tuned"))


def prepare(inputs: MoEInputs, problem: MoEProblem, choice: Candidate) -> Callable[[torch.Tensor], None]:
    """The call for one layer and its inputs.

    Raises
    ------
    BackendUnsupportedError
        SGLang or sgl-kernel isn't there, or no file has tiles for the layer.
    """
    reasons = sglang.not_supported_reasons()
    tile = tiles.named(str(choice.config["tiles"]), problem, inputs.num_tokens)
    if tile is None:
        reasons.append(f"no file of tiles={choice.config['tiles']} for {tiles.file_name(problem)}")
    if reasons or tile is None:
        raise BackendUnsupportedError(choice, reasons)
    layer = Layer.of(inputs, problem)
    return lambda output: run(layer, tile, output)


def tune(case: Case) -> Tile | None:
    """The fastest tile of the sweep that is right; ``None`` if none is.

    Raises
    ------
    BackendUnsupportedError
        SGLang or sgl-kernel isn't there.
    """
    if reasons := sglang.not_supported_reasons():
        raise BackendUnsupportedError(CANDIDATES[-1], reasons)
    layers = [Layer.of(inputs, case.problem) for inputs in case.inputs]
    outputs = [poisoned_output(inputs, case.problem) for inputs in case.inputs]

    def time(tile: Tile) -> float | None:
        runs = [functools.partial(run, layer, tile) for layer in layers]
        rotation = Rotation(case, DEFAULT_TOLERANCE, runs, outputs)
        rotation.poison()
        try:
            for call in rotation.calls():
                call()
        except OutOfResources:  # of shared memory
            return None
        return time_graph(rotation.calls(), runs=3).median if rotation.check()[1].passed else None

    return tiles.fastest(tiles.worth_trying(case.problem, case.workload.num_tokens), time)


def run(layer: Layer, tile: Tile, output: torch.Tensor) -> None:
    """Write the layer's result into ``output``."""
    kernels, ops = sglang.kernels("fused_moe_triton_kernels"), sglang.ops()
    ids, weights = layer.topk_ids, layer.topk_weights
    tokens, top_k = ids.shape
    experts, width, hidden = layer.w13.shape
    rows, device = tokens * top_k, ids.device

    # As the runner's `moe_align_block_size`: one expert more, for the pairs of other ranks.
    block = tile["BLOCK_SIZE_M"]
    padded = rows * block if rows < experts + 1 else rows + (experts + 1) * (block - 1)
    order = torch.empty(padded, dtype=torch.int32, device=device)
    expert_of_block = torch.empty(triton.cdiv(padded, block), dtype=torch.int32, device=device)
    used = torch.empty(1, dtype=torch.int32, device=device)
    scratch = torch.empty(experts + 2, dtype=torch.int32, device=device)
    ops.moe_align_block_size.default(ids, experts + 1, block, order, expert_of_block, used, scratch, True, False)

    def gemm(a: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, c: torch.Tensor, weigh: bool) -> None:
        kernels.invoke_fused_moe_kernel(
            a, b, None, c, None, b_scale, None, weights, ids, order, expert_of_block, used,
            weigh, 1 if weigh else top_k, tile,
            compute_type=tl.bfloat16, use_fp8_w8a8=True, use_int8_w8a8=False, use_int8_w8a16=False,
            use_int4_w4a16=False, per_channel_quant=False, block_shape=[BLOCK, BLOCK], filter_expert=not layer.is_whole,
        )  # fmt: skip

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    gate_up, activated, down = empty(rows, width), empty(rows, width // 2), empty(tokens, top_k, hidden)
    gemm(layer.hidden, layer.w13, layer.w13_scale, gate_up, False)
    if layer.is_whole:
        ops.silu_and_mul.default(activated, gate_up)
    else:
        kernels.act_and_mul_triton(gate_up, activated, tile, topk_ids=ids)
    gemm(activated, layer.w2, layer.w2_scale, down, True)
    ops.moe_sum_reduce.default(down, output, layer.factor)
