"""Write docs/api.md, the API reference, from the docstrings of what is public.

    python docs/make_api.py           # as `make docs`
    python docs/make_api.py -         # on stdout

The docstrings are NumPy's: their sections become lists, and their names in single backticks code.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import hybrid_moe
from hybrid_moe import metrics
from hybrid_moe.backends import base
from hybrid_moe.kernels.grouped_gemm import base as grouped_gemm

OUTPUT = Path(__file__).with_name("api.md")
HEAD = """# API reference

Made from the docstrings by `make docs`; don't edit. Shapes: `T` tokens, `E` local experts, `H` hidden size,
`I` intermediate size.
"""
# Where each part's names come from, and what they are for.
PARTS: tuple[tuple[str, str, ModuleType, tuple[str, ...]], ...] = (
    (
        "Calls",
        "All of these are in `hybrid_moe`.",
        hybrid_moe,
        ("fused_moe", "HybridMoE", "MoEProblem", "MoEInputs", "RoutedInputs", "DeviceKey"),
    ),
    ("Choices and policies", "", hybrid_moe, ()),  # what is left of hybrid_moe.__all__
    ("Metrics", "In `hybrid_moe.metrics`.", metrics, ()),
    ("For those who add a backend", "In `hybrid_moe.backends.base`.", base, ("Backend", "Runner")),
    ("For those who add a grouped GEMM", f"In `{grouped_gemm.__name__}`.", grouped_gemm, ("GroupedGemm",)),
)
SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)


def main() -> None:
    """Write the reference, or print it."""
    text = reference()
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(text)
    else:
        OUTPUT.write_text(text, encoding="utf-8")


def reference() -> str:
    """The whole page."""
    parts, done = [HEAD], {"metrics"}
    for title, lead, module, names in PARTS:
        chosen = names or tuple(name for name in public(module) if name not in done)
        done |= set(chosen)
        parts += [f"## {title}\n", *([f"{lead}\n"] if lead else [])]
        parts += [described(name, getattr(module, name)) for name in chosen]
    return "\n".join(parts)


def public(module: ModuleType) -> list[str]:
    """What a module exports, or else what it defines without an underscore."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    return sorted(names, key=str.lower)


def described(name: str, value: Any) -> str:
    """One class or function."""
    if not inspect.isclass(value):
        return f"### {name}\n\n{signature(name, value)}\n{markdown(value)}"
    parts = [f"### {name}\n", *([] if is_plain(value) else [signature(name, value)]), markdown(value)]
    for member, attribute in vars(value).items():
        if member.startswith("_") and member != "__call__" or member in getattr(value, "_fields", ()):
            continue
        function = attribute.__func__ if isinstance(attribute, classmethod | staticmethod) else attribute
        if isinstance(function, property):
            parts.append(f"#### {name}.{member}\n\n{markdown(function.fget)}")
        elif inspect.isfunction(function) and inspect.getdoc(function):
            parts.append(f"#### {name}.{member}\n\n{signature(member, function)}\n{markdown(function)}")
    return "\n".join(parts)


def is_plain(value: type) -> bool:
    """Whether its constructor says nothing to a reader: errors, enumerations, abstract classes and pydantic models."""
    return issubclass(value, Exception | enum.Enum) or inspect.isabstract(value) or hasattr(value, "model_fields")


def signature(name: str, value: Any) -> str:
    """As it is called, one parameter a line where it is long."""
    found = inspect.signature(value)
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    if dataclasses.is_dataclass(value):
        parameters = [p for p in parameters if not p.name.startswith("_")]
    found = found.replace(parameters=parameters)
    text = name + re.sub(r"'([^'=]*)'(?=[,)]| =|$)", r"\1", str(found))
    if len(text) > 100:
        body = "".join(f"    {line},\n" for line in lines_of(parameters))
        returns = "" if found.return_annotation is found.empty else f" -> {annotation(found.return_annotation)}"
        text = f"{name}(\n{body}){returns}"
    return f"```text\n{text}\n```\n"


def lines_of(parameters: list[inspect.Parameter]) -> list[str]:
    """Each parameter, and the star before those by keyword alone."""
    lines, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines, starred = [*lines, "*"], True
        text = parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        lines.append(text)
    return lines


def annotation(value: Any) -> str:
    """A type as it was written."""
    return value if isinstance(value, str) else inspect.formatannotation(value)


def markdown(value: Any) -> str:
    """A NumPy docstring as Markdown."""
    text = inspect.getdoc(value) or ""
    pieces = SECTION.split(text)
    parts = [paragraphs(pieces[0])]
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        parts.append(f"**{title}**\n\n{items(body)}")
    return "\n".join(part for part in parts if part.strip())


def items(body: str) -> str:
    """The entries of a section: a name or type, and indented below it what it is."""
    entries: list[tuple[str, list[str]]] = []
    for line in body.strip("\n").splitlines():
        if line and not line[0].isspace():
            entries.append((line.strip(), []))
        elif entries:
            entries[-1][1].append(line.strip())
    lines = []
    for name, text in entries:
        said = " ".join(filter(None, text))
        # "As `fused_moe`." is a sentence in the place of a name.
        lines.append(f"- {name}" if name.endswith(".") else f"- `{name}`" + (f": {said}" if said else ""))
    return code("\n".join(lines)) + "\n"


def paragraphs(text: str) -> str:
    """Prose, one paragraph a line."""
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]
    return code("\n\n".join(found)) + "\n"


def code(text: str) -> str:
    """Double backticks, reST's code, as Markdown's single ones."""
    return re.sub(r"``([^`]+)``", r"`\1`", text)


if __name__ == "__main__":
    main()
