"""Repairs of Triton's interpreter (3.6 to 3.9), which runs the kernels on the CPU for tests; GPUs do all of it right.

Its conversion of float32 (`triton.runtime.interpreter._convert_float`) rounds the mantissa to e4m3 without carrying
into the exponent, 127.8 becomes 64 instead of 128, and cuts off what bfloat16 doesn't hold: results are 0.3% too small
for each tensor that is stored. Its conversions from e4m3 make 480 of NaN. And half of its time is spent where a kernel
calls a function, when it patches all of Triton's language again, and on integers, computed twice for a check of
overflow that it doesn't make; its reductions by a function take a step of Python for each element.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from .quantize import larger

_NAN = {tl.float16: 0x7E00, tl.bfloat16: 0x7FC0, tl.float32: 0x7FC00000}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return knobs.runtime.interpret


def repair() -> None:
    """Make the interpreter convert as the hardware does, and do at once what it does over and over; for good."""
    convert_float, reduce = interpreter._convert_float, interpreter.ReduceOps.generic_reduce
    patch_lang = interpreter._patch_lang
    if hasattr(convert_float, "__wrapped__"):
        return

    @functools.wraps(convert_float)
    def convert(input, input_dtype, output_dtype, rounding_mode):  # the argument names are Triton's
        if input_dtype == tl.float32 and output_dtype == tl.float8e4nv:
            values = torch.from_numpy(input.copy()).clamp(-448.0, 448.0)
            return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            return torch.from_numpy(input.copy()).bfloat16().view(torch.uint16).numpy()
        converted = convert_float(input, input_dtype, output_dtype, rounding_mode)
        if input_dtype == tl.float8e4nv and output_dtype in _NAN:
            converted = converted.copy()
            converted[(input.view("uint8") & 0x7F) == 0x7F] = _NAN[output_dtype]
        return converted

    @functools.wraps(reduce)
    def reduce_by(self, input):
        if self.combine_fn is larger:
            return self.min_max(input[0], lambda values, **over: values.max(**over))
        return reduce(self, input)

    @functools.cache
    def languages_of(function):
        return [language for language in (tl, tl.core) if any(language is x for x in function.__globals__.values())]

    @functools.wraps(patch_lang)
    def patch(function):
        looked_at = [part for language in languages_of(function) for part in (language.load, language.tensor.__add__)]
        return patch_lang(function) if any(map(tl.core.is_builtin, looked_at)) else interpreter._LangPatchScope()

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = patch
    interpreter._convert_float = convert
    interpreter.ReduceOps.generic_reduce = reduce_by
