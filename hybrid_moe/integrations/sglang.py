"""SGLang's routed experts by `HybridMoE`: ``--moe-runner-backend hybrid_moe``.

    pip install hybrid-moe
    python -m sglang.launch_server --model-path ... --moe-runner-backend hybrid_moe

SGLang finds `register` by the entry point ``hybrid_moe`` of group ``sglang.srt.plugins``. Without the option it changes
nothing. With it, SGLang loads the weights as for its Triton runner (the checkpoint's layout), and after loading every
FP8 block-scale MoE layer's runner calls a `HybridMoE` on those weights: no copy. Gate, top-k, shared experts, EPLB's
renumbering and the reduction over ranks stay SGLang's; the runner gets chosen experts, so that routing of any kind
works, grouped or not, sigmoid or softmax, with fused shared experts and under expert or tensor parallelism.

SGLang 0.5.16 has a closed list of runners. 0.5.23 lets packages name new ones (`register_moe_runner_core`), but its
`Fp8MoEMethod` calls none but its own. So in both the option is read as ``triton`` before SGLang checks it, and the
runner's fused function, which is called with (dispatch output, weights, configuration), is replaced.

Needs of SGLang (``sglang/srt/``):

- ``server_args.py``: `add_moe_runner_backend_choices`; `ServerArgs` can be marked before it resolves itself.
- ``layers/moe/moe_runner/runner.py``: `MoeRunner.fused_func`, called by `MoeRunner.run`.
- ``layers/moe/token_dispatcher/standard.py``: `StandardDispatchOutput` with ``hidden_states`` and ``topk_output``
  (``topk_weights`` float32, ``topk_ids`` counted from the rank's first expert, -1 for others'); `StandardCombineInput`.
- ``layers/moe/fused_moe_triton/layer.py``: `FusedMoE` and its ``moe_runner_config``.
- ``plugins/hook_registry.py``: `HookRegistry`; ``distributed``: `get_tp_group` and its ``cpu_group``.
- For the metrics alone: ``model_executor/runner/decode_cuda_graph_runner.py``: `DecodeCudaGraphRunner.execute`, its
  ``bs`` and ``captured_req_width``; ``observability/metrics_collector.py``: `SchedulerMetricsCollector.log_stats`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt import server_args as sglang_server_args
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ..api import HybridMoE
from ..problem import MoEProblem
from ..serving.metrics import snapshot
from ..serving.warmup import WarmedUp

__all__ = ["NAME", "problem_of", "register", "replace_runners"]

NAME = "hybrid_moe"
# Releases whose engine (the first) or Python files (the second) this was run with.
RUN_WITH = ("0.5.16", "0.5.23")
# An attribute of ServerArgs, which SGLang sends to every rank's process.
_MARK = "hybrid_moe_runner"
# An attribute of ModelRunner: its layers.
_LAYERS = "hybrid_moe_layers"
# Of a prefill, where SGLang is told no chunk size.
_MAX_NUM_TOKENS = 8192

_log = logging.getLogger("hybrid_moe")


def register() -> None:
    """Add ``hybrid_moe`` to SGLang's choices of ``--moe-runner-backend``. Called by SGLang in each of its processes."""
    sglang_server_args.add_moe_runner_backend_choices([NAME])
    HookRegistry.register("sglang.srt.server_args.ServerArgs.__post_init__", _request, HookType.BEFORE)
    after = {
        "model_executor.model_runner.ModelRunner.load_model": _after_load,
        "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute": _after_replay,
        "observability.metrics_collector.SchedulerMetricsCollector.log_stats": _after_log_stats,
    }
    for target, hook in after.items():
        HookRegistry.register(f"sglang.srt.{target}", hook, HookType.AFTER)


def _request(server_args: Any, *_: Any, **__: Any) -> None:
    if server_args.moe_runner_backend == NAME:
        object.__setattr__(server_args, _MARK, True)
        server_args.moe_runner_backend = "triton"  # the layout of the weights


def _after_load(result: Any, model_runner: Any, *_: Any, **__: Any) -> None:
    """SGLang logs what a plugin raises and goes on, but not what a hook does: no server starts with another runner."""
    if not getattr(model_runner.server_args, _MARK, False):
        return
    from sglang.srt.distributed import get_tp_group  # the model runner has it in 0.5.16, and no more in 0.5.23

    ranks = get_tp_group()
    options = {} if ranks is None or ranks.world_size == 1 else {"group": ranks.cpu_group}  # all of them choose alike
    layers = replace_runners(model_runner.model, **options)
    name = type(model_runner.model).__name__
    if not layers:
        _log.warning("%s has no FP8 block-scale MoE layer: --moe-runner-backend %s changes nothing", name, NAME)
        return
    for problem in dict.fromkeys(layer.problem for layer in layers.values()):  # in the same order on all ranks
        same = [layer for layer in layers.values() if layer.problem == problem]
        choices = ", ".join(f"T = {tokens}: {same[0].choice(tokens)}" for tokens in (1, 64, 1024, 8192))
        _log.info("%d MoE layers of %s by hybrid_moe, %s; %s", len(same), name, problem.definition, choices)
        _warm_up(same[0], getattr(model_runner.server_args, "chunked_prefill_size", None))
    setattr(model_runner, _LAYERS, tuple(layers.values()))


def _warm_up(layer: HybridMoE, chunked_prefill_size: int | None) -> None:
    """Compile what layers of its problem will run: before SGLang measures memory and captures its graphs."""
    most = chunked_prefill_size if chunked_prefill_size and chunked_prefill_size > 0 else _MAX_NUM_TOKENS

    def progress(done: WarmedUp) -> None:
        if done.seconds > 1:  # as a library that compiles at its first call
            _log.info("T = %d took %.1f s: %s", done.num_tokens, done.seconds, done.choice)

    _log.info("compiling and setting up what layers of %s run to T = %d", layer.problem.definition, most)
    start = time.perf_counter()
    warmed = layer.warm_up(max_num_tokens=most, progress=progress)
    _log.info("warm-up of %d token counts to T = %d: %.1f s", len(warmed), most, time.perf_counter() - start)


def _after_replay(result: Any, graphs: Any, *_: Any, **__: Any) -> None:
    """Graphs run no Python: the calls that they hold are counted here."""
    for layer in getattr(graphs.model_runner, _LAYERS, ()):
        layer.count_replay(graphs.bs * graphs.captured_req_width)


def _after_log_stats(result: Any, collector: Any, *_: Any, **__: Any) -> None:
    """SGLang writes its own metrics: ours go where they go, to the files that ``/metrics`` is collected from."""
    if snapshot():
        _mirror().update()


@functools.cache
def _mirror() -> Any:
    # SGLang imports prometheus_client no sooner either: it reads where its files are to be.
    from ..serving.prometheus import Mirror

    return Mirror()


def replace_runners(model: torch.nn.Module, **options: Any) -> dict[str, HybridMoE]:
    """Have every FP8 block-scale MoE layer of a loaded model run by `HybridMoE`: all of them or, after an error, none.

    Parameters
    ----------
    model
        With its weights loaded and processed, before CUDA graphs are captured.
    options
        Of `HybridMoE`: ``backend``, ``policy``, ``max_num_tokens``, ``group`` and others.

    Returns
    -------
    dict
        The layers by module name.

    Raises
    ------
    ValueError
        A layer can't be computed; the message names it and every reason.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod

    found: list[tuple[str, Any, HybridMoE]] = []
    refused = []
    for name, experts, topk in _layers(model, FusedMoE):
        if not isinstance(experts.quant_method, Fp8MoEMethod):
            continue
        reasons = _not_supported_reasons(experts)
        if reasons:
            refused.append(f"{name}: {'; '.join(reasons)}")
            continue
        found.append((name, experts, _prepare(experts, None if topk is None else topk.topk_config, options)))
    if refused:
        raise ValueError(
            f"--moe-runner-backend {NAME} can't run these layers of SGLang {importlib.metadata.version('sglang')}:\n  "
            + "\n  ".join(refused)
        )
    for _, experts, layer in found:
        experts.quant_method.runner.fused_func = _fused(layer, experts.moe_runner_config.routed_scaling_factor)
    return {name: layer for name, _, layer in found}


def _layers(model: torch.nn.Module, kind: type) -> Iterator[tuple[str, Any, Any]]:
    """Name, experts and, where the block has one, `TopK`."""
    for name, block in model.named_modules():
        for child_name, child in block.named_children():
            if isinstance(child, kind):
                yield f"{name}.{child_name}", child, getattr(block, "topk", None)


def _not_supported_reasons(experts: Any) -> list[str]:
    config, method = experts.moe_runner_config, experts.quant_method
    runner = getattr(method, "runner", None)
    block = list(getattr(method, "weight_block_size", None) or ())
    checks = {
        f"expected 128x128 FP8 weight blocks, got {block or 'none'}": block != [128, 128] or bool(method.use_mxfp8),
        "expected a runner of the checkpoint's layout (triton)": runner is None
        or not runner.runner_backend.is_triton(),
        f"expected gated SiLU, got {config.activation!r}": config.activation != "silu" or not config.is_gated,
        "a SwiGLU limit or alpha": any(
            getattr(config, name, None) is not None for name in ("swiglu_limit", "gemm1_alpha", "gemm1_clamp_limit")
        ),
        "router weights on the input": bool(config.apply_router_weight_on_input),
        "no_combine": bool(config.no_combine),
        "experts with biases": bool(getattr(experts, "with_bias", False)),
        "LoRA": bool(getattr(runner, "lora_enabled", False)),
    }
    return [reason for reason, holds in checks.items() if holds]


def problem_of(experts: Any, topk_config: Any | None) -> MoEProblem:
    """The problem that a `FusedMoE` computes, whose policy it gets.

    Parameters
    ----------
    experts
        SGLang's `FusedMoE`.
    topk_config
        The `TopKConfig` of its block; ``None`` where the block has no `TopK`. Experts are chosen before the call, so
        this says no more than which policy fits.
    """
    config = experts.moe_runner_config
    local, double, hidden = experts.w13_weight.shape
    grouped = topk_config is not None and topk_config.use_grouped_topk
    n_group = int(topk_config.num_expert_group or 1) if grouped and topk_config is not None else 1
    topk_group = int(topk_config.topk_group or 1) if grouped and topk_config is not None else 1
    if config.num_experts % n_group:  # fused shared experts are in no group
        n_group = topk_group = 1
    softmax = topk_config is not None and topk_config.scoring_func == "softmax" and n_group == 1
    return MoEProblem(
        num_experts=int(config.num_experts),
        num_local_experts=local,
        top_k=int(config.top_k),
        n_group=n_group,
        topk_group=topk_group,
        hidden_size=hidden,
        intermediate_size=double // 2,
        routing_method="softmax" if softmax else "deepseek_v3",
        gate_first=True,
    )


def _prepare(experts: Any, topk_config: Any | None, options: dict[str, Any]) -> HybridMoE:
    problem = problem_of(experts, topk_config)
    return HybridMoE(
        experts.w13_weight.data,
        experts.w13_weight_scale_inv.data,
        experts.w2_weight.data,
        experts.w2_weight_scale_inv.data,
        None,
        local_expert_offset=0,  # SGLang's dispatcher counts from the rank's first expert
        routed_scaling_factor=1.0,
        problem=problem,
        **options,
    )


def _fused(layer: HybridMoE, factor: float | None) -> Callable[..., Any]:
    """What SGLang's runner calls in place of its own fused function."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

    def run(dispatch_output: Any, quant_info: Any, runner_config: Any) -> Any:
        hidden_states = dispatch_output.hidden_states
        topk_weights, topk_ids = dispatch_output.topk_output[:2]
        if not hidden_states.shape[0]:  # SGLang's empty top-k output has no width
            return StandardCombineInput(hidden_states=torch.empty_like(hidden_states))
        if factor is not None and factor != 1.0:
            topk_weights = topk_weights * factor
        output = layer(None, hidden_states, topk_ids=topk_ids, topk_weights=topk_weights)
        return StandardCombineInput(hidden_states=output)

    return run
