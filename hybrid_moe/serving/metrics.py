"""How often each backend ran, and for how many tokens: counters for a metrics exporter to read.

Counted in Python, when a call is made: the replay of a CUDA graph runs no Python and isn't counted, only its capture
is. Count replays where they are launched, by `HybridMoE.count_replay`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..candidate import Candidate
from ..policy.schema import Interval
from ..policy.select import Source
from ..problem import MoEProblem

T = TypeVar("T")

__all__ = ["Counter", "Counters", "Label", "Sample", "ShadowSample", "shadow_snapshot", "snapshot"]

# Calls that a counter notes before it adds them up.
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Label:
    """What a count is of.

    Attributes
    ----------
    device
        Slug of the device.
    problem
        What is computed.
    choice
        What ran.
    regime
        Bounds of the policy's regime that holds T; ``None`` outside of all and without a policy.
    source
        The step of the order of choice that took it.
    """

    device: str
    problem: MoEProblem
    choice: Candidate
    regime: Interval | None
    source: Source


@dataclass(frozen=True, slots=True)
class Sample:
    """A label with its count so far: calls made, and the sum of their T. Neither ever falls."""

    label: Label
    calls: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The sample as a JSON object."""
        label = self.label
        regime = None if label.regime is None else {"min_tokens": label.regime[0], "max_tokens": label.regime[1]}
        return {
            "device": label.device,
            "problem": label.problem.definition,
            "backend": label.choice.backend,
            "config": dict(label.choice.config),
            "regime": regime,
            "source": label.source,
            "calls": self.calls,
            "tokens": self.tokens,
        }


class _Log(Generic[T]):
    """A list of items with the total of all earlier ones at its head; nobody waits for a lock here.

    Adding, copying and replacing the beginning are one operation on the list each, and so atomic: whoever copies it has
    every item once, under its head or behind it. That holds in a signal handler that interrupts a fold, and in a child
    that was forked while another thread folded.
    """

    __slots__ = ("items", "_folding")

    def __init__(self, head: T) -> None:
        self.items: list[T] = [head]
        self.renew_lock()

    def renew_lock(self) -> None:
        """In a forked child: the thread that held it may be gone."""
        self._folding = threading.Lock()

    def fold(self, shorter: Callable[[list[T]], list[T]]) -> None:
        """Put what ``shorter`` makes of all items in their place, unless somebody is at it already."""
        if not self._folding.acquire(blocking=False):
            return
        try:
            taken = self.items.copy()
            self.items[: len(taken)] = shorter(taken)  # other threads go on appending behind
        finally:
            self._folding.release()


class Counter:
    """Calls and tokens of one label, exact whatever threads call at once.

    A call only appends to a list; a lock at every call would cost it three times as much. What was appended is added up
    once in many calls.
    """

    __slots__ = ("_log", "_items", "_limit", "_first")

    def __init__(self) -> None:
        self._log: _Log[int | tuple[int, int]] = _Log((0, 0))
        self._items = self._log.items
        self._limit = 2  # so that the first call is noticed
        self._first = [True]  # taken once

    def add(self, tokens: int) -> bool:
        """Count a call of ``tokens``; whether it's the first, which is true exactly once."""
        items = self._items
        items.append(tokens)
        return len(items) >= self._limit and self._noticed()

    def totals(self) -> tuple[int, int]:
        """Calls and tokens so far."""
        return _added_up(self._items.copy())

    def renew_lock(self) -> None:
        """See `_Log`."""
        self._log.renew_lock()

    def _noticed(self) -> bool:
        self._limit = _BATCH
        try:
            return self._first.pop()
        except IndexError:
            self._log.fold(lambda items: [_added_up(items)])
            return False


def _added_up(items: list[Any]) -> tuple[int, int]:
    (calls, tokens), *added = items
    return calls + len(added), tokens + sum(added)


class Counters:
    """The counters of one owner, as a layer; `snapshot` knows them from here on, and keeps their counts after them."""

    def __init__(self) -> None:
        self._counters: dict[Label, Counter] = {}
        _PROCESS.join(self, self._counters)

    def of(self, label: Label) -> Counter:
        """The label's counter, the same at every call."""
        return self._counters.setdefault(label, Counter())

    def samples(self) -> tuple[Sample, ...]:
        """Every label that was counted, in the order in which they were made known."""
        return _samples(_totals([self._counters]))


class _Process:
    """All owners there are, and at the head what is left of those that are gone."""

    def __init__(self) -> None:
        self._log: _Log[Any] = _Log({})

    def join(self, owner: Counters, counters: dict[Label, Counter]) -> None:
        self._log.items.append((weakref.ref(owner), counters))
        self._log.fold(_bury)

    def snapshot(self) -> tuple[Sample, ...]:
        gone, *owners = self._log.items.copy()
        return _samples(_totals([counters for _, counters in owners], gone))

    @property
    def owners(self) -> list[dict[Label, Counter]]:
        """The counters of each owner that isn't buried."""
        return [counters for _, counters in self._log.items.copy()[1:]]

    def renew_locks(self) -> None:
        self._log.renew_lock()
        for counters in self.owners:
            for counter in counters.values():
                counter.renew_lock()


def _bury(items: list[Any]) -> list[Any]:
    # Here and not in a callback of the reference, which could come anywhere.
    gone, *owners = items
    alive = []
    for owner, counters in owners:
        if owner() is None:  # nobody counts any more
            gone = _totals([counters], gone)
        else:
            alive.append((owner, counters))
    return [gone, *alive]


def _totals(
    owners: Iterable[dict[Label, Counter]], start: Mapping[Label, tuple[int, int]] | None = None
) -> dict[Label, tuple[int, int]]:
    totals = dict(start or {})
    for counters in owners:
        for label, counter in counters.copy().items():
            calls, tokens = counter.totals()
            before = totals.get(label, (0, 0))
            totals[label] = before[0] + calls, before[1] + tokens
    return totals


def _samples(totals: Mapping[Label, tuple[int, int]]) -> tuple[Sample, ...]:
    return tuple(Sample(label, *counts) for label, counts in totals.items() if counts[0])


@dataclass(frozen=True, slots=True)
class ShadowSample:
    """What shadow checks have found of one candidate so far; no count ever falls.

    Attributes
    ----------
    device, problem, choice
        As `Label` has them.
    checks, breaches, skipped
        See `ShadowStatus`.
    """

    device: str
    problem: MoEProblem
    choice: Candidate
    checks: int
    breaches: int
    skipped: int

    def to_dict(self) -> dict[str, Any]:
        """The sample as a JSON object."""
        return {
            "device": self.device,
            "problem": self.problem.definition,
            "backend": self.choice.backend,
            "config": dict(self.choice.config),
            "checks": self.checks,
            "breaches": self.breaches,
            "skipped": self.skipped,
        }


class _Checks:
    """Checks made, results that were wrong, and checks left out."""

    def __init__(self) -> None:
        self.counters = Counter(), Counter(), Counter()

    def totals(self) -> tuple[int, int, int]:
        checks, breaches, skipped = (counter.totals()[0] for counter in self.counters)
        return checks, breaches, skipped


class ShadowCounters:
    """The counts of one layer's shadow checks, which `shadow_snapshot` has as well."""

    def __init__(self, device: str, problem: MoEProblem) -> None:
        self._device, self._problem, self._own = device, problem, _Checks()

    def checked(self, choice: Candidate, passed: bool) -> None:
        """Count a check of ``choice``."""
        self._add(choice, 0)
        if not passed:
            self._add(choice, 1)

    def skipped(self, choice: Candidate) -> None:
        """Count a check that was due and not made."""
        self._add(choice, 2)

    def totals(self) -> tuple[int, int, int]:
        """Checks, breaches and checks left out of this layer."""
        return self._own.totals()

    def _add(self, choice: Candidate, which: int) -> None:
        # For good, and few: one for each candidate of a problem.
        of_process = _CHECKS.setdefault((self._device, self._problem, choice), _Checks())
        for checks in (self._own, of_process):
            checks.counters[which].add(1)


_CHECKS: dict[tuple[str, MoEProblem, Candidate], _Checks] = {}


def shadow_snapshot() -> tuple[ShadowSample, ...]:
    """What the shadow checks of all layers of the process have found so far, one sample a candidate."""
    return tuple(ShadowSample(*key, *checks.totals()) for key, checks in _CHECKS.copy().items())


def _after_fork_in_child() -> None:
    _PROCESS.renew_locks()
    for checks in _CHECKS.values():
        for counter in checks.counters:
            counter.renew_lock()


_PROCESS = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def snapshot() -> tuple[Sample, ...]:
    """What the process ran so far, layers and `fused_moe` together, one sample a label; counts never fall.

    Returns
    -------
    tuple of Sample
        Those with at least one call. Replays of CUDA graphs aren't counted: they run no Python.
    """
    return _PROCESS.snapshot()
