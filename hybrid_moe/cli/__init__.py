"""The command line, ``hybrid-moe``: one module a command."""

from __future__ import annotations

import io
import sys
import warnings
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
USER_ERRORS = (ValueError, OSError, BackendUnsupportedError, NoBackendError, SweepError, torch.OutOfMemoryError)


class _Commands(TyperGroup):
    """Turns the errors that a person can put right into one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `hybrid-moe explain | head`: no error
            raise
        except USER_ERRORS as error:
            if ctx.params.get("traceback"):
                raise
            err.print(Text(f"error: {_message(error)}", style="bold red"), soft_wrap=True)
            raise typer.Exit(2) from error


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


for _module in (demo, run, explain, regenerate, learn, verify, evaluate, report, solution, doctor):
    app.command()(getattr(_module, _module.__name__.rpartition(".")[2]))


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that isn't UTF-8 still gets all of it
    warnings.showwarning = show_warning  # type: ignore[assignment]
    app(prog_name="hybrid-moe")
