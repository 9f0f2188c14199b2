"""The fused pipeline from routing to the combined output, around one grouped GEMM."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NoReturn

import torch

from ..inputs import Inputs
from ..problem import MoEProblem
from .arena import Arena
from .grouped_gemm.base import GroupedGemm
from .launcher import DeviceLimits, limits_of
from .plan import LaunchKey, Plan, addresses_of
from .routing import reserve_routing, route
from .weigh import on_weighted, reserve_weighted, weigh


class Pipeline:
    """All steps of the layer around one grouped GEMM, planned once for each `LaunchKey`.

    Safe to call from any thread. Its plans hold no memory of the device.
    """

    def __init__(self, problem: MoEProblem, gemm: GroupedGemm) -> None:
        self._problem = problem
        self._layer = problem.all_routed  # to the experts' GEMMs
        self._gemm = gemm
        # Serving meets few keys: its T, in tensors with the same strides.
        self._plan = functools.lru_cache(maxsize=1024)(self._make_plan)

    def arena(self, num_tokens: int, row_alignment: int | None = None) -> Arena:
        """Where the intermediate tensors of a call lie."""
        problem, gemm, arena = self._layer, self._gemm, Arena()
        reserve_routing(arena, problem, num_tokens, gemm.counters(problem, num_tokens))
        if problem.weight_on_input:
            reserve_weighted(arena, problem, num_tokens)
        gemm.reserve(arena, problem, num_tokens, gemm.usual_row_alignment if row_alignment is None else row_alignment)
        return arena

    def most_bytes(self, first: int, last: int) -> int:
        """The most that the arena of a call with ``first`` to ``last`` tokens takes."""

        def ends(low: int, high: int) -> list[int]:
            # Of each stretch with one sizing, in which the arena only grows: a sizing that has changed stays changed.
            if sizing(low) == sizing(high):
                return [high]
            middle = (low + high) // 2
            return [low, high] if middle == low else [*ends(low, middle), *ends(middle + 1, high)]

        sizing = functools.partial(self._gemm.sizing, self._layer)
        return max(self.arena(num_tokens).bytes for num_tokens in ends(first, last))

    def plan(self, key: LaunchKey, device: torch.device, limits: DeviceLimits) -> Plan:
        """The steps of a call."""
        arena = self.arena(key.num_tokens, key.row_alignment)
        whole = self._gemm.whole_steps(self._problem, limits, key)
        if whole is not None:
            return Plan(key, arena, whole, device)
        steps = route(self._problem, limits, key, arena)
        if self._problem.weight_on_input:
            step, key_of_gemm = weigh(self._problem, limits, key)
            steps += [step, *map(on_weighted, self._gemm.steps(self._layer, limits, key_of_gemm))]
        else:
            steps += self._gemm.steps(self._layer, limits, key)
        return Plan(key, arena, steps, device)

    def _make_plan(self, key: LaunchKey, device: torch.device) -> Plan:
        return self.plan(key, device, limits_of(device))

    def run(self, inputs: Inputs, output: torch.Tensor, memory: torch.Tensor | None = None) -> None:
        """Launch all steps on the current stream.

        Parameters
        ----------
        inputs, output
            As `Runner.run` has them.
        memory
            Bytes on the device for the intermediate tensors, which nobody else uses until the launches are through;
            by default, or if they are too few, some are reserved for this call.

        Raises
        ------
        ValueError
            An input doesn't start at a multiple of 16 bytes, and the grouped GEMM's library wants it.
        """
        device = output.device
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):  # Triton launches on the current one
                self._run(inputs, output, device, memory)
        else:
            self._run(inputs, output, device, memory)

    def compile(self, inputs: Inputs) -> None:
        """Compile this package's kernels of a call whose output is aligned, and launch none."""
        key = LaunchKey.of(inputs, addresses_of(inputs), inputs.hidden_states, self._gemm.row_alignment())
        with torch.cuda.device_of(inputs.hidden_states):
            self._plan(key._replace(output_aligned=True), inputs.hidden_states.device).compile(inputs)

    def _run(self, inputs: Inputs, output: torch.Tensor, device: torch.device, memory: torch.Tensor | None) -> None:
        addresses = addresses_of(inputs)
        key = LaunchKey.of(inputs, addresses, output, self._gemm.row_alignment())
        if self._gemm.wants_alignment and not key.aligned:
            _refuse_unaligned(inputs, addresses)
        plan = self._plan(key, device)
        if memory is None or memory.numel() < plan.arena.bytes:
            memory = torch.empty(plan.arena.bytes, dtype=torch.uint8, device=device)
        plan.run(inputs, addresses, output, memory)


def _refuse_unaligned(inputs: Inputs, addresses: Sequence[int]) -> NoReturn:
    names = [name for name, address in zip(inputs._fields, addresses, strict=False) if address % 16]
    raise ValueError(
        f"{', '.join(names)} don't start at a multiple of 16 bytes, as the grouped GEMM's library wants: "
        "give tensors of their own, or backend='triton_fused[gemm=triton]'"
    )
