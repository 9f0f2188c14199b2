"""Record what examples/vllm_layer.py relies on, from its wheel, without importing them.

    pip download --no-deps -d wheels vllm==0.33.0
    python tests/data/record_dropin_interfaces.py wheels/*.whl

writes ``dropin_interfaces.json`` beside this file. Of each function its parameters (``*args`` and ``**kwargs`` by their
bare names); of each class its bases, its methods' parameters, and its fields: what its body annotates or assigns, its
properties, and all that its methods assign to ``self``. Beside them the line in the wheel's own file.
"""

from __future__ import annotations

import argparse
import ast
import json
import zipfile
from pathlib import Path

LAYERS = "vllm.model_executor.layers"
RECORDED = {
    "vllm": {
        f"{LAYERS}.fused_moe.config": ["FusedMoEConfig", "FusedMoEParallelConfig"],
        f"{LAYERS}.fused_moe.fused_moe_method_base": ["FusedMoEMethodBase"],
        f"{LAYERS}.fused_moe.oracle.fp8": ["Fp8MoeBackend"],
        f"{LAYERS}.fused_moe.routed_experts": ["RoutedExperts"],
        f"{LAYERS}.fused_moe.runner.moe_runner": ["MoERunner"],
        f"{LAYERS}.quantization": ["register_quantization_config"],
        f"{LAYERS}.quantization.base_config": ["QuantizationConfig", "QuantizeMethodBase"],
        f"{LAYERS}.quantization.fp8": ["Fp8Config", "Fp8MoEMethod"],
    },
}


def parameters(function: ast.FunctionDef) -> str:
    """Names in order, as `inspect.signature` has them for what is looked up on the class."""
    a = function.args
    names = [x.arg for x in a.posonlyargs + a.args]
    names += [a.vararg.arg] if a.vararg else []
    names += [x.arg for x in a.kwonlyargs]
    names += [a.kwarg.arg] if a.kwarg else []
    bound = any(isinstance(d, ast.Name) and d.id == "classmethod" for d in function.decorator_list)
    return " ".join(names[1:] if bound else names)


def class_record(node: ast.ClassDef) -> dict[str, object]:
    """Bases, methods and fields of a class."""
    fields: dict[str, None] = {}  # in the order of the source
    methods: dict[str, str] = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            fields[item.target.id] = None
        elif isinstance(item, ast.Assign):
            fields.update({t.id: None for t in item.targets if isinstance(t, ast.Name)})
        elif isinstance(item, ast.FunctionDef):
            if any(ast.unparse(d) in ("property", "cached_property") for d in item.decorator_list):
                fields[item.name] = None
            else:
                methods[item.name] = parameters(item)
            for inner in ast.walk(item):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    # ``self.name = ``, and a quantisation method's ``layer.name = ``, which are the experts'.
                    if isinstance(inner.value, ast.Name) and inner.value.id in ("self", "layer"):
                        fields[inner.attr if inner.value.id == "self" else f"layer.{inner.attr}"] = None
                if isinstance(inner, ast.Call) and ast.unparse(inner.func) == "layer.register_parameter":
                    # An f-string by its source: ``w13_{self.weight_scale_name}``.
                    name = ast.unparse(inner.args[0]).removeprefix("f").strip("'\"")
                    fields[f"layer.{name}"] = None
    return {
        "line": node.lineno,
        "bases": [ast.unparse(base) for base in node.bases],
        "fields": " ".join(fields),
        "methods": methods,
    }


def module_record(archive: zipfile.ZipFile, module: str, names: list[str]) -> dict[str, object]:
    """What is recorded of one module, and its file in the wheel."""
    stem = module.replace(".", "/")
    path = next(p for p in (f"{stem}.py", f"{stem}/__init__.py") if p in archive.namelist())
    found: dict[str, object] = {}
    for node in ast.parse(archive.read(path)).body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            found[node.name] = class_record(node)
        elif isinstance(node, ast.FunctionDef) and node.name in names:
            found[node.name] = {"line": node.lineno, "parameters": parameters(node)}
    missing = set(names) - set(found)
    if missing:
        raise SystemExit(f"{path} has no {', '.join(sorted(missing))}")
    return {"path": path, "names": found}


def main() -> None:
    """Read the wheels named on the command line and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs=2, type=Path)
    packages = {}
    for wheel in sorted(parser.parse_args().wheels):
        package, version = wheel.name.split("-")[:2]
        with zipfile.ZipFile(wheel) as archive:
            modules = {m: module_record(archive, m, names) for m, names in RECORDED[package].items()}
        packages[package] = {"version": version, "modules": modules}
    text = json.dumps(packages, indent=1) + "\n"
    Path(__file__).with_name("dropin_interfaces.json").write_text(text)


if __name__ == "__main__":
    main()
