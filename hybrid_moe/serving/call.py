"""A call of `hybrid_moe.fused_moe` from its checked arguments on: the dispatch that all alike calls share."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from ..backends.base import Runner
from ..candidate import BackendFailedError, BackendUnsupportedError, Candidate
from ..device import DeviceKey
from ..inputs import (
    Inputs,
    MoEInputs,
    RoutedInputs,
    Stated,
    check_output,
    check_unquantized,
    problem_of,
    stated,
    with_python_numbers,
)
from ..policy.resolve import as_candidate, decision_table
from ..policy.schema import Policy
from ..policy.select import Refusals
from ..problem import MoEProblem
from . import chunks, custom_ops, quantize_input
from .dispatch import Dispatch
from .metrics import Counters
from .out_of_memory import CallOutOfMemoryError
from .quarantine import QUARANTINE
from .warmup import check_count

logger = logging.getLogger("hybrid_moe")


class _Identity:
    """Cache key for a policy argument: a Policy by identity (it isn't hashable), names and None by value."""

    __slots__ = ("value",)

    def __init__(self, value: Policy | str | Path | None) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value) if isinstance(self.value, Policy) else hash(self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity):
            return NotImplemented
        return self.value is other.value or (not isinstance(self.value, Policy) and self.value == other.value)


def new_dispatch(
    problem: MoEProblem,
    device: DeviceKey,
    backend: Candidate | None,
    policy: Policy | str | Path | None,
    routed: bool,
    counters: Counters,
    *,
    stacklevel: int,
    elsewhere: Refusals | None = None,
    max_workspace_bytes: int | None = None,
) -> Dispatch:
    """By the backend that is named, else by the policy; what is in quarantine, or refused elsewhere, is refused.

    A backend that fails to be prepared is put there, and the next one of the order taken; one that is named raises.
    """
    elsewhere = elsewhere or {}
    if backend is not None:
        if reasons := (*QUARANTINE.reasons(device, problem).get(backend, ()), *elsewhere.get(backend, ())):
            raise BackendUnsupportedError(backend, reasons)
        return Dispatch(problem, device, backend, counters, policy, routed, max_workspace_bytes)
    while True:
        here = QUARANTINE.reasons(device, problem)
        refused = {c: (*here.get(c, ()), *elsewhere.get(c, ())) for c in here.keys() | elsewhere.keys()}
        try:
            table = decision_table(problem, device, policy, routed=routed, refused=refused, stacklevel=stacklevel)
            return Dispatch(problem, device, table, counters, policy, routed, max_workspace_bytes)
        except BackendFailedError as error:
            logger.error("%s", error, exc_info=error)
            QUARANTINE.put(device, problem, error.choice, "prepare", str(error.__cause__))


@functools.lru_cache(maxsize=256)
def _cached_dispatch(
    problem: MoEProblem,
    device: DeviceKey,
    backend: Candidate | None,
    policy: _Identity,
    routed: bool,
    max_workspace_bytes: int | None,
    epoch: int,
) -> Dispatch:
    # By the quarantine's epoch, so that what it changes is decided again.
    return new_dispatch(
        problem,
        device,
        backend,
        policy.value,
        routed,
        _function_counters(),
        stacklevel=6,
        max_workspace_bytes=max_workspace_bytes,
    )


@functools.cache
def _function_counters() -> Counters:
    """Where calls of `fused_moe` are counted."""
    return Counters()


class Call:
    """`fused_moe` with its backend, policy, problem and bound on memory given."""

    __slots__ = ("_backend", "_policy", "_problem", "_max_workspace_bytes", "__weakref__")

    def __init__(
        self,
        backend: str | Candidate | None,
        policy: Policy | str | Path | None,
        problem: MoEProblem | None,
        max_workspace_bytes: int | None,
    ) -> None:
        if max_workspace_bytes is not None:
            check_count("max_workspace_bytes", max_workspace_bytes)
        self._backend, self._policy, self._problem = backend, policy, problem
        self._max_workspace_bytes = max_workspace_bytes

    def run(self, inputs: Inputs, output: torch.Tensor | None, *options: Any) -> torch.Tensor:
        """Check the inputs, choose and run; the options are the fields of `Stated`. See `Routine`."""
        if inputs.hidden_states_scale is None:
            check_unquantized(inputs.hidden_states)
        if isinstance(inputs, MoEInputs) and inputs.routing_bias is None and inputs.routing_logits is not None:
            inputs = inputs._replace(routing_bias=inputs.routing_logits.new_zeros(inputs.routing_logits.shape[-1:]))
        problem = problem_of(inputs, stated(self._problem, Stated(*options)))
        inputs = with_python_numbers(inputs)
        if output is not None:
            check_output(output, inputs, problem)
        device = DeviceKey.of(inputs.hidden_states.device)
        # A backend that is named never looks at the policy.
        backend, policy = (None, self._policy) if self._backend is None else (as_candidate(self._backend), None)
        routed, epoch = isinstance(inputs, RoutedInputs), QUARANTINE.epoch
        bound = self._max_workspace_bytes
        dispatch = _cached_dispatch(problem, device, backend, _Identity(policy), routed, bound, epoch)
        given, tokens = output is not None, inputs.num_tokens
        try:
            if output is None:
                output = new_output(problem, inputs)
            if tokens:
                launch(dispatch.counted(tokens), inputs, output)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(dispatch, problem, tokens, given, error) from error
        return output


def handle_of(
    backend: str | Candidate | None,
    policy: Policy | str | Path | None,
    problem: MoEProblem | None,
    max_workspace_bytes: int | None,
) -> int:
    """What stands for `fused_moe` with these in a compiled graph."""
    named = None if backend is None else as_candidate(backend)
    handle, _ = _registered(named, _Identity(policy), problem, max_workspace_bytes)
    return handle


@functools.cache
def _registered(
    backend: Candidate | None, policy: _Identity, problem: MoEProblem | None, max_workspace_bytes: int | None
) -> tuple[int, Call]:
    # For good, as compiled graphs are, and few: one for each that is named where `fused_moe` is called.
    call = Call(backend, policy.value, problem, max_workspace_bytes)
    return custom_ops.register(call), call


def new_output(problem: MoEProblem, inputs: Inputs) -> torch.Tensor:
    """An unwritten ``[T, H]`` bfloat16 tensor where the inputs are."""
    hidden = inputs.hidden_states
    return torch.empty((hidden.shape[0], problem.hidden_size), dtype=torch.bfloat16, device=hidden.device)


def launch(runner: Runner, inputs: Inputs, output: torch.Tensor, memory: torch.Tensor | None = None) -> None:
    """Quantise hidden states that come in bfloat16, and run, in chunks if need be; the inputs were checked before.

    ``memory`` is for both: see `Runner.run_in`.
    """
    if (most := runner.most_tokens) is not None and inputs[2].shape[0] > most:
        for part, rows in chunks.slices(inputs, output, most):
            launch(runner, part, rows, memory)
        return
    if inputs[3] is None:  # hidden_states_scale
        inputs = quantize_input.quantize(inputs, memory)
    if memory is None:
        runner.run(inputs, output)
    else:
        runner.run_in(inputs, output, memory)


def out_of_memory(
    dispatch: Dispatch, problem: MoEProblem, num_tokens: int, given: bool, error: torch.OutOfMemoryError
) -> CallOutOfMemoryError:
    """What to raise for a call, whose output was ``given`` or not."""
    workspace = dispatch.runner(num_tokens).workspace_bytes(num_tokens)
    output = 0 if given else 2 * num_tokens * problem.hidden_size
    return CallOutOfMemoryError(num_tokens, dispatch.choice(num_tokens), workspace, output, error)
