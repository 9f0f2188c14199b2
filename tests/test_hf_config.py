"""Models' configurations -> problems, and the shards of tensor parallelism."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from hybrid_moe.hf_config import UnsupportedModelError, padded_width, read_hf_config
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work, moe_reference
from hybrid_moe.shards import tensor_parallel_shard

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def config(model_type, hidden, **fields):
    return {"model_type": model_type, "hidden_size": hidden, "hidden_act": "silu", "quantization_config": FP8, **fields}


def noaux(model_type, hidden, experts, width, top_k, factor, **fields):
    common = dict(
        scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, n_group=1, topk_group=1,
        n_shared_experts=1,
    )  # fmt: skip
    sizes = dict(n_routed_experts=experts, moe_intermediate_size=width, num_experts_per_tok=top_k)
    return config(model_type, hidden, routed_scaling_factor=factor, **(common | sizes | fields))


def softmax(model_type, hidden, experts, width, top_k=8, **fields):
    return config(
        model_type, hidden, num_experts=experts, moe_intermediate_size=width, num_experts_per_tok=top_k, **fields
    )


# The MoE fields of public models, and the problem: experts, top-k, groups, kept groups, hidden, width, routing, factor.
EXPRESSED = {
    "DeepSeek-V3": (
        noaux("deepseek_v3", 7168, 256, 2048, 8, 2.5, n_group=8, topk_group=4),
        (256, 8, 8, 4, 7168, 2048, "deepseek_v3", 2.5),
    ),
    "Kimi-K2": (noaux("kimi_k2", 7168, 384, 2048, 8, 2.827), (384, 8, 1, 1, 7168, 2048, "deepseek_v3", 2.827)),
    "GLM-4.5-Air": (noaux("glm4_moe", 4096, 128, 1408, 8, 1.0), (128, 8, 1, 1, 4096, 1408, "deepseek_v3", 1.0)),
    "GLM-4.6": (noaux("glm4_moe", 5120, 160, 1536, 8, 2.5), (160, 8, 1, 1, 5120, 1536, "deepseek_v3", 2.5)),
    "MiMo-V2-Flash": (
        noaux("mimo_v2_flash", 4096, 256, 2048, 8, None, n_shared_experts=None),
        (256, 8, 1, 1, 4096, 2048, "deepseek_v3", 1.0),
    ),
    "MiniMax-M2.5": (
        config(
            "minimax_m2", 3072, num_local_experts=256, intermediate_size=1536, num_experts_per_tok=8,
            scoring_func="sigmoid", use_routing_bias=True,
        ),
        (256, 8, 1, 1, 3072, 1536, "deepseek_v3", 1.0),
    ),
    "Qwen3-235B": (
        softmax("qwen3_moe", 4096, 128, 1536, norm_topk_prob=True),
        (128, 8, 1, 1, 4096, 1536, "softmax", 1.0),
    ),
    "Qwen3-30B": (
        softmax("qwen3_moe", 2048, 128, 768, norm_topk_prob=True),
        (128, 8, 1, 1, 2048, 768, "softmax", 1.0),
    ),
    "Qwen3-Next": (
        softmax("qwen3_next", 2048, 512, 512, top_k=10, norm_topk_prob=True),
        (512, 10, 1, 1, 2048, 512, "softmax", 1.0),
    ),
    "Mixtral-8x7B": (
        config("mixtral", 4096, num_local_experts=8, intermediate_size=14336, num_experts_per_tok=2),
        (8, 2, 1, 1, 4096, 14336, "softmax", 1.0),
    ),
    "OLMoE": (
        config("olmoe", 2048, num_experts=64, intermediate_size=1024, num_experts_per_tok=8, norm_topk_prob=False),
        (64, 8, 1, 1, 2048, 1024, "softmax_no_renorm", 1.0),
    ),
    "DeepSeek-V2-Lite": (
        noaux(
            "deepseek_v2", 2048, 64, 1408, 6, 1.0, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False
        ),
        (64, 6, 1, 1, 2048, 1408, "softmax_no_renorm", 1.0),
    ),
}  # fmt: skip
REFUSED = {
    "Llama-4-Maverick": (
        {
            "model_type": "llama4",
            "text_config": {
                "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "num_local_experts": 128,
                "num_experts_per_tok": 1, "hidden_act": "silu",
            },
        },
        ["got no quantization_config"],
    ),
    "DeepSeek-V4-Flash": (
        noaux("deepseek_v4", 4096, 256, 2048, 6, 1.5, scoring_func="sqrtsoftplus", swiglu_limit=10.0),
        ["sigmoid or softmax scores, got 'sqrtsoftplus'", "swiglu_limit 10.0"],
    ),
    "DeepSeek-V2": (
        noaux(
            "deepseek_v2", 5120, 160, 1536, 6, 16.0, scoring_func="softmax", topk_method="group_limited_greedy",
            norm_topk_prob=False, n_group=8, topk_group=3,
        ),
        ["softmax scores without groups, got 8 groups ranked by 'group_limited_greedy'"],
    ),
    "gpt-oss-120b": (
        config("gpt_oss", 2880, num_local_experts=128, intermediate_size=2880, num_experts_per_tok=4)
        | {"quantization_config": {"quant_method": "mxfp4"}},
        ["SwiGLU has a limit", "scores, got None", "quant_method 'mxfp4'", "multiple of 128, got 2880"],
    ),
    "LongCat-Flash": (
        noaux("longcat_flash", 6144, 512, 2048, 12, 6.0, zero_expert_num=256),
        ["256 that pass their input on"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSED)
def test_what_a_model_is(name, tmp_path):
    fields, (experts, top_k, n_group, topk_group, hidden, width, routing, factor) = EXPRESSED[name]
    expected = MoEProblem(
        num_experts=experts, num_local_experts=experts, top_k=top_k, n_group=n_group, topk_group=topk_group,
        hidden_size=hidden, intermediate_size=width, routing_method=routing,
    )  # fmt: skip
    layer = read_hf_config(fields)
    assert (MoEProblem(**layer.fields), layer.routed_scaling_factor) == (expected, factor)
    assert layer.has_routing_bias == (routing == "deepseek_v3")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert MoEProblem.from_hf_config(tmp_path) == MoEProblem.from_hf_config(tmp_path / "config.json") == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_says_every_reason(name):
    fields, reasons = REFUSED[name]
    with pytest.raises(UnsupportedModelError) as caught:
        MoEProblem.from_hf_config(fields)
    assert len(caught.value.reasons) == len(reasons)
    for reason in reasons:
        assert any(reason in found for found in caught.value.reasons), caught.value.reasons


def test_ranks():
    fields = EXPRESSED["DeepSeek-V3"][0]
    assert read_hf_config(fields, ep=8).fields["num_local_experts"] == 32
    tp8 = read_hf_config(fields, tp=8)
    assert (tp8.fields["intermediate_size"], tp8.unpadded_size) == (256, 256)
    qwen = read_hf_config(EXPRESSED["Qwen3-235B"][0], tp=8)
    assert (qwen.fields["intermediate_size"], qwen.unpadded_size) == (256, 192)
    assert MoEProblem.from_hf_config(fields, ep=4, gate_first=True).gate_first
    with pytest.raises(ValueError, match="ep: expected a divisor of the 256 experts of deepseek_v3, got 3"):
        read_hf_config(fields, ep=3)
    with pytest.raises(ValueError, match="tp: expected a divisor of the 2048 columns"):
        read_hf_config(fields, tp=3)
    with pytest.raises(ValueError, match="tp: expected a positive integer, got 0"):
        read_hf_config(fields, tp=0)


def test_weights_on_the_input():
    fields = REFUSED["Llama-4-Maverick"][0] | {"quantization_config": FP8}
    layer, problem = read_hf_config(fields), MoEProblem.from_hf_config(fields)
    assert (problem.top_k, problem.routing_method, problem.weight_on_input) == (1, "sigmoid_no_renorm", True)
    assert not layer.has_routing_bias and layer.shared_experts == 1
    with pytest.raises(UnsupportedModelError, match="to fuse shared experts, got them on the input"):
        read_hf_config(fields, fuse_shared_experts=True)


def test_shared_experts_that_are_fused():
    fields = EXPRESSED["DeepSeek-V3"][0]
    problem = MoEProblem.from_hf_config(fields, tp=8, fuse_shared_experts=True)
    assert problem == dataclasses.replace(MoEProblem.from_hf_config(fields, tp=8), num_shared_experts=1)
    for changed, ep, reason in (
        ({}, 8, "all routed experts on a rank that shared ones are fused on, got ep=8"),
        ({"n_shared_experts": None}, 1, "n_shared_experts to fuse, got none"),
        ({"moe_shared_expert_intermediate_size": 512}, 1, "shared experts as wide as the routed ones"),
    ):
        with pytest.raises(UnsupportedModelError, match=reason):
            read_hf_config(fields | changed, ep=ep, fuse_shared_experts=True)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 20000])
def test_a_file_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: expected"):
        read_hf_config(path)


def test_a_missing_file_and_another_type(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="config: expected a path, a mapping or a PretrainedConfig, got int"):
        read_hf_config(3)


@pytest.mark.parametrize("width, tp, expected", [(2048, 8, 256), (1536, 8, 256), (1408, 2, 768), (768, 2, 384)])
def test_padded_width(width, tp, expected):
    assert padded_width(width, tp) == expected


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("gate_first", [False, True])
def test_the_ranks_shards_sum_to_the_layer(tp, gate_first):
    """768 / 4 = 192: every other shard begins in the middle of a block."""
    whole = MoEProblem(
        num_experts=8, num_local_experts=8, top_k=2, n_group=1, topk_group=1, hidden_size=256, intermediate_size=768,
        gate_first=gate_first,
    )  # fmt: skip
    weights = random_weights(whole, "cpu", seed=1)
    inputs = make_inputs(Workload(num_tokens=9), whole, weights)
    expected = moe_reference(inputs, whole)
    total = torch.zeros_like(expected)
    for rank in range(tp):
        shard = tensor_parallel_shard(*(getattr(weights, name) for name in weights.__slots__), rank=rank, tp=tp)
        assert shard.gemm2_weights.shape[2] == padded_width(768, tp)
        part = inputs._replace(**shard._asdict())
        problem = MoEProblem(
            num_experts=8, num_local_experts=8, top_k=2, n_group=1, topk_group=1, hidden_size=256,
            intermediate_size=padded_width(768, tp), gate_first=gate_first,
        )  # fmt: skip
        total += moe_reference(part, problem)
    assert check(total, expected, has_local_work(inputs, whole)).passed
    assert float((total - expected).norm() / expected.norm()) < 1e-5


def test_a_rank_that_is_none():
    problem = MoEProblem(num_experts=8, num_local_experts=8, top_k=2, n_group=1, topk_group=1, hidden_size=128)
    weights = random_weights(problem, "cpu")
    tensors = [getattr(weights, name) for name in weights.__slots__]
    with pytest.raises(ValueError, match="rank: expected 0 to 3, got 4"):
        tensor_parallel_shard(*tensors, rank=4, tp=4)
    with pytest.raises(ValueError, match="tp: expected a divisor of the intermediate size 2048, got 3"):
        tensor_parallel_shard(*tensors, rank=0, tp=3)
