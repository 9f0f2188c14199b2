"""The command line, ``hybrid-moe``: one module a command."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from typer.core import TyperGroup

from ..candidate import BackendUnsupportedError
from ..measure.sweep.process import SweepError
from ..policy.select import NoBackendError
from ..version import __version__
from . import demo, doctor, evaluate, explain, learn, regenerate, report, run, solution, verify
from .common import err, show_warning

# What a person can put right: bad input, an unusable file (PolicyError is a ValueError), a device that can't run it.
# Anything else is a bug, and keeps its traceback.
USER_ERRORS = (
    ValueError,
    OSError,
    MemoryError,
    BackendUnsupportedError,
    NoBackendError,
    SweepError,
    torch.OutOfMemoryError,
)
# torch has no error of its own for a CPU that is out of memory.
_EXPECTED = (*USER_ERRORS, RuntimeError)


class _Commands(TyperGroup):
    """Turns the errors that a person can put right into one message and exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _pipe_may_close():  # the help is printed here
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _pipe_may_close():
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None
        except _EXPECTED as error:
            if ctx.params.get("traceback") or not _is_users(error):
                raise
            err.print(Text(f"error: {_message(error)}", style="bold red"), soft_wrap=True)
            raise typer.Exit(2) from error


@contextlib.contextmanager
def _pipe_may_close() -> Iterator[None]:
    """`hybrid-moe explain | head -1`: who reads has read enough, which is no error."""
    try:
        yield
    except BrokenPipeError:
        # What is still in the buffer is written at exit, where nobody catches an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def _is_users(error: Exception) -> bool:
    return isinstance(error, USER_ERRORS) or "can't allocate memory" in str(error)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would swallow "[default: ...]" and "name[key=value]"
    context_settings={"help_option_names": ["-h", "--help"]},
    help="FP8 block-scale MoE layers on the backend that was measured fastest for this GPU and number of tokens.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    pass


# In the order of the help. Each has its one line there (SUMMARY), and examples at the end of its own (EXAMPLES).
COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (demo, run, explain, regenerate, learn, verify, evaluate, report, solution, doctor)
}
for _name, _module in COMMANDS.items():
    # \b: lines that are not to be joined.
    _examples = "\n\n".join(f"\b\n{line}" for line in ("Examples:", *(f"  {e}" for e in _module.EXAMPLES)))
    app.command(short_help=_module.SUMMARY, epilog=_examples)(getattr(_module, _name))


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that isn't UTF-8 still gets all of it
    warnings.showwarning = show_warning  # type: ignore[assignment]
    # Data have no cycles, and to walk a million records again and again takes as long as to read them.
    gc.set_threshold(100_000, 50, 50)
    app(prog_name="hybrid-moe")
