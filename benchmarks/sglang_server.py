"""SGLang's engine with hybrid_moe as its MoE runner, beside SGLang's own runners: the same logits, and how fast.

    python benchmarks/sglang_server.py --model deepseek-v3 --output results.json

A checkpoint of random weights with the model's real layer widths (and as many layers as asked for) is written to a
folder in memory, so that every runner loads the same numbers. Then one engine after another answers the same prompts,
greedily, under CUDA graphs: decode at several batch sizes, prefill of 2k and 8k tokens, each three times.

How logits are judged: two FP8 kernels that are both right differ by their rounding. ``hybrid_moe``'s log probabilities
of the prompt's tokens may differ from those of SGLang's Triton runner no more than twice as much as those of SGLang's
DeepGEMM runner do (mean absolute difference), and the text is compared for as long as it agrees.

Wants SGLang 0.5.16 or newer, and hybrid_moe installed (its entry point is how SGLang finds it).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

VOCAB = 32768
COMMON = {"torch_dtype": "bfloat16", "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"}
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    # One of eight expert-parallel ranks' experts: 32, in the 8 groups of the model.
    "deepseek-v3": COMMON | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 32, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6,
        "rope_theta": 10000, "max_position_embeddings": 16384, "tie_word_embeddings": False,
        "attention_bias": False, "num_nextn_predict_layers": 0, "quantization_config": QUANTIZATION,
    },
    "qwen3-30b": COMMON | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 16384, "tie_word_embeddings": False, "attention_bias": False,
        "quantization_config": QUANTIZATION,
    },
}  # fmt: skip


def write_checkpoint(folder: Path, name: str, layers: int) -> None:
    """Random weights of unit variance per layer's output, per tensor seeded, as a Hugging Face checkpoint."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = MODELS[name] | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device="cuda", generator=generator) * std).bfloat16().cpu()

    def fp8(key: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        # e4m3 of about N(0, 64^2): the block's scale brings the variance to 1 / columns.
        values = torch.randn((rows, columns), device="cuda", generator=generator) * 64
        blocks = (-(-rows // 128), -(-columns // 128))
        scale = (0.5 + torch.rand(blocks, device="cuda", generator=generator)) / (64 * columns**0.5)
        return {
            f"{key}.weight": values.clamp(-448, 448).to(torch.float8_e4m3fn).cpu(),
            f"{key}.weight_scale_inv": scale.float().cpu(),
        }

    index: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    h, ones = config["hidden_size"], torch.ones
    save("ends.safetensors", {
        "model.embed_tokens.weight": normal(VOCAB, h),
        "model.norm.weight": ones(h).bfloat16(),
        "lm_head.weight": normal(VOCAB, h, std=h**-0.5),
    })  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors = {
            f"{at}.{norm}.weight": ones(h).bfloat16() for norm in ("input_layernorm", "post_attention_layernorm")
        }
        if name == "deepseek-v3":
            heads, q, kv = config["num_attention_heads"], config["q_lora_rank"], config["kv_lora_rank"]
            nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
            for key, rows, columns in (
                ("q_a_proj", q, h), ("q_b_proj", heads * (nope + rope), q), ("kv_a_proj_with_mqa", kv + rope, h),
                ("kv_b_proj", heads * (nope + v), kv), ("o_proj", h, heads * v),
            ):  # fmt: skip
                tensors |= fp8(f"{at}.self_attn.{key}", rows, columns)
            tensors[f"{at}.self_attn.q_a_layernorm.weight"] = ones(q).bfloat16()
            tensors[f"{at}.self_attn.kv_a_layernorm.weight"] = ones(kv).bfloat16()
            dense = layer < config["first_k_dense_replace"]
            experts, shared = config["n_routed_experts"], ["shared_experts"]
        else:
            heads, kv_heads, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
            for key, rows, columns in (
                ("q_proj", heads * d, h), ("k_proj", kv_heads * d, h), ("v_proj", kv_heads * d, h),
                ("o_proj", h, heads * d),
            ):  # fmt: skip
                tensors |= fp8(f"{at}.self_attn.{key}", rows, columns)
            for norm in ("q_norm", "k_norm"):
                tensors[f"{at}.self_attn.{norm}.weight"] = ones(d).bfloat16()
            dense, experts, shared = False, config["num_experts"], []
        parts = [(f"{at}.mlp", config["intermediate_size"])] if dense else []
        if not dense:
            width = config["moe_intermediate_size"]
            tensors[f"{at}.mlp.gate.weight"] = normal(experts, h, std=h**-0.5)
            if name == "deepseek-v3":
                tensors[f"{at}.mlp.gate.e_score_correction_bias"] = 0.1 * normal(experts).float()
            parts = [(f"{at}.mlp.{kind}", width) for kind in [*(f"experts.{e}" for e in range(experts)), *shared]]
        for key, width in parts:
            tensors |= fp8(f"{key}.gate_proj", width, h) | fp8(f"{key}.up_proj", width, h)
            tensors |= fp8(f"{key}.down_proj", h, width)
        save(f"layer{layer}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer, so that text goes in and comes out; its other numbers have names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {f"<{number}>": number for number in range(len(words), VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )


def engine_options(folder: Path, runner: str, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_path": str(folder), "moe_runner_backend": runner, "attention_backend": "triton",
        "sampling_backend": "pytorch", "grammar_backend": "none", "fp8_gemm_runner_backend": "triton",
        "disable_radix_cache": True, "mem_fraction_static": 0.6, "cuda_graph_max_bs_decode": max(args.batches),
        "disable_prefill_cuda_graph": True, "tp_size": args.tp, "ep_size": args.ep, "random_seed": 0,
        "log_level": "info", "chunked_prefill_size": 8192, "max_running_requests": max(args.batches),
    }  # fmt: skip


def prompts_of(count: int, length: int, seed: int) -> list[list[int]]:
    import random

    source = random.Random(seed)
    return [[source.randrange(300, VOCAB) for _ in range(length)] for _ in range(count)]


def timed(engine: Any, prompts: list[list[int]], new: int) -> float:
    start = time.perf_counter()
    engine.generate(input_ids=prompts, sampling_params={"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True})
    return time.perf_counter() - start


def run_engine(folder: Path, runner: str, args: argparse.Namespace) -> dict[str, Any]:
    import sglang

    start = time.perf_counter()
    engine = sglang.Engine(**engine_options(folder, runner, args))
    found: dict[str, Any] = {"runner": runner, "ready_s": time.perf_counter() - start, "decode": {}, "prefill": {}}
    # The same prompts for every runner: their tokens' log probabilities, and the text.
    judged = engine.generate(
        input_ids=prompts_of(8, 128, 7),
        sampling_params={"temperature": 0.0, "max_new_tokens": 64, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
    )
    found["logprobs"] = [[p[0] for p in j["meta_info"]["input_token_logprobs"][1:]] for j in judged]
    found["tokens"] = [[p[1] for p in j["meta_info"]["output_token_logprobs"]] for j in judged]
    for batch in args.batches:
        rows = []
        timed(engine, prompts_of(batch, 32, 1), 8)
        for repeat in range(args.repeats):
            prompts = prompts_of(batch, 32, 100 + repeat)
            first, whole = timed(engine, prompts, 1), timed(engine, prompts, args.new)
            step = (whole - first) / (args.new - 1)
            rows.append({"ttft_ms": 1e3 * first, "itl_ms": 1e3 * step, "tokens_per_s": batch / step})
        found["decode"][batch] = rows
    for length in args.prefill:
        timed(engine, prompts_of(1, length, 2), 1)
        times = [timed(engine, prompts_of(1, length, 200 + r), 1) for r in range(args.repeats)]
        found["prefill"][length] = [{"ttft_ms": 1e3 * t, "tokens_per_s": length / t} for t in times]
    engine.shutdown()
    gc.collect()
    return found


def difference(a: list[list[float]], b: list[list[float]]) -> float:
    pairs = [abs(x - y) for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True)]
    return statistics.fmean(pairs)


def agreeing(a: list[list[int]], b: list[list[int]]) -> list[int]:
    """Tokens up to the first that differs, for each prompt."""
    return [
        next((i for i, (x, y) in enumerate(zip(u, v, strict=True)) if x != y), len(u))
        for u, v in zip(a, b, strict=True)
    ]


def over_http(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One request to `launch_server`; what SGLang logs of the runner."""
    port, log = 30017, folder / "server.log"
    options = engine_options(folder, "hybrid_moe", args)
    command = [sys.executable, "-m", "sglang.launch_server", "--port", str(port)]
    for key, value in options.items():
        if value is True:
            command.append(f"--{key.replace('_', '-')}")
        elif value is not False:
            command += [f"--{key.replace('_', '-')}", str(value)]
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        body = json.dumps({"text": "Mixture of experts", "sampling_params": {"max_new_tokens": 16, "temperature": 0}})
        for _ in range(240):
            if server.poll() is not None:
                break
            try:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/generate", body.encode(), {"Content-Type": "application/json"}
                )
                answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
                break
            except OSError:
                time.sleep(0.5)
        else:
            answer = None
    finally:
        server.terminate()
        server.wait(30)
    lines = [line for line in log.read_text(errors="replace").splitlines() if "hybrid_moe" in line]
    return {"answer": answer if server.returncode is not None else None, "log": lines[:12]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="deepseek-v3")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runners", nargs="+", default=["triton", "hybrid_moe", "deep_gemm"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prefill", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/hybrid_moe_checkpoint"))
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")
    start = time.perf_counter()
    # In a process of its own: CUDA must not be in use when the engine forks.
    here = Path(__file__).resolve().parent
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(here)!r}); import sglang_server as s; "
         f"s.write_checkpoint(s.Path({str(args.folder)!r}), {args.model!r}, {args.layers})"],
        check=True,
    )  # fmt: skip
    print(f"checkpoint of {args.layers} layers in {time.perf_counter() - start:.0f} s", flush=True)
    results: dict[str, Any] = {"model": args.model, "layers": args.layers, "tp": args.tp, "ep": args.ep, "engines": []}
    for runner in args.runners:
        results["engines"].append(run_engine(args.folder, runner, args))
        print_engine(results["engines"][-1])
        if args.output:
            args.output.write_text(json.dumps(results))
    by = {engine["runner"]: engine for engine in results["engines"]}
    if "triton" in by:
        for runner, engine in by.items():
            gap = difference(engine["logprobs"], by["triton"]["logprobs"])
            same = agreeing(engine["tokens"], by["triton"]["tokens"])
            results.setdefault("judged", {})[runner] = {"mean_abs_logprob_difference": gap, "agreeing_tokens": same}
            print(f"{runner}: mean |log probability - triton's| {gap:.5f}; text agrees for {same} of 64 tokens")
    if args.http:
        results["http"] = over_http(args.folder, args)
        print(json.dumps(results["http"])[:3000])
    if args.output:
        args.output.write_text(json.dumps(results))


def print_engine(engine: dict[str, Any]) -> None:
    def middle(rows: list[dict[str, float]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    print(f"{engine['runner']}: ready in {engine['ready_s']:.1f} s")
    for batch, rows in engine["decode"].items():
        print(
            f"  decode batch {batch}: {middle(rows, 'tokens_per_s'):.0f} tokens/s, between tokens "
            f"{middle(rows, 'itl_ms'):.2f} ms, first after {middle(rows, 'ttft_ms'):.1f} ms"
        )
    for length, rows in engine["prefill"].items():
        print(
            f"  prefill {length}: first token after {middle(rows, 'ttft_ms'):.1f} ms, "
            f"{middle(rows, 'tokens_per_s'):.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
