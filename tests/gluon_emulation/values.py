"""Values of a kernel on the CPU: integers and tensors that don't overflow unseen, and pointers into global memory."""

from __future__ import annotations

import operator
from typing import Any

import torch

RANGES = {32: (-(2**31), 2**31 - 1), 64: (-(2**63), 2**63 - 1)}
BITS = {torch.int32: 32, torch.int64: 64}


class EmulationError(Exception):
    """A kernel does what a GPU would do wrong, or not at all."""


class Overflow(EmulationError):
    """An int32 or int64 result that doesn't fit."""


def _quotient(a: int, b: int) -> int:
    """As in C, towards zero."""
    return abs(a) // abs(b) if (a < 0) == (b < 0) else -(abs(a) // abs(b))


def _remainder(a: int, b: int) -> int:
    return a - _quotient(a, b) * b


class Scalar(int):
    """A signed integer of 32 or 64 bits; a plain int is a constant, which takes the other operand's width."""

    bits: int

    def __new__(cls, value: int, bits: int = 32) -> Scalar:
        low, high = RANGES[bits]
        if not low <= value <= high:
            raise Overflow(f"{int(value)} doesn't fit into int{bits}")
        self = super().__new__(cls, value)
        self.bits = bits
        return self

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        """Converted."""
        return convert(self, torch_dtype(dtype), bitcast)

    @property
    def dtype(self) -> torch.dtype:
        """torch.int32 or torch.int64."""
        return torch.int32 if self.bits == 32 else torch.int64


def _scalar_operator(function, swapped):
    def apply(self, other):
        if not isinstance(other, int):
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        return Scalar(function(int(a), int(b)), max(self.bits, getattr(other, "bits", 32)))

    return apply


for _name, _function in {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": _quotient, "mod": _remainder,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "rshift": operator.rshift, "lshift": operator.lshift,
}.items():  # fmt: skip
    setattr(Scalar, f"__{_name}__", _scalar_operator(_function, False))
    setattr(Scalar, f"__r{_name}__", _scalar_operator(_function, True))
Scalar.__neg__ = lambda self: Scalar(-int(self), self.bits)  # type: ignore[method-assign]


class Tensor:
    """A block of values. ``data`` of integers is int64, whatever the ``dtype``: what doesn't fit is seen."""

    __slots__ = ("data", "dtype")

    def __init__(self, data: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or data.dtype
        self.data = data.long() if self.dtype in BITS else data

    @property
    def shape(self) -> list[int]:
        """Its lengths."""
        return list(self.data.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.data[index], self.dtype)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __neg__(self) -> Tensor:
        return Tensor(-self.data, self.dtype)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data, self.dtype)

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        """Converted."""
        return convert(self, torch_dtype(dtype), bitcast)

    def reshape(self, *shape: Any) -> Tensor:
        """In another shape."""
        return Tensor(self.data.reshape(*shape), self.dtype)

    def permute(self, *order: Any) -> Tensor:
        """With its dimensions in another order."""
        order = order[0] if isinstance(order[0], tuple | list) else order
        return Tensor(self.data.permute(*order), self.dtype)

    def split(self) -> tuple[Tensor, Tensor]:
        """Its two halves along the last dimension, which is two long."""
        assert self.data.shape[-1] == 2
        return Tensor(self.data[..., 0], self.dtype), Tensor(self.data[..., 1], self.dtype)


TRITON_DTYPES = {
    "int1": torch.bool, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64, "fp32": torch.float32,
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn,
}  # fmt: skip


def torch_dtype(dtype: Any) -> torch.dtype:
    """Torch's name for one of Triton's."""
    return dtype if isinstance(dtype, torch.dtype) else TRITON_DTYPES[dtype.name]


def made(data: torch.Tensor, dtype: torch.dtype | None = None) -> Any:
    """A value from a result: of no dimensions an integer is a `Scalar`, a truth value a bool."""
    dtype = dtype or data.dtype
    if dtype == torch.int32 and data.numel():
        low, high = (int(x) for x in torch.aminmax(data.long()))
        if low < RANGES[32][0] or high > RANGES[32][1]:
            raise Overflow(f"a tensor has {low if low < RANGES[32][0] else high}, which doesn't fit into int32")
    if data.dim() == 0 and dtype in BITS:
        return Scalar(int(data), BITS[dtype])
    if data.dim() == 0 and dtype == torch.bool:
        return bool(data)
    return Tensor(data, dtype)


def data_of(value: Any) -> Any:
    """What torch computes with."""
    if isinstance(value, Tensor):
        return value.data
    if isinstance(value, int | float):
        return value
    raise EmulationError(f"a {type(value).__name__} is used as a value: {value}")


def dtype_of(value: Any) -> torch.dtype | None:
    """None for a constant, which takes that of the other operand."""
    return value.dtype if isinstance(value, Tensor | Scalar) else torch.bool if isinstance(value, bool) else None


def common(a: Any, b: Any, division: bool = False) -> torch.dtype:
    """What an operation computes in."""
    first, second = dtype_of(a), dtype_of(b)
    floats = [x for x in (first, second) if x is not None and x.is_floating_point]
    if floats:
        return floats[0] if len(set(floats)) == 1 else torch.float32
    if division or isinstance(a, float) or isinstance(b, float):
        return torch.float32
    if torch.int64 in (first, second):
        return torch.int64
    return torch.bool if first == second == torch.bool else torch.int32


def tensor_of(value: Any, dtype: torch.dtype) -> torch.Tensor:
    """As torch's, to compute in ``dtype``."""
    data = _operand(value, dtype)
    held = torch.int64 if dtype in BITS else dtype
    return data if isinstance(data, torch.Tensor) else torch.tensor(data, dtype=held)


def operate(function: Any, a: Any, b: Any, result: torch.dtype | None = None, division: bool = False) -> Any:
    """Of two values, of which torch's function takes numbers too; ``result`` is the dtype if not the operands'."""
    dtype = common(a, b, division)
    return made(function(_operand(a, dtype), _operand(b, dtype)), result or dtype)


def _operand(value: Any, dtype: torch.dtype) -> Any:
    data = data_of(value)
    if not isinstance(data, torch.Tensor):
        return float(data) if dtype.is_floating_point else int(data)
    held = torch.int64 if dtype in BITS else dtype
    return data if data.dtype == held else data.to(held)


def convert(value: Any, dtype: torch.dtype, bitcast: bool = False) -> Any:
    """To another dtype; to e4m3 as the hardware does, with what is too large at the end of the range."""
    data = data_of(value)
    if not isinstance(data, torch.Tensor):
        data = torch.tensor(data)
    if bitcast:
        held = data.int() if dtype_of(value) == torch.int32 else data
        return made(held.contiguous().view(dtype), dtype)
    if dtype in BITS:
        return made(data.long(), dtype)
    if dtype == torch.float8_e4m3fn and data.dtype != dtype:
        return Tensor(data.float().clamp(-448.0, 448.0).to(dtype))
    return made(data.to(dtype), dtype)


def _tensor_operator(function, swapped, result, division):
    def apply(self, other):
        if type(other) is Tensor and other.dtype is self.dtype and self.dtype.is_floating_point:  # most of them
            return Tensor(function(self.data, other.data))
        if not isinstance(other, Tensor | int | float):
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        return operate(function, a, b, result, division)

    return apply


for _name, _function, _result in (
    ("add", operator.add, None), ("sub", operator.sub, None), ("mul", operator.mul, None),
    ("truediv", operator.truediv, None), ("floordiv", lambda a, b: torch.div(a, b, rounding_mode="trunc"), None),
    ("mod", torch.fmod, None), ("and", operator.and_, None), ("or", operator.or_, None), ("xor", operator.xor, None),
    ("rshift", operator.rshift, None), ("lshift", operator.lshift, None),
    ("lt", operator.lt, torch.bool), ("le", operator.le, torch.bool), ("gt", operator.gt, torch.bool),
    ("ge", operator.ge, torch.bool), ("eq", operator.eq, torch.bool), ("ne", operator.ne, torch.bool),
):  # fmt: skip
    setattr(Tensor, f"__{_name}__", _tensor_operator(_function, False, _result, _name == "truediv"))
    if _result is None:
        setattr(Tensor, f"__r{_name}__", _tensor_operator(_function, True, _result, _name == "truediv"))
Tensor.__hash__ = None  # type: ignore[assignment]


class Pointer:
    """Places in a tensor in global memory: ``offset`` elements from its start, an int or an int64 tensor."""

    __slots__ = ("region", "offset")

    def __init__(self, region: Any, offset: Any = 0) -> None:
        self.region = region
        self.offset = offset

    @property
    def shape(self) -> list[int]:
        """Of the places."""
        return list(self.offset.shape) if isinstance(self.offset, torch.Tensor) else []

    def __add__(self, other: Any) -> Pointer:
        if dtype_of(other) not in (None, torch.int32, torch.int64) or isinstance(other, float):
            raise EmulationError(f"{self.region.name} plus {other}: offsets are integers")
        return Pointer(self.region, self.offset + (other.data if isinstance(other, Tensor) else int(other)))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self + -other

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.region, self.offset[index])

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        """The addresses, for assembly that only prefetches."""
        assert torch_dtype(dtype) == torch.int64
        return made(torch.as_tensor(self.offset), torch.int64)
