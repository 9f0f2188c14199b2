"""Say what an installation on a machine without a GPU would cost, before it downloads anything.

torch comes as a CPU build or as a CUDA build, which brings several GB of libraries along; which of the two there is for
this Python is up to the package index.

    python tools/torch_build.py -c constraints.txt torch     # what follows goes to `pip install --dry-run`
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

NOTE = """\
note: pip finds no CPU build of torch for Python {python}: {count} packages of CUDA libraries come along
      with torch {torch}, about {gigabytes:.1f} GB in .venv. It works without a GPU too. For a CPU build instead:
        make ... TORCH_INDEX=URL        the index of CPU builds that PyTorch's installation page names
        make ... PYTHON=python3.X       a Python that your package index has one for"""
# Of torch 2.13.0 with its CUDA libraries for Python 3.12, on disk. The index only knows the sizes of some.
CUDA_GIGABYTES = 4.9


def note(report: dict[str, Any]) -> str | None:
    """What to say of pip's report on an installation; ``None`` if no CUDA libraries come with it."""
    versions = {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in report["install"]}
    libraries = [n for n in versions if n.startswith(("nvidia-", "cuda-")) and n != "nvidia-ml-py"]
    if "torch" not in versions or not libraries:
        return None
    python = "{}.{}".format(*sys.version_info)
    return NOTE.format(python=python, count=len(libraries), torch=versions["torch"], gigabytes=CUDA_GIGABYTES)


def main() -> None:
    """Ask pip, and print the note if there is one."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *sys.argv[1:]]
    done = subprocess.run(pip, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # pip has said why
    said = note(json.loads(done.stdout))
    if said:
        print(said, file=sys.stderr)


if __name__ == "__main__":
    main()
