"""Triton's aggregates: a kernel's arguments, or what belongs together of them, passed on as one value.

A module that defines one has no ``from __future__ import annotations``: Triton compares fields with their annotations.
"""

from typing import dataclass_transform

from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate


@gluon.constexpr_function
def _set_fields(self, **fields):
    for name, value in fields.items():
        setattr(self, name, value if isinstance(value, gl.base_value) else gl.constexpr(value))


def _set_plain_fields(self, **fields):
    vars(self).update(fields)


@dataclass_transform(kw_only_default=True)
def aggregate(cls):
    """Triton's aggregate, constructed by keyword: Triton 3.6 wants an ``__init__``, 3.9 makes one.

    In the interpreter, whose compile-time arguments are plain values, the class itself.
    """
    if knobs.runtime.interpret:
        cls.__init__, cls.__triton_aggregate__ = _set_plain_fields, True
        return cls
    cls.__init__ = _set_fields
    return _aggregate(cls)
