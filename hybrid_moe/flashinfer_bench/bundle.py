"""Modules of this package as sources that stand alone: only what can be reached, checked for what they import.

A Solution has to run where this package isn't installed. What goes into it is found in the import graph when it is
written; what nothing there names is left out of the modules, and with it the libraries that only that would import.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Distributions that are called otherwise than what is imported from them.
DISTRIBUTIONS = {"sgl_kernel": "sglang-kernel", "deep_gemm": "sgl-deep-gemm", "flashinfer": "flashinfer-python"}
# Modules of the standard library that could reach a network, or what could by another program.
NETWORK = frozenset(
    "asyncio ctypes ftplib http imaplib multiprocessing poplib smtplib socket socketserver ssl subprocess telnetlib "
    "urllib xmlrpc".split()
)
# Where CUDA is by convention: the only absolute path that a source may hold.
ALLOWED_PATHS = frozenset({"/usr/local/cuda"})
LEFT_OUT = '"""Left out: nothing in this solution\'s table runs it."""\n'
_IMPORTERS = frozenset({"import_module", "find_spec", "__import__"})


class BundleError(ValueError):
    """Sources that can't stand alone; the message names each file and what is wrong with it."""


def bundle(roots: Mapping[str, Iterable[str]], left_out: Collection[str] = ()) -> dict[str, str]:
    """The sources that ``roots`` need, by path relative to this package's folder, sorted.

    Of each module stay the top-level statements that bind a name which is named somewhere in what stays; names are
    compared by their text alone, so too much may stay but never too little. No package's ``__init__`` comes along: the
    folders are namespace packages.

    Parameters
    ----------
    roots
        Module of this package (``"backends.base"``) -> what is wanted of it.
    left_out
        Modules that are imported but never reached: a line that says so takes their place.

    Raises
    ------
    BundleError
        A module imports from a package's ``__init__``.
    """
    modules = {name: _Module.read(name) for name in roots}
    names = {wanted for some in roots.values() for wanted in some}
    grown = True
    while grown:
        grown = False
        for name, module in list(modules.items()):
            for statement in module.statements:
                if id(statement) in module.kept or not _is_wanted(statement, names):
                    continue
                grown = True
                module.kept.add(id(statement))
                names |= _named(statement)
                for imported in _relative_imports(name, statement):
                    if imported not in modules:
                        modules[imported] = _Module("", []) if imported in left_out else _Module.read(imported)
    return {_path(name): LEFT_OUT if name in left_out else modules[name].text() for name in sorted(modules)}


def third_party_imports(path: str, text: str) -> set[str]:
    """Top-level modules outside the standard library that a source imports, looks for, or might.

    Raises
    ------
    BundleError
        What it imports is computed, so that nobody can say what it is; or it may use the network.
    """
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and _called(node) in _IMPORTERS:
            argument = node.args[0] if node.args else None
            if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                raise BundleError(f"{path}, line {node.lineno}: expected an import by a literal, got a computed name")
            if not argument.value.startswith("."):
                found.add(argument.value)
    tops = {name.partition(".")[0] for name in found}
    if tops & NETWORK:
        raise BundleError(f"{path} imports {', '.join(sorted(tops & NETWORK))}, by which it could use the network")
    return {top for top in tops if top not in sys.stdlib_module_names}


def check_sources(sources: Mapping[str, str], dependencies: Collection[str]) -> None:
    """Check that sources stand alone.

    Raises
    ------
    BundleError
        One imports what is neither declared nor there, could use the network, or holds an absolute path, a URL or
        characters that aren't ASCII (flashinfer-bench writes them in whatever encoding the machine has).
    """
    for path, text in sources.items():
        if not text.isascii():
            raise BundleError(f"{path} has characters that aren't ASCII")
        undeclared = {DISTRIBUTIONS.get(name, name) for name in third_party_imports(path, text)} - set(dependencies)
        if undeclared:
            raise BundleError(f"{path} imports {', '.join(sorted(undeclared))}; declared: {', '.join(dependencies)}")
        if "://" in text:
            raise BundleError(f"{path} holds a URL")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in ALLOWED_PATHS:
                if re.match(r"/\w|~/|[A-Za-z]:[\\/]", node.value):
                    raise BundleError(f"{path}, line {node.lineno}: holds the path {node.value!r}")


# ---- Modules and what is in them ----


@dataclass
class _Module:
    source: str
    statements: list[ast.stmt]
    kept: set[int] = field(default_factory=set)  # by id()

    @classmethod
    def read(cls, name: str) -> _Module:
        text = (PACKAGE / _path(name)).read_text("utf-8")
        return cls(text, ast.parse(text).body)

    def text(self) -> str:
        """The source without the statements that don't stay, nor the comments right above them."""
        lines: list[str | None] = list(self.source.splitlines())
        for statement in self.statements:
            if id(statement) in self.kept:
                continue
            decorators = getattr(statement, "decorator_list", [])
            first = min([statement.lineno, *(d.lineno for d in decorators)]) - 1
            while first and (above := lines[first - 1]) is not None and above.startswith("#"):
                first -= 1
            for line in range(first, statement.end_lineno or statement.lineno):
                lines[line] = None
        text = "\n".join(line for line in lines if line is not None)
        return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"


def _path(name: str) -> str:
    return name.replace(".", "/") + ".py"


def _is_module(name: str) -> bool:
    return (PACKAGE / _path(name)).is_file()


def _is_wanted(statement: ast.stmt, names: set[str]) -> bool:
    if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
        return True
    bound = _bound(statement)
    return not bound or bool(bound & names)


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement binds in its module; none if it is run for something else."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target)]
        # An assignment to something's attribute or item is an effect.
        return set() if any(isinstance(n, ast.Attribute | ast.Subscript) for n in nodes) else _names(nodes)
    if isinstance(statement, ast.If):
        inner = [_bound(s) for s in (*statement.body, *statement.orelse)]
        return set().union(*inner) if all(inner) else set()
    return set()


def _called(call: ast.Call) -> str:
    """Last part of what is called: ``import_module`` of ``importlib.import_module(...)``."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _named(statement: ast.stmt) -> set[str]:
    nodes = list(ast.walk(statement))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    aliases = {
        name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        for name in (*alias.name.split("."), alias.asname or "")
    }
    return _names(nodes) | attributes | aliases


def _relative_imports(module: str, statement: ast.stmt) -> Iterator[str]:
    package = module.split(".")[:-1]
    for node in ast.walk(statement):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            inside = ".".join([*base, alias.name])
            if _is_module(inside):
                yield inside
            elif base and _is_module(".".join(base)):
                yield ".".join(base)
            else:
                raise BundleError(f"{_path(module)}, line {node.lineno}: imports {alias.name} from an __init__")
