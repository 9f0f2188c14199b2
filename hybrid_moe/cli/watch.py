"""Shows a sweep as it goes, with the time that is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from ..candidate import Candidate
from ..measure.records import BenchRecord
from ..measure.sweep.plan import Plan, Results
from ..measure.sweep.run import Progress
from ..measure.workloads import Workload
from .common import err


@contextlib.contextmanager
def watching(before: Results, plan: Plan) -> Iterator[tuple[Callable[[Progress], None], Callable[[BenchRecord], None]]]:
    """A bar on stderr if that is a terminal, else a line for each workload; failures are told in both."""
    for choice, reason in before.left_out(plan.candidates).items():
        err.print(f"left out: {escape(f'{choice}: {reason}')}", style="yellow", soft_wrap=True)
    lines = _Lines()
    if not err.is_terminal:
        yield lines.workload, lines.record
        lines.flush()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("starting", total=plan.most_workloads, left="")

        def workload(progress: Progress) -> None:
            bar.update(
                task,
                description=_named(progress.workload),
                completed=progress.number - 1,
                total=progress.most,
                left=_left(progress),
            )

        def record(record: BenchRecord) -> None:
            if record.status != "passed":
                what = f"{record.choice} at T = {record.num_tokens} {record.routing}, {record.timing}"
                bar.console.print(escape(f"{what}: {record.status}: {record.reason}"), style="yellow", soft_wrap=True)

        yield workload, record


@dataclass(slots=True)
class _Lines:
    """One line a workload, printed when the next begins."""

    _progress: Progress | None = None
    _records: list[BenchRecord] = field(default_factory=list)

    def workload(self, progress: Progress) -> None:
        self.flush()
        self._progress = progress

    def record(self, record: BenchRecord) -> None:
        self._records.append(record)

    def flush(self) -> None:
        progress, records = self._progress, self._records
        self._progress, self._records = None, []
        if progress is None:
            return
        parts: dict[Candidate, list[str]] = {}
        for record in records:
            text = (
                f"{record.latency_us.median:.1f} us {record.timing}"
                if record.latency_us
                else f"{record.status} ({record.reason})"
            )
            if text not in parts.setdefault(record.choice, []):
                parts[record.choice].append(text)
        said = "; ".join(f"{choice} {', '.join(texts)}" for choice, texts in parts.items())
        left = f" [{_left(progress)}]" if _left(progress) else ""
        err.print(
            escape(f"{progress.number}/{progress.most} {_named(progress.workload)}: {said}{left}"), soft_wrap=True
        )


def _named(workload: Workload) -> str:
    return f"T = {workload.num_tokens} {workload.routing}"


def _left(progress: Progress) -> str:
    if progress.left_s is None:
        return ""
    if progress.left_s < 90:
        return f"about {progress.left_s:.0f} s left"
    return f"about {progress.left_s / 60:.0f} min left"
