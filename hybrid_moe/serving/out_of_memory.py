"""The error of a call for which the device has too little memory: what it takes, and how that can be bounded."""

from __future__ import annotations

import torch

from ..candidate import Candidate


class CallOutOfMemoryError(torch.OutOfMemoryError):
    """The device has too little memory for a call. The layer is as it was before: later calls go on.

    Attributes
    ----------
    num_tokens
        T.
    choice
        What was to run.
    bytes_wanted
        What the call takes besides its inputs: intermediate tensors and, unless it is given, the output.
    """

    def __init__(self, num_tokens: int, choice: Candidate, workspace: int, output: int, error: torch.OutOfMemoryError):
        self.num_tokens, self.choice, self.bytes_wanted = num_tokens, choice, workspace + output
        parts = f"{workspace:,} for intermediate tensors" + (f" and {output:,} for the output" if output else "")
        super().__init__(
            f"out of memory: a call with T = {num_tokens} takes {self.bytes_wanted:,} bytes with {choice}: {parts}. "
            "Make calls with fewer tokens (HybridMoE.workspace_bytes(T) says what each takes), reserve the memory "
            "before it is taken by others (max_num_tokens= and warm_up), or give less of it to the KV cache. "
            f"The device: {error}"
        )
