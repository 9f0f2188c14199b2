"""Readers of the formats that benchmark records come in.

Our own runs are JSON Lines, one `BenchRecord` a line. Traces of flashinfer-bench are JSON Lines as well, see `traces`.
The B200 results that the first policy is learned from are a markdown table of speedups over one reference, which give
the ratios between backends at one workload.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..candidate import Candidate
from ..device import device_slug
from ..flashinfer_bench.traces import is_trace, record_fields
from ..policy.schema import InputDigest, describe
from ..problem import problem_of_definition
from .records import BenchRecord, EnvironmentValue, RecordCorrectness


def shipped_records_dir() -> Path:
    """Where the records are that the shipped policies were learned from, as in ``benchmarks/`` of the repository."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_records"  # in a wheel
    return inside if inside.is_dir() else package.parent / "benchmarks"


def read_any(paths: Iterable[str | Path], solutions: Mapping[str, str] | None = None) -> list[BenchRecord]:
    """Read files of records, each by the reader that its content asks for.

    They are records or traces of flashinfer-bench in JSON Lines, or the published table. ``solutions`` says which
    candidates the solutions of traces are, see `traces.candidate_of`.

    Raises
    ------
    ValueError
        A file is neither, or is wrong.
    OSError
        A file can't be read.
    """
    return [record for path in paths for record in read_with_digest(path, solutions)[0]]


def read_with_digest(
    path: str | Path, solutions: Mapping[str, str] | None = None
) -> tuple[list[BenchRecord], InputDigest]:
    """The records of one file, and the digest of the very bytes that they were read from; else as `read_any`."""
    path = Path(path)
    content = path.read_bytes()
    start = content.lstrip()[:1]
    if start == b"{" or not start:
        first = content.lstrip().split(b"\n", 1)[0]
        records = _parse_traces(path, content, solutions or {}) if is_trace(first) else _parse_records(path, content)
    elif b"**GPU:**" in content:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} can't be read as UTF-8: {error}") from error
        records = _parse_seed_table(path, text)
    else:
        raise ValueError(
            f"{path} holds neither benchmark records or traces of flashinfer-bench (JSON Lines) nor the published "
            "table (markdown with '**GPU:**')"
        )
    return records, InputDigest(name=path.name, sha256=hashlib.sha256(content).hexdigest(), records=len(records))


def read_records(path: str | Path) -> list[BenchRecord]:
    """Read records in JSON Lines; blank lines are skipped.

    Raises
    ------
    ValueError
        A line isn't a whole record; the message names file and line.
    OSError
        The file can't be read.
    """
    return _parse_records(Path(path), Path(path).read_bytes())


def _parse_traces(path: Path, content: bytes, solutions: Mapping[str, str]) -> list[BenchRecord]:
    records = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = record_fields(line, solutions)
            if fields is not None:  # a workload that was not run
                records.append(BenchRecord(**fields))
        except ValidationError as error:
            raise ValueError(f"{path}, line {number} is no trace of flashinfer-bench: {describe(error)}") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def _parse_records(path: Path, content: bytes) -> list[BenchRecord]:
    if content and not content.endswith(b"\n"):
        last = content.count(b"\n") + 1
        raise ValueError(
            f"{path}, line {last} is cut short (no newline at its end), as by a run that was interrupted: "
            "delete that line"
        )
    records = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(BenchRecord.model_validate_json(line))
        except ValidationError as error:
            raise ValueError(f"{path}, line {number} is no benchmark record: {describe(error)}") from error
    return records


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
    return _parse_seed_table(Path(path), Path(path).read_text(encoding="utf-8"))


def _parse_seed_table(path: Path, text: str) -> list[BenchRecord]:
    gpu = re.sub(r"\s*\(.*\)\s*$", "", _header(path, text, "GPU"))
    definition = _header(path, text, "Definition").strip("`")
    problem_of_definition(definition)
    correctness = RecordCorrectness(**_seed_tolerance(path, _header(path, text, "Tolerance")))
    environment: dict[str, EnvironmentValue] = {"benchmark": "flashinfer-bench"}
    if "**Config:**" in text:
        environment["benchmark_config"] = _header(path, text, "Config")
    date = re.search(r"^# .*?(\d{4}-\d{2}-\d{2})", text, re.MULTILINE)

    records: list[BenchRecord] = []
    columns: list[str] | None = None
    rows = 0
    for number, line in enumerate(text.splitlines(), start=1):
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
            records.append(
                BenchRecord(
                    device=device_slug(gpu),
                    problem=definition,
                    backend=choice.backend,
                    config=dict(choice.config),
                    num_tokens=_integer(path, number, "T", row["T"]),
                    local_expert_offset=_integer(path, number, "offset", row["offset"]),
                    routing="flashinfer_bench",
                    seed=0,
                    workload=row["UUID"],
                    status="passed",
                    timing="cupti",
                    speedup_vs_reference=_speedup(path, number, column, row[column]),
                    correctness=correctness,
                    environment=environment,
                    timestamp=date.group(1) if date else None,
                )
            )
    if columns is None or not rows:
        raise ValueError(f"{path} has no table of results; one that starts with a column UUID is wanted")
    # The gate: the table has speeds only, so the file must say that the answers were right.
    passed = re.search(r"All (\d+) workloads PASS", text, re.IGNORECASE)
    if passed is None or int(passed.group(1)) != rows:
        found = f"'{passed.group(0)}'" if passed else "no such sentence"
        raise ValueError(
            f"{path} has {rows} rows and {found}; 'All {rows} workloads PASS' is wanted, as no speed is kept for a "
            "wrong answer"
        )
    return records


def _header(path: Path, text: str, name: str) -> str:
    match = re.search(rf"^\*\*{name}:\*\*\s*(\S.*?)\s*$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"{path} has no line '**{name}:** ...'; one is wanted before the table")
    return match.group(1)


def _seed_tolerance(path: Path, text: str) -> dict[str, Any]:
    found = dict(re.findall(r"([\w-]+)=([0-9.]+)", text))
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
    if not text.isdecimal():
        raise ValueError(f"{path}, line {number} has {column} = {text!r}; a whole number is wanted")
    return int(text)


def _speedup(path: Path, number: int, column: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x", text)
    if match is None or float(match.group(1)) <= 0:
        raise ValueError(f"{path}, line {number} has {column} = {text!r}; a positive speedup as 31.24x is wanted")
    return float(match.group(1))
