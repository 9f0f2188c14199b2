"""Where the intermediate tensors of a call lie: as many bytes as `workspace_bytes` says, and none of them twice."""

import itertools

import pytest
import torch

from hybrid_moe import DeviceKey, backends
from hybrid_moe.kernels import pipeline
from hybrid_moe.kernels.arena import ALIGNMENT, Arena
from hybrid_moe.kernels.grouped_gemm.deep_gemm import DeepGemmGroupedGemm
from hybrid_moe.kernels.grouped_gemm.sgl import SglGroupedGemm
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.measure.workloads import MODELS
from hybrid_moe.policy import resolve

TOKENS = (1, 2, 15, 16, 33, 80, 901, 2560, 14107)
# Tensors that are parts of another one, or take its memory once its last reader is done.
PARTS = {
    "counters": {"tokens_per_expert", "finished", "block_arrivals", "gemm1_tile_counter", "gemm2_tile_counter"},
    "shared": {"gathered", "gemm1", "rows"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gemm", [TritonGroupedGemm, SglGroupedGemm, DeepGemmGroupedGemm])
def test_no_two_tensors_overlap(gemm, model):
    flow = pipeline.Pipeline(MODELS[model], gemm())
    for tokens in TOKENS:
        arena = flow.arena(tokens)
        places = dict(arena.places)
        for whole, parts in PARTS.items():
            for part in parts & places.keys() if whole in places else ():
                inner, outer = places.pop(part), places[whole]
                assert inner.offset % 16 == 0
                assert outer.offset <= inner.offset and inner.offset + inner.bytes <= outer.offset + outer.bytes
        ends = sorted((place.offset, place.offset + place.bytes) for place in places.values())
        for (_, end), (start, _) in itertools.pairwise([(0, 0), *ends, (arena.bytes, arena.bytes)]):
            assert end <= start < end + ALIGNMENT  # nothing is wasted but for the alignment
        assert all(place.offset % ALIGNMENT == 0 for place in places.values())
        assert arena.bytes % ALIGNMENT == 0


@pytest.mark.parametrize("tokens", TOKENS)
def test_all_that_is_counted_with_is_cleared_together(tokens):
    problem = MODELS["deepseek-v3"]
    gemm = TritonGroupedGemm((9, 0))
    places = pipeline.Pipeline(problem, gemm).arena(tokens).places
    assert (places["tokens_per_expert"].offset, places["tokens_per_expert"].shape) == (places["counters"].offset, (32,))
    assert (places["finished"].offset, places["finished"].shape) == (places["tokens_per_expert"].offset + 32 * 4, (33,))
    end = (32 + 36) * 4
    for name, numbers in gemm.counters(problem, tokens).items():
        assert (places[name].offset, places[name].shape) == (places["counters"].offset + end, (numbers,))
        end += (numbers + 3) // 4 * 16
    assert places["counters"].bytes == end


def test_workspace_bytes():
    problem = MODELS["deepseek-v3"]
    runner = backends.prepare(problem, DeviceKey("gpu_x", (9, 0)), resolve.as_candidate("triton_fused"))
    for tokens in TOKENS:
        assert (
            runner.workspace_bytes(tokens) == pipeline.Pipeline(problem, TritonGroupedGemm((9, 0))).arena(tokens).bytes
        )
    # As docs/serving.md has it.
    assert [round(runner.workspace_bytes(tokens) / 1e6, 1) for tokens in (16, 901, 14107)] == [3.2, 118.7, 1859.0]


def test_tensors_are_views():
    arena = Arena()
    arena.reserve("bytes", (3,), torch.uint8)
    arena.reserve("numbers", (2, 5), torch.float32)
    arena.overlay("row", arena.places["numbers"].offset + 20, (5,), torch.float32)
    arena.overlay("none", arena.bytes, (0, 4), torch.int64)
    memory = torch.zeros(arena.bytes, dtype=torch.uint8)
    tensors = arena.tensors(memory)
    tensors["numbers"].copy_(torch.arange(10).view(2, 5))
    assert tensors["row"].tolist() == [5, 6, 7, 8, 9] and tensors["none"].shape == (0, 4)
    assert tensors["bytes"].tolist() == [0, 0, 0]
    assert tensors["numbers"].data_ptr() == memory.data_ptr() + ALIGNMENT
    assert arena.bytes == 2 * ALIGNMENT
