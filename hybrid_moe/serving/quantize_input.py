"""Hidden states that come in bfloat16, without scales: made what every backend takes, before one runs."""

from __future__ import annotations

import functools

import torch

from ..inputs import FP8, Inputs, check_unquantized
from ..kernels.arena import Arena
from ..problem import MoEProblem
from ..reference import quantize_rows


@functools.lru_cache(maxsize=1024)
def arena_of(num_tokens: int, hidden_size: int) -> Arena:
    """Where ``values`` and ``scale`` of quantised hidden states lie."""
    arena = Arena()
    arena.reserve("values", (num_tokens, hidden_size), FP8)
    arena.reserve("scale", (hidden_size // 128, num_tokens), torch.float32)
    return arena


def bytes_of(problem: MoEProblem, num_tokens: int) -> int:
    """What `quantize` takes at the end of the memory that it is given."""
    return arena_of(num_tokens, problem.hidden_size).bytes


def quantize(inputs: Inputs, memory: torch.Tensor | None = None) -> Inputs:
    """The inputs with hidden states in e4m3 and a scale for each 1x128 block, by this package's kernel on a GPU.

    Parameters
    ----------
    inputs
        Their hidden states in bfloat16, without scales.
    memory
        Bytes on the GPU, for the result at their end; by default it is in memory of its own.

    Raises
    ------
    TypeError, ValueError
        The hidden states are no bfloat16, or of no shape that can be quantised.
    """
    hidden = inputs.hidden_states
    check_unquantized(hidden)
    if hidden.device.type == "cuda":
        # Imported where used: `import hybrid_moe` imports no kernel library.
        from ..kernels.activations import quantize_rows as quantize_on_gpu

        result = None
        if memory is not None:
            arena = arena_of(*hidden.shape)
            result = arena.tensors(memory[memory.numel() - arena.bytes :])
        values, scale = quantize_on_gpu(hidden, result)
    else:
        values, scale = quantize_rows(hidden)
    return inputs._replace(hidden_states=values, hidden_states_scale=scale)
