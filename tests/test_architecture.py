"""Imports go down one spine, and none goes in a circle."""

import ast
from pathlib import Path

import hybrid_moe

PACKAGE = Path(hybrid_moe.__file__).parent

# From the top. A part may import from those below it alone, `hybrid_moe/__init__.py` from any of them.
SPINE = (
    "cli",
    "learn",
    "measure",
    "integrations",
    "api",
    "serving",
    "flashinfer_bench",
    "policy",
    "backends",
    "kernels",
    "reference",
    "inputs",
    "candidate",
    "numerics",
    "device",
    "shards",
    "problem",
    "hf_config",
    "files",
    "text",
    "version",
)


def modules():
    found = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    del found["__main__",]  # `python -m hybrid_moe`, which nothing imports
    return found


def imports(module, path):
    """The modules of the package that a module imports, wherever in it, as paths from the package's root."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = (*module[: len(module) - node.level], *(node.module or "").split("."))
        elif node.module and node.module.partition(".")[0] == "hybrid_moe":
            base = tuple(node.module.split(".")[1:])
        else:
            continue
        base = tuple(filter(None, base))
        for alias in node.names:
            for target in ((*base, alias.name), (*base, alias.name, "__init__"), base, (*base, "__init__")):
                if target in known:
                    yield target
                    break


def test_every_part_has_its_place():
    parts = {module[0] for module in modules()} - {"__init__"}
    assert parts == set(SPINE)


def test_imports_go_down():
    up = [
        f"{'.'.join(module)} imports {'.'.join(target)}"
        for module, path in modules().items()
        if module[0] != "__init__"
        for target in imports(module, path)
        if target[0] == "__init__" or (target[0] != module[0] and SPINE.index(target[0]) < SPINE.index(module[0]))
    ]
    assert not up


def test_no_circle_of_modules():
    arrows = {module: set(imports(module, path)) - {module} for module, path in modules().items()}
    done = set()

    def visit(module, way):
        assert module not in way, " -> ".join(".".join(m) for m in (*way[way.index(module) :], module))
        if module not in done:
            for target in sorted(arrows[module]):
                visit(target, (*way, module))
            done.add(module)

    for module in sorted(arrows):
        visit(module, ())
