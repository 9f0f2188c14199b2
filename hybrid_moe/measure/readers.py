"""Readers of the formats that benchmark records come in.

Our own runs are JSON Lines, one `BenchRecord` a line. Traces of flashinfer-bench are JSON Lines as well, see `traces`.
The results that the B200 policy is learned from are a table, see `published`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from ..files import Lines, parse_json
from ..flashinfer_bench.dataset import find_definition, read_num_experts
from ..flashinfer_bench.traces import is_trace, record_fields
from ..policy.schema import InputDigest, describe
from ..text import printable
from .published import read_published
from .records import (
    BenchRecord,
    EnvironmentValue,
    Measurement,
    MeasurementKey,
    RecordCorrectness,
    WorkloadKey,
    check_offset,
    problem_of_record,
)
from .workloads import num_experts_of

_T = TypeVar("_T")
_Numbered = Iterator[tuple[int, bytes]]


def shipped_records_dir() -> Path:
    """Where the records are that the shipped policies were learned from, as in ``benchmarks/`` of the repository."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_records"  # in a wheel
    return inside if inside.is_dir() else package.parent / "benchmarks"


def read_any(
    paths: Iterable[str | Path], solutions: Mapping[str, str] | None = None, experts: Experts | None = None
) -> list[BenchRecord]:
    """Read files of records, each by the reader that its content asks for.

    They are records or traces of flashinfer-bench in JSON Lines, or the published table.

    Parameters
    ----------
    paths
        Regular files; a byte order mark is passed over.
    solutions
        Which candidates the solutions of traces are, see `traces.candidate_of`.
    experts
        Where traces leave open of how many experts a model is.

    Raises
    ------
    ValueError
        A file is neither, or is wrong; the message names the file and, where there is one, the line.
    OSError
        A file can't be read.
    """
    return [record for path in paths for record in read_with_digest(path, solutions, experts)[0]]


def read_with_digest(
    path: str | Path, solutions: Mapping[str, str] | None = None, experts: Experts | None = None
) -> tuple[list[BenchRecord], InputDigest]:
    """The records of one file, and the digest of the very bytes that they were read from; else as `read_any`."""
    return _read(Path(path), solutions, experts, _Shared().record)


def read_measurements(
    path: str | Path, solutions: Mapping[str, str] | None = None, experts: Experts | None = None
) -> tuple[list[Measurement], InputDigest]:
    """As `read_with_digest`, with what may be compared of each record alone: for files of millions of them."""
    return _read(Path(path), solutions, experts, _Shared().measurement)


def _read(
    path: Path, solutions: Mapping[str, str] | None, experts: Experts | None, keep: Callable[[BenchRecord], _T]
) -> tuple[list[_T], InputDigest]:
    lines = Lines(path)
    numbered = iter(lines)
    first = next((item for item in numbered if item[1].strip()), None)
    if first is not None and not first[1].lstrip().startswith(b"{"):
        records, sha256 = read_published(path)
        kept = [keep(record) for record in records]
    else:
        numbered = itertools.chain([first] if first else [], numbered)
        with _uncollected():
            if first is not None and is_trace(first[1]):
                kept = [keep(r) for r in _parse_traces(path, numbered, solutions or {}, experts or Experts())]
            else:
                kept = [keep(r) for r in _parse_records(path, numbered, lines)]
        sha256 = lines.sha256
    # As a policy keeps the name: no folders, and nothing that a JSON file can't hold.
    name = printable(path.name).replace("\\", "_")
    return kept, InputDigest(name=name, sha256=sha256, records=len(kept))


def measured_keys(path: Path) -> set[MeasurementKey]:
    """What a file of records has measured already: nothing, if it isn't there yet."""
    return {record.key for record in read_records(path)} if path.exists() else set()


def read_records(path: str | Path) -> list[BenchRecord]:
    """Read records in JSON Lines; blank lines are skipped.

    Raises
    ------
    ValueError
        A line isn't a whole record; the message names file and line.
    OSError
        The file can't be read.
    """
    lines, shared = Lines(path), _Shared()
    with _uncollected():
        return [shared.record(record) for record in _parse_records(Path(path), iter(lines), lines)]


class Experts:
    """The number of experts of the whole model, which the definition names of traces leave out.

    What is given here counts, else the axes of a Definition (one given, or that of the data set that the traces lie
    in), else the models that are known here (`workloads.num_experts_of`).

    Parameters
    ----------
    num_experts
        Of every definition, or by definition name.
    definitions
        Files of Definitions.

    Raises
    ------
    ValueError
        One of the files is no Definition, or contradicts ``num_experts``.
    OSError
        One of them can't be read.
    """

    def __init__(self, num_experts: int | Mapping[str, int] | None = None, definitions: Iterable[Path] = ()) -> None:
        self._given = num_experts
        self._axes: dict[str, tuple[Path, int] | None] = {}
        for path in definitions:
            name, found = read_num_experts(path)
            self._axes[name] = path, found
        self._known: dict[tuple[Path, str], int | None] = {}

    def of(self, definition: str, traces: Path) -> int | None:
        """Those of the model that a definition in a file of traces is of; `None` if nothing says so."""
        key = traces.parent, definition
        if key not in self._known:
            self._known[key] = self._look_up(definition, traces)
        return self._known[key]

    def _look_up(self, definition: str, traces: Path) -> int | None:
        given = self._given if isinstance(self._given, int | None) else self._given.get(definition)
        axes = self._axes.get(definition)
        if axes is None and (path := find_definition(traces, definition)) is not None:
            axes = path, read_num_experts(path)[1]
        if axes is not None and given not in (None, axes[1]):
            raise ValueError(f"num_experts is {given}; the Definition {axes[0]} has {axes[1]}")
        if given is not None:
            return given
        return num_experts_of(definition) if axes is None else axes[1]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    # None of it is garbage, and looking for some takes longer than reading: three quarters of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse_traces(
    path: Path, lines: _Numbered, solutions: Mapping[str, str], experts: Experts
) -> Iterator[BenchRecord]:
    source, results, workloads = str(path), 0, 0
    for number, line in lines:
        if not line.strip():
            continue
        try:
            data = parse_json(line.decode())
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no trace of flashinfer-bench: {error}") from error
        try:
            fields = record_fields(data, solutions)
            if fields is None:  # a workload that was not run
                workloads += 1
                continue
            fields["num_experts"] = experts.of(fields["problem"], path)
            record = BenchRecord(**fields)
            if record.num_experts is not None:
                check_offset(record, problem_of_record(record))
        except ValidationError as error:
            raise ValueError(f"{path}, line {number} is no trace of flashinfer-bench: {describe(error)}") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        record.set_place(source, number)
        results += 1
        yield record
    if workloads and not results:
        raise ValueError(
            f"nothing in {path} was run: it has workloads ({workloads}) and no result. Expected traces, as "
            "flashinfer-bench writes them when it runs solutions on workloads"
        )


def _parse_records(path: Path, numbered: _Numbered, lines: Lines) -> Iterator[BenchRecord]:
    source = str(path)
    for number, line in numbered:
        if not lines.complete:
            raise ValueError(
                f"{path}, line {number} is cut short (no newline at its end), as by a run that was interrupted: "
                "delete that line"
            )
        if not line.strip():
            continue
        try:
            record = BenchRecord.model_validate_json(line)
            if _may_have_a_key_twice(line, record):
                parse_json(line.decode())
            if record.num_experts is not None:
                check_offset(record, problem_of_record(record))
        except ValidationError as error:
            raise ValueError(f"{path}, line {number} is no benchmark record: {describe(error)}") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no benchmark record: {error}") from error
        record.set_place(source, number)
        yield record


def _may_have_a_key_twice(line: bytes, record: BenchRecord) -> bool:
    """Whether a line has more keys than the record read from it; in doubt, yes.

    Of a key that is there twice the record has the last value alone. Reading every line again to find out would double
    the time; counting is cheap, and misled by strings that look like keys to the safe side only.
    """
    spaced = b" :" in line or b"\t:" in line or b"\r:" in line
    return spaced or line.count(b'":') != _keys(record)


def _keys(record: BenchRecord) -> int:
    found = len(record.config) + len(record.environment) + len(record.code or ())
    for model in (record, record.latency_us, record.correctness):
        if model is not None:
            found += len(model.model_fields_set)
            if model.model_extra:
                found += _keys_inside(list(model.model_extra.values()))
    return found


def _keys_inside(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_keys_inside, value.values()))
    return sum(map(_keys_inside, value)) if isinstance(value, list) else 0


class _Shared:
    """What many records have in common, kept once: most of the memory of a million records."""

    def __init__(self) -> None:
        self._environments: dict[object, dict[str, EnvironmentValue]] = {}
        self._sets: dict[frozenset[str], set[str]] = {}
        self._bounds: dict[object, RecordCorrectness] = {}
        self._workloads: dict[WorkloadKey, WorkloadKey] = {}

    def record(self, record: BenchRecord) -> BenchRecord:
        """The same record, with its parts from here."""
        record.__dict__["environment"] = self._environment(record.environment)
        for model in (record, record.latency_us, record.correctness):
            if model is not None:
                names = model.__pydantic_fields_set__
                object.__setattr__(model, "__pydantic_fields_set__", self._sets.setdefault(frozenset(names), names))
        return record

    def measurement(self, record: BenchRecord) -> Measurement:
        """What may be compared of a record."""
        passed, at = record.status == "passed", record.at
        return Measurement(
            device=sys.intern(record.device),
            problem=sys.intern(record.problem),
            num_experts=record.num_experts,
            gate_first=record.gate_first,
            solution=record.solution,
            choice=record.choice,
            is_peer=record.is_peer,
            at=self._workloads.setdefault(at, at),
            status=record.status,
            timing=record.timing,
            relative_time=record.relative_time if passed else math.nan,
            by_speedup=record.by_speedup,
            spread=record.spread if passed else None,
            correctness=self._bound(record.correctness),
            environment=self._environment(record.environment),
            timestamp=record.timestamp,
            place=record.place,
        )

    def _environment(self, environment: dict[str, EnvironmentValue]) -> dict[str, EnvironmentValue]:
        # With their types: 1, 1.0 and True are equal, but not the same.
        key = (*environment.items(), *map(type, environment.values()))
        return self._environments.setdefault(key, environment)

    def _bound(self, gate: RecordCorrectness | None) -> RecordCorrectness | None:
        if gate is None:
            return None
        bounds = (gate.rtol, gate.atol, gate.required_matched_ratio, gate.max_relative_l2, gate.rule)
        if bounds not in self._bounds:
            rtol, atol, ratio, l2, rule = bounds
            self._bounds[bounds] = RecordCorrectness(
                rtol=rtol, atol=atol, required_matched_ratio=ratio, max_relative_l2=l2, rule=rule
            )
        return self._bounds[bounds]
