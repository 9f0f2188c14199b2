"""Plants bugs in copies of the package, one at a time, and says which test catches each.

``python tests/mutations.py`` runs all, ``--area gluon`` those of one area, ``--only TEXT`` those whose description or
file has it; ``--jobs N`` so many at once, ``--list`` none. The end is 1 if a bug survives that isn't argued to be none,
or if a test fails without one.

The bugs are in ``tests/planted/``, a module for each area with a list ``MUTATIONS``. To add one: the file, its text and
what it becomes, what is wrong then, and the tests that should see it, the quickest first. The text has to be there
exactly once: one that isn't is an error, so that the list follows the code.

Not part of ``make test``: with two jobs all took two hours on two busy cores.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
COPIED = ("hybrid_moe", "tests", "policies", "examples", "benchmarks", "docs", "pyproject.toml", "README.md")
TIME_LIMIT = 300.0  # seconds; a bug that makes a test hang is caught


@dataclass(frozen=True)
class Mutation:
    """A planted bug.

    Parameters
    ----------
    file
        In the package.
    old, new
        Text that is in it once, and what is there instead.
    wrong
        What is wrong then, in a few words.
    tests
        Arguments for pytest, run in this order until one fails.
    equivalent
        Why no test can see it, where it changes nothing that counts.
    """

    file: str
    old: str
    new: str
    wrong: str
    tests: tuple[str, ...]
    equivalent: str = ""


@dataclass(frozen=True)
class Outcome:
    """Of one: ``verdict`` is caught, survived, equivalent or broken (the tests could not be run)."""

    mutation: Mutation | None
    verdict: str
    by: str
    seconds: float


def mutations(area: str | None = None) -> dict[str, list[Mutation]]:
    """By their areas, in ``tests/planted/``."""
    found = {}
    for path in sorted((TESTS / "planted").glob("*.py")):
        if area in (None, path.stem):
            spec = importlib.util.spec_from_file_location(f"planted_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found[path.stem] = list(module.MUTATIONS)
    if not found:
        areas = ", ".join(path.stem for path in sorted((TESTS / "planted").glob("*.py")))
        raise SystemExit(f"--area {area}: expected one of {areas}")
    return found


def misplaced(all_mutations: Sequence[Mutation]) -> list[str]:
    """What is wrong with the list: texts that aren't there exactly once, change nothing, or are no Python."""
    errors = []
    for mutation in all_mutations:
        path = ROOT / "hybrid_moe" / mutation.file
        source = path.read_text() if path.exists() else ""
        count = source.count(mutation.old)
        if count != 1:
            errors.append(f"hybrid_moe/{mutation.file}: expected once, found {count} times: {mutation.old!r}")
        missing = [test for test in mutation.tests if not _is_there(test)]
        errors += [f"hybrid_moe/{mutation.file}, {mutation.wrong}: {test} isn't there" for test in missing]
        if mutation.old == mutation.new:
            errors.append(f"hybrid_moe/{mutation.file}: {mutation.old!r} becomes the same")
        try:
            ast.parse(source.replace(mutation.old, mutation.new))
        except SyntaxError as error:
            errors.append(f"hybrid_moe/{mutation.file}, with {mutation.new!r}: {error}")
    return errors


def _is_there(test: str) -> bool:
    """Whether pytest's argument names a file, and in it a test or a class of them."""
    file, *names = test.split("::")
    path = ROOT / file
    return path.exists() and (
        not names or bool(re.search(rf"^(def|class) {names[0].split('[')[0]}\b", path.read_text(), re.M))
    )


class Failures:
    """A plugin of pytest that keeps the first failure."""

    def __init__(self) -> None:
        self.first = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for each test."""
        if report.failed and not self.first:
            message = str(report.longrepr).strip().splitlines()
            errors = [line[1:].strip() for line in message if line.startswith("E ")]
            self.first = f"{report.nodeid.removeprefix('tests/')}: {errors[0][:100] if errors else ''}"


def _child(folder: Path, tests: Sequence[str], connection: Any) -> None:
    """Runs the tests on the copy in ``folder`` and sends the exit status and the first failure."""
    # Those that a test starts end with it.
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.dont_write_bytecode = True
    output = io.StringIO()
    failures = Failures()
    try:
        import pytest

        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "--timeout=0"]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            for test in tests:  # pytest would put them into the files' order
                status = int(pytest.main([*arguments, test], plugins=[failures]))
                if status:
                    break
    except BaseException:  # whatever it is, the parent has to hear of it
        status, failures.first = 99, traceback.format_exc()
    connection.send((status, failures.first, output.getvalue()[-2000:]))
    connection.close()
    os._exit(0)


def run_tests(folder: Path, tests: Sequence[str], limit: float = TIME_LIMIT) -> tuple[int | None, str, str]:
    """Exit status of pytest (None: the time limit), the first failure, and the end of its output."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(folder, tests, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        return None, "", ""
    except EOFError:
        process.join()
        return 1, f"the process crashed, exit code {process.exitcode}", ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        receiver.close()


@contextlib.contextmanager
def copy_of(root: Path) -> Iterator[Path]:
    """A folder with all that the tests want."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        for part in COPIED:
            source = root / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "figures"))
            elif source.exists():
                shutil.copy(source, folder / part)
        yield folder


def plant(root: Path, mutation: Mutation) -> Outcome:
    """Run the tests of one."""
    begin = time.monotonic()
    with copy_of(root) as folder:
        path = folder / "hybrid_moe" / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        status, first, output = run_tests(folder, mutation.tests)
    seconds = time.monotonic() - begin
    if status is None:
        return Outcome(mutation, "caught", f"time limit of {TIME_LIMIT:.0f} s", seconds)
    if status == 1:
        return Outcome(mutation, "caught", first, seconds)
    if status == 0:
        return Outcome(mutation, "equivalent" if mutation.equivalent else "survived", mutation.equivalent, seconds)
    return Outcome(mutation, "broken", f"pytest ended with {status}: {first or output}", seconds)


def unmutated(root: Path, tests: Sequence[str]) -> Outcome:
    """All tests named, on the package as it is: what they catch must be a bug's doing."""
    begin = time.monotonic()
    with copy_of(root) as folder:
        status, first, output = run_tests(folder, tests, limit=3600.0)
    wrong = "" if status == 0 else f"without a bug, pytest ended with {status}: {first or output}"
    return Outcome(None, "broken" if wrong else "passed", wrong, time.monotonic() - begin)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--area", help="a module of tests/planted")
    parser.add_argument("--only", default="", help="those whose file or description has this text")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--unchecked", action="store_true", help="without running the tests on the package as it is")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    arguments = parser.parse_args()
    chosen = [
        (area, mutation)
        for area, listed in mutations(arguments.area).items()
        for mutation in listed
        if arguments.only in f"{mutation.file} {mutation.wrong}"
    ]
    errors = misplaced([mutation for _, mutation in chosen])
    if errors:
        print("\n".join(errors))
        return 1
    if arguments.list:
        for area, mutation in chosen:
            print(f"{area:10} {mutation.file:45} {mutation.wrong}{' (equivalent)' if mutation.equivalent else ''}")
        print(f"{len(chosen)} mutations")
        return 0
    _import_what_is_slow()
    with copy_of(ROOT) as root:  # what is changed meanwhile is not seen
        outcomes = _run(root, chosen, arguments.jobs) if arguments.unchecked or _is_sound(root, chosen) else []
    return _report(outcomes, arguments.json) if outcomes else 1


def _run(root: Path, chosen: Sequence[tuple[str, Mutation]], jobs: int) -> list[tuple[str, Outcome]]:
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(functools.partial(plant, root), [mutation for _, mutation in chosen])
        for (area, mutation), outcome in zip(chosen, found, strict=True):
            outcomes.append((area, outcome))
            print(f"{outcome.verdict:10} {area:10} {mutation.file}: {mutation.wrong} ({outcome.seconds:.0f} s)")
            print(f"           {outcome.by}", flush=True)
    return outcomes


def _is_sound(root: Path, chosen: Sequence[tuple[str, Mutation]]) -> bool:
    """Whether all tests pass without a bug."""
    tests = list(dict.fromkeys(test for _, mutation in chosen for test in mutation.tests))
    sound = unmutated(root, _without_parts(tests))
    print(sound.by or f"{len(chosen)} mutations; without any the tests pass in {sound.seconds:.0f} s", flush=True)
    return sound.verdict == "passed"


def _without_parts(tests: Sequence[str]) -> list[str]:
    """Without those that others in the list contain."""
    return [test for test in tests if not any(test != other and test.startswith(other + "::") for other in tests)]


def _import_what_is_slow() -> None:
    """Once, before the processes for the mutations are forked; nothing of this package, nor anything that they change.

    Triton decides when it is imported whether kernels are interpreted: as tests/conftest.py has it.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import triton.experimental.gluon.language.nvidia.hopper  # noqa: F401
    import typer.testing  # noqa: F401


def _report(outcomes: Sequence[tuple[str, Outcome]], path: Path | None) -> int:
    if path is not None:
        rows = [
            {"area": area, "verdict": o.verdict, "by": o.by, "seconds": round(o.seconds, 1), **vars(o.mutation)}
            for area, o in outcomes
        ]
        path.write_text(json.dumps(rows, indent=1))
    verdicts = ("caught", "equivalent", "survived", "broken")
    print(f"\n{'area':10} {'planted':>8} " + " ".join(f"{verdict:>10}" for verdict in verdicts))
    for area in dict.fromkeys(area for area, _ in outcomes):
        mine = [outcome.verdict for of, outcome in outcomes if of == area]
        print(f"{area:10} {len(mine):8} " + " ".join(f"{mine.count(verdict):10}" for verdict in verdicts))
    bad = [(area, outcome) for area, outcome in outcomes if outcome.verdict in ("survived", "broken")]
    for area, outcome in bad:
        assert outcome.mutation is not None
        print(f"{outcome.verdict}: {area}, {outcome.mutation.file}: {outcome.mutation.wrong}: {outcome.by}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
