"""What `torch.compile` asks while it traces `fused_moe`. Apart, as importing this imports the compiler and Triton."""

from __future__ import annotations

import torch

from . import call

# Backend and policy are no arguments that an operator can have: traced code holds the number that stands for them.
handle_of = torch.compiler.assume_constant_result(call.handle_of)
