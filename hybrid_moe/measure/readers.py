"""Readers of the formats that benchmark records come in.

Our own runs are JSON Lines, one `BenchRecord` a line. Traces of flashinfer-bench are JSON Lines as well, see `traces`.
The B200 results that the first policy is learned from are a markdown table of speedups over one reference, which give
the ratios between backends at one workload.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..candidate import Candidate
from ..device import device_slug
from ..files import Lines, decode, parse_json, read_whole
from ..flashinfer_bench.dataset import find_definition, read_num_experts
from ..flashinfer_bench.traces import is_trace, record_fields
from ..policy.schema import InputDigest, describe
from ..problem import MoEProblem, problem_of_definition
from ..text import printable
from .records import (
    BenchRecord,
    EnvironmentValue,
    Measured,
    Measurement,
    RecordCorrectness,
    WorkloadKey,
    problem_of_record,
)
from .workloads import num_experts_of

# A table of results is for people to read.
_LARGEST_TABLE = 16 * 2**20

Numbered = Iterator[tuple[int, bytes]]


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
    path = Path(path)
    lines = Lines(path)
    numbered = iter(lines)
    first = next((item for item in numbered if item[1].strip()), None)
    if first is not None and first[1].lstrip()[:1] != b"{":
        return _read_table(path)
    with _uncollected():
        shared = _Shared()
        read = _records(path, lines, first, numbered, solutions or {}, experts or Experts())
        records = [shared.record(record) for record in read]
    return records, InputDigest(name=_name(path), sha256=lines.sha256, records=len(records))


def read_measurements(
    path: str | Path, solutions: Mapping[str, str] | None = None, experts: Experts | None = None
) -> tuple[list[Measurement], InputDigest]:
    """As `read_with_digest`, with what may be compared of each record alone: for files of millions of them."""
    path = Path(path)
    lines = Lines(path)
    numbered = iter(lines)
    first = next((item for item in numbered if item[1].strip()), None)
    shared = _Shared()
    if first is not None and first[1].lstrip()[:1] != b"{":
        records, digest = _read_table(path)
        return [shared.measurement(record) for record in records], digest
    with _uncollected():
        read = _records(path, lines, first, numbered, solutions or {}, experts or Experts())
        measurements = [shared.measurement(record) for record in read]
    return measurements, InputDigest(name=_name(path), sha256=lines.sha256, records=len(measurements))


def _records(
    path: Path,
    lines: Lines,
    first: tuple[int, bytes] | None,
    rest: Numbered,
    solutions: Mapping[str, str],
    experts: Experts,
) -> Iterator[BenchRecord]:
    if first is None:
        return iter(())
    numbered = itertools.chain([first], rest)
    if is_trace(first[1]):
        return _parse_traces(path, numbered, solutions, experts)
    return _parse_records(path, numbered, lines)


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


def _name(path: Path) -> str:
    """A file's name as a policy keeps it: no folders, and nothing that a JSON file can't hold."""
    return printable(path.name).replace("\\", "_")


def _parse_traces(path: Path, lines: Numbered, solutions: Mapping[str, str], experts: Experts) -> Iterator[BenchRecord]:
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


def check_offset(record: Measured, problem: MoEProblem) -> None:
    """Refuse a record at an offset that its problem can't have: then it is about another one."""
    last = problem.num_experts - problem.num_local_experts
    if record.local_expert_offset > last:
        raise ValueError(
            f"local_expert_offset is {record.local_expert_offset}; expected 0 to {last}, as "
            f"{problem.num_local_experts} of {problem.num_experts} experts are local: if the model has more, say how "
            "many as --num-experts"
        )


def _parse_records(path: Path, numbered: Numbered, lines: Lines) -> Iterator[BenchRecord]:
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
        bounds = (gate.rtol, gate.atol, gate.required_matched_ratio, gate.max_relative_l2)
        if bounds not in self._bounds:
            rtol, atol, ratio, l2 = bounds
            self._bounds[bounds] = RecordCorrectness(
                rtol=rtol, atol=atol, required_matched_ratio=ratio, max_relative_l2=l2
            )
        return self._bounds[bounds]


# The columns of speedups in the published table, and the candidate that each of them measured.
SEED_COLUMNS: Mapping[str, Candidate] = {
    "flashinfer": Candidate("flashinfer_trtllm"),
    "triton_v2": Candidate("triton_fused", {"gemm": "sgl_kernel"}),
}
_SEED_KEYS = ("UUID", "T", "offset")
_SEED_DERIVED = ("v2/fi", "winner")


def read_seed_table(path: str | Path) -> list[BenchRecord]:
    """Read the published markdown table of speedups over the reference.

    Wanted are the lines ``**GPU:**``, ``**Definition:**`` and ``**Tolerance:**``, the sentence ``All <n> workloads
    PASS``, and the table with the columns UUID, T, offset and those of `SEED_COLUMNS`.

    Raises
    ------
    ValueError
        Something of this is missing or wrong; the message names file and line.
    OSError
        The file can't be read.
    """
    return _read_table(Path(path), known=True)[0]


def _read_table(path: Path, known: bool = False) -> tuple[list[BenchRecord], InputDigest]:
    content = read_whole(path, _LARGEST_TABLE)
    if not known and b"**GPU:**" not in content:
        raise ValueError(
            f"{path} holds neither benchmark records or traces of flashinfer-bench (JSON Lines) nor the published "
            "table (markdown with '**GPU:**')"
        )
    try:
        text = decode(content)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    records = _parse_seed_table(path, text)
    return records, InputDigest(name=_name(path), sha256=hashlib.sha256(content).hexdigest(), records=len(records))


def _parse_seed_table(path: Path, text: str) -> list[BenchRecord]:
    device = device_slug(_header(path, text, "GPU").partition("(")[0])
    if not device:
        raise ValueError(f"{path} has the line '**GPU:** {_header(path, text, 'GPU')}'; expected a GPU's name in it")
    definition = _header(path, text, "Definition").strip("`")
    try:
        problem = problem_of_definition(definition)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    correctness = RecordCorrectness(**_seed_tolerance(path, _header(path, text, "Tolerance")))
    environment: dict[str, EnvironmentValue] = {"benchmark": "flashinfer-bench"}
    if "**Config:**" in text:
        environment["benchmark_config"] = _header(path, text, "Config")
    date = re.search(r"^# .*?(\d{4}-\d{2}-\d{2})", text, re.MULTILINE)

    records: list[BenchRecord] = []
    columns: list[str] | None = None
    rows = 0
    for number, line in enumerate(text.split("\n"), start=1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if columns is None:
            if cells[:1] == ["UUID"]:
                columns = cells
                _check_seed_columns(path, number, columns)
            continue
        if not cells:
            break
        if all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            continue
        if len(cells) != len(columns):
            raise ValueError(f"{path}, line {number} has {len(cells)} cells; {len(columns)} are wanted, as in the head")
        row = dict(zip(columns, cells, strict=True))
        rows += 1
        for column, choice in SEED_COLUMNS.items():
            fields = {
                "device": device,
                "problem": definition,
                "backend": choice.backend,
                "config": dict(choice.config),
                "num_tokens": _integer(path, number, "T", row["T"]),
                "local_expert_offset": _integer(path, number, "offset", row["offset"]),
                "routing": "flashinfer_bench",
                "seed": 0,
                "workload": row["UUID"],
                "status": "passed",
                "timing": "cupti",
                "speedup_vs_reference": _speedup(path, number, column, row[column]),
                "correctness": correctness,
                "environment": environment,
                "timestamp": date.group(1) if date else None,
            }
            try:
                record = BenchRecord.model_validate(fields)
                check_offset(record, problem)
            except ValidationError as error:
                raise ValueError(f"{path}, line {number} is no row of results: {describe(error)}") from error
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            record.set_place(str(path), number)
            records.append(record)
    if columns is None or not rows:
        raise ValueError(f"{path} has no table of results; one that starts with a column UUID is wanted")
    # The gate: the table has speeds only, so the file must say that the answers were right.
    passed = re.search(r"All ([0-9]{1,9}) workloads PASS", text, re.IGNORECASE)
    if passed is None or int(passed.group(1)) != rows:
        found = f"'{passed.group(0)}'" if passed else "no such sentence"
        raise ValueError(
            f"{path} has {rows} rows and {found}; 'All {rows} workloads PASS' is wanted, as no speed is kept for a "
            "wrong answer"
        )
    return records


def _header(path: Path, text: str, name: str) -> str:
    start = f"**{name}:**"
    for line in text.split("\n"):
        if line.startswith(start) and (said := line.removeprefix(start).strip()):
            return said
    raise ValueError(f"{path} has no line '{start} ...'; one is wanted before the table")


def _seed_tolerance(path: Path, text: str) -> dict[str, Any]:
    found = dict(re.findall(r"(?<![\w-])(rtol|atol|required-matched-ratio)=([0-9]{1,20}(?:\.[0-9]{1,20})?)\b", text))
    names = {"rtol": "rtol", "atol": "atol", "required-matched-ratio": "required_matched_ratio"}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} has the tolerance '{text}', which lacks {', '.join(missing)}")
    return {field: float(found[name]) for name, field in names.items()}


def _check_seed_columns(path: Path, number: int, columns: list[str]) -> None:
    wanted = [*_SEED_KEYS, *SEED_COLUMNS]
    missing = [name for name in wanted if name not in columns]
    unknown = [name for name in columns if name not in (*wanted, *_SEED_DERIVED)]
    if missing or unknown or len(set(columns)) != len(columns):
        raise ValueError(
            f"{path}, line {number} has the columns {', '.join(columns)}; {', '.join(wanted)} are wanted, "
            f"{' and '.join(_SEED_DERIVED)} are allowed"
        )


def _integer(path: Path, number: int, column: str, text: str) -> int:
    if re.fullmatch("[0-9]{1,15}", text) is None:
        raise ValueError(f"{path}, line {number} has {column} = {text!r:.99}; a whole number is wanted")
    return int(text)


def _speedup(path: Path, number: int, column: str, text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)x", text)
    if match is None or float(match.group(1)) <= 0:
        raise ValueError(f"{path}, line {number} has {column} = {text!r:.99}; a positive speedup as 31.24x is wanted")
    return float(match.group(1))
