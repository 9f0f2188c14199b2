"""Calls before the first request: kernels compile and libraries set up at their first call for a number of tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..backends.base import Runner
from ..candidate import Candidate
from ..inputs import Inputs, MoEInputs, RoutedInputs
from ..problem import MoEProblem
from .quantize_input import quantize

_log = logging.getLogger("hybrid_moe")


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """One call made before serving.

    Attributes
    ----------
    choice
        What ran.
    num_tokens
        T.
    seconds
        What it took, compiling with it, until the device was done.
    """

    choice: Candidate
    num_tokens: int
    seconds: float


def token_counts(starts: Sequence[int], max_num_tokens: int) -> tuple[int, ...]:
    """T to warm up, sorted: both bounds of every interval between ``starts``, and the powers of two.

    The powers of two because a backend's tiles change with T inside of a regime as well. ValueError for a bound that is
    no T.
    """
    check_count("max_num_tokens", max_num_tokens)
    bounds = [*starts, *(start - 1 for start in starts), max_num_tokens]
    powers = itertools.takewhile(lambda power: power <= max_num_tokens, (2**n for n in itertools.count()))
    return tuple(sorted({t for t in (*bounds, *powers) if 1 <= t <= max_num_tokens}))


def check_count(name: str, value: object) -> None:
    """ValueError for a number that is no T of at least 1."""
    if not _is_count(value):
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def checked(given: Iterable[int]) -> tuple[int, ...]:
    """The T that a caller gave, sorted, each once; ValueError for one that is no T."""
    counts = tuple(given)
    for count in counts:
        if not _is_count(count):
            raise ValueError(f"token_counts: expected integers of at least 1, got {count!r}")
    return tuple(sorted(set(counts)))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def synthetic(
    problem: MoEProblem, device: torch.device, bias: torch.Tensor | None, held: tuple, counts: Iterable[int]
) -> Iterator[Inputs]:
    """Inputs of each T: the layer's weights, random logits, hidden states quantised as bfloat16 ones are.

    Without a bias, experts that are chosen: the best by the logits.
    """
    generator = torch.Generator(device).manual_seed(0)
    for tokens in counts:
        logits = torch.randn((tokens, problem.num_experts), dtype=torch.float32, device=device, generator=generator)
        hidden = torch.randn((tokens, problem.hidden_size), dtype=torch.bfloat16, device=device, generator=generator)
        if bias is None:
            weights, ids = logits.softmax(dim=1).topk(problem.top_k)
            yield quantize(RoutedInputs(ids.int(), weights, hidden, None, *held))  # type: ignore[arg-type]
        else:
            yield quantize(MoEInputs(logits, bias, hidden, None, *held))  # type: ignore[arg-type]


def compile_all(runner_of: Callable[[int], Runner], calls: Iterable[Inputs], device: torch.device) -> None:
    """Compile the kernels of all calls at once; what a call has to compile by itself, or fails to, is left to it.

    A failure is no more than logged here: the call that follows raises it again, and there the candidate is put in
    quarantine and the next one takes its place.
    """
    if device.type == "cuda":
        # Imported where used: `import hybrid_moe` imports no kernel library.
        from ..kernels.launcher import compiling_in_parallel

        with compiling_in_parallel():
            for inputs in calls:
                try:
                    runner_of(inputs.num_tokens).compile(inputs)
                except Exception as error:  # whatever a library raises, or the kernels' compiler
                    _log.info("nothing compiled ahead for T = %d: %r", inputs.num_tokens, error)


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it runs behind the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
