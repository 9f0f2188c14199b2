"""The repaired conversions of Triton's interpreter: the kernels' tests on the CPU round as a GPU does."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from hybrid_moe.kernels import interpreter


@pytest.mark.parametrize(
    ("wanted", "dtype", "bits"),
    [(torch.bfloat16, tl.bfloat16, torch.uint16), (torch.float8_e4m3fn, tl.float8e4nv, torch.uint8)],
)
def test_float32_is_rounded_as_torch_does(wanted, dtype, bits):
    interpreter.repair()
    interpreter.repair()
    random = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 50
    # Both sides of a carry into the exponent, halves, signs, zeros, subnormals and what isn't a number.
    edges = torch.tensor([127.8, -127.8, 1.9999, 1.00390625, 1.01171875, 0.0, -0.0, 1e-3, 1e-40, 448.0, torch.nan])
    for values in (random, edges):
        converted = triton_interpreter._convert_float(values.numpy(), tl.float32, dtype, None)
        assert converted.shape == tuple(values.shape)
        assert np.array_equal(converted, values.to(wanted).view(bits).numpy())
