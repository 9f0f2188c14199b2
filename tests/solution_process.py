"""Build and run a Solution where hybrid_moe can't be imported, as its two users do; started by test_solution.

    python tests/solution_process.py FOLDER

reads solution.json, definition.json and inputs.pt from the folder, writes outputs.pt there and prints what it saw.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import warnings
from pathlib import Path

# From here on an import of it raises, wherever it is installed.
sys.modules["hybrid_moe"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from flashinfer_bench.compile import BuilderRegistry  # noqa: E402
from flashinfer_bench.data import Definition, Solution, load_json_file  # noqa: E402


def loaded_like_flashinfer(solution: Solution, folder: Path):
    """The entry point, loaded as ``flashinfer.trace_apply.loaders.python`` does: without a package around it."""
    for source in solution.sources:
        path = folder / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.content)
    name = "flashinfer_trace_apply_solution_" + hashlib.sha256(solution.name.encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, folder / solution.get_entry_path())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return getattr(module, solution.get_entry_symbol())


def main() -> None:
    """See the module."""
    folder = Path(sys.argv[1])
    solution = load_json_file(Solution, folder / "solution.json")
    definition = load_json_file(Definition, folder / "definition.json")
    data = torch.load(folder / "inputs.pt")
    registry = BuilderRegistry.get_instance()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = registry.build(definition, solution)
        outputs = {"built": [built(*inputs.values()) for inputs in data["inputs"]]}
        alone = loaded_like_flashinfer(solution, folder / "alone")
        outputs["keywords"] = [alone(**inputs, **data["options"]) for inputs in data["inputs"]]
    reference = registry.build_reference(definition)
    outputs["reference"] = [reference(*inputs.values()) for inputs in data["inputs"]]
    torch.save(outputs, folder / "outputs.pt")
    seen = sorted(name for name in sys.modules if name.startswith(built.metadata.misc["module_name"]))
    registry.cleanup()
    left = [name for name in sys.modules if name.startswith("fib_triton_")]
    ours = [str(w.message) for w in caught if "in its place" in str(w.message)]
    json.dump({"build_type": built.metadata.build_type, "modules": seen, "left": left, "warnings": ours}, sys.stdout)


if __name__ == "__main__":
    main()
