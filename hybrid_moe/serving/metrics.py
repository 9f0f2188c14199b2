"""How often each backend ran, and for how many tokens: counters for a metrics exporter to read.

Counted in Python, when a call is made: the replay of a CUDA graph runs no Python and isn't counted, only its capture
is. Count replays where they are launched.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..candidate import Choice
from ..policy.schema import Interval
from ..policy.select import Source
from ..problem import MoEProblem

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
    choice: Choice
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


class Counter:
    """Calls and tokens of one label, exact whatever threads call at once.

    A call only appends to a deque, which is atomic; a lock at every call would cost it three times as much. What was
    appended is added up under the lock, once in many calls and when somebody asks.
    """

    __slots__ = ("_pending", "_limit", "_lock", "_calls", "_tokens")

    def __init__(self) -> None:
        self._pending: deque[int] = deque()
        self._limit = 1  # so that the first call is noticed
        self._lock = threading.Lock()
        self._calls = self._tokens = 0

    def add(self, tokens: int) -> bool:
        """Count a call of ``tokens``; whether it's the first, which is true exactly once."""
        pending = self._pending
        pending.append(tokens)
        return len(pending) >= self._limit and self._noticed()

    def totals(self) -> tuple[int, int]:
        """Calls and tokens so far."""
        with self._lock:
            self._add_up()
            return self._calls, self._tokens

    def _noticed(self) -> bool:
        with self._lock:
            first = self._limit == 1
            self._limit = _BATCH
            self._add_up()
        return first

    def _add_up(self) -> None:
        # No more than there are now: other threads go on appending.
        for _ in range(len(self._pending)):
            self._tokens += self._pending.popleft()
            self._calls += 1


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
    """All owners there are, and what is left of those that are gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: list[tuple[weakref.ref[Counters], dict[Label, Counter]]] = []
        self._gone: dict[Label, tuple[int, int]] = {}

    def join(self, owner: Counters, counters: dict[Label, Counter]) -> None:
        with self._lock:
            self._bury()
            self._owners.append((weakref.ref(owner), counters))

    def snapshot(self) -> tuple[Sample, ...]:
        with self._lock:
            self._bury()
            return _samples(_totals([counters for _, counters in self._owners], self._gone))

    def _bury(self) -> None:
        # Here and not in a callback of the reference, which could come while the lock is held.
        alive = []
        for owner, counters in self._owners:
            if owner() is None:
                self._gone = _totals([counters], self._gone)
            else:
                alive.append((owner, counters))
        self._owners = alive


def _totals(
    owners: Iterable[dict[Label, Counter]], start: Mapping[Label, tuple[int, int]] | None = None
) -> dict[Label, tuple[int, int]]:
    totals = dict(start or {})
    for counters in owners:
        for label, counter in list(counters.items()):
            calls, tokens = counter.totals()
            before = totals.get(label, (0, 0))
            totals[label] = before[0] + calls, before[1] + tokens
    return totals


def _samples(totals: Mapping[Label, tuple[int, int]]) -> tuple[Sample, ...]:
    return tuple(Sample(label, *counts) for label, counts in totals.items() if counts[0])


_PROCESS = _Process()


def snapshot() -> tuple[Sample, ...]:
    """What the process ran so far, layers and `fused_moe` together, one sample a label; counts never fall.

    Returns
    -------
    tuple of Sample
        Those with at least one call. Replays of CUDA graphs aren't counted: they run no Python.
    """
    return _PROCESS.snapshot()
