"""Hidden states that come in bfloat16, without scales: made what every backend takes, before one runs."""

from __future__ import annotations

from .problem import Inputs, check_unquantized
from .reference import quantize_rows


def quantize(inputs: Inputs) -> Inputs:
    """The inputs with hidden states in e4m3 and a scale for each 1x128 block, by this package's kernel on a GPU.

    Raises
    ------
    TypeError, ValueError
        The hidden states are no bfloat16, or of no shape that can be quantised.
    """
    hidden = inputs.hidden_states
    check_unquantized(hidden)
    if hidden.device.type == "cuda":
        # Imported where used: `import hybrid_moe` imports no kernel library.
        from .kernels.activations import quantize_rows as quantize_on_gpu

        values, scale = quantize_on_gpu(hidden)
    else:
        values, scale = quantize_rows(hidden)
    return inputs._replace(hidden_states=values, hidden_states_scale=scale)
