"""Under which versions something was measured: what may be compared, and whether a policy still holds here.

What counts for a candidate is the releases of the packages that its backend names (`Backend.packages`), and for all of
them what is in `COMMON`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from .. import backends
from ..candidate import Candidate
from .schema import Policy
from .select import Refusals

# What counts for every candidate, and how many numbers of the version do: this package's patches keep its speed, and
# what a driver does to it depends on its branch. None: all of them.
COMMON: Mapping[str, int | None] = {"hybrid-moe": 2, "driver": 1, "cuda": None}
# A policy is learned again for another minor release; a patch says nothing.
MINOR = 2


def packages_of(choice: Candidate) -> tuple[str, ...]:
    """Packages whose release decides how fast a candidate is; torch alone for what is in no registry."""
    backend = backends.BACKENDS.get(choice.backend)
    return ("torch",) if backend is None else backend.packages(choice.config)


def release(version: str, numbers: int | None = None) -> str:
    """A version without its local part (``2.11.0+cu130`` is a build of 2.11.0), or only its first ``numbers``."""
    public = version.partition("+")[0]
    return public if numbers is None else ".".join(public.split(".")[:numbers])


# Packages that some backend uses.
LIBRARIES = tuple(dict.fromkeys(name for choice in backends.candidates() for name in packages_of(choice)))


class PolicyMismatchWarning(UserWarning):
    """A policy was measured on something else than it is used on."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How a policy's measurements differ from where it is used.

    Attributes
    ----------
    hard
        What it chose can't run here, or it is for another GPU.
    soft
        It runs, but under other versions than were measured, or unknown ones: the choice may no longer be the fastest.
    """

    hard: tuple[str, ...]
    soft: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.hard or self.soft)

    def messages(self, where: str) -> list[str]:
        """A sentence for each of the two kinds that there is; ``where`` is the policy for people."""
        found = []
        if self.hard:
            found.append(f"{where}: not all that it chooses can run here: {'; '.join(self.hard)}")
        if self.soft:
            found.append(
                f"{where}: measured under other or unknown versions ({'; '.join(self.soft)}), so what it chooses may "
                "no longer be the fastest: `hybrid-moe regenerate` measures again"
            )
        return found


def mismatch(policy: Policy, device: str, refusals: Refusals, installed: Mapping[str, str | None]) -> Mismatch:
    """Compare a policy with where it is to run.

    Parameters
    ----------
    policy
        The policy.
    device
        Slug of the GPU here.
    refusals
        Why candidates can't run here; what can is compared by version.
    installed
        Version of each package here; ``None``, or missing, where it isn't known.
    """
    hard = []
    if policy.device != device:
        hard.append(f"it is for {policy.device}, this is {device}")
    wanted: dict[Candidate, list[str]] = defaultdict(list)
    for regime in policy.regimes:
        wanted[regime.choice].append(f"T = {regime.label}")
    wanted[policy.default].append("the default")
    for choice, places in wanted.items():
        if refused := refusals.get(choice):
            named = [*places[:8], *([f"{len(places) - 8} more"] if len(places) > 8 else [])]
            hard.append(f"{choice} ({', '.join(named)}): {'; '.join(refused)}")
    soft = []
    for name in sorted({name for choice in wanted if not refusals.get(choice) for name in packages_of(choice)}):
        measured, here = policy.environment.get(name), installed.get(name)
        if measured is None or here is None:
            soft.append(f"{name} {measured or 'unknown'}, here {here or 'unknown'}")
        # A policy from several versions has them as "2.10.0 | 2.11.0".
        elif release(here, MINOR) not in {release(one, MINOR) for one in measured.split(" | ")}:
            soft.append(f"{name} {measured}, here {here}")
    return Mismatch(tuple(hard), tuple(soft))


@functools.cache
def installed_version(package: str) -> str | None:
    """Version of a package here; ``None`` where its metadata isn't found."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str | None]:
    """Version here of each package that some backend uses."""
    return {name: installed_version(name) for name in LIBRARIES}
