"""The published results that the B200 policy is learned from: a markdown table of speedups over one reference.

They give the ratios between candidates at one workload, and nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..candidate import Candidate
from ..device import device_slug
from ..files import decode, read_whole
from ..policy.schema import LARGEST_COUNT, describe
from ..problem import problem_of_definition
from .records import BenchRecord, EnvironmentValue, RecordCorrectness, check_offset

# A table of results is for people to read.
_LARGEST = 16 * 2**20
# The columns of speedups, and the candidate that each of them measured.
COLUMNS: Mapping[str, Candidate] = {
    "flashinfer": Candidate("flashinfer_trtllm"),
    "triton_v2": Candidate("triton_fused", {"gemm": "sgl_kernel"}),
}
_Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
_Speedup = Annotated[
    str, Field(pattern=r"^[0-9]{1,20}(\.[0-9]{1,20})?x$"), AfterValidator(lambda text: float(text.removesuffix("x")))
]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    UUID: str
    T: _Count
    offset: _Count
    flashinfer: _Speedup
    triton_v2: _Speedup
    ratio: str | None = Field(default=None, alias="v2/fi")
    winner: str | None = None


def read_published(path: str | Path) -> tuple[list[BenchRecord], str]:
    """Read the table, and the SHA-256 of its file.

    Expected are the lines ``**GPU:**``, ``**Definition:**`` and ``**Tolerance:**``, the sentence ``All <n> workloads
    PASS``, and the table with the columns UUID, T, offset and `COLUMNS`.

    Raises
    ------
    ValueError
        Something of this is missing or wrong; the message names file and line.
    OSError
        The file can't be read.
    """
    content = read_whole(path, _LARGEST)
    if b"**GPU:**" not in content:
        raise ValueError(
            f"{path} holds neither benchmark records or traces of flashinfer-bench (JSON Lines) nor the published "
            "table (markdown with '**GPU:**')"
        )
    try:
        return _parse(Path(path), decode(content)), hashlib.sha256(content).hexdigest()
    except _TableError as error:
        raise ValueError(f"{path}{error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _TableError(ValueError):
    """Begins with the line that is wrong."""


def _parse(path: Path, text: str) -> list[BenchRecord]:
    gpu = _header(text, "GPU")
    if not (device := device_slug(gpu.partition("(")[0])):
        raise ValueError(f"expected a GPU's name in the line '**GPU:**', got {gpu!r}")
    definition = _header(text, "Definition").strip("`")
    problem = problem_of_definition(definition)
    environment: dict[str, EnvironmentValue] = {"benchmark": "flashinfer-bench"}
    if "**Config:**" in text:
        environment["benchmark_config"] = _header(text, "Config")
    date = re.search(r"^# .*?(\d{4}-\d{2}-\d{2})", text, re.MULTILINE)
    shared: dict[str, Any] = {
        "device": device,
        "problem": definition,
        "routing": "flashinfer_bench",
        "seed": 0,
        "status": "passed",
        "timing": "cupti",
        "correctness": _tolerance(_header(text, "Tolerance")),
        "environment": environment,
        "timestamp": date.group(1) if date else None,
    }
    records: list[BenchRecord] = []
    rows = _rows(text)
    for number, cells in rows:
        try:
            row = _Row.model_validate(cells)
            for column, choice in COLUMNS.items():
                record = BenchRecord(
                    **shared,
                    backend=choice.backend,
                    config=dict(choice.config),
                    num_tokens=row.T,
                    local_expert_offset=row.offset,
                    workload=row.UUID,
                    speedup_vs_reference=getattr(row, column),
                )
                check_offset(record, problem)
                record.set_place(str(path), number)
                records.append(record)
        except ValidationError as error:
            raise _TableError(f", line {number} is no row of results: {describe(error)}") from error
        except ValueError as error:
            raise _TableError(f", line {number}: {error}") from error
    # The gate: the table has speeds only, so the file must say that the answers were right.
    passed = re.search(r"All ([0-9]{1,9}) workloads PASS", text, re.IGNORECASE)
    if passed is None or int(passed.group(1)) != len(rows):
        found = f"'{passed.group(0)}'" if passed else "no such sentence"
        raise ValueError(
            f"expected 'All {len(rows)} workloads PASS', as no speed is kept for a wrong answer, got {found} and "
            f"{len(rows)} rows"
        )
    return records


def _rows(text: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of the first table, by the names of their columns, with the numbers of their lines."""
    lines = list(enumerate(text.split("\n"), start=1))
    start = next((number for number, line in lines if re.match(r"\| *UUID *\|", line)), None)
    if start is None:
        raise ValueError("expected a table of results that starts with a column UUID, got none")
    head, rows = _cells(lines[start - 1][1]), []
    for number, line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = _cells(line)
        if all(re.fullmatch(":?-+:?", cell) for cell in cells):
            continue
        if len(cells) != len(set(head)):
            raise _TableError(f", line {number}: expected {len(set(head))} cells, as in the head, got {len(cells)}")
        rows.append((number, dict(zip(head, cells, strict=True))))
    if not rows:
        raise ValueError("expected rows of results, got none")
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _header(text: str, name: str) -> str:
    found = re.search(rf"^\*\*{name}:\*\*[^\S\n]*(\S.*)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"expected a line '**{name}:** ...' before the table, got none")
    return found.group(1).strip()


def _tolerance(text: str) -> RecordCorrectness:
    found: dict[str, Any] = {
        name.replace("-", "_"): float(value)
        for name, value in re.findall(
            r"(?<![\w-])(rtol|atol|required-matched-ratio)=([0-9]{1,20}(?:\.[0-9]{1,20})?)\b", text
        )
    }
    missing = [name for name in ("rtol", "atol", "required_matched_ratio") if name not in found]
    if missing:
        raise ValueError(f"the tolerance '{text}' lacks {', '.join(missing).replace('_', '-')}")
    return RecordCorrectness(**found)
