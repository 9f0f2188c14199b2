"""Measure, learn, verify and install the policy of this machine's GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Any

from .. import backends
from ..candidate import Candidate
from ..files import POLICY, check_outputs, check_target
from ..measure.readers import read_with_digest
from ..measure.records import BenchRecord
from ..measure.sweep import journal
from ..measure.sweep import run as sweeping
from ..measure.sweep.plan import LOADS, Plan, Results, middle_rank
from ..measure.sweep.process import Bench, Identity, Worker
from ..measure.sweep.run import Progress
from ..measure.workloads import ROUTING_LOADS, RoutingLoad, Workload, make_routing
from ..policy.schema import LearnerOptions, Policy, PolicyError
from ..policy.select import NoBackendError
from ..policy.store import load_policy, policy_path, save_policy, user_policy_dir
from ..problem import MoEProblem
from .learner import learn
from .verify import Finding, silent, verify_policy


def candidates_of(names: Sequence[str] | None) -> list[Candidate]:
    """The candidates of that names, or every configuration worth measuring; ValueError for an unknown one.

    The reference isn't among them by itself: it can't be captured in a CUDA graph, and takes seconds at large T.
    """
    if not names:
        return [choice for choice in backends.candidates() if choice.backend != "torch_reference"]
    found: dict[Candidate, None] = {}
    for name in names:
        given = Candidate.parse(name)
        choice = backends.complete(given)
        # By their text: what is read from text has strings where the configuration may have numbers.
        known = {str(c): c for c in backends.candidates() if c.backend == choice.backend}
        wanted = known if not given.config else [str(choice)]
        for text in wanted:
            if text not in known:
                raise ValueError(f"candidate: expected one of {', '.join(known)}, got {name!r}")
            found[known[text]] = None
    return list(found)


def loads_of(
    problem: MoEProblem, wanted: Sequence[str] | None
) -> tuple[tuple[RoutingLoad, ...], dict[RoutingLoad, str]]:
    """The routing loads to measure, and the default ones that can't be made for this problem, with the reasons.

    Raises
    ------
    ValueError
        One that was asked for is unknown, or it or the uniform one can't be made.
    """
    left_out: dict[RoutingLoad, str] = {}
    for name in wanted or ():
        if name not in ROUTING_LOADS:
            raise ValueError(f"routing: expected one of {', '.join(ROUTING_LOADS)}, got {name!r}")
    loads: list[RoutingLoad] = [load for load in ROUTING_LOADS if load in (wanted or LOADS)]
    for load in loads:
        try:
            make_routing(Workload(8, middle_rank(problem), load), problem)
        except ValueError as error:
            if wanted or load == "uniform":
                raise
            left_out[load] = str(error)
    return tuple(load for load in loads if load not in left_out), left_out


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a regeneration.

    Attributes
    ----------
    policy, path
        What was learned, and the file that it is in.
    installed
        Whether that file is the one asked for; else it is next to the records.
    findings
        Of the verification.
    left_out
        Candidates that were refused or given up, and why.
    records, outcome
        The file of records, and what came of the measuring.
    """

    policy: Policy
    path: Path
    installed: bool
    findings: list[Finding]
    left_out: dict[Candidate, str]
    records: Path
    outcome: sweeping.Outcome

    @property
    def verified(self) -> bool:
        """Whether everything of the policy could be run here, and was right."""
        return all(finding.status == "verified" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "path": str(self.path),
            "installed": self.installed,
            "verified": self.verified,
            "findings": [asdict(finding) for finding in self.findings],
            "left_out": {str(choice): reason for choice, reason in self.left_out.items()},
            "records": str(self.records),
            "measured_now": self.outcome.added,
            "measured_in_all": len(self.outcome.records),
            "failures": [
                {"candidate": str(r.choice), "num_tokens": r.num_tokens, "routing": r.routing, "timing": r.timing}
                | {"status": r.status, "reason": r.reason}
                for r in failures_of(self.outcome.records)
            ],
            "seconds": round(self.outcome.spent_s, 1),
            "out_of_time": self.outcome.out_of_time,
            "policy": self.policy.model_dump(mode="json"),
        }


class Observer:
    """What is told of a regeneration as it goes; this one shows nothing."""

    def say(self, message: str) -> None:
        """Something that a person may want to know."""

    def warn(self, message: str) -> None:
        """Something that a person should know."""

    def sweep(
        self, before: Results, plan: Plan
    ) -> AbstractContextManager[tuple[Callable[[Progress], None], Callable[[BenchRecord], None]]]:
        """Around the sweep: what is called as a workload begins, and with each record."""
        return contextlib.nullcontext((lambda progress: None, lambda record: None))

    def verification(self, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """Around the verification, see `verify.Progress`."""
        return silent(total)


@dataclass(frozen=True, slots=True)
class Regeneration:
    """All of it, from the plan to the installed policy.

    Parameters
    ----------
    plan, options
        What to measure, and how to learn from it.
    budget_s, limit_s
        Seconds of measuring in all, and for one candidate at one workload; see `sweep.run.sweep`.
    records, output
        The files to write; by default among the user's own data.
    install
        Write the policy where it is looked up, or to ``output``.
    fresh, retry
        Set earlier records aside; measure again what didn't pass.
    """

    plan: Plan
    options: LearnerOptions
    budget_s: float
    limit_s: float
    records: Path | None = None
    output: Path | None = None
    install: bool = True
    fresh: bool = False
    retry: bool = False

    def perform(
        self, bench: Bench, context: SpawnContext | ForkContext | None = None, observer: Observer | None = None
    ) -> Result:
        """Measure with ``bench`` (see `sweep.process`), learn, verify, install; ``observer`` is told of it.

        Raises
        ------
        ValueError
            The records in the file were measured in other circumstances, another run writes it, or nothing can be
            learned from them.
        NoBackendError
            No candidate can run here.
        SweepError
            Nothing can be measured.
        """
        observer = observer or Observer()
        given = None if self.records is None else Path(os.path.realpath(self.records))
        if given is not None:
            journal.check(given, fresh=self.fresh)  # before anything is written next to it
        log = given or journal.user_records_dir() / "measuring"
        with Worker(bench, log.with_name(f"{log.name}.log"), context) as worker:
            identity = worker.identify()
            target = self._target(identity.device)  # before anything is measured: whether it can be written
            path = given or journal.default_path(identity.device, self.plan.problem)
            with journal.locked(path):
                outcome = self._measure(worker, identity, path, observer)
                worker.close()  # its memory is wanted for the verification
                return self._conclude(outcome, path, identity.device, target, observer)

    def _measure(self, worker: Worker, identity: Identity, path: Path, observer: Observer) -> sweeping.Outcome:
        if self.fresh and (aside := journal.set_aside(path)):
            observer.say(f"earlier records are now in {aside}")
        if mended := journal.mend(path):
            observer.warn(mended)
        records = journal.resume(path, identity, self.plan.problem)
        if records:
            observer.say(f"going on from {len(records)} records in {path}")
        before = Results() if self.retry else Results(records)
        with observer.sweep(before, self.plan) as (on_workload, on_record):
            return sweeping.sweep(
                self.plan,
                worker,
                identity,
                path,
                records,
                budget_s=self.budget_s,
                limit_s=self.limit_s,
                retry=self.retry,
                on_workload=on_workload,
                on_record=on_record,
            )

    def _conclude(self, outcome: sweeping.Outcome, path: Path, device: str, target: Path, observer: Observer) -> Result:
        """Learn, verify, install."""
        if not outcome.records:
            raise ValueError("nothing was measured, so there is nothing to learn from: give more --minutes")
        left_out = Results(outcome.records).left_out(self.plan.candidates)
        if len(left_out) == len(self.plan.candidates):
            lines = [f"  {choice}: {reason}" for choice, reason in left_out.items()]
            raise NoBackendError("\n".join([f"no candidate can run on {device}:", *lines]))
        policy = self._learn(path)
        # Kept before it is tried: if trying it ends this process, the file is there to look at.
        tried, failed, kept = _beside(path)
        save_policy(policy, tried)
        policy = load_policy(tried)
        findings = verify_policy(policy, observer.verification)
        installed = False
        if any(finding.status != "verified" for finding in findings):
            target = failed
            os.replace(tried, target)
        elif self.install:
            save_policy(policy, target)
            tried.unlink()
            installed = True
        else:
            target = kept
            os.replace(tried, target)
        return Result(policy, target, installed, findings, left_out, path, outcome)

    def _learn(self, path: Path) -> Policy:
        # From the file, not from memory: the same records give the same policy by `hybrid-moe learn`.
        records, digest = read_with_digest(path)
        used = [r for r in records if r.choice in self.plan.candidates and r.num_tokens <= max(self.plan.anchors)]
        try:
            return learn(used, self.options, problem=self.plan.problem, inputs=[digest])
        except ValueError as error:
            raise ValueError(
                f"{error}. The records are kept in {path}: --retry measures again what failed, and --max-tokens leaves "
                "larger T out"
            ) from error

    def _target(self, device: str) -> Path:
        """Where the policy goes; ValueError if something else is there."""
        path = self.output or policy_path(user_policy_dir(), device, self.plan.problem)
        check_outputs({"--output": path}, [self.records])
        for target in [*([path] if self.install else []), *(_beside(self.records) if self.records else [])]:
            check_target(target, POLICY)
        try:
            there = load_policy(path) if self.install and path.exists() else None
        except PolicyError:
            there = None  # of no use as it is: it is replaced
        if there is not None and (there.device, there.problem) != (device, self.plan.problem):
            raise ValueError(
                f"{path} has the policy of {there.device} for {there.problem}, which would be lost: name another file "
                "as --output"
            )
        return path


def _beside(records: Path) -> tuple[Path, Path, Path]:
    """Where a policy is kept next to its records: while it is tried, if that fails, and if it isn't to be installed."""
    ends = ("unverified", "failed-verification", "policy")
    tried, failed, kept = (records.with_name(f"{records.stem}.{end}.json") for end in ends)
    return tried, failed, kept


def failures_of(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """Those of candidates that gave a wrong answer, raised, crashed or hung."""
    return [record for record in records if record.status in ("failed", "timeout")]
