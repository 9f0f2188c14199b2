"""Ranks of a process group that choose alike: what each can run is exchanged once, and what one refuses none runs.

Ranks that choose differently still give right results, but wait for the slowest, and where scores are nearly equal they
may choose other experts for a token. `agree` and `together` are collectives: all ranks of the group call them, in the
same order. Neither is on the path of a call.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from ..backends import complete
from ..candidate import Candidate
from ..policy.select import DecisionTable, Refusals
from ..policy.store import digest_of
from ..policy.versions import installed_version, packages_of
from ..version import __version__
from .dispatch import Dispatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("hybrid_moe")

_T = TypeVar("_T")
_K = TypeVar("_K", bound=Hashable)


class RanksDifferError(RuntimeError):
    """The ranks of a group can't choose alike, or one of them failed; the message says which rank has what."""


@dataclass(frozen=True, slots=True)
class _Statement:
    """What one rank says of a layer.

    Attributes
    ----------
    terms
        What has to be the same on all ranks, by its name.
    policy
        Where the policy comes from, for people.
    versions
        Of the packages that what it can choose uses: another one is another speed.
    refusals
        Why candidates can't run on this rank.
    """

    terms: Mapping[str, str]
    policy: str
    versions: Mapping[str, str | None]
    refusals: Refusals


def agree(
    group: ProcessGroup, dispatch_without: Callable[[Refusals], Dispatch], terms: Mapping[str, object]
) -> tuple[Dispatch, Refusals]:
    """Choose what every rank can run.

    Parameters
    ----------
    group
        The ranks. Its backend may be any; gloo needs no device.
    dispatch_without
        Makes this rank's dispatch without candidates that are refused for the reasons given.
    terms
        What else has to be the same on all ranks: its name, and its value, compared as text.

    Returns
    -------
    dispatch
        Of this rank, with the same decisions as those of the others.
    elsewhere
        Why other ranks can't run a candidate: what it was made with.

    Raises
    ------
    RanksDifferError
        Policies, releases of this package or ``terms`` differ, or another rank raised.
    Exception
        What ``dispatch_without`` raises.
    """
    elsewhere: Refusals = {}
    known: frozenset[Candidate] = frozenset()
    made: list[Dispatch] = []

    def state() -> _Statement:
        made.append(dispatch_without(elsewhere))
        return _statement(made[-1].table, elsewhere, terms)

    while True:
        said = together(group, state)
        _refuse_difference(group, said)
        refused = frozenset[Candidate]().union(*(statement.refusals for statement in said))
        # Each rank has decided without its own refusals and those known before: are these all that there are?
        if all(refused <= known | statement.refusals.keys() for statement in said):
            _warn_of_versions(group, said)
            return made[-1], elsewhere
        known, elsewhere = refused, _refused_elsewhere(group, said)


def together(group: ProcessGroup, call: Callable[[], _T]) -> list[_T]:
    """What ``call`` gives on each rank of the group.

    Raises
    ------
    RanksDifferError
        It raised on another rank; on that one, what it raised.
    """
    failure: Exception | None = None
    own: tuple[_T | None, str | None]
    try:
        own = call(), None
    except Exception as error:  # whatever it is: the others would wait for this rank
        failure, own = error, (None, f"{type(error).__name__}: {error}")
    results = [own] * group.size()
    dist.all_gather_object(results, own, group=group)
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {error}" for rank, (_, error) in zip(_ranks(group), results, strict=True) if error]
    if failed:
        raise RanksDifferError("expected all ranks to go on, but these raised:\n  " + "\n  ".join(failed))
    return [result for result, _ in results]  # type: ignore[misc]  # without an error each has one


def _statement(table: DecisionTable, elsewhere: Refusals, terms: Mapping[str, object]) -> _Statement:
    own = {
        complete(candidate): kept
        for candidate, reasons in table.refusals.items()
        if (kept := tuple(reason for reason in reasons if reason not in elsewhere.get(complete(candidate), ())))
    }
    packages = sorted({package for choice in table.choices for package in packages_of(choice)})
    return _Statement(
        {
            "hybrid-moe": __version__,
            "policy": "none" if table.policy is None else digest_of(table.policy),
            **{name: str(value) for name, value in terms.items()},
        },
        table.where,
        {package: installed_version(package) for package in packages},
        own,
    )


def _refused_elsewhere(group: ProcessGroup, said: Sequence[_Statement]) -> Refusals:
    """What other ranks refuse and this one doesn't."""
    own = said[group.rank()].refusals
    others = frozenset[Candidate]().union(*(statement.refusals for statement in said)) - own.keys()
    found = {}
    for candidate in others:
        ranks = _by_value(group, ["; ".join(statement.refusals.get(candidate, ())) for statement in said])
        found[candidate] = tuple(f"{_named(of)}: {reasons}" for reasons, of in ranks.items() if reasons)
    return found


def _refuse_difference(group: ProcessGroup, said: Sequence[_Statement]) -> None:
    differ = []
    for name in said[0].terms:
        ranks = _by_value(group, [statement.terms[name] for statement in said])
        if len(ranks) > 1:
            where = {statement.terms[name]: f" ({statement.policy})" for statement in said} if name == "policy" else {}
            found = "; ".join(f"{value}{where.get(value, '')} on {_named(of)}" for value, of in ranks.items())
            differ.append(f"{name}: {found}")
    if differ:
        raise RanksDifferError(
            "expected ranks that are alike, so that all of them choose the same; they differ in\n  "
            + "\n  ".join(differ)
        )


def _warn_of_versions(group: ProcessGroup, said: Sequence[_Statement]) -> None:
    for package in sorted({package for statement in said for package in statement.versions}):
        ranks = _by_value(group, [statement.versions.get(package) for statement in said])
        if len(ranks) > 1:
            found = "; ".join(f"{version or 'unknown'} on {_named(of)}" for version, of in ranks.items())
            logger.warning("ranks run the same candidates under several versions of %s: %s", package, found)


def _by_value(group: ProcessGroup, values: Sequence[_K]) -> dict[_K, list[int]]:
    ranks: dict[_K, list[int]] = defaultdict(list)
    for rank, value in zip(_ranks(group), values, strict=True):
        ranks[value].append(rank)
    return ranks


def _ranks(group: ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _named(ranks: Sequence[int]) -> str:
    first = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {first}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
