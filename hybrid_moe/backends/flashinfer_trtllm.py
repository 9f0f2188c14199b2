"""flashinfer's `trtllm_fp8_block_scale_moe`: one call from routing to combine, for SM100 and SM103.

**State.** Never run or measured by this project: it had no such GPU. Tested are the call against the recorded
signatures of releases all over the range, and the tensor layouts against an emulation in torch. What follows was
read in the sources of the released wheels; ``launcher`` is ``csrc/trtllm_fused_moe_kernel_launcher.cu``, ``routing``
``csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing_deepseek.cu``, ``dev_kernel``
``csrc/fused_moe/trtllm_backend/trtllm_fused_moe_dev_kernel.cu``, and line numbers are those of 0.7.2.post1.

**Range.** From 0.6.14 to before 0.8. 0.6.15 inserted ``num_fused_shared_experts`` into the middle of the parameters, as
earlier releases did with others: arguments are given by keyword only. ``fused_moe/core.py`` announces that the function
returns a list instead of a tensor from 0.8.0 on; what it returns is not read here, the result is in ``output``.

**Layouts** (docstring in ``fused_moe/core.py``, 5817 on). The definition's own: unshuffled weights
(``use_shuffled_weight=False``) with ``weight_layout=0``, MajorK; ``hidden_states_scale`` ``[H/128, T]``. The first half
of GEMM1's rows is linear and the second the gate: ``silu(x2) * x1`` (``dev_kernel`` 320-325), so ``gate_first`` is
refused.

**Strides.** The launcher reads ``data_ptr()`` of logits, activations and their scales and checks shapes and dtypes, but
neither strides nor contiguity (``launcher`` 1238, 4337-4434): a strided tensor would give wrong results in silence, so
it is a ValueError here.

**Dtypes.** Logits float32 or bf16 (``launcher`` 1246), bias bf16 or float32 (1279, not checked before 0.6.16). The
bias is rounded to bf16 in any case: of one in float32, take off what all experts have in common before. Scores stay
float32, and the weights of the chosen experts are bf16 (``routing``
150-153, 338). Equal scores go to the lower index (``RoutingKernelTopK.cuh`` 58). GEMM1's result is stored as fp8 with
1x128 scales before SwiGLU and again after it (``launcher`` 4450-4474). In the emulation that gives a relative L2 of
0.042 to 0.046 against the definition, where rounding once gives 0.023: little below the gate's 0.05.

**Routing by softmax** is refused. ``RoutingMethodType.RenormalizeNaive`` (4) is its name there, but nobody looked
whether its kernels read float32 logits, the bias and the scaling factor.

**Experts chosen before the call** are refused. ``trtllm_fp8_block_scale_routed_moe``, there from 0.6.14 on, takes them
packed: the id above the weight in bf16, in one int32. Nobody looked what its kernels make of -1.

**Limits of routing**, the same in every release of the range (``launcher`` 4240-4280, ``routing`` 488-551): see
`FlashinferTrtllm.not_supported_reasons`.

**First call.** It fetches headers and kernels of NVIDIA's artifact server, unless they are there already, and compiles
with nvcc (``jit/fused_moe.py`` 331-420): warm up before capturing a CUDA graph. It fetches on SM90 too, though it is
built and run for SM10x and SM12x only (385, ``launcher`` 1697), so the capability is asked before flashinfer is
imported. SM12x and SM107, which is another module, are refused: nobody looked at them.

**Tuning.** Without a surrounding ``flashinfer.autotune()`` nothing is tuned: ``AutoTuner.choose_one`` looks into its
cache and else takes the fallback, tactic -1 (``autotuner/autotuner.py``). The bundled tables name other operations
(``tuning_configs/``). Fallback and candidates both come from ``computeSelectedTileN`` (``launcher`` 1050-1092), which
takes ``num_tokens * top_k / num_local_experts`` rows for each expert, as if every route were local. With 32 of 256
experts local that is 8 times too many, three tile sizes; the candidates reach only one size down, so that the tile that
fits may not even be tried. No argument mends that. ``tune_max_num_tokens`` only sets the buckets of T for which tactics
are tuned and looked up (``fused_moe/utils.py`` 228-300); larger T share the last one. It is a constant here, as tuning
and serving must use the same, and large enough for the definition's largest workload, T = 14107; flashinfer's own
default, 8192, isn't.

**Unknown here.** Whether equal inputs give equal bits, whether the call can be captured after one warm-up at every T,
and the size of the batched GEMMs' own workspaces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..candidate import BackendUnsupportedError, Candidate, ConfigValue
from ..device import DeviceKey
from ..inputs import Inputs, MoEInputs
from ..problem import MoEProblem
from . import flashinfer_package
from .base import Backend, Runner
from .flashinfer_package import PACKAGE

CAPABILITIES = ((10, 0), (10, 3))

TUNE_MAX_NUM_TOKENS = 16384

# flashinfer.tllm_enums.RoutingMethodType and WeightLayout.
_ROUTING_METHOD_TYPE = {"deepseek_v3": 2}
_WEIGHT_LAYOUT_MAJOR_K = 0

# routing: MaxNumGroups, WarpSize, MaxNumTopGroups, NumNemotronExperts; launcher: kNumKimiK2Experts.
_MAX_GROUPS = 8
_MAX_GROUP_SIZE = 32
_MAX_TOPK_GROUP = 4
_MAX_EXPERTS = 512
_MAX_EXPERTS_TOP_8 = 384

# launcher, Fp8BlockScaleLauncher: the largest tile, to whose multiple each expert's rows are padded.
_MAX_TILE = 128


class FlashinferTrtllm(Backend):
    """TensorRT-LLM's fused MoE kernels, as flashinfer ships them. Needs the extra ``[flashinfer]``, SM100 or SM103."""

    name = "flashinfer_trtllm"
    rounds_bias = True

    def packages(self, config: Mapping[str, ConfigValue]) -> tuple[str, ...]:
        """The kernels are flashinfer's."""
        return ("torch", PACKAGE)

    def not_supported_reasons(
        self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]
    ) -> list[str]:
        """Every reason against it: the device, flashinfer's presence and version, the problem, the options.

        flashinfer is neither imported nor called.
        """
        reasons = []
        if device.capability not in CAPABILITIES:
            have = ".".join(map(str, device.capability)) if device.capability else "unknown"
            reasons.append(f"compute capability of {device.name}: expected 10.0 or 10.3, got {have}")
        reasons += flashinfer_package.package_reasons()
        reasons += _problem_reasons(problem)
        reasons += self.unknown_config_reasons(config, {})
        return reasons

    def routed_reasons(self, problem: MoEProblem, config: Mapping[str, ConfigValue]) -> list[str]:
        """It chooses the experts itself: see the module."""
        return ["topk_ids and topk_weights aren't taken: trtllm_fp8_block_scale_moe chooses the experts from logits"]

    def prepare(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> Runner:
        """Import flashinfer, check the function's signature against the call, and make the runner.

        Raises
        ------
        BackendUnsupportedError
            With all of `not_supported_reasons`; or if flashinfer can't be imported, or its function can't be called
            as this backend does.
        """
        self.refuse_if_unsupported(problem, device, config)
        moe, reasons = flashinfer_package.load("trtllm_fp8_block_scale_moe", _passed(problem))
        if moe is None or reasons:
            raise BackendUnsupportedError(Candidate(self.name, config), reasons)
        return _TrtllmRunner(moe, problem)


def layer_arguments(problem: MoEProblem) -> dict[str, Any]:
    """The keyword arguments that are the same in every call of a layer."""
    return {
        "num_experts": problem.num_experts,
        "top_k": problem.top_k,
        "n_group": problem.n_group,
        "topk_group": problem.topk_group,
        "intermediate_size": problem.intermediate_size,
        "local_num_experts": problem.num_local_experts,
        "routing_method_type": _ROUTING_METHOD_TYPE[problem.routing_method],
        "use_shuffled_weight": False,
        "weight_layout": _WEIGHT_LAYOUT_MAJOR_K,
        "do_finalize": True,
        # flashinfer would choose the same on these devices, after asking the capability in each call.
        "enable_pdl": True,
        "tune_max_num_tokens": TUNE_MAX_NUM_TOKENS,
    }


def _passed(problem: MoEProblem) -> set[str]:
    return {*MoEInputs._fields, "output", *layer_arguments(problem)}


def contract_reasons(signature: inspect.Signature, problem: MoEProblem) -> list[str]:
    """Why a function with this signature can't take our keyword arguments; empty if it can."""
    return flashinfer_package.contract_reasons("trtllm_fp8_block_scale_moe", signature, _passed(problem))


class _TrtllmRunner(Runner):
    def __init__(self, moe: Callable[..., Any], problem: MoEProblem) -> None:
        self._moe = moe
        self._problem = problem
        self._layer_arguments = layer_arguments(problem)

    def run(self, inputs: Inputs, output: torch.Tensor) -> None:
        """Call flashinfer, which reads these three tensors as packed whatever their strides: copied where they aren't.

        A call at another T may go to a backend that takes any strides, so refusing here would be in mid-serving.
        """
        assert isinstance(inputs, MoEInputs), "routed_reasons has refused"
        inputs = inputs._replace(
            routing_logits=inputs.routing_logits.contiguous(),
            hidden_states=inputs.hidden_states.contiguous(),
            hidden_states_scale=inputs.hidden_states_scale.contiguous(),
        )
        # flashinfer asks the current device, and before 0.6.16 launches on it whatever the tensors' device.
        with torch.cuda.device_of(output):
            self._moe(**inputs._asdict(), output=output, **self._layer_arguments)

    def workspace_bytes(self, num_tokens: int) -> int:
        """Upper bound of the buffers between the kernels, without the batched GEMMs' own workspaces.

        As the launcher allocates them (``getMaxPermutedPaddedCount`` and ``prepare_moe``, 4436-4474), with the largest
        tile: rows for all routes, local or not.
        """
        p = self._problem
        routes = num_tokens * p.top_k
        filled = min(p.num_experts, routes)
        rows = (filled + (routes - filled) // _MAX_TILE) * _MAX_TILE
        gemm1, activation, gemm2 = 2 * p.intermediate_size, p.intermediate_size, 2 * p.hidden_size
        scales = 4 * (gemm1 + activation) // p.block
        return rows * (gemm1 + activation + gemm2 + scales)


def _problem_reasons(problem: MoEProblem) -> list[str]:
    reasons = []
    if problem.weight_on_input:
        reasons.append("weight_on_input is True; the kernels weigh an expert's result")
    if problem.gate_first:
        reasons.append("gate_first is True; the kernels read the up half first")
    if problem.routing_method not in _ROUTING_METHOD_TYPE:
        reasons.append(f"routing_method: expected {', '.join(_ROUTING_METHOD_TYPE)}, got {problem.routing_method!r}")
    if problem.num_shared_experts:
        reasons.append(
            f"num_shared_experts: expected 0, got {problem.num_shared_experts}: it has experts by choice alone"
        )
    if problem.num_experts % 4:
        reasons.append(f"num_experts: expected a multiple of 4, got {problem.num_experts}")
    if problem.num_experts > _MAX_EXPERTS:
        reasons.append(f"num_experts: expected at most {_MAX_EXPERTS}, got {problem.num_experts}")
    if problem.n_group > _MAX_GROUPS:
        reasons.append(f"n_group: expected at most {_MAX_GROUPS}, got {problem.n_group}")
    if problem.n_group > 1 and problem.group_size > _MAX_GROUP_SIZE:
        reasons.append(f"groups: expected at most {_MAX_GROUP_SIZE} experts, got {problem.group_size}")
    if problem.topk_group > _MAX_TOPK_GROUP:
        reasons.append(f"topk_group: expected at most {_MAX_TOPK_GROUP}, got {problem.topk_group}")
    max_top_k = 8 if problem.num_experts <= _MAX_EXPERTS_TOP_8 else 22
    if problem.top_k > max_top_k:
        reasons.append(f"top_k: expected at most {max_top_k} of {problem.num_experts} experts, got {problem.top_k}")
    eligible = problem.topk_group * problem.group_size
    if problem.top_k >= eligible:
        reasons.append(f"top_k: expected less than the {eligible} experts of the kept groups, got {problem.top_k}")
    return reasons
