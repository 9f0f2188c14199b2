"""What measured: the release, the commit, and whether the sources were changed since."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

from ..version import __version__

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code(package: Path = PACKAGE) -> dict[str, str | bool]:
    """What a record says of the code that measured it.

    Returns
    -------
    dict
        ``version``; ``sources``, a digest of all modules of the package, by which a tree without git can be told; and
        in a git checkout ``commit`` and ``dirty``, whether a file of the package differs from it.
    """
    found: dict[str, str | bool] = {"version": __version__, "sources": _digest(package)}
    tracked = _git(package, "ls-files", "__init__.py")
    commit = _git(package, "rev-parse", "HEAD")
    # An installed package may lie inside of somebody else's checkout, which doesn't track it.
    if commit is None or not tracked:
        return found
    changes = _git(package, "status", "--porcelain", "--untracked-files=all", ".")
    return found | {"commit": commit, "dirty": changes != ""}


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None
