"""What a data set of flashinfer-bench says besides its traces: the axes of a Definition, which its name leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import decode, parse_json, read_whole
from ..problem import sizes_of_definition

# How far above traces/<author>/<op_type>/<name>.jsonl the folder `definitions` of its data set may be.
_LEVELS = 4
# Axes whose size the name has too.
_NAMED = ("num_local_experts", "hidden_size", "intermediate_size")


def find_definition(traces: Path, name: str) -> Path | None:
    """The Definition of that name in the data set that a file of traces lies in; `None` if it lies in none."""
    sizes_of_definition(name)  # it becomes a path
    return next((path for path in _definitions(traces.absolute(), name) if path.is_file()), None)


def _definitions(traces: Path, name: str) -> Iterator[Path]:
    for folder in traces.parents[:_LEVELS]:
        for pattern in (f"{name}.json", f"*/{name}.json"):
            yield from sorted((folder / "definitions").glob(pattern))


def read_num_experts(path: Path) -> tuple[str, int]:
    """Name of a Definition, and the number of experts of the whole model that its axes say.

    Raises
    ------
    ValueError
        It is no Definition of such a layer, or its axes contradict its name; the message names the file.
    OSError
        It can't be read.
    """
    try:
        data = parse_json(decode(read_whole(path)))
    except ValueError as error:
        raise ValueError(f"Definition {path} {error}") from error
    name, axes = (data.get(key) if isinstance(data, dict) else None for key in ("name", "axes"))
    if not isinstance(name, str) or not isinstance(axes, dict):
        raise ValueError(f"{path} is no Definition of flashinfer-bench: expected an object with name and axes")
    try:
        sizes = sizes_of_definition(name)
    except ValueError as error:
        raise ValueError(f"Definition {path}: {error}") from error
    for axis in _NAMED:
        if axis in axes and _size(path, axes, axis) != sizes[axis]:
            raise ValueError(f"Definition {path} has {axis} = {_size(path, axes, axis)}; its name says {sizes[axis]}")
    return name, _size(path, axes, "num_experts")


def _size(path: Path, axes: dict[str, Any], name: str) -> int:
    axis = axes.get(name)
    value = axis.get("value") if isinstance(axis, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(f"Definition {path} has no axis {name} with a constant value above 0")
    return value
