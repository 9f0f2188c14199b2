"""The registry of backends. Importing it imports no kernel library."""

from __future__ import annotations

import functools

import torch

from ..candidate import BackendFailedError
from ..device import DeviceKey
from ..problem import MoEProblem
from .base import Backend, BackendUnsupportedError, Candidate, Runner
from .flashinfer_cutlass import FlashinferCutlass
from .flashinfer_trtllm import FlashinferTrtllm
from .torch_reference import TorchReference
from .triton_fused import TritonFused

# The order is that of preference where nothing was measured: fastest hope first, the reference last.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (FlashinferTrtllm(), TritonFused(), FlashinferCutlass(), TorchReference())
}


def get_backend(name: str) -> Backend:
    """The backend of that name; ValueError lists the known ones."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}") from None


def complete(choice: Candidate) -> Candidate:
    """The same choice with the backend's default options filled in."""
    return Candidate(choice.backend, {**get_backend(choice.backend).default_config, **choice.config})


def candidates() -> list[Candidate]:
    """Every backend with each configuration worth measuring, in the order of rank."""
    return [complete(Candidate(name, config)) for name, backend in BACKENDS.items() for config in backend.configs()]


@functools.lru_cache(maxsize=1024)
def not_supported_reasons(problem: MoEProblem, device: DeviceKey, choice: Candidate) -> tuple[str, ...]:
    """Why ``choice`` can't run; empty if it can. Memoised: asked once for each problem and device."""
    choice = complete(choice)
    return tuple(get_backend(choice.backend).not_supported_reasons(problem, device, choice.config))


def routed_reasons(problem: MoEProblem, choice: Candidate) -> tuple[str, ...]:
    """Why ``choice`` can't run a layer whose experts are chosen before the call; empty if it can."""
    choice = complete(choice)
    return tuple(get_backend(choice.backend).routed_reasons(problem, choice.config))


@functools.lru_cache(maxsize=1024)
def prepare(problem: MoEProblem, device: DeviceKey, choice: Candidate) -> Runner:
    """The runner of ``choice``, made once for each problem and device.

    Raises
    ------
    BackendUnsupportedError
        It can't run this here; see `not_supported_reasons`.
    BackendFailedError
        It raised anything else.
    """
    choice = complete(choice)
    backend = get_backend(choice.backend)
    try:
        return backend.prepare(problem, device, choice.config)
    except (BackendUnsupportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a library raises: it is told apart from a refusal, and never lost
        raise BackendFailedError(choice, error) from error


__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnsupportedError",
    "Candidate",
    "Runner",
    "candidates",
    "complete",
    "get_backend",
    "not_supported_reasons",
    "prepare",
    "routed_reasons",
]
