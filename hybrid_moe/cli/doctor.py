"""``hybrid-moe doctor``: what this machine has, which backends work here, and why each other one doesn't."""

from __future__ import annotations

import platform
import warnings
from dataclasses import asdict
from typing import Any

import torch
from rich.markup import escape

from .. import backends
from ..candidate import BackendFailedError, BackendUnsupportedError, Candidate
from ..device import DeviceKey
from ..learn.report.letters import assign_letters
from ..measure.workloads import DEEPSEEK_V3
from ..policy.resolve import policy_or_nearest
from ..policy.schema import PolicyError
from ..policy.store import scan, shipped_policy_dir, user_policy_dir
from ..policy.versions import Mismatch, installed_version, installed_versions, mismatch
from ..serving.quarantine import QUARANTINE
from ..version import __version__
from . import view
from .common import Json, out, print_json, this_device

SUMMARY = "What this machine has, and what works here"
EXAMPLES = ("hybrid-moe doctor",)


# Packages that no backend runs on.
_OTHERS = ("numpy", "flashinfer-bench")


def doctor(as_json: Json = False) -> None:
    """Say which backends work here for the definition's problem, and why each other one doesn't."""
    report = examine()
    if as_json:
        print_json(report)
    else:
        _print(report)


def examine() -> dict[str, Any]:
    """All that the command says, as a JSON object."""
    device = this_device()
    key = DeviceKey.of(device)
    looked_up: list[dict[str, Any]] = []
    problems: list[str] = []
    for kind, folder in (("your own", user_policy_dir()), ("shipped", shipped_policy_dir())):
        there = scan(folder)
        policies = [{"path": str(path), "device": p.device, "definition": p.definition} for path, p in there.policies]
        problems += map(str, there.skipped.values())
        looked_up.append({"kind": kind, "folder": str(folder), "policies": policies})
    # The file that is asked for may itself be broken: say so, and go on with the rest of the report.
    found, broken = None, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the files that are listed above
            found, where, _ = policy_or_nearest(DEEPSEEK_V3, key.name)
    except PolicyError as error:
        where, broken = str(error), True
    differs = None
    if found is not None:
        refusals = {c: backends.not_supported_reasons(DEEPSEEK_V3, key, c) for c in found.candidates}
        differs = asdict(mismatch(found, key.name, refusals, installed_versions()))
    return {
        "versions": {
            "hybrid-moe": __version__,
            "python": platform.python_version(),
            **installed_versions(),
            **{name: installed_version(name) for name in _OTHERS},
        },
        "device": _device(device, key),
        "problem": DEEPSEEK_V3.definition,
        "backends": _backends(key),
        "policies": {
            "looked_up": looked_up,
            "applies": found is not None,
            "found": where,
            "mismatch": differs,
            "unreadable": problems,
            "broken": broken,
        },
    }


def _device(device: torch.device, key: DeviceKey) -> dict[str, Any]:
    described: dict[str, Any] = {"slug": key.name, "cuda_of_torch": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "name": properties.name,
            "capability": list(key.capability or ()),
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "gpus": torch.cuda.device_count(),
        }
    return described


def _backends(key: DeviceKey) -> list[dict[str, Any]]:
    rows = []
    for choice in backends.candidates():
        reasons = _reasons(key, choice)
        backend = backends.get_backend(choice.backend)
        rows.append(
            {
                "backend": choice.backend,
                "config": dict(choice.config),
                "works": not reasons,
                "reasons": list(reasons),
                "remarks": [] if reasons else backend.remarks(DEEPSEEK_V3, key, choice.config),
            }
        )
    return rows


def _reasons(key: DeviceKey, choice: Candidate) -> tuple[str, ...]:
    """Why it doesn't work here: what it says itself, what this process has seen, and what preparing it raises."""
    reasons = backends.not_supported_reasons(DEEPSEEK_V3, key, choice)
    reasons += QUARANTINE.reasons(key, DEEPSEEK_V3).get(choice, ())
    if reasons:
        return reasons
    try:
        backends.prepare(DEEPSEEK_V3, key, choice)
    except BackendUnsupportedError as error:
        return tuple(error.reasons)
    except BackendFailedError as error:
        return (f"it raises when it is prepared: {type(error.__cause__).__name__}: {error.__cause__}",)
    return ()


def _print(report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    missing = ", ".join(name for name, version in report["versions"].items() if not version)
    out.print(f"[bold]versions[/]  {escape(versions)}")
    if missing:
        out.print(f"[bold]missing[/]   {missing}")
    device = report["device"]
    if "name" in device:
        capability = ".".join(map(str, device["capability"]))
        text = f"{device['name']} (compute capability {capability}, {device['memory_gb']} GB), slug {device['slug']}"
    else:
        text = "no GPU that torch can use" + ("" if device["cuda_of_torch"] else ": this torch is a CPU build")
    out.print(f"[bold]device[/]    {escape(text)}")
    out.print(f"[bold]problem[/]   {report['problem']}\n")

    letters = assign_letters(Candidate(row["backend"], row["config"]) for row in report["backends"])
    out.print("Which backends work here, each with its letter in strips and figures:")
    for row in report["backends"]:
        candidate = Candidate(row["backend"], row["config"])
        works = "[green]yes[/]" if row["works"] else "[yellow]no [/]"
        head = f"{works} {letters[candidate]}  [bold]{escape(str(candidate))}[/]"
        out.print(view.item(head, *(escape(said) for said in (*row["reasons"], *row["remarks"]))))
    out.print()

    out.print("Policies are looked up in this order:")
    for number, place in enumerate(report["policies"]["looked_up"], start=1):
        devices = ", ".join(policy["device"] for policy in place["policies"]) or "none"
        out.print(f"  {number}. {place['kind']}: {escape(place['folder'])} (has: {devices})", soft_wrap=True)
    out.print(f"Here: {escape(report['policies']['found'])}.", soft_wrap=True)
    if report["policies"]["mismatch"] is not None:
        for message in Mismatch(**report["policies"]["mismatch"]).messages("That policy here"):
            out.print(f"[yellow]{escape(message)}[/]", soft_wrap=True)
    for problem in report["policies"]["unreadable"]:
        out.print(f"[yellow]{escape(problem)}[/]", soft_wrap=True)
    if report["policies"]["broken"]:
        out.print("[red]Until that file is mended or removed, layers on this device are refused.[/]")
    elif not report["policies"]["applies"]:
        first = "torch_reference" if "name" not in device else "the first backend above that works"
        out.print(f"Without one, {first} runs at every T.")
