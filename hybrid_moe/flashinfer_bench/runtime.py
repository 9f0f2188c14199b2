"""A policy baked in as code: what the Solutions that `hybrid_moe.flashinfer_bench.solution` writes run on.

It goes into each of them, with the backends that its table names and nothing else of this package: no policy file is
read, and neither pydantic nor the registry is there.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..backends.base import Backend, Runner
from ..candidate import BackendUnsupportedError, Candidate, ConfigValue
from ..device import DeviceKey
from ..inputs import MoEInputs, check_activations, check_ranks, check_weights
from ..problem import MoEProblem


class BakedLayer:
    """The layer with a fixed table of what runs at which T. Nothing is timed, tuned or switched in a call.

    Parameters
    ----------
    problem
        The fields of `MoEProblem`.
    table
        ``(first T, backend, config)``, sorted; each holds up to the next one's first T. The first starts at 0.
    otherwise
        ``(backend, config)`` of what runs, in this order, in place of a choice that can't run here; empty where nothing
        may.
    backends
        Those that are named.
    """

    def __init__(
        self,
        problem: Mapping[str, Any],
        table: Sequence[tuple[int, str, Mapping[str, ConfigValue]]],
        otherwise: Sequence[tuple[str, Mapping[str, ConfigValue]]],
        backends: Sequence[Backend],
    ) -> None:
        self._problem = MoEProblem(**problem)
        self._known = dict(problem)
        self._starts = [first for first, _, _ in table]
        self._choices = [Candidate(backend, config) for _, backend, config in table]
        self._otherwise = [Candidate(backend, config) for backend, config in otherwise]
        self._backends = {backend.name: backend for backend in backends}
        self._runners: dict[torch.device, list[Runner]] = {}

    def run(self, inputs: MoEInputs, options: Mapping[str, Any]) -> torch.Tensor:
        """The layer's output, a new ``[T, H]`` bfloat16 tensor.

        The first call on a device decides, once, what runs there.

        Parameters
        ----------
        inputs
            The ten inputs of the definition.
        options
            What else the caller says of the layer, as flashinfer does (``top_k``, ``n_group``, ``topk_group``).

        Raises
        ------
        TypeError, ValueError
            An input or an option isn't what this layer takes.
        BackendUnsupportedError
            Nothing can run here; the message lists every reason.
        """
        problem = self._problem
        for name, value in options.items():
            if name not in self._known or self._known[name] != value:
                expected = self._known.get(name, "no such option")
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        check_ranks(inputs._asdict())
        check_weights(inputs, problem)
        check_activations(inputs, problem)
        tokens, device = inputs.num_tokens, inputs.hidden_states.device
        output = torch.empty((tokens, problem.hidden_size), dtype=torch.bfloat16, device=device)
        runners = self._runners.get(device) or self._prepare(device)
        if tokens:
            runners[bisect_right(self._starts, tokens) - 1].run(inputs, output)
        return output

    def _prepare(self, device: torch.device) -> list[Runner]:
        key = DeviceKey.of(device)
        prepared: dict[Candidate, Runner] = {}
        refusals: dict[Candidate, str] = {}
        for choice in dict.fromkeys([*self._choices, *self._otherwise]):
            try:
                prepared[choice] = self._backends[choice.backend].prepare(self._problem, key, choice.config)
            except BackendUnsupportedError as error:
                refusals[choice] = "; ".join(error.reasons)
        runners, replaced = [], {}
        for wanted in self._choices:
            taken = next((choice for choice in (wanted, *self._otherwise) if choice in prepared), None)
            if taken is None:
                raise BackendUnsupportedError(wanted, [f"{choice}: {why}" for choice, why in refusals.items()])
            if taken != wanted:
                replaced[wanted] = taken
            runners.append(prepared[taken])
        for wanted, taken in replaced.items():
            warnings.warn(
                f"{wanted} can't run here ({refusals[wanted]}): {taken} runs in its place", RuntimeWarning, stacklevel=2
            )
        self._runners[device] = runners
        return runners
