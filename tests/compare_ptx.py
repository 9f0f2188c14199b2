"""Whether two states of the source compile to the same machine code.

``python tests/compare_ptx.py dump FOLDER`` writes the PTX and the SASS of every kernel that `compile_pipeline.py`
compiles, for sm_90a and sm_100a and the layers of all models. ``python tests/compare_ptx.py diff BEFORE AFTER``
compares two such folders, but for names and line numbers, and exits 1 if any kernel differs. No GPU is needed. Each
Triton release compiles differently: dump with the same one, as by ``PYTHONPATH=FOLDER_OF_ANOTHER_RELEASE``.

What differs is listed with its instructions (PTX and SASS), registers and spilled bytes before and after; "reordered"
says that each SASS instruction is there as often as before.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = (90, 100)


def dump(folder: Path, capability: int, models: list[str]) -> None:
    """One file a kernel: its PTX, its SASS and what is in `SUMMARY`."""
    from compile_pipeline import compile_layers, resources
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(get_ptxas(capability).path).parent
    seen: collections.Counter[str] = collections.Counter()
    folder.mkdir(parents=True, exist_ok=True)
    for name, options, kernel in compile_layers(capability, models):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            Path(cubin.name).write_bytes(kernel.asm["cubin"])
            sass = subprocess.run([tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True)
        row = {
            "kernel": name,
            "options": {key: value for key, value in options.items() if isinstance(value, int)},
            **resources(kernel),
            "ptx": normalised_ptx(kernel.asm["ptx"], kernel.name),
            "sass": normalised_sass(sass.stdout, kernel.name),
        }
        (folder / f"{name}-{seen[name]:03}.json").write_text(json.dumps(row, indent=0))
        seen[name] += 1


def normalised_ptx(text: str, kernel: str) -> list[str]:
    """Lines without comments, debug information and the kernel's name."""
    text = re.sub(r"\.section\s+\.debug.*", "", text, flags=re.DOTALL).replace(kernel, "KERNEL")
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not re.match(r"\.(loc|file)\b|\$L__(tmp|func)|\.(version|target)", line)]


def normalised_sass(text: str, kernel: str) -> list[str]:
    """Instructions and labels, without addresses."""
    lines = (re.sub(r"/\*.*?\*/", "", line).strip() for line in text.replace(kernel, "KERNEL").splitlines())
    return [line for line in lines if line and not line.startswith((".headerflags", ".elftype", "//"))]


def instructions(lines: list[str]) -> int:
    """Of PTX or SASS."""
    return sum(line.endswith(";") and not line.startswith(".") for line in lines)


def opcodes(lines: list[str]) -> collections.Counter[str]:
    """How often each instruction is in SASS, whatever its registers."""
    return collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in lines if line.endswith(";"))


def diff(before: Path, after: Path, renamed: dict[str, str]) -> int:
    """Print what differs; how many kernels do."""

    def key(path: Path, folder: Path, names: dict[str, str]) -> str:
        name, _, number = path.stem.rpartition("-")
        return f"{path.parent.relative_to(folder)}/{names.get(name, name)}-{number}"

    old = {key(path, before, renamed): path for path in sorted(before.rglob("*.json"))}
    new = {key(path, after, {}): path for path in sorted(after.rglob("*.json"))}
    differing = 0
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            differing += 1
            print(f"{name}: only in {before if name in old else after}")
            continue
        a, b = json.loads(old[name].read_text()), json.loads(new[name].read_text())
        if a["sass"] == b["sass"]:
            continue
        differing += 1
        notes = ["same PTX" if a["ptx"] == b["ptx"] else "PTX differs"]
        if opcodes(a["sass"]) == opcodes(b["sass"]):
            notes.append("reordered")
        for what, x, y in (
            ("PTX instructions", instructions(a["ptx"]), instructions(b["ptx"])),
            ("SASS instructions", instructions(a["sass"]), instructions(b["sass"])),
            *((what, a[what], b[what]) for what in ("registers", "spill_bytes", "shared")),
        ):
            notes.append(f"{what} {x} -> {y}" if x != y else f"{what} {x}")
        print(f"{name}: {', '.join(notes)}")
    print(f"{len(new) - differing} of {len(new)} kernels have the same SASS")
    return differing


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    dumping = commands.add_parser("dump")
    dumping.add_argument("folder", type=Path)
    dumping.add_argument("--capability", type=int, choices=TARGETS, action="append")
    dumping.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    dumping.add_argument("models", nargs="*")
    comparing = commands.add_parser("diff")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--renamed", action="append", default=[], metavar="OLD=NEW", help="a kernel's name")
    options = parser.parse_args()
    if options.command == "diff":
        renamed = dict(pair.split("=") for pair in options.renamed)
        sys.exit(1 if diff(options.before, options.after, renamed) else 0)
    if options.one:
        dump(options.folder, options.capability[0], options.models)
        return
    from hybrid_moe.measure.workloads import MODELS

    # A process for each target and layer: it can't change its target once Triton's driver was asked.
    for capability in options.capability or TARGETS:
        for models in [[], [model for model in MODELS if model != "deepseek-v3"]]:
            at = options.folder / f"sm_{capability}a" / ("models" if models else "deepseek-v3")
            command = [sys.executable, __file__, "dump", "--one", "--capability", str(capability), str(at), *models]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
