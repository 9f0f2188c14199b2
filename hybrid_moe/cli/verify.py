"""``hybrid-moe verify``: whether a policy file still says the same, and its choices are right where they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..learn.verify import Finding, Status, verify_policy
from ..policy.store import load_policy
from . import view
from .common import Json, out, print_json, steps
from .table import shortened

SUMMARY = "Check a policy file and run its choices"
EXAMPLES = ("hybrid-moe verify policy.json",)


_STYLES: dict[Status, str] = {"verified": "green", "unverified": "yellow", "failed": "bold red"}


def verify(
    policy: Annotated[Path, typer.Argument(help="A policy file.")],
    as_json: Json = False,
) -> None:
    """Check a policy file: read it again, and run each regime's backend against the reference.

    What can't run on this machine is unverified, not failed. Exit code 1 if something failed.
    """
    loaded = load_policy(policy)
    findings = verify_policy(loaded, steps)
    failed = any(finding.status == "failed" for finding in findings)
    if as_json:
        print_json(
            {
                "path": str(policy),
                "device": loaded.device,
                "definition": loaded.definition,
                "passed": not failed,
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        out.print(f"[bold]{loaded.device}[/], {loaded.definition}")
        print_findings(findings)
    if failed:
        raise typer.Exit(1)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print each with its reason; of hundreds, what failed before the rest."""
    if len(findings) > 200:
        findings = sorted(findings, key=lambda finding: finding.status != "failed")
    first, omitted, last = shortened(findings)
    for f in [*first, None, *last] if omitted else first:
        if f is None:
            out.print(f"... {omitted} more: --json has all of them")
            continue
        at = "" if f.num_tokens is None else f" at T = {f.num_tokens}"
        what = f"{f.what}: {escape(f.choice)}{at}" if f.choice else f.what
        out.print(view.item(f"[{_STYLES[f.status]}]{f.status}[/] {what}", escape(f.reason)))
