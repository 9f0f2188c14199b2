"""Benchmark records: what one of them says, and the readers of the formats that they come in.

Our own runs are JSON Lines, one `BenchRecord` a line. Traces of flashinfer-bench are JSON Lines as well, see `traces`.
The B200 results that the first policy is learned from are a markdown table of speedups over one reference, which give
the ratios between backends at one workload.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..candidate import PEER_PREFIX, Choice, ConfigValue
from ..flashinfer_bench.traces import is_trace, record_fields
from ..policy.schema import SLUG, InputDigest, Timing, describe
from ..problem import MoEProblem, device_slug, problem_of_definition

Status = Literal["passed", "failed", "unsupported", "timeout"]
EnvironmentValue = str | int | float | bool | None

_Positive = Annotated[float, Field(gt=0)]
# A result that isn't finite has figures that JSON can't hold: they are left out, and the reason says why.
_Figure = Annotated[
    float | None, BeforeValidator(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
]


class _Model(BaseModel):
    # extra="allow": others may add fields, the names of these stay.
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Latency(_Model):
    """Latency of one call in microseconds: median and percentiles over ``runs`` timed calls."""

    median: _Positive
    p10: _Positive | None = None
    p90: _Positive | None = None
    runs: int | None = Field(default=None, ge=1)


class RecordCorrectness(_Model):
    """The figures of the correctness gate and the bounds that were applied; ``None`` where it isn't known."""

    relative_l2: _Figure = None
    cosine: _Figure = None
    matched_ratio: _Figure = None
    max_abs_error: _Figure = None
    rtol: float | None = None
    atol: float | None = None
    required_matched_ratio: float | None = None
    max_relative_l2: float | None = None


class BenchRecord(_Model):
    """One candidate on one workload.

    Attributes
    ----------
    device
        Slug of the device's product name.
    problem
        Definition name.
    backend, config
        The candidate. ``peer:<name>`` is a pipeline that isn't one of ours: kept for comparison, never learned from.
    num_tokens, local_expert_offset, routing, seed, workload
        The workload; ``workload`` is its id where it comes from a set that has them.
    solution
        What the candidate is called in a trace of flashinfer-bench; ``None`` if the record is from no trace.
    num_experts, gate_first
        Of the problem, as the definition name leaves them out; 256 and ``False`` if ``None``.
    local_rows, active_experts
        (token, local expert) pairs, and local experts that got any; ``None`` where it isn't known.
    status, reason
        What came of it; the reason is wanted for all but ``passed``.
    timing
        How it was, or would have been, timed.
    latency_us, speedup_vs_reference
        Exactly one of them if passed: no speed is kept for a wrong answer.
    floor_us
        Least time in microseconds that the device's bandwidth and arithmetic allow.
    correctness, environment, timestamp
        The gate's figures, versions and measured device rates, and ISO 8601 time.
    """

    schema_version: Literal[1] = 1
    device: str = Field(pattern=SLUG)
    problem: str = Field(min_length=1)
    backend: str = Field(min_length=1)
    config: dict[str, ConfigValue] = {}
    num_tokens: int = Field(ge=1)
    local_expert_offset: int = Field(ge=0)
    routing: str
    seed: int
    workload: str | None = None
    solution: str | None = None
    num_experts: int | None = Field(default=None, ge=1)
    gate_first: bool | None = None
    local_rows: int | None = Field(default=None, ge=0)
    active_experts: int | None = Field(default=None, ge=0)
    status: Status
    reason: str | None = None
    timing: Timing
    latency_us: Latency | None = None
    speedup_vs_reference: _Positive | None = None
    floor_us: float | None = Field(default=None, ge=0)
    correctness: RecordCorrectness | None = None
    environment: dict[str, EnvironmentValue] = {}
    timestamp: str | None = None

    @model_validator(mode="after")
    def _speed_only_if_right(self) -> BenchRecord:
        speeds = [name for name in ("latency_us", "speedup_vs_reference") if getattr(self, name) is not None]
        if self.status == "passed" and len(speeds) != 1:
            raise ValueError(
                f"a passed record has {' and '.join(speeds) or 'neither latency_us nor speedup_vs_reference'}; "
                "exactly one of the two is wanted"
            )
        if self.status != "passed" and speeds:
            raise ValueError(f"a record that {self.status} has {' and '.join(speeds)}; no speed is kept for it")
        if self.status != "passed" and not self.reason:
            raise ValueError(f"a record that {self.status} has no reason; one is wanted")
        return self

    @property
    def choice(self) -> Choice:
        """The candidate."""
        return Choice(self.backend, self.config)

    @property
    def is_peer(self) -> bool:
        """Whether it is of a pipeline that isn't one of ours."""
        return self.backend.startswith(PEER_PREFIX)

    @property
    def relative_time(self) -> float:
        """Median latency in us of a passed record, or else the inverse of its speedup: the same but for a factor."""
        if self.latency_us is not None:
            return self.latency_us.median
        if self.speedup_vs_reference is None:
            raise ValueError(f"a record that {self.status} has no time")
        return 1.0 / self.speedup_vs_reference

    @property
    def spread(self) -> float | None:
        """Measured noise: half of p90 - p10, as a share of the median; ``None`` where it wasn't measured."""
        latency = self.latency_us
        if latency is None or latency.p10 is None or latency.p90 is None:
            return None
        return max(0.0, latency.p90 - latency.p10) / (2 * latency.median)

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured and how: two records with one key are two measurements of the same. Hashable."""
        config = tuple(sorted(self.config.items()))
        workload = (self.num_tokens, self.local_expert_offset, self.routing, self.seed)
        problem = (self.problem, self.num_experts or 256, bool(self.gate_first))
        return (self.device, *problem, self.backend, config, *workload, self.timing)


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


def append_record(path: str | Path, record: BenchRecord) -> None:
    """Add one line to a file of records, in one write, and wait until it is on the disk; makes missing folders.

    Raises
    ------
    ValueError
        The file ends in the middle of a line: what is added would be lost with it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = record.model_dump_json(exclude_none=True).encode() + b"\n"
    # Unbuffered: one write is one line, so that runs which share a file don't mix theirs.
    with open(path, "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                raise ValueError(f"{path} ends in the middle of a line: delete its last line first")
        written = file.write(line)
        if written != len(line):
            raise OSError(f"{path} took {written} of {len(line)} bytes; is the disk full?")
        os.fsync(file.fileno())


# The columns of speedups in the published table, and the candidate that each of them measured.
SEED_COLUMNS: Mapping[str, Choice] = {
    "flashinfer": Choice("flashinfer_trtllm"),
    "triton_v2": Choice("triton_fused", {"gemm": "sgl_kernel"}),
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


def problem_of_record(record: BenchRecord, *, num_experts: int = 256, gate_first: bool = False) -> MoEProblem:
    """The problem that a record is about; the keyword arguments hold where the record itself doesn't say."""
    return problem_of_definition(
        record.problem,
        num_experts=num_experts if record.num_experts is None else record.num_experts,
        gate_first=gate_first if record.gate_first is None else record.gate_first,
    )
