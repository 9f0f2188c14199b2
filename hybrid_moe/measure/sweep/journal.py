"""The file that a sweep writes: one sweep at a time, whole lines, one environment."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import platformdirs
from pydantic import ValidationError

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
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file beside it, as the file itself may be set aside meanwhile. It stays: to remove it would be a race.
    with open(path.with_name(f".{path.name}.lock"), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing {path}: wait until it ends, or write elsewhere with --records FILE "
                "(two at once on one GPU would spoil each other's timing)"
            ) from None
        yield


def mend(path: Path) -> str:
    """Cut off a last line that is half written, as a machine that went down leaves it; whole lines stay.

    Returns
    -------
    str
        For people: what was done; empty if nothing.
    """
    if not path.exists():
        return ""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    rest = content[whole:]
    if not rest:
        return ""
    try:
        BenchRecord.model_validate_json(rest)
    except ValidationError:
        with open(path, "r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
        return f"{path} ended in the middle of a line: cut off its last {len(rest)} bytes; that one is measured again"
    with open(path, "ab") as file:
        file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    return f"{path} lacked the newline after its last record: added"


def set_aside(path: Path) -> Path | None:
    """Give a file of records another name, with the time in it, and say which; ``None`` if there is no file."""
    if not path.exists():
        return None
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
            "write elsewhere with --records FILE, or begin anew with --fresh (the old file stays under another name)"
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
