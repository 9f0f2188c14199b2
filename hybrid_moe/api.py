"""The entry points of serving code: `fused_moe` for one call, `HybridMoE` for a layer."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

from .backends.base import Runner
from .candidate import Candidate
from .device import DeviceKey
from .inputs import (
    Inputs,
    MoEInputs,
    RoutedInputs,
    Stated,
    check_activations,
    check_output,
    check_ranks,
    check_unquantized,
    plain_num_tokens,
    problem_of,
    stated,
    with_python_numbers,
)
from .policy.resolve import as_candidate
from .policy.schema import Policy
from .policy.select import Decision, Refusals, check_num_tokens
from .problem import MoEProblem, RoutingMethod
from .serving import custom_ops, quantize_input, warmup
from .serving.agreement import agree, together
from .serving.call import Call, launch, new_dispatch, new_output, out_of_memory
from .serving.dispatch import Dispatch
from .serving.metrics import Counters, Sample
from .serving.quarantine import QUARANTINE
from .serving.shadow import Shadow, ShadowCheck, ShadowStatus
from .serving.warmup import WarmedUp
from .serving.weight_check import refuse_not_finite
from .serving.workspace import Workspaces

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["HybridMoE", "fused_moe"]

logger = logging.getLogger("hybrid_moe")


def fused_moe(
    routing_logits: torch.Tensor | None,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    problem: MoEProblem | None = None,
    top_k: int | None = None,
    n_group: int | None = None,
    topk_group: int | None = None,
    gate_first: bool | None = None,
    routing_method: RoutingMethod | None = None,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    num_experts: int | None = None,
    output: torch.Tensor | None = None,
    backend: str | Candidate | None = None,
    policy: Policy | str | Path | None = None,
    max_workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Run the FP8 block-scale MoE layer on the backend that was measured fastest for this GPU and token count.

    Parameters
    ----------
    routing_logits
        ``[T, num_experts]`` float32; ``None`` with ``topk_ids``.
    routing_bias
        ``[num_experts]`` bfloat16 or float32. ``None`` for none, zeros that each call makes, and with ``topk_ids``.
        Added in float32, but by ``flashinfer_trtllm``, which rounds it to bfloat16.
    hidden_states
        ``[T, H]`` float8_e4m3fn; bfloat16 without scales.
    hidden_states_scale
        ``[H/128, T]`` float32. ``None``: the hidden states are in bfloat16, and quantised here for each 1x128 block.
    gemm1_weights, gemm1_weights_scale
        ``[E, 2I, H]`` float8_e4m3fn, rows ``[0, I)`` up and ``[I, 2I)`` gate; ``[E, 2I/128, H/128]`` float32.
    gemm2_weights, gemm2_weights_scale
        ``[E, H, I]`` float8_e4m3fn; ``[E, H/128, I/128]`` float32.
    local_expert_offset
        Global index of the first of the E local experts.
    routed_scaling_factor
        Factor on the routing weights, which sum to one before it; not applied to ``topk_weights``.
    problem
        What is computed, said outright: the preferred way. Every tensor is checked against it.
    top_k, n_group, topk_group, gate_first, routing_method, num_experts
        In place of ``problem``, whose fields they are, the rest of which the tensors say. What isn't given is
        DeepSeek-V3's: 8 of 8 groups' experts from the best 4, up first, ``"deepseek_v3"``. With ``topk_ids``
        ``num_experts`` is wanted, ``top_k`` is their width, and the others say no more than whose policy it is.
    topk_ids, topk_weights
        ``[T, top_k]`` int32 and float32, in place of logits and bias: the experts that were chosen before, by their
        global numbers, and their final weights. -1 is no expert; see `RoutedInputs`.
    output
        ``[T, H]`` bfloat16 to write into; a new tensor if not given.
    backend
        A name (``"triton_fused"``), ``"name[key=value]"`` or a `Candidate`. It runs, or raises: never falls back.
    policy
        A `Policy`, a policy file or a directory of them; by default the user's own, then the shipped one. Files are
        read once in a process.
    max_workspace_bytes
        Most device memory that a call takes next to its inputs and its output: with more tokens than that is enough
        for, the same candidate runs on one chunk of them after the other, and reads the weights again for each.

    Returns
    -------
    torch.Tensor
        ``[T, H]`` bfloat16: this rank's part of the layer, to be summed over the ranks. Zeros for a token that chose
        no local expert.

    Raises
    ------
    TypeError, ValueError
        An input has the wrong type, dtype, shape, device or range; the message names it. ``max_workspace_bytes`` is
        less than one token takes; the message says how much that is.
    PolicyError
        The given policy can't be read, or is for another problem or device.
    BackendUnsupportedError
        The given backend can't run here; the message lists every reason.
    """
    inputs: Inputs
    rest = (
        hidden_states,
        hidden_states_scale,  # None until they are quantised
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        local_expert_offset,
        routed_scaling_factor,
    )
    if topk_ids is None and topk_weights is None:
        inputs = MoEInputs(routing_logits, routing_bias, *rest)  # type: ignore[arg-type]  # checked below
    else:
        for name, given in (("routing_logits", routing_logits), ("routing_bias", routing_bias)):
            if given is not None:
                raise TypeError(f"{name}: expected None with topk_ids and topk_weights, got a value")
        inputs = RoutedInputs(topk_ids, topk_weights, *rest)  # type: ignore[arg-type]
    options = (top_k, n_group, topk_group, gate_first, routing_method, num_experts)
    if is_compiling():
        from .serving.traced import handle_of  # loads the compiler, which is there by now

        handle = handle_of(backend, policy, problem, max_workspace_bytes)
        return custom_ops.call_fused_moe(inputs, output, handle, *options)
    return Call(backend, policy, problem, max_workspace_bytes).run(inputs, output, *options)


class HybridMoE:
    """A prepared layer: it holds weights and policy, and is called with logits and hidden states.

    Made without a bias (``routing_bias=None``), it is called with experts that are chosen already. Backends that choose
    them themselves can't run then, and the order of choice passes over them. Two layers, one of each kind, may share
    their weights.

    The policy is resolved and every backend that it can choose is prepared once, here: one that can't run refuses now,
    not in the middle of serving.

    Parameters
    ----------
    gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, routing_bias
        See `fused_moe`. Held, never copied.
    local_expert_offset, routed_scaling_factor, problem, backend, policy, max_workspace_bytes
        See `fused_moe`.
    num_experts, top_k, n_group, topk_group, gate_first, routing_method
        In place of ``problem``, see `fused_moe`; the bias says ``num_experts`` by its length.
    max_num_tokens
        T up to which calls reserve no memory but for their output, and none with ``output=``: their intermediate
        tensors lie in a workspace that is kept, `planned_bytes` for each stream that the device's layers are called on,
        which they share. The first call on a stream reserves it; `warm_up` does on its own. A call with more tokens is
        right too, and reserves what it takes. Without an argument every call does. ``flashinfer_trtllm`` and
        ``flashinfer_cutlass`` reserve their own memory in any case, and so does ``torch_reference``.
    shadow_check
        Compares a few tokens of every so many calls with the reference while the layer serves; see `ShadowCheck`.
    check_weights
        Read all weights and scales once, here, and raise ValueError with the names of the tensors and the numbers of
        the experts if one is NaN or infinite. Otherwise such an expert shows as NaN in the rows that use it.
    group
        Ranks that run the same layer in parts, each with a layer of its own made with its group: they compare policies
        and what they can run, and all choose the same. `warm_up`, `reload_policy` and `agree` are then collectives, as
        making the layer is; calls aren't. A copy belongs to no group.

    Attributes
    ----------
    problem : MoEProblem
    device : DeviceKey
    max_num_tokens, max_workspace_bytes : int or None

    Raises
    ------
    TypeError, ValueError, PolicyError, BackendUnsupportedError
        As `fused_moe`.
    RanksDifferError
        The ranks of ``group`` can't choose alike, or another one of them raised.
    """

    def __init__(
        self,
        gemm1_weights: torch.Tensor,
        gemm1_weights_scale: torch.Tensor,
        gemm2_weights: torch.Tensor,
        gemm2_weights_scale: torch.Tensor,
        routing_bias: torch.Tensor | None,
        *,
        local_expert_offset: int,
        routed_scaling_factor: float,
        problem: MoEProblem | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        n_group: int | None = None,
        topk_group: int | None = None,
        gate_first: bool | None = None,
        routing_method: RoutingMethod | None = None,
        backend: str | Candidate | None = None,
        policy: Policy | str | Path | None = None,
        max_num_tokens: int | None = None,
        max_workspace_bytes: int | None = None,
        shadow_check: ShadowCheck | None = None,
        check_weights: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        if max_num_tokens is not None:
            warmup.check_count("max_num_tokens", max_num_tokens)
        if max_workspace_bytes is not None:
            warmup.check_count("max_workspace_bytes", max_workspace_bytes)
        tensors = {
            "gemm1_weights": gemm1_weights,
            "gemm1_weights_scale": gemm1_weights_scale,
            "gemm2_weights": gemm2_weights,
            "gemm2_weights_scale": gemm2_weights_scale,
        }
        check_ranks(tensors if routing_bias is None else tensors | {"routing_bias": routing_bias})
        said = stated(problem, Stated(top_k, n_group, topk_group, gate_first, routing_method, num_experts))
        rest = (
            gemm1_weights.new_empty((0, *gemm1_weights.shape[-1:])),
            gemm1_weights_scale.new_empty((gemm1_weights_scale.shape[-1], 0)),
            gemm1_weights,
            gemm1_weights_scale,
            gemm2_weights,
            gemm2_weights_scale,
            local_expert_offset,
            routed_scaling_factor,
        )
        empty: Inputs
        if routing_bias is not None:
            logits = torch.empty((0, *routing_bias.shape), dtype=torch.float32, device=routing_bias.device)
            empty = MoEInputs(logits, routing_bias, *rest)
        elif problem is None and num_experts is None:
            raise TypeError(
                "routing_bias: expected a tensor, zeros for no bias, got None; a layer that is called with topk_ids "
                "takes problem or num_experts in its place"
            )
        else:
            width = said.top_k if said.top_k is not None else 8
            weights = torch.empty((0, width), dtype=torch.float32, device=gemm1_weights.device)
            empty = RoutedInputs(weights.int(), weights, *rest)
        self.problem = problem_of(empty, said)
        empty = with_python_numbers(empty)
        if check_weights:
            refuse_not_finite(tensors)
        self.device = DeviceKey.of(gemm1_weights.device)
        # What every call has in common: the bias, and all that stands behind the activations.
        self._device = gemm1_weights.device
        self._routing_bias = routing_bias
        self._held: tuple[Any, ...] = empty[MoEInputs._fields.index("gemm1_weights") :]
        self.max_num_tokens = max_num_tokens
        self.max_workspace_bytes = max_workspace_bytes
        self._workspaces = None if max_num_tokens is None else Workspaces.of(self._device)
        self._counters = Counters()
        self._shadow: Shadow | None = None
        if shadow_check is not None:
            self._shadow = Shadow(shadow_check, self.problem, self.device, self._device)
        self._dispatch: Dispatch
        self._policy = policy
        self._group = group
        self._elsewhere: Refusals = {}  # what other ranks refuse
        QUARANTINE.join(self)
        self._take(None if backend is None else as_candidate(backend), policy)
        self._handle = custom_ops.register(self)

    def _take(self, backend: Candidate | None, policy: Policy | str | Path | None) -> None:
        # What is put in quarantine meanwhile is passed over as well.
        epoch, agreed = None, self._group is None
        while epoch != QUARANTINE.epoch:
            epoch = QUARANTINE.epoch
            if agreed:
                dispatch = self._dispatch_of(backend, policy, self._elsewhere)
            else:
                dispatch, self._elsewhere = self._agreed(backend, policy)
            self._policy, self._dispatch, agreed = policy, dispatch, True

    def _agreed(self, backend: Candidate | None, policy: Policy | str | Path | None) -> tuple[Dispatch, Refusals]:
        assert self._group is not None
        terms = {
            "device": self.device.name,
            "problem": self.problem,
            "backend": backend,
            "experts chosen before the call": self._routing_bias is None,
        }
        # Warnings are of the place that makes the layer, four calls further up than without a group.
        return agree(self._group, functools.partial(self._dispatch_of, backend, policy, stacklevel=10), terms)

    def agree(self) -> None:
        """Compare again with the other ranks of the layer's group, so that all of them choose the same; a collective.

        For after a candidate was put in quarantine or released on one of them: until then that rank chooses on its own.
        Captured graphs keep what they were captured with.

        Raises
        ------
        ValueError
            The layer has no group.
        RanksDifferError
            As when a layer is made; the layer goes on as it was.
        """
        if self._group is None:
            raise ValueError("agree: expected a layer with group=, got one without")
        self._take(self._dispatch.backend, self._policy)

    def choose_again(self) -> None:
        """Resolve the layer's policy again, as after a change of the quarantine; not for an explicit backend."""
        if (dispatch := getattr(self, "_dispatch", None)) is None or dispatch.backend is not None:
            return
        policy = dispatch  # nobody's
        while policy is not self._policy:  # another thread may give the layer another one
            policy = self._policy
            self._dispatch = self._dispatch_of(None, policy, self._elsewhere)

    def _dispatch_of(
        self, backend: Candidate | None, policy: Policy | str | Path | None, elsewhere: Refusals, stacklevel: int = 6
    ) -> Dispatch:
        routed = self._routing_bias is None
        dispatch = new_dispatch(
            self.problem,
            self.device,
            backend,
            policy,
            routed,
            self._counters,
            stacklevel=stacklevel,
            elsewhere=elsewhere,
            max_workspace_bytes=self.max_workspace_bytes,
        )
        if self._workspaces is not None:
            self._workspaces.grow(self._planned_bytes(dispatch))
        return dispatch

    def _planned_bytes(self, dispatch: Dispatch) -> int:
        if self.max_num_tokens is None:
            return 0
        # Behind what a runner takes, hidden states that come in bfloat16 are quantised.
        planned = dispatch.reserved_bytes(self.max_num_tokens)
        planned += quantize_input.bytes_of(self.problem, self.max_num_tokens)
        return planned if self.max_workspace_bytes is None else min(planned, self.max_workspace_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made as the layer was: it resolves its policy where it comes to be, and counts its own calls."""
        dispatch = self._dispatch
        w13, s13, w2, s2, offset, factor = self._held
        options = dict(
            local_expert_offset=offset,
            routed_scaling_factor=factor,
            problem=self.problem,
            backend=dispatch.backend,
            policy=dispatch.policy,
            max_num_tokens=self.max_num_tokens,
            max_workspace_bytes=self.max_workspace_bytes,
            shadow_check=None if self._shadow is None else self._shadow.options,
        )
        return _make, (type(self), (w13, s13, w2, s2, self._routing_bias), options)

    @classmethod
    def from_inputs(
        cls,
        inputs: Inputs,
        problem: MoEProblem,
        *,
        backend: str | Candidate | None = None,
        policy: Policy | str | Path | None = None,
        max_num_tokens: int | None = None,
        max_workspace_bytes: int | None = None,
        shadow_check: ShadowCheck | None = None,
        check_weights: bool = False,
        group: ProcessGroup | None = None,
    ) -> HybridMoE:
        """The layer whose weights, bias, offset and factor are those of ``inputs``, as one call would give them all.

        Without a bias for `RoutedInputs`.
        """
        return cls(
            inputs.gemm1_weights,
            inputs.gemm1_weights_scale,
            inputs.gemm2_weights,
            inputs.gemm2_weights_scale,
            inputs.routing_bias if isinstance(inputs, MoEInputs) else None,
            local_expert_offset=inputs.local_expert_offset,
            routed_scaling_factor=inputs.routed_scaling_factor,
            problem=problem,
            backend=backend,
            policy=policy,
            max_num_tokens=max_num_tokens,
            max_workspace_bytes=max_workspace_bytes,
            shadow_check=shadow_check,
            check_weights=check_weights,
            group=group,
        )

    def __call__(
        self,
        routing_logits: torch.Tensor | None,
        hidden_states: torch.Tensor,
        hidden_states_scale: torch.Tensor | None = None,
        *,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer; see `fused_moe` for the tensors and errors.

        ``topk_ids`` and ``topk_weights`` are for a layer without a bias, and ``routing_logits`` for one with it.
        """
        if self._routing_bias is None or topk_ids is not None or topk_weights is not None:
            return self._call_routed(routing_logits, topk_ids, topk_weights, hidden_states, hidden_states_scale, output)
        # In few steps: all that is done here is added to every call of the layer. MoEInputs' own constructor and
        # _replace take up to 0.4 us more.
        inputs = tuple.__new__(
            MoEInputs, (routing_logits, self._routing_bias, hidden_states, hidden_states_scale, *self._held)
        )
        if is_compiling():
            return custom_ops.call_layer(inputs, output, self._handle)
        return self.run(inputs, output)

    def _call_routed(
        self,
        routing_logits: torch.Tensor | None,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        hidden_states: torch.Tensor,
        hidden_states_scale: torch.Tensor | None,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._routing_bias is not None:
            raise TypeError(
                "topk_ids, topk_weights: expected None and routing_logits, as the layer has a routing_bias, got "
                "values: make a layer with routing_bias=None and num_experts"
            )
        if routing_logits is not None:
            raise TypeError(
                "routing_logits: expected None, and topk_ids and topk_weights, as the layer has no routing_bias, got "
                "logits: make a layer with one, zeros for no bias"
            )
        inputs = RoutedInputs(topk_ids, topk_weights, hidden_states, hidden_states_scale, *self._held)  # type: ignore[arg-type]
        if is_compiling():
            return custom_ops.call_layer(inputs, output, self._handle)
        return self.run(inputs, output)

    def check_replay(
        self,
        routing_logits: torch.Tensor | None,
        hidden_states: torch.Tensor,
        hidden_states_scale: torch.Tensor | None = None,
        *,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        output: torch.Tensor,
        choice: Candidate | None = None,
    ) -> None:
        """Let the shadow check look at a call of this layer that a CUDA graph has replayed, which runs no Python.

        Call it after each replay, on its stream and before its tensors are written again; one of every so many is
        compared, as eager calls are.

        Parameters
        ----------
        routing_logits, hidden_states, hidden_states_scale, topk_ids, topk_weights, output
            The tensors that the graph reads and writes, as the captured call was given them.
        choice
            What was captured: `choice` at the time. By default what would run now.

        Raises
        ------
        ValueError
            The layer has no ``shadow_check``, or the output lies where the hidden states were.
        TypeError, ValueError
            As a call.
        """
        if self._shadow is None:
            raise ValueError("check_replay: expected a layer with shadow_check=, got one without")
        rest = (hidden_states, hidden_states_scale, *self._held)
        inputs: Inputs
        if self._routing_bias is None:
            inputs = RoutedInputs(topk_ids, topk_weights, *rest)  # type: ignore[arg-type]
        else:
            inputs = MoEInputs(routing_logits, self._routing_bias, *rest)  # type: ignore[arg-type]
        if hidden_states_scale is None:
            check_unquantized(hidden_states)
        check_activations(inputs, self.problem)
        check_output(output, inputs, self.problem)
        if output.data_ptr() == hidden_states.data_ptr():
            raise ValueError("output: expected memory of its own, to be compared with hidden_states, got theirs")
        if tokens := inputs.num_tokens:
            self._shadow.after_replay(self.choice(tokens) if choice is None else choice, tokens, inputs, output)

    def count_replay(self, num_tokens: int) -> None:
        """Count a call of this layer that a CUDA graph has replayed, which runs no Python.

        ValueError for what is no integer of at least 1.
        """
        warmup.check_count("num_tokens", num_tokens)
        self._dispatch.counted(num_tokens)

    @property
    def shadow(self) -> ShadowStatus | None:
        """What the layer's shadow checks have found so far; ``None`` without ``shadow_check``."""
        return None if self._shadow is None else self._shadow.status()

    def finish_shadow_checks(self) -> None:
        """Wait for the shadow checks in flight and judge them: before weights are written in place, and at the end."""
        if self._shadow is not None:
            self._shadow.finish()

    def run(self, inputs: Inputs, output: torch.Tensor | None = None) -> torch.Tensor:
        """Run on inputs that are given whole; all but the activations are taken to be the layer's own, unchecked."""
        problem = self.problem
        logits, _, hidden, scale, *_ = inputs
        tokens = None
        if type(inputs) is MoEInputs:
            tokens = plain_num_tokens(problem, hidden, logits, scale, output, self._device)
        if tokens is None:
            if scale is None:
                check_unquantized(hidden)
            check_activations(inputs, problem)
            if output is not None:
                check_output(output, inputs, problem)
            tokens = inputs.num_tokens
        given, dispatch = output is not None, self._dispatch
        try:
            if output is None:
                output = new_output(problem, inputs)
            if tokens:
                runner, shadow = dispatch.counted(tokens), self._shadow
                if shadow is None or (sample := shadow.begin(dispatch.choice, tokens, inputs)) is None:
                    self._launch(runner, inputs, output)
                else:
                    shadow.watch(sample, functools.partial(self._launch, runner, inputs, output), output)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(dispatch, problem, tokens, given, error) from error
        return output

    def _launch(self, runner: Runner, inputs: Inputs, output: torch.Tensor) -> None:
        spaces = self._workspaces
        fits = spaces is not None and self.max_num_tokens is not None and inputs[2].shape[0] <= self.max_num_tokens
        piece = spaces.piece() if spaces is not None and fits else None
        if piece is None:
            launch(runner, inputs, output)
        else:
            piece.run(functools.partial(launch, runner, inputs, output))

    def choice(self, num_tokens: int) -> Candidate:
        """What runs at ``num_tokens``."""
        return self._dispatch.choice(num_tokens)

    def explain(self, num_tokens: int) -> Decision:
        """What runs at ``num_tokens``, and why."""
        return self._dispatch.decision(num_tokens)

    def workspace_bytes(self, num_tokens: int) -> int:
        """Device memory in bytes that a call at ``num_tokens`` takes besides its inputs and output.

        ValueError for what is no integer of at least 0.
        """
        check_num_tokens(num_tokens)
        return self._dispatch.runner(num_tokens).workspace_bytes(num_tokens) if num_tokens else 0

    @property
    def planned_bytes(self) -> int:
        """Device memory in bytes that is kept for calls up to ``max_num_tokens``, for each stream; 0 without it."""
        return self._planned_bytes(self._dispatch)

    def warm_up(
        self,
        token_counts: Iterable[int] | None = None,
        *,
        max_num_tokens: int = 16384,
        progress: Callable[[WarmedUp], None] | None = None,
    ) -> tuple[WarmedUp, ...]:
        """Compile and set up all that serving will run: one call at each T, before the first request.

        This package's kernels are compiled first, side by side on the CPU cores that the process may use. The calls
        have made-up activations, whose quantisation is warmed up with them, and count in no statistics. They wait for
        the device, so make them before graphs are captured. A candidate that raises in one is put in quarantine, and
        the next one of the order of choice warmed up instead; an explicit backend raises. Libraries that tune inside of
        a context of theirs do so here if this is called in it (``with flashinfer.autotune(): layer.warm_up()``).

        Parameters
        ----------
        token_counts
            T to call at, as those of the graphs that will be captured. By default the bounds of every regime, and the
            powers of two, as kernels change inside of a regime too.
        max_num_tokens
            The largest T of the default ones; no others are left out.
        progress
            Called after each T with what it was.

        Returns
        -------
        tuple of WarmedUp
            Candidate, T and seconds of each call, by T.

        Raises
        ------
        ValueError
            One of ``token_counts``, or ``max_num_tokens``, is no integer of at least 1.
        """
        dispatch = self._dispatch
        if token_counts is None:
            counts = warmup.token_counts(dispatch.starts, max_num_tokens)
        else:
            counts = warmup.checked(token_counts)
        if self._group is None:
            return self._warm_up_all(counts, progress)
        # A candidate that fails on one rank is to run on none: the others warm up what it takes instead.
        warm = functools.partial(self._warm_up_all, counts, progress)
        done = together(self._group, warm)
        while self._agreeing_changes(self._group, counts):
            done = together(self._group, warm)
        return done[self._group.rank()]

    def _agreeing_changes(self, group: ProcessGroup, counts: Iterable[int]) -> bool:
        """Whether `agree` makes a rank choose otherwise than before at one of these T."""
        before = [self.choice(count) for count in counts]
        self.agree()
        changed = before != [self.choice(count) for count in counts]
        return any(together(group, lambda: changed))

    def _warm_up_all(self, counts: Iterable[int], progress: Callable[[WarmedUp], None] | None) -> tuple[WarmedUp, ...]:
        made = functools.partial(warmup.synthetic, self.problem, self._device, self._routing_bias, self._held)
        warmup.compile_all(self._dispatch.runner, made(counts), self._device)
        done = []
        for inputs in made(counts):
            done.append(self._warm_up(inputs))
            if progress is not None:
                progress(done[-1])
        return tuple(done)

    def _warm_up(self, inputs: Inputs) -> WarmedUp:
        """One call; a candidate that raises in it is put in quarantine, unless there is no other."""
        tokens, output = inputs.num_tokens, new_output(self.problem, inputs)
        while True:
            dispatch = self._dispatch
            choice = dispatch.choice(tokens)
            warmup.synchronize(self._device)
            begin = time.perf_counter()
            try:
                self._launch(dispatch.runner(tokens), inputs, output)
                warmup.synchronize(self._device)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(dispatch, self.problem, tokens, True, error) from error
            except Exception as error:  # whatever a library raises, or the kernels' compiler
                if dispatch.backend is not None:
                    raise
                logger.error("%s failed to warm up at T = %d", choice, tokens, exc_info=error)
                reason = f"{type(error).__name__}: {error} (T = {tokens})"
                QUARANTINE.put(self.device, self.problem, choice, "warm_up", reason)
                if self._dispatch.choice(tokens) == choice:
                    raise
                continue
            if self._shadow is not None:
                self._shadow.warm_up(inputs, output)
            return WarmedUp(choice, tokens, time.perf_counter() - begin)

    def reload_policy(self, policy: Policy | str | Path | None = None) -> None:
        """Take another policy from the next call on, as after `hybrid-moe regenerate`.

        The new policy is resolved and all that it can choose is prepared first, and then taken in one step: a call in
        another thread runs by the old one or by the new one, and after an error the old one stays. Captured graphs keep
        what they were captured with; `warm_up` again before new ones are. Compiled code takes it without compiling
        again.

        Parameters
        ----------
        policy
            As in `fused_moe`; by default it is looked up again.

        Raises
        ------
        ValueError
            The layer has an explicit backend, which no policy changes.
        PolicyError, NoBackendError, BackendUnsupportedError
            As when a layer is made.
        """
        if self._dispatch.backend is not None:
            raise ValueError(
                f"policy: expected a layer without a backend, got one with {self._dispatch.backend}: an explicit "
                "backend is never changed"
            )
        self._take(None, policy)

    def stats(self) -> tuple[Sample, ...]:
        """Calls of this layer so far and their tokens, by what ran and in which regime.

        Counted when a call is made: the replay of a CUDA graph runs no Python, so of a graph its capture alone counts.
        `metrics.snapshot` has the whole process's.
        """
        return self._counters.samples()


def _make(kind: type[HybridMoE], weights: tuple[torch.Tensor, ...], options: dict[str, Any]) -> HybridMoE:
    return kind(*weights, **options)
