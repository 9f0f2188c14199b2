"""SGLang's server with hybrid_moe as its MoE runner, beside SGLang's own runners: the same logits, and how fast.

    python benchmarks/sglang_server.py --model deepseek-v3 --output results.json

A checkpoint of random weights with the model's real layer widths (and as many layers as asked for) is written to a
folder in memory, so that every runner loads the same numbers. Each runner has a server of its own (`launch_server`).
All are asked the same over HTTP, greedily, one server at a time: decode at several batch sizes, prefill of 2k and 8k
tokens, each three times. Times are the client's. Runners joined by a comma are up together in the GPU's memory and
asked by turns, as ``--runners hybrid_moe,triton hybrid_moe,deep_gemm``. A runner that is named again is started again,
with its kernels compiled, and not asked anything.

How logits are judged: two FP8 kernels that are both right differ by their rounding. ``hybrid_moe``'s log probabilities
of the prompts' tokens may differ from those of SGLang's Triton runner no more than twice as much as those of SGLang's
DeepGEMM runner do (mean absolute difference), and the text is compared for as long as it agrees.

Wants SGLang 0.5.16 or newer, and hybrid_moe installed (its entry point is how SGLang finds it).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
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


class Server:
    """A server of one runner in processes of its own; ``log`` is what it says.

    Parameters
    ----------
    folder
        The checkpoint.
    runner
        Of ``--moe-runner-backend``.
    kernels
        Where compiled kernels are kept.
    """

    def __init__(self, folder: Path, runner: str, port: int, kernels: Path, args: argparse.Namespace) -> None:
        self.runner, self.port, self.log = runner, port, args.logs / f"{runner}-{port}.log"
        options = {
            "model-path": folder, "port": port, "moe-runner-backend": runner, "attention-backend": "triton",
            "sampling-backend": "pytorch", "grammar-backend": "none", "fp8-gemm-backend": "triton",
            "mem-fraction-static": 0.9, "max-total-tokens": args.kv_tokens,
            "cuda-graph-max-bs-decode": max(args.batches), "max-running-requests": max(args.batches),
            "chunked-prefill-size": max([2048, *args.prefill]), "tp-size": args.tp, "ep-size": args.ep,
            "random-seed": 0,
        }  # fmt: skip
        flags = ["--disable-radix-cache", "--enable-metrics"]
        if args.prefill_graphs:
            flags += ["--cuda-graph-bs-prefill", *map(str, args.prefill)]
        else:
            flags.append("--disable-prefill-cuda-graph")
        command = [sys.executable, "-m", "sglang.launch_server", *flags, *args.server_arg]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        environment = os.environ | {
            "TRITON_CACHE_DIR": str(kernels / "triton"),
            "DG_JIT_CACHE_DIR": str(kernels / "deep_gemm"),
            "SGLANG_DG_CACHE_DIR": str(kernels / "deep_gemm"),
            "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # it would take a second
        }
        self.started = time.perf_counter()
        self.ready_s = 0.0
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def is_ready(self, limit: float) -> bool:
        """Whether it answers now; RuntimeError if it has stopped, or takes longer than ``limit`` seconds."""
        if time.perf_counter() - self.started > limit:
            raise RuntimeError(f"the server of {self.runner} isn't ready after {limit} s; see {self.log}")
        if self.process.poll() is not None:
            raise RuntimeError(f"the server of {self.runner} stopped:\n" + self.log.read_text(errors="replace")[-6000:])
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
        except (OSError, urllib.error.URLError):
            return False
        self.ready_s = time.perf_counter() - self.started
        return True

    def generate(self, new: int, **request: Any) -> Any:
        """Greedily, ``new`` tokens of each prompt."""
        sampling = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
        body = json.dumps(request | {"sampling_params": sampling}).encode()
        url = f"http://127.0.0.1:{self.port}/generate"
        asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(asked, timeout=300).read())

    def metrics(self) -> list[str]:
        """Our lines of ``/metrics``."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30).read().decode()
        return [line for line in text.splitlines() if line.startswith("hybrid_moe_")]

    def said(self) -> dict[str, Any]:
        """What the log has about the runner, and the seconds that it names."""
        text = self.log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if "by hybrid_moe" in line or "warm-up of" in line]
        seconds = {
            "warm_up_s": re.findall(r"warm-up of .*: ([0-9.]+) s", text),
            "graphs_s": re.findall(
                r"[Cc]apture .*cuda ?graph.* end\..*?elapsed=?:? ?([0-9.]+) ?s", text, re.IGNORECASE
            ),
            "load_s": re.findall(r"Load weight end\. elapsed=([0-9.]+)", text),
        }
        return {"lines": lines, **{name: [float(one) for one in found] for name, found in seconds.items()}}

    def stop(self) -> None:
        """End it and what it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 15)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, 9)
                self.process.wait(20)


def prompts_of(count: int, length: int, seed: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(300, VOCAB) for _ in range(length)] for _ in range(count)]


def timed(server: Server, prompts: list[list[int]], new: int) -> float:
    start = time.perf_counter()
    server.generate(new, input_ids=prompts)
    return time.perf_counter() - start


def ask_text(server: Server, args: argparse.Namespace) -> Any:
    return server.generate(16, text="Mixture of experts")["text"]


def ask_judged(server: Server, args: argparse.Namespace) -> Any:
    """Log probabilities of the prompts' tokens, and the tokens that follow."""
    judged = server.generate(64, input_ids=prompts_of(8, 128, 7), return_logprob=True, logprob_start_len=0)
    return {
        "logprobs": [[p[0] for p in j["meta_info"]["input_token_logprobs"][1:]] for j in judged],
        "tokens": [[p[1] for p in j["meta_info"]["output_token_logprobs"]] for j in judged],
    }


def ask_decode(server: Server, args: argparse.Namespace, batch: int) -> list[dict[str, float]]:
    rows = []
    timed(server, prompts_of(batch, 32, 1), 8)
    for repeat in range(args.repeats):
        prompts = prompts_of(batch, 32, 100 + repeat)
        first, whole = timed(server, prompts, 1), timed(server, prompts, args.new)
        step = (whole - first) / (args.new - 1)
        rows.append({"ttft_ms": 1e3 * first, "itl_ms": 1e3 * step, "tokens_per_s": batch / step})
    return rows


def ask_prefill(server: Server, args: argparse.Namespace, length: int) -> list[dict[str, float]]:
    timed(server, prompts_of(1, length, 2), 1)
    times = [timed(server, prompts_of(1, length, 200 + repeat), 1) for repeat in range(args.repeats)]
    return [{"ttft_ms": 1e3 * seconds, "tokens_per_s": length / seconds} for seconds in times]


def difference(a: list[list[float]], b: list[list[float]]) -> float:
    pairs = [abs(x - y) for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True)]
    return statistics.fmean(pairs)


def agreeing(a: list[list[int]], b: list[list[int]]) -> list[int]:
    """Tokens up to the first that differs, for each prompt."""
    return [
        next((i for i, (x, y) in enumerate(zip(u, v, strict=True)) if x != y), len(u))
        for u, v in zip(a, b, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="deepseek-v3")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runners", nargs="+", default=["hybrid_moe", "triton", "deep_gemm", "hybrid_moe"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prefill", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--prefill-graphs", action="store_true", help="capture graphs of these prefills too")
    parser.add_argument("--new", type=int, default=128, help="tokens generated by each decode run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-tokens", type=int, default=32768, help="size of the key-value cache")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--port", type=int, default=30017)
    parser.add_argument("--limit", type=float, default=240, help="seconds that a server may take to be ready")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/hybrid_moe_checkpoint"))
    parser.add_argument(
        "--server-arg", action="append", default=[], help="one more of launch_server's: --server-arg=--x"
    )
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of the servers' logs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # so that the servers are stopped too
    args.logs.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if not (args.folder / "model.safetensors.index.json").exists():
        # In a process of its own, so that the GPU's memory is the servers'.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(args.folder, args.model, args.layers)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the checkpoint couldn't be written")
    print(f"checkpoint of {args.layers} layers in {time.perf_counter() - start:.0f} s", flush=True)
    said = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    results: dict[str, Any] = {**machine(), "arguments": said, "starts": [], "answers": {}}
    kernels = Path(tempfile.mkdtemp(prefix="kernels-"))
    servers: list[Server] = []
    port = args.port
    try:
        for group in args.runners:
            for runner in group.split(","):
                servers.append(Server(args.folder, runner, port, kernels, args))
                port += 100
            wait(servers, args, results)
            ask(servers, args, results)
            while servers:
                servers.pop().stop()
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(kernels)
        write(args, results)


def write(args: argparse.Namespace, results: dict[str, Any]) -> None:
    if args.output:
        args.output.write_text(json.dumps(results))


def machine() -> dict[str, Any]:
    """What the figures are of."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    packages = ("sglang", "torch", "triton", "sglang-kernel", "sgl-deep-gemm", "hybrid-moe")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"devices": subprocess.check_output(query, text=True).split("\n")[:-1], "versions": versions}


def wait(servers: list[Server], args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Until all are ready but those that fail, which are taken from the list."""
    waiting = list(servers)
    while waiting:
        for server in list(waiting):
            try:
                if not server.is_ready(args.limit):
                    continue
                found: dict[str, Any] = {"runner": server.runner, "ready_s": server.ready_s, **server.said()}
            except RuntimeError as error:
                found = {"runner": server.runner, "failed": str(error)}
                server.stop()
                servers.remove(server)
            waiting.remove(server)
            results["starts"].append(found)
            print(json.dumps(found), flush=True)
        time.sleep(0.1)


def ask(servers: list[Server], args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Each question of each server in turn, shown and written as it is answered."""
    questions: dict[str, Callable[[Server], Any]] = {
        "text": lambda server: ask_text(server, args),
        "judged": lambda server: ask_judged(server, args),
    }
    for batch in args.batches:
        questions[f"decode {batch}"] = functools.partial(ask_decode, args=args, batch=batch)
    for length in args.prefill:
        questions[f"prefill {length}"] = functools.partial(ask_prefill, args=args, length=length)
    questions["metrics"] = Server.metrics
    asked = [server for server in servers if server.runner not in results["answers"]]
    for name, question in questions.items():
        for server in asked:
            answer = question(server)
            results["answers"].setdefault(server.runner, {})[name] = answer
            print(f"{server.runner}, {name}: {shown(answer)}", flush=True)
        if name == "judged":
            judge(results)
        write(args, results)


def judge(results: dict[str, Any]) -> None:
    """How far log probabilities and text are from those of SGLang's Triton runner."""
    judged = {runner: answers["judged"] for runner, answers in results["answers"].items() if "judged" in answers}
    for runner, answer in judged.items() if "triton" in judged else ():
        gap = difference(answer["logprobs"], judged["triton"]["logprobs"])
        same = agreeing(answer["tokens"], judged["triton"]["tokens"])
        results.setdefault("judged", {})[runner] = {"mean_abs_logprob_difference": gap, "agreeing_tokens": same}
        print(f"{runner}: mean |log probability - triton's| {gap:.5f}; text agrees for {same} of 64 tokens", flush=True)


def shown(answer: Any) -> str:
    """The median of what is a list of measurements; the beginning of anything else."""
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return ", ".join(f"{key} {statistics.median(row[key] for row in answer):.4g}" for key in answer[0])
    return json.dumps(answer)[:1500] if not isinstance(answer, dict) else ", ".join(answer)


if __name__ == "__main__":
    main()
