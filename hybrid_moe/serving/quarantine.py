"""Candidates that failed in this process: passed over by later calls and new captures, until released.

One is put here when it raises as it is prepared or warmed up, or fails a shadow check that was asked to do so. To the
order of choice it is one more refusal, with its reason. What is captured in a CUDA graph stays as it is, an explicit
backend is never exchanged, and a layer that has nothing else to run goes on with what it has: a backend refuses when
it is prepared, not in the middle of serving. The logger ``hybrid_moe`` has an ERROR record for each.
"""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..backends import complete
from ..candidate import Candidate
from ..device import DeviceKey
from ..policy.resolve import as_candidate
from ..problem import MoEProblem

logger = logging.getLogger("hybrid_moe")

Cause = Literal["prepare", "warm_up", "shadow_check"]
_FAILED: dict[Cause, str] = {
    "prepare": "it raised when it was prepared",
    "warm_up": "it raised when it was warmed up",
    "shadow_check": "it failed the shadow check",
}


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A candidate in quarantine.

    Attributes
    ----------
    device
        Slug of the device.
    problem, choice
        What it computed, and the candidate itself; for other problems it goes on.
    cause
        ``"prepare"``, ``"warm_up"`` or ``"shadow_check"``.
    reason
        The error, or the rule that it broke.
    since
        Seconds since the epoch.
    """

    device: str
    problem: MoEProblem
    choice: Candidate
    cause: Cause
    reason: str
    since: float

    def __str__(self) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.since))
        return f"in quarantine since {at}, as {_FAILED[self.cause]}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return {
            "device": self.device,
            "problem": self.problem.definition,
            "backend": self.choice.backend,
            "config": dict(self.choice.config),
            "cause": self.cause,
            "reason": self.reason,
            "since": self.since,
        }


class Owner(Protocol):
    """Who holds decisions that a change of the quarantine makes out of date."""

    def choose_again(self) -> None:
        """Take decisions by what is in quarantine now; the old ones stay if this raises."""


_Key = tuple[str, MoEProblem, Candidate]


class Quarantine:
    """The entries of a process; without locks, as each change is one operation of a dict.

    Attributes
    ----------
    epoch
        Another number after every change: decisions that were made before may be out of date.
    """

    def __init__(self) -> None:
        self._entries: dict[_Key, Quarantined] = {}
        self._owners: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()
        self._numbers = itertools.count(1)
        self.epoch = 0

    def join(self, owner: Owner) -> None:
        """Tell ``owner`` of every change from now on. It isn't kept alive."""
        self._owners[next(self._numbers)] = owner

    def put(self, device: DeviceKey, problem: MoEProblem, choice: Candidate, cause: Cause, reason: str) -> None:
        """Pass ``choice`` over from now on; one that is here already keeps its reason."""
        key = device.name, problem, complete(choice)
        entry = Quarantined(*key, cause, reason, time.time())
        if self._entries.setdefault(key, entry) is not entry:
            return
        logger.error("%s on %s is %s", choice, device.name, entry, extra=entry.to_dict())
        self._changed()

    def release(self, choice: Candidate | None = None) -> tuple[Quarantined, ...]:
        """Let ``choice``, or all, run again; what was released."""
        keys = [key for key in self._entries.copy() if choice in (None, key[2])]
        released = [entry for key in keys if (entry := self._entries.pop(key, None)) is not None]
        if released:
            self._changed()
        return tuple(released)

    def entries(self) -> tuple[Quarantined, ...]:
        """All that are here, the first one first."""
        return tuple(self._entries.copy().values())

    def reasons(self, device: DeviceKey, problem: MoEProblem) -> dict[Candidate, tuple[str, ...]]:
        """Why each candidate of a problem is refused."""
        found = (entry for entry in self.entries() if (entry.device, entry.problem) == (device.name, problem))
        return {entry.choice: (str(entry),) for entry in found}

    def _changed(self) -> None:
        self.epoch = next(self._numbers)
        for reference in self._owners.valuerefs():
            owner = reference()
            if owner is None:
                continue
            try:
                owner.choose_again()
            except Exception as error:  # NoBackendError, or its policy can't be read: the others have to learn of it
                logger.error(
                    "a layer goes on as it was, as nothing else can be chosen for it: %s", error, exc_info=error
                )


QUARANTINE = Quarantine()


def quarantined() -> tuple[Quarantined, ...]:
    """Every candidate that failed in this process and is passed over, with its reason."""
    return QUARANTINE.entries()


def release_quarantine(candidate: str | Candidate | None = None) -> tuple[Quarantined, ...]:
    """Let a candidate run again from the next call on, or, by default, all that are in quarantine.

    Parameters
    ----------
    candidate
        As ``backend=`` of `fused_moe`; for every device and problem.

    Returns
    -------
    tuple of Quarantined
        What was released.

    Raises
    ------
    TypeError, ValueError
        ``candidate`` is none.
    """
    return QUARANTINE.release(None if candidate is None else as_candidate(candidate))
