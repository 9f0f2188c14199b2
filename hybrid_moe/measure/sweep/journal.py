"""The file that a sweep writes: one sweep at a time, whole lines, one environment."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from ... import files
from ...policy.schema import describe
from ...problem import MoEProblem
from ..bench import PACKAGES
from ..readers import read_records
from ..records import BenchRecord, problem_of_record
from .process import Identity


def user_records_dir() -> Path:
    """Where records measured on this machine are kept, unless told otherwise."""
    return platformdirs.user_data_path("hybrid_moe") / "records"


def default_path(device: str, problem: MoEProblem) -> Path:
    """Where the records of a device and a problem are kept, unless told otherwise."""
    return user_records_dir() / device / f"{problem.definition}.jsonl"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the right to write ``path``; the system gives it back however the process ends.

    Raises
    ------
    ValueError
        Another process holds it.
    """
    # A file next to it, as the file itself may be set aside meanwhile.
    with files.locked(path.with_name(f".{path.name}.lock")) as had:
        if not had:
            raise ValueError(
                f"another run is writing {path}: wait until it ends, or write elsewhere with --records FILE "
                "(two at once on one GPU would spoil each other's timing)"
            )
        yield


# How `append_record` begins every line. A policy's file may have the same first two fields.
_START, _SLUG, _NEXT = b'{"schema_version":1,"device":"', re.compile(rb"[a-z0-9_]*"), b'","problem":"'


def check(path: Path, *, fresh: bool = False) -> bytes:
    """Look whether a file may be gone on with, or set aside (``fresh``); changes nothing.

    Returns
    -------
    bytes
        What is left of a last line that is half written, or lacks its newline.

    Raises
    ------
    ValueError
        It isn't a file of records, or its last line isn't what is left of one.
    """
    if not path.exists():
        return b""
    lines = files.Lines(path)
    number, rest = 0, b""
    for number, line in lines:
        # The way out of a damaged file: it only has to begin as one of ours.
        if fresh and _begins_as_record(line):
            return b""
        if not lines.complete:
            rest = line
        elif line.strip():
            _parse(path, number, line)
    if rest and not _is_rest(rest, alone=number == 1):
        _parse(path, number, rest)
    return rest


def mend(path: Path) -> str:
    """Cut off a last line that is half written, as a machine that went down leaves it; whole lines stay.

    Returns
    -------
    str
        For people: what was done; empty if nothing.

    Raises
    ------
    ValueError
        As `check`; the file stays as it is.
    """
    rest = check(path)
    if not rest:
        return ""
    try:
        BenchRecord.model_validate_json(rest)
    except ValidationError:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - len(rest))
            os.fsync(file.fileno())
        return f"{path} ended in the middle of a line: cut off its last {len(rest)} bytes; that one is measured again"
    with open(path, "ab") as file:
        file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    return f"{path} lacked the newline after its last record: added"


def _parse(path: Path, number: int, line: bytes) -> None:
    try:
        BenchRecord.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(
            f"{path}, line {number} is no benchmark record ({describe(error, most=1)}); nothing was changed: name "
            "another file as --records, or delete that line"
        ) from error


def _is_rest(rest: bytes, alone: bool) -> bool:
    """Whether this can be left of a record: its beginning, with zeros for what wasn't on the disk yet.

    More is wanted where nothing before it (``alone``) says that the file is a journal.
    """
    rest = rest.rstrip(b"\0")
    if not (_begins_as_record(rest) if alone else not rest or rest.startswith(b"{")):
        return False
    with contextlib.suppress(ValueError):
        files.parse_json(files.decode(rest))
        return False  # a whole value, but no record
    return True


def _begins_as_record(text: bytes) -> bool:
    if not text.startswith(_START):
        return bool(text) and _START.startswith(text)
    slug = _SLUG.match(text, len(_START))
    assert slug is not None
    after = text[slug.end() :]
    return after.startswith(_NEXT) or _NEXT.startswith(after)


def set_aside(path: Path) -> Path | None:
    """Give a file of records another name, with the time in it, and say which; ``None`` if there is no file.

    Raises
    ------
    ValueError
        It isn't a file of records; it keeps its name.
    """
    if not path.exists():
        return None
    check(path, fresh=True)
    stem = f"{path.stem}.until-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    number, target = 1, path.with_name(stem + path.suffix)
    while target.exists():
        number += 1
        target = path.with_name(f"{stem}-{number}{path.suffix}")
    path.rename(target)
    return target


def resume(path: Path, identity: Identity, problem: MoEProblem) -> list[BenchRecord]:
    """The records to go on from; none if there is no file yet.

    Raises
    ------
    ValueError
        The file has a record of another device, problem or environment: they can't be compared. Or a line of it is no
        record.
    """
    if not path.exists():
        return []
    records = read_records(path)
    differences: dict[str, None] = {}
    for record in records:
        differences |= dict.fromkeys(_differences(record, identity, problem))
    if differences:
        raise ValueError(
            f"{path} was measured in other circumstances: {'; '.join(differences)}. Such times can't be compared: "
            "write elsewhere with --records FILE, or begin again with --fresh (the old file stays under another name)"
        )
    return records


def _differences(record: BenchRecord, identity: Identity, problem: MoEProblem) -> Iterator[str]:
    if record.device != identity.device:
        yield f"device {record.device}, here {identity.device}"
    if record.problem != problem.definition or problem_of_record(record) != problem:
        named = f"{record.problem}, num_experts={record.num_experts or 256}, gate_first={bool(record.gate_first)}"
        yield f"problem {named}, wanted {problem}"
    here: Mapping[str, object] = identity.environment
    for name in dict.fromkeys([*PACKAGES, *here]):
        if record.environment.get(name) != here.get(name):
            yield f"{name} {_shown(record.environment.get(name))}, here {_shown(here.get(name))}"


def _shown(value: object) -> str:
    return "not there" if value is None else str(value)
