"""What the commands share: consoles, options, errors shown, JSON and progress."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from ..device import DeviceKey, device_slug
from ..policy import resolve
from ..policy.schema import Policy
from ..policy.store import find_policy, how_to_make_one, known_policies, load_policy
from ..problem import MoEProblem
from ..text import printable, printable_json


class PrintableConsole(Console):
    """A console on which text that came from a file can't move the cursor, hide what was printed, or fail to encode."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As ``Console.render``, with what isn't a style of ours made `printable`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """As it is: rich would exit with 1, and who reads our output may stop where they like."""
        raise BrokenPipeError


def _width() -> int | None:
    """Columns of stdout: a terminal says its own, and a pipe has 120 unless COLUMNS says otherwise."""
    if sys.stdout is not None and sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal():
        return None
    return 120


out = PrintableConsole(width=_width(), highlight=False)
err = PrintableConsole(stderr=True, highlight=False)

Where = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VERSION", help="Use records of this version only, as triton=3.6; may be repeated."),
]
Solutions = Annotated[
    list[str] | None,
    typer.Option(
        "--solution",
        metavar="NAME=CANDIDATE",
        help="Which candidate a solution of flashinfer-bench's traces is; may be repeated.",
    ),
]
PolicyPath = Annotated[Path | None, typer.Option(help="A policy file, or a folder of them.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def versions_from(where: list[str] | None) -> dict[str, str] | None:
    """``--where`` as the learner's option; ValueError if one isn't NAME=VERSION or a name comes twice."""
    return _pairs("--where", where, r"([^=]+)=([^=]+)", "triton=3.6")


def solutions_from(solutions: list[str] | None) -> dict[str, str] | None:
    """``--solution`` as the learner's option; ValueError if one isn't NAME=CANDIDATE or a name comes twice."""
    # A candidate has equals signs inside brackets alone, a name may have any.
    return _pairs("--solution", solutions, r"(.+)=([^=\[\]]+(?:\[.*\])?)", "my_kernel=triton_fused[gemm=triton]")


def _pairs(option: str, given: list[str] | None, pattern: str, example: str) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for text in given or ():
        match = re.fullmatch(pattern, text)
        if match is None:
            raise ValueError(f"{option}: expected NAME=VALUE as {example}, got {text!r}")
        name, value = match.groups()
        if name in found:
            raise ValueError(f"{option} names {name!r} twice, as {found[name]} and as {value}")
        found[name] = value
    return found or None


def this_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class GivenPolicy:
    """What ``--policy`` names: the policy of a file, which is read once; a folder; or nothing."""

    source: Policy | Path | None
    what: str

    @classmethod
    def at(cls, path: Path | None) -> GivenPolicy:
        """Of the option's value."""
        return cls(path if path is None or path.is_dir() else load_policy(path), f"policy file {path}")

    @property
    def policy(self) -> Policy | None:
        """That of a file."""
        return self.source if isinstance(self.source, Policy) else None

    def problem(self, otherwise: MoEProblem) -> MoEProblem:
        """The policy's, if a file is named."""
        return otherwise if self.policy is None else self.policy.problem


def wanted_policy(device: str | None, problem: MoEProblem, given: GivenPolicy) -> tuple[Policy, str]:
    """The policy that a command is to speak of, and where it came from.

    Raises
    ------
    ValueError
        There is none; the message lists the devices that have one, and says how to make one.
    PolicyError
        As `find_policy`.
    """
    device = _wanted_device(device, given.policy)
    policy, where = find_policy(problem, device, given.source, what=given.what)
    if policy is None:
        raise _no_policy(device, problem)
    return policy, where


def policy_or_nearest(device: str | None, problem: MoEProblem, given: GivenPolicy) -> tuple[Policy, str, str | None]:
    """As `wanted_policy`, but a problem without a policy has the one that serving takes, and a note that says so."""
    device = _wanted_device(device, given.policy)
    policy, where, note = resolve.policy_or_nearest(problem, device, given.source, what=given.what)
    if policy is None:
        raise _no_policy(device, problem)
    return policy, where, note


def _no_policy(device: str, problem: MoEProblem) -> ValueError:
    known = known_devices()
    by_definition: dict[str, list[str]] = {}
    for name, definitions in known.items():
        for definition in definitions:
            by_definition.setdefault(definition, []).append(name)
    there = "; ".join(f"{', '.join(names)} for {definition}" for definition, names in by_definition.items()) or "none"
    words = {word: name for name in known for word in (*name.split("_"), name)}
    close = difflib.get_close_matches(device.lower(), words, n=1)
    hint = f" Did you mean {words[close[0]]}?" if close and device not in known else ""
    return ValueError(
        f"no policy for device {device} and {problem.definition}.{hint} There are policies of: {there}. "
        f"{how_to_make_one(problem)}"
    )


def _wanted_device(device: str | None, loaded: Policy | None) -> str:
    if device is not None:
        return device_named(device, known_devices() if loaded is None else [loaded.device])
    if loaded is not None:
        return loaded.device
    if torch.cuda.is_available():
        return DeviceKey.of("cuda").name
    devices = ", ".join(known_devices()) or "none"
    raise ValueError(f"torch finds no GPU here: name one with --device. There are policies of: {devices}")


def known_devices() -> dict[str, list[str]]:
    """The devices that policies are looked up for here, each with the definitions that it has one for."""
    found: dict[str, set[str]] = {}
    for _, policy in known_policies():
        found.setdefault(policy.device, set()).add(policy.definition)
    return {device: sorted(found[device]) for device in sorted(found)}


def device_named(text: str, known: Iterable[str]) -> str:
    """The device that is meant: ``b200`` or ``NVIDIA B200`` is ``nvidia_b200`` if no other known one has these words.

    Returned as it is if it is none of them: what comes of that is said where it is looked up.
    """
    slug = device_slug(text)
    words = set(slug.split("_"))
    meant = [name for name in known if name == slug] or [name for name in known if words <= set(name.split("_"))]
    return meant[0] if len(meant) == 1 else text


def print_json(value: object) -> None:
    """Print ``value``; figures that aren't finite, which JSON doesn't have, become null."""
    print(printable_json(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@contextlib.contextmanager
def steps(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, where that is a terminal; call what it gives with each step's name as the step begins."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=total)
        done = -1

        def begin(step: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, description=escape(step), completed=done)

        yield begin


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Print warnings in one line each, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        show_warning(message)


def show_warning(message: Warning | str, *_place: object) -> None:
    """Print a warning in one line, in place of ``warnings.showwarning``."""
    err.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)
