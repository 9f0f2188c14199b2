"""SGLang's server with hybrid_moe as its MoE runner, beside SGLang's own runners: the same logits, and how fast.

    python benchmarks/sglang_server.py --model deepseek-v3 --output results.jsonl
    python benchmarks/sglang_server.py --table results.jsonl

A checkpoint of random weights with the model's real layer widths (and as many layers as asked for) is written to a
folder in memory, so that every runner loads the same numbers. Each runner has a server of its own (`launch_server`),
one after another, and is asked the same over HTTP, greedily: decode at several batch sizes, prefill of 2k and 8k
tokens, each three times. Times are the client's. Then SGLang's profiler records some steps, for the time of each
kernel. Every start adds a line to the results, so that runs can be split; ``--table`` needs no GPU. A runner that is
named again is started again, with its kernels compiled, and not asked anything.

How logits are judged: two FP8 kernels that are both right differ by their rounding. ``hybrid_moe``'s log probabilities
of the prompts' tokens may differ from those of SGLang's Triton runner no more than twice as much as those of SGLang's
DeepGEMM runner do (mean absolute difference). The text is compared for as long as it agrees; random weights make nearly
every token a tie.

Wants SGLang 0.5.16 or newer, and hybrid_moe installed (its entry point is how SGLang finds it).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import importlib.metadata
import itertools
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
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrid_moe.files import append_line

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
            "mem-fraction-static": 0.9, "max-total-tokens": args.kv_tokens, "max-running-requests": max(args.batches),
            "chunked-prefill-size": max([2048, *args.prefill]), "tp-size": args.tp, "ep-size": args.ep,
            "random-seed": 0, "log-level-http": "warning",
        }  # fmt: skip
        flags = ["--disable-radix-cache", "--enable-metrics", "--cuda-graph-bs-decode", *map(str, args.batches)]
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
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self, limit: float) -> float:
        """Seconds until it answered; RuntimeError if it stops, or takes longer than ``limit`` seconds."""
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.runner} stopped:\n" + self.log.read_text(errors="replace")[-6000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
            except (OSError, urllib.error.URLError):
                if time.perf_counter() - self.started > limit:
                    raise RuntimeError(f"{self.runner} isn't ready after {limit} s; see {self.log}") from None
                time.sleep(0.2)
            else:
                return time.perf_counter() - self.started

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        url, content = f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode()
        asked = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        return urllib.request.urlopen(asked, timeout=300).read()

    def generate(self, new: int, **request: Any) -> Any:
        """Greedily, ``new`` tokens of each prompt."""
        sampling = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
        return json.loads(self.post("/generate", request | {"sampling_params": sampling}))

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
        """End it and what it has started: at once, as a graceful end takes some 10 s and there is nothing to save."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


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
    answers = [answer["meta_info"] for answer in judged]
    return {
        "logprobs": [[round(p[0], 4) for p in answer["input_token_logprobs"][1:]] for answer in answers],
        "tokens": [[p[1] for p in answer["output_token_logprobs"]] for answer in answers],
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


PROFILED_STEPS = 10


def ask_profile(server: Server, args: argparse.Namespace, batch: int = 0, length: int = 0) -> dict[str, Any]:
    """GPU time by kernel of some decode steps of ``batch`` sequences, or of the prefill of one of ``length`` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"output_dir": folder, "activities": ["GPU"], "with_stack": False, "record_shapes": False}
        if length:
            server.post("/start_profile", wanted)
            timed(server, prompts_of(1, length, 300), 1)
            server.post("/stop_profile", {})
        else:
            prompts = prompts_of(batch, 32, 300)
            prefill_s = timed(server, prompts, 1)
            asked = threading.Thread(target=timed, args=(server, prompts, 200))
            asked.start()
            time.sleep(prefill_s + 0.1)  # the steps are to be of decode alone
            server.post("/start_profile", wanted | {"num_steps": PROFILED_STEPS})
            asked.join()
        traces = sorted(Path(folder).rglob("*TP-0*.trace.json.gz"))  # SGLang writes them between two steps
        return kernels_of(traces[0], 1 if length else PROFILED_STEPS)


# Names that only the routed experts have: of SGLang's Triton and DeepGEMM runners, and of this package.
MOE_KERNEL = re.compile(
    "fused_moe|moe_align|moe_sum|moe_fused_mul|fused_copy__mul_sum|count_and_sort|deep_gemm|ep_scatter|ep_gather|fill_gateup|post_reorder"
    "|^hopper_|^(clear|route|scatter|gather|combine|one_token|gemm2|swiglu_quantize|gemm1_swiglu|quantize_rows)_kernel"
)
# What both may have between two of those, as quantisation and activation, in one stream.
MOE_GAP = 3


def kernels_of(trace: Path, steps: int) -> dict[str, Any]:
    """Of a step: microseconds from the first kernel to the last, with a kernel running, and by kernel name.

    ``experts_us`` is with one of the routed experts running, from their choice to their sum; kernels overlap.
    """
    with gzip.open(trace) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy")]
    events.sort(key=lambda event: event["ts"])
    kernels: dict[str, list[float]] = {}
    streams: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        found = kernels.setdefault(event["name"][:160], [0, 0.0])
        found[0] += 1
        found[1] += event["dur"]
        streams.setdefault(event.get("args", {}).get("stream"), []).append(event)
    experts = []
    for stream in streams.values():
        at = [number for number, event in enumerate(stream) if MOE_KERNEL.search(event["name"])]
        among = {n for a, b in itertools.pairwise(at) if b - a <= MOE_GAP + 1 for n in range(a, b)} | set(at)
        experts += [stream[number] for number in among]
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])
    return {
        "span_us": (max(event["ts"] + event["dur"] for event in events) - events[0]["ts"]) / steps,
        "busy_us": covered(events) / steps,
        "experts_us": covered(experts) / steps,
        "kernels": [[name, count / steps, us / steps] for name, (count, us) in longest],
    }


def covered(events: list[dict[str, Any]]) -> float:
    """Microseconds in which at least one of these runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        total += max(0.0, end - max(until, event["ts"]))
        until = max(until, end)
    return total


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
    parser.add_argument("--kv-tokens", type=int, default=65536, help="size of the key-value cache")
    parser.add_argument("--profile", nargs="*", type=int, default=[32, 128], help="decode batches to profile")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--port", type=int, default=30017)
    parser.add_argument("--limit", type=float, default=240, help="seconds that a server may take to be ready")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="folder of the checkpoint")
    parser.add_argument("--kernels", type=Path, help="folder of compiled kernels that stays; else an empty one")
    parser.add_argument(
        "--server-arg", action="append", default=[], help="one more of launch_server's: --server-arg=--x"
    )
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of the servers' logs")
    parser.add_argument("--output", type=Path, help="file of results, a line for each start")
    parser.add_argument("--table", type=Path, help="print the results in this file, run nothing")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # so that the server is stopped too
    args.logs.mkdir(parents=True, exist_ok=True)
    checkpoint = args.folder / f"{args.model}-{args.layers}"
    if not (checkpoint / "model.safetensors.index.json").exists():
        start = time.perf_counter()
        # In a process of its own, so that the GPU's memory is the servers'.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(checkpoint, args.model, args.layers)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the checkpoint couldn't be written")
        print(f"checkpoint of {args.layers} layers in {time.perf_counter() - start:.0f} s", flush=True)
    kernels = args.kernels or Path(tempfile.mkdtemp(prefix="kernels-"))
    try:
        for number, runner in enumerate(args.runners):
            record = run(checkpoint, runner, number, kernels, args)
            if args.output:
                append_line(args.output, json.dumps(record).encode() + b"\n")
    finally:
        if args.kernels is None:
            shutil.rmtree(kernels)


def run(checkpoint: Path, runner: str, number: int, kernels: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Start a server, ask it what this process hasn't asked its runner before, and stop it."""
    said = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    record: dict[str, Any] = {"runner": runner, **machine(args.tp), "arguments": said, "answers": {}}
    server = Server(checkpoint, runner, args.port + 100 * number, kernels, args)
    try:
        record |= {"ready_s": server.wait(args.limit), **server.said()}
        print(json.dumps({name: value for name, value in record.items() if name != "arguments"}), flush=True)
        if runner not in args.runners[:number]:
            for name, question in questions_of(args).items():
                record["answers"][name] = question(server)
                print(f"{runner}, {name}: {shown(record['answers'][name])}", flush=True)
    except (RuntimeError, OSError) as error:
        record["failed"] = str(error)
        print(f"{runner}: {error}", flush=True)
    finally:
        server.stop()
    return record


def machine(devices: int) -> dict[str, Any]:
    """What the figures are of."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    packages = ("sglang", "torch", "triton", "sglang-kernel", "sgl-deep-gemm", "hybrid-moe")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"devices": subprocess.check_output(query, text=True).split("\n")[:devices], "versions": versions}


def questions_of(args: argparse.Namespace) -> dict[str, Callable[[Server], Any]]:
    questions: dict[str, Callable[[Server], Any]] = {
        "text": functools.partial(ask_text, args=args),
        "judged": functools.partial(ask_judged, args=args),
    }
    for batch in args.batches:
        questions[f"decode {batch}"] = functools.partial(ask_decode, args=args, batch=batch)
    for length in args.prefill:
        questions[f"prefill {length}"] = functools.partial(ask_prefill, args=args, length=length)
    questions["metrics"] = Server.metrics
    for batch in args.profile:
        questions[f"profile decode {batch}"] = functools.partial(ask_profile, args=args, batch=batch)
    if args.profile and args.prefill:
        longest = max(args.prefill)
        questions[f"profile prefill {longest}"] = functools.partial(ask_profile, args=args, length=longest)
    return questions


def shown(answer: Any) -> str:
    """The median of what is a list of measurements; the beginning of anything else."""
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return ", ".join(f"{key} {statistics.median(row[key] for row in answer):.4g}" for key in answer[0])
    if isinstance(answer, dict) and "busy_us" in answer:
        return f"step {answer['span_us']:.0f} us, busy {answer['busy_us']:.0f} us"
    return json.dumps(answer)[:1500] if not isinstance(answer, dict) else ", ".join(answer)


# ---- The table ----


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a column for each runner, a part for each model and number of ranks."""
    parts: dict[tuple, dict[str, list[dict[str, Any]]]] = {}
    first: dict[tuple, dict[str, Any]] = {}  # answers to the same prompts, however many ranks there are
    for record in records:
        arguments = record["arguments"]
        key = (*(arguments[name] for name in ("model", "layers", "tp", "ep")), record["devices"][0])
        if "judged" in record["answers"]:
            first.setdefault((*key[:2], record["runner"]), record["answers"]["judged"])
        parts.setdefault(key, {}).setdefault(record["runner"], []).append(record)
    return "\n\n".join(
        f"{model}, {layers} layers, tp {tp}, ep {ep}, {device}\n\n"
        + part_of(runners, {name: answer for (*of, name), answer in first.items() if of == [model, layers]})
        for (model, layers, tp, ep, device), runners in parts.items()
    )


def part_of(runners: dict[str, list[dict[str, Any]]], first: dict[str, dict[str, Any]]) -> str:
    """A column for each runner; ``first`` has what each is compared with."""
    lines = [" | ".join(["", *runners]), "|".join(["---", *("---:" for _ in runners)])]

    def row(name: str, cells: list[str]) -> None:
        if any(cells):
            lines.append(" | ".join([name, *cells]))

    starts = [[start for start in found if "failed" not in start] for found in runners.values()]
    for key, name in {
        "ready_s": "start to ready, s, each start", "load_s": "of it: weights", "warm_up_s": "of it: warm-up",
        "graphs_s": "of it: graphs",
    }.items():  # fmt: skip
        row(name, [", ".join(f"{of_a_rank(start, key):.1f}" for start in found if start[key]) for found in starts])
    answers = [next((s["answers"] for s in found if s["answers"]), {}) for found in starts]
    for question in dict.fromkeys(name for answer in answers for name in answer if name.startswith(("dec", "pre"))):
        for key in ("ttft_ms", "itl_ms", "tokens_per_s"):
            row(f"{question}, {key}", [spread(answer.get(question, ()), key) for answer in answers])
    for question in dict.fromkeys(name for answer in answers for name in answer if name.startswith("profile")):
        profiles = [answer.get(question) for answer in answers]
        row(f"{question}, step us", [f"{p['span_us']:.0f}" if p else "" for p in profiles])
        row(f"{question}, GPU busy us", [f"{p['busy_us']:.0f}" if p else "" for p in profiles])
        row(
            f"{question}, routed experts us",
            [f"{p['experts_us']:.0f}" if p and "experts_us" in p else "" for p in profiles],
        )
    for what, names in (("triton", ["triton"] * len(runners)), ("its own of other ranks", list(runners))):
        pairs = [(answer.get("judged"), first.get(name)) for answer, name in zip(answers, names, strict=True)]
        compared = [judge(a, b) if a and b and a is not b else None for a, b in pairs]
        row(f"log probabilities beside {what}", [f"{one[0]:.4f}, r = {one[1]:.4f}" if one else "" for one in compared])
        row(f"tokens of 64 as {what}", [", ".join(map(str, one[2])) if one else "" for one in compared])
    return "\n".join(f"| {line} |" for line in lines)


def of_a_rank(start: dict[str, Any], key: str) -> float:
    """Seconds: of the whole server, or summed up over a rank's log lines, of which every rank has the same."""
    found = start[key]
    return found if isinstance(found, float) else sum(found) / start["arguments"]["tp"]


def spread(rows: Any, key: str) -> str:
    """Median, smallest and largest."""
    values = [row[key] for row in rows if key in row]
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})" if values else ""


def judge(answer: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float, list[int]]:
    """Mean absolute difference and correlation of log probabilities; tokens of each text up to a difference."""
    ours, theirs = ([value for prompt in one["logprobs"] for value in prompt] for one in (answer, reference))
    agreeing = [
        next((place for place, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), len(text))
        for text, other in zip(answer["tokens"], reference["tokens"], strict=True)
    ]
    difference = statistics.fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return difference, statistics.correlation(ours, theirs), sorted(agreeing)


if __name__ == "__main__":
    main()
