"""A sweep: plan, measure, append, until nothing more is worth it or the time is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...text import printable
from ..bench import record_fields
from ..records import BenchRecord, append_record
from ..workloads import Workload
from .plan import Job, Plan, Results, next_job
from .process import CandidateLost, Identity, Worker


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a sweep is when a workload begins.

    Attributes
    ----------
    workload
        The one that begins.
    number, most
        Of this workload, from 1; and how many there can be.
    left_s
        Seconds that the rest takes, by the mean of what is done and no more than the budget; ``None`` at the start.
    """

    workload: Workload
    number: int
    most: int
    left_s: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a sweep.

    Attributes
    ----------
    records
        All of the file, those of earlier runs among them.
    added
        How many of them this run measured.
    spent_s
        Seconds of all runs together.
    out_of_time
        Whether it ended because the budget was spent, with more to look at.
    """

    records: tuple[BenchRecord, ...]
    added: int
    spent_s: float
    out_of_time: bool


def spent_s(records: Sequence[BenchRecord]) -> float:
    """Seconds that measuring them took; each record has its own, so that this survives any end of a run.

    It counts making workloads ready and failures, not what a run did after its last record before it was killed.
    """
    return sum(record.seconds or 0.0 for record in records)


def sweep(
    plan: Plan,
    worker: Worker,
    identity: Identity,
    path: Path,
    records: Sequence[BenchRecord],
    *,
    budget_s: float,
    limit_s: float,
    retry: bool = False,
    on_workload: Callable[[Progress], None] = lambda progress: None,
    on_record: Callable[[BenchRecord], None] = lambda record: None,
) -> Outcome:
    """Measure what the plan still wants, and append each record to the file as it comes.

    Parameters
    ----------
    plan, worker
        What to measure, and who does.
    identity
        Of the worker: what stands in the records of candidates that give none themselves.
    path, records
        The file to append to, held by `journal.locked`, and what is in it.
    budget_s
        Seconds of all runs together. It ends the sweep between two T: a T that was begun is measured with all loads.
    limit_s
        Seconds that a candidate may take for one record, the compilation of its kernels included.
    retry
        Measure again what failed, hung or was refused in earlier runs.
    on_workload, on_record
        Called as a workload begins, and with each record that is on the disk.

    Raises
    ------
    SweepError
        Nothing can be measured.
    OSError
        The file can't be written.
    """
    kept = list(records)
    results = Results(record for record in records if not retry or record.status == "passed")
    spent, added, mark = spent_s(records), 0, time.monotonic()
    current: Workload | None = None

    def keep(record: BenchRecord) -> None:
        nonlocal spent, added, mark
        now = time.monotonic()
        record = record.model_copy(update={"seconds": round(now - mark, 3)})
        append_record(path, record)
        spent, added, mark = spent + now - mark, added + 1, now
        kept.append(record)
        results.add(record)
        on_record(record)

    while (job := next_job(plan, results)) is not None:
        if spent >= budget_s and job.workload.num_tokens not in results.begun(plan):
            return Outcome(tuple(kept), added, spent, out_of_time=True)
        if job.workload != current:
            current = job.workload
            number = results.order(current) + 1
            left = None if number == 1 else max(0.0, min(budget_s - spent, spent / (number - 1) * _left(plan, number)))
            on_workload(Progress(current, number, max(number, plan.most_workloads), left))
        missing = list(job.timings)
        try:
            for record in worker.measure(job, limit_s):
                keep(record)
                missing.remove(record.timing)  # type: ignore[arg-type]
        except CandidateLost as lost:
            for timing in missing:
                keep(_lost_record(plan, identity, job, timing, lost))
        else:
            # Else the plan would want the same again, for ever.
            assert not missing, f"{job} gave no record for {', '.join(missing)}"
    return Outcome(tuple(kept), added, spent, out_of_time=False)


def _left(plan: Plan, number: int) -> int:
    return max(1, plan.most_workloads - number + 1)


def _lost_record(plan: Plan, identity: Identity, job: Job, timing: str, lost: CandidateLost) -> BenchRecord:
    return BenchRecord(
        **record_fields(identity.device, plan.problem, job.workload, job.choice, identity.environment),
        timing=timing,  # type: ignore[arg-type]
        status="timeout" if lost.timeout else "failed",
        reason=printable(lost.reason),
        crashed=lost.crashed or None,
    )
