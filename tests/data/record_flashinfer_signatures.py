"""Record the parameters of flashinfer's trtllm_fp8_block_scale_moe from wheels, without importing them.

    pip download --no-deps -d wheels flashinfer-python==0.7.2.post1
    python tests/data/record_flashinfer_signatures.py wheels/*.whl

writes ``flashinfer_signatures.json`` beside this file, holding the wheels given and no others.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import zipfile
from pathlib import Path

FUNCTION = "trtllm_fp8_block_scale_moe"
SOURCE = "flashinfer/fused_moe/core.py"


def parameters(source: str) -> list[dict[str, str]]:
    """Name, kind and default (as source text; no key if there is none) of each parameter, in order."""
    found = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == FUNCTION]
    if len(found) != 1:
        raise SystemExit(f"{SOURCE}: expected one function {FUNCTION}, got {len(found)}")
    args = found[0].args
    if args.vararg or args.kwarg:
        raise SystemExit(f"{FUNCTION} has variadic parameters, which this script doesn't record")
    positional = [(a, "POSITIONAL_ONLY") for a in args.posonlyargs] + [(a, "POSITIONAL_OR_KEYWORD") for a in args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    rows = []
    for (arg, kind), default in zip(
        positional + [(a, "KEYWORD_ONLY") for a in args.kwonlyargs], defaults + list(args.kw_defaults), strict=True
    ):
        row = {"name": arg.arg, "kind": kind}
        if default is not None:
            row["default"] = ast.unparse(default)
        rows.append(row)
    return rows


def main() -> None:
    """Read the wheels named on the command line and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    versions = {}
    for wheel in parser.parse_args().wheels:
        with zipfile.ZipFile(wheel) as archive:
            versions[wheel.name.split("-")[1]] = parameters(archive.read(SOURCE).decode())
    ordered = sorted(versions, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])
    lines = []
    for version in ordered:
        rows = ",\n".join("   " + json.dumps(row) for row in versions[version])
        lines.append(f"  {json.dumps(version)}: [\n{rows}\n  ]")
    body = ",\n".join(lines)
    text = f'{{\n "package": "flashinfer-python",\n "function": "{FUNCTION}",\n "versions": {{\n{body}\n }}\n}}\n'
    json.loads(text)
    Path(__file__).with_name("flashinfer_signatures.json").write_text(text)


if __name__ == "__main__":
    main()
