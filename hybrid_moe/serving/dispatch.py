"""What a problem runs on a device at every number of tokens: prepared, counted, and logged when it is first chosen.

The logger is ``hybrid_moe``: one INFO record for the first decision of each regime of a problem, with the fields of
`Decision.to_dict` but the evidence, and ``device`` and ``problem``, as attributes of the record (``extra=``). As counts
are, it is made when a call is: the replay of a CUDA graph says nothing.
"""

from __future__ import annotations

import functools
import logging
from bisect import bisect_right
from pathlib import Path

from .. import backends
from ..backends.base import Runner
from ..candidate import BackendUnsupportedError, Candidate
from ..device import DeviceKey
from ..policy.schema import Policy
from ..policy.select import Decision, DecisionTable, explicit
from ..problem import MoEProblem
from .chunks import bounded
from .metrics import Counter, Counters, Label

logger = logging.getLogger("hybrid_moe")


class Dispatch:
    """The runner for every T, with the decision behind it, in ``table``.

    Unchanging but for its counts: a layer takes another policy by changing its one reference to this.

    Parameters
    ----------
    problem, device
        What is computed, and where.
    decider
        The decisions of a policy, or the choice that the caller named.
    counters
        Where calls are counted.
    policy
        What the decisions were asked of, as the caller gave it.
    routed
        The experts are chosen before the call.
    max_workspace_bytes
        Most that a call takes next to inputs and output: calls that would take more run in chunks of tokens.

    Raises
    ------
    BackendUnsupportedError
        A choice can't run here.
    ValueError
        One token takes more than the bound.
    """

    __slots__ = ("backend", "policy", "starts", "table", "_labels", "_runners", "_counters", "_owner")

    def __init__(
        self,
        problem: MoEProblem,
        device: DeviceKey,
        decider: DecisionTable | Candidate,
        counters: Counters,
        policy: Policy | str | Path | None = None,
        routed: bool = False,
        max_workspace_bytes: int | None = None,
    ) -> None:
        self.backend = decider if isinstance(decider, Candidate) else None
        self.policy = policy
        if isinstance(decider, Candidate):
            decider = DecisionTable([0], [explicit(decider, 0)])
        self.table = decider
        self.starts = decider.starts  # the decision changes at these T alone
        if routed:
            for choice in decider.choices:
                if reasons := backends.routed_reasons(problem, choice):
                    others = backends.not_supported_reasons(problem, device, choice)
                    raise BackendUnsupportedError(choice, [*others, *reasons])
        self._labels = [Label(device.name, problem, d.choice, d.regime, d.source) for d in decider.decisions]
        self._runners = [backends.prepare(problem, device, decision.choice) for decision in decider.decisions]
        if max_workspace_bytes is not None:
            self._runners = [bounded(runner, problem, max_workspace_bytes) for runner in self._runners]
        self._counters: list[Counter] = [counters.of(label) for label in self._labels]
        self._owner = counters  # whose counts are kept as gone when nobody can call any more

    def counted(self, num_tokens: int) -> Runner:
        """The runner for a call at ``num_tokens``, at least 1, which is counted, and logged if it is a first one.

        Call it with no lock held: a log handler may do anything.
        """
        # All that is done here is added to every call.
        at = bisect_right(self.starts, num_tokens) - 1
        if self._counters[at].add(num_tokens):
            _announce(self._labels[at], self.table.decision(num_tokens))
        return self._runners[at]

    def runner(self, num_tokens: int) -> Runner:
        """What `counted` returns, uncounted."""
        return self._runners[bisect_right(self.starts, num_tokens) - 1]

    def reserved_bytes(self, max_num_tokens: int) -> int:
        """The most that any call up to ``max_num_tokens`` takes from the memory that it is given."""
        ends = [*self.starts[1:], max_num_tokens + 1]
        return max(
            (
                _most_reserved(runner, max(start, 1), min(end - 1, max_num_tokens))
                for runner, start, end in zip(self._runners, self.starts, ends, strict=True)
                if max(start, 1) <= min(end - 1, max_num_tokens)
            ),
            default=0,
        )

    def choice(self, num_tokens: int) -> Candidate:
        """What runs at ``num_tokens``; ValueError if that is no integer of at least 0."""
        return self.table.choice(num_tokens)

    def decision(self, num_tokens: int) -> Decision:
        """What runs at ``num_tokens``, and why; ValueError as `choice`."""
        return self.table.decision(num_tokens)


@functools.lru_cache(maxsize=256)  # layers are alike
def _most_reserved(runner: Runner, first: int, last: int) -> int:
    return runner.most_reserved_bytes(first, last)


class _Announced:
    """What the process's log has said: a model's layers are alike, and their first decisions too."""

    def __init__(self) -> None:
        self._labels: dict[Label, object] = {}

    def is_new(self, label: Label) -> bool:
        """True for one caller of each label."""
        mine = object()
        return self._labels.setdefault(label, mine) is mine

    def forget(self) -> None:
        self._labels.clear()


_ANNOUNCED = _Announced()


def _announce(label: Label, decision: Decision) -> None:
    if not logger.isEnabledFor(logging.INFO) or not _ANNOUNCED.is_new(label):
        return
    fields = decision.to_dict()
    del fields["evidence"]
    fields |= {"device": label.device, "problem": label.problem.definition}
    logger.info(
        "T = %d on %s runs %s: %s",
        decision.num_tokens,
        label.device,
        decision.choice,
        decision.reasons[-1],
        extra=fields,
    )
