"""Kernels as functions of Python: their own code, with the emulation's operations in the place of Triton's."""

from __future__ import annotations

import builtins
import inspect
import types
from typing import Any

import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.language.extra import cuda

from . import language

_MODULES = (
    (tl, language.LANGUAGE), (gl, language.LANGUAGE), (hopper, language.HOPPER), (hopper.mbarrier, language.MBARRIER),
    (hopper.tma, language.TMA), (hopper.async_copy, language.ASYNC_COPY), (cuda, language.CUDA),
    (gl.shared_memory_descriptor, language.SHARED),
)  # fmt: skip


class Translator:
    """Translates functions, classes and whatever else kernels find by name; each once."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._globals: dict[int, dict[str, Any]] = {}
        self._kept: list[Any] = []  # what has an id in the above
        for module, operations in _MODULES:
            nested = {
                name: language.Namespace(getattr(module, name), **of)
                for name, of in (("mbarrier", language.MBARRIER), ("tma", language.TMA))
                if module is hopper
            }
            self._remember(module, language.Namespace(module, **operations, **nested))
            for name, operation in operations.items():
                if hasattr(module, name):
                    self._remember(getattr(module, name), operation)

    def _remember(self, original: Any, translated: Any) -> Any:
        self._kept.append(original)
        self._done[id(original)] = translated
        return translated

    def __call__(self, value: Any) -> Any:
        """What a name stands for in the emulation."""
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, tl.constexpr):
            return value.value
        if getattr(value, "__triton_aggregate__", False):
            return self._aggregate(value)
        # A decorated function: compiled, interpreted, or evaluated while compiling.
        plain = getattr(value, "fn", None)
        if isinstance(plain, types.FunctionType) and type(value).__module__.split(".")[0] == "triton":
            return self._remember(value, self._function(plain))
        return value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        names = self._names(function.__globals__)
        made = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        made.__kwdefaults__ = function.__kwdefaults__
        return made

    def _names(self, originals: dict[str, Any]) -> dict[str, Any]:
        """Of a module; filled after it is known, as its functions call one another."""
        if id(originals) not in self._globals:
            self._kept.append(originals)
            names = self._globals[id(originals)] = {}
            names.update({name: self(value) for name, value in originals.items()})
            # The variable of a loop is an int32.
            names["__builtins__"] = {**vars(builtins), "range": language.loop}
        return self._globals[id(originals)]

    def _aggregate(self, original: Any) -> Any:
        """A class with the same fields, methods and properties."""
        annotations = vars(original).get("__annotations__")
        if annotations is None:  # Triton 3.6 keeps the class to itself
            annotations = inspect.getclosurevars(original.__new__).nonlocals["cls"].__annotations__
        fields = list(annotations)
        members: dict[str, Any] = {}
        made = self._remember(original, type(original.__name__, (), {}))
        for base in reversed(original.__mro__):
            for name, member in vars(base).items():
                if isinstance(member, property) and name != "type":
                    members[name] = property(self._method(member.fget))
                elif name not in ("__new__", "__setattr__") and (
                    getattr(base, "__triton_aggregate__", False) and not name.startswith("_")
                ):
                    members[name] = self._method(member)

        def init(self: Any, *values: Any, **named: Any) -> None:
            given = {**dict(zip(fields, values, strict=False)), **named}
            assert set(given) == set(fields), f"{original.__name__} has {fields}, not {list(given)}"
            self.__dict__.update(given)

        members["__init__"] = init
        for name, member in members.items():
            setattr(made, name, member)
        return made

    def _method(self, member: Any) -> Any:
        return self._function(member) if isinstance(member, types.FunctionType) else self(member)
