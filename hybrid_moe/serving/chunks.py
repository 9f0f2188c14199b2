"""Calls whose intermediate tensors would take more memory than a server allows: worked through in chunks of tokens.

Tokens don't mix, so every chunk is a call of its own with a slice of the activations; the weights are read again in
each. How many tokens a chunk has depends on the runner and the bound alone, so that a graph captured at T keeps it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ..backends.base import Runner
from ..inputs import Inputs
from ..problem import MoEProblem
from . import quantize_input

# Slices that start at a multiple of it are as aligned as their tensors, which the fastest kernels want.
_ALIGNMENT = 128
_MOST_TOKENS = 2**22  # nobody calls with more


class Chunked(Runner):
    """A runner that takes no more than ``most_tokens`` at a time; see `serving.call.launch`."""

    most_tokens: int

    def __init__(self, runner: Runner, most_tokens: int) -> None:
        self._runner, self.most_tokens = runner, most_tokens

    def run(self, inputs: Inputs, output: torch.Tensor) -> None:
        """See `Runner`."""
        self._runner.run(inputs, output)

    def run_in(self, inputs: Inputs, output: torch.Tensor, memory: torch.Tensor) -> None:
        """See `Runner`."""
        self._runner.run_in(inputs, output, memory)

    def workspace_bytes(self, num_tokens: int) -> int:
        """Of the largest chunk."""
        return self._runner.workspace_bytes(chunk(num_tokens, self.most_tokens))

    def reserved_bytes(self, num_tokens: int) -> int:
        """Of the largest chunk."""
        return self._runner.reserved_bytes(chunk(num_tokens, self.most_tokens))

    def most_reserved_bytes(self, first: int, last: int) -> int:
        """See `Runner`."""
        return self._runner.most_reserved_bytes(min(first, self.most_tokens), min(last, self.most_tokens))


def bounded(runner: Runner, problem: MoEProblem, max_workspace_bytes: int) -> Runner:
    """The runner, in chunks if calls would take more than the bound, hidden states that come in bfloat16 included.

    Raises
    ------
    ValueError
        One token takes more.
    """
    most = most_tokens(runner, problem, max_workspace_bytes)
    return runner if most >= _MOST_TOKENS else Chunked(runner, most)


@functools.lru_cache(maxsize=256)  # layers are alike
def most_tokens(runner: Runner, problem: MoEProblem, max_workspace_bytes: int) -> int:
    """The largest T up to which no call takes more than the bound."""

    def taken(num_tokens: int) -> int:
        reserved = max(runner.most_reserved_bytes(1, num_tokens), runner.workspace_bytes(num_tokens))
        return reserved + quantize_input.bytes_of(problem, num_tokens)

    if (least := taken(1)) > max_workspace_bytes:
        raise ValueError(
            f"max_workspace_bytes: expected {least} or more, which one token takes, got {max_workspace_bytes}"
        )
    low = high = 1
    while high < _MOST_TOKENS and taken(high) <= max_workspace_bytes:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle) <= max_workspace_bytes else (low, middle - 1)
    return low if low < _ALIGNMENT else low // _ALIGNMENT * _ALIGNMENT


def chunk(num_tokens: int, most: int) -> int:
    """Tokens of each chunk but the last: as even as their alignment lets them be."""
    if num_tokens <= most:
        return num_tokens
    even = -(-num_tokens // -(-num_tokens // most))
    return even if most < _ALIGNMENT else -(-even // _ALIGNMENT) * _ALIGNMENT


def slices(inputs: Inputs, output: torch.Tensor, most: int) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """The chunks of a call, each with its rows of the output."""
    first, second, hidden, scale, *rest = inputs
    tokens = hidden.shape[0]
    size = chunk(tokens, most)
    for start in range(0, tokens, size):
        rows = slice(start, start + size)
        # A routing bias is every token's; weights of chosen experts are a token's own.
        of_second = second[rows] if second.ndim == 2 else second
        of_scale = None if scale is None else scale[:, rows]
        yield type(inputs)(first[rows], of_second, hidden[rows], of_scale, *rest), output[rows]  # type: ignore[arg-type]
