"""The installed flashinfer: its version, and whether one of its functions takes the call that a backend makes."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

PACKAGE = "flashinfer-python"
# The range of the extra [flashinfer]; first and first excluded release.
VERSION_RANGE = ">=0.6.14,<0.8"
_FIRST, _EXCLUDED = (0, 6, 14), (0, 8, 0)


def installed_version() -> str | None:
    """The installed release; ``None`` where there is none, or it isn't known."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_reasons() -> list[str]:
    """Why the installed flashinfer is out of the question; it is neither imported nor called."""
    if importlib.util.find_spec("flashinfer") is None:
        return [f"{PACKAGE} isn't installed: pip install '{PACKAGE}{VERSION_RANGE}'"]
    version = installed_version()
    if version is None:
        return [f"flashinfer is there, but not as the package {PACKAGE}: its version is unknown"]
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if match is None or not _FIRST <= tuple(int(part or 0) for part in match.groups()) < _EXCLUDED:
        return [f"{PACKAGE}: expected {VERSION_RANGE}, got {version}"]
    return []


def contract_reasons(function: str, signature: inspect.Signature, passed: Collection[str]) -> list[str]:
    """Why a function with this signature can't take these keyword arguments; empty if it can."""
    by_keyword = {
        p.name: p
        for p in signature.parameters.values()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    reasons = [
        f"{function} takes no argument {name!r}, which this backend passes"
        for name in sorted(set(passed) - by_keyword.keys())
    ]
    for parameter in signature.parameters.values():
        variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if not variadic and parameter.default is inspect.Parameter.empty and parameter.name not in passed:
            reasons.append(f"{function} wants an argument {parameter.name!r}, which this backend doesn't know")
    return reasons


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function has an argument of that name, as some do from a later release on."""
    return argument in inspect.signature(function).parameters


def load(function: str, passed: Collection[str]) -> tuple[Callable[..., Any] | None, list[str]]:
    """Import a function of ``flashinfer.fused_moe`` and compare it with the keyword arguments of a call.

    Returns
    -------
    The function, or ``None``; and why it can't be called so, empty if it can.
    """
    release = f"{PACKAGE} {installed_version()}"
    try:
        module = importlib.import_module("flashinfer.fused_moe")
    except (ImportError, OSError) as error:  # OSError: a shared library that it loads is missing
        return None, [f"{release} can't be imported: {error}"]
    found = _original(getattr(module, function, None))
    if found is None:
        return None, [f"{release} has no flashinfer.fused_moe.{function}"]
    return found, [f"{release}: {r}" for r in contract_reasons(function, inspect.signature(found), passed)]


def _original(function: Any) -> Any:
    # `flashinfer.trace_apply` puts a wrapper in its place that calls what is registered for this layer. That may be us:
    # we must not call ourselves.
    while getattr(function, "_trace_apply", False):
        function = function.__wrapped__
    return function
