"""``hybrid-moe report``: one HTML page of a policy and the records that it is judged by."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..files import PAGE, PICTURE, Kind, check_outputs, check_target, sha256_of, write_whole
from ..learn.compare import is_about
from ..learn.report import data
from ..measure.readers import read_with_digest, shipped_records_dir
from ..measure.records import BenchRecord, problem_of_record
from ..measure.workloads import DEEPSEEK_V3
from ..policy.schema import InputDigest, Policy
from ..policy.store import find_policy
from ..problem import MoEProblem
from .common import GivenPolicy, Json, device_named, out, print_json, wanted_policy

SUMMARY = "Draw a policy and records as a web page"
EXAMPLES = (
    "hybrid-moe report --device nvidia_h200",
    "hybrid-moe report records.jsonl --policy policy.json --png figure.png",
)


Read = list[tuple[list[BenchRecord], InputDigest]]


def report(
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            help="JSON Lines of benchmark records, or the published table.  [default: what the policy was learned from]"
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="A policy file, or a folder of them. [default: what runs on the records' device]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page. [default: report.html, or none with --png]")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="The first figure as a picture.")] = None,
    device: Annotated[str | None, typer.Option(help="Slug of the device, where the records have several.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a policy and the records that it is judged by as one HTML page.

    Latency and regret over T, the regimes, what was refused and why, the environment. The page loads nothing; the same
    records and policy give the same bytes. The records need not be those that the policy was learned from.
    """
    _require("matplotlib", "jinja2")
    page_path = Path("report.html") if output is None and png is None else output
    outputs = {"--output": (page_path, PAGE), "--png": (png, PICTURE)}
    for path, kind in outputs.values():
        if path is not None:
            check_target(path, kind)
    check_outputs({option: path for option, (path, _) in outputs.items()}, [*(records or ()), policy])
    if records:
        read: Read = [read_with_digest(path) for path in records]
        found, where = _policy_for([r for rs, _ in read for r in rs], policy, device)
    else:
        given = GivenPolicy.at(policy)
        found, where = wanted_policy(device, given.problem(DEEPSEEK_V3), given)
        read = _learned_from(found, policy)
    about = [r for rs, _ in read for r in rs if r.device == found.device and is_about(r, found.problem)]
    result = data.report(about, found, [digest for _, digest in read])

    # Both are made before either is written.
    from ..learn.report import draw, page

    files: dict[Path, tuple[bytes, Kind]] = {}
    if png is not None:
        files[png] = draw.png(result, result.loads[0]), PICTURE
    if page_path is not None:
        files[page_path] = page.html(result).encode(errors="backslashreplace"), PAGE
    for path, (content, kind) in files.items():
        write_whole(path, content, kind)

    sentence = page.verdict(result)
    if as_json:
        print_json({"written": [str(path) for path in files], "verdict": sentence, **_figures(result)})
        return
    out.print(f"[bold]{found.device}[/], {found.definition}\n{escape(where)}", soft_wrap=True)
    out.print(escape(sentence))
    for path in files:
        out.print(f"written to {escape(str(path))}", soft_wrap=True)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the report is drawn with {' and '.join(missing)}, not installed here: pip install 'hybrid-moe[report]'"
        )


def _policy_for(records: Sequence[BenchRecord], path: Path | None, device: str | None) -> tuple[Policy, str]:
    """The policy that is given, or that runs on the device of the records."""
    devices = sorted({r.device for r in records})
    if device is None and len(devices) != 1:
        raise ValueError(f"the records are of several devices or none: {_list(devices)}; name one with --device")
    device = device_named(device or devices[0], devices)
    if device not in devices:
        raise ValueError(f"--device: expected one of the records' {_list(devices)}, got {device}")
    given = GivenPolicy.at(path)
    problem = _problem_of([r for r in records if r.device == device]) if given.policy is None else given.policy.problem
    found, where = find_policy(problem, device, given.source, what=given.what)
    if found is None:
        raise ValueError(
            f"{where}: for these `hybrid-moe learn RECORDS -o policy.json`, then `hybrid-moe report RECORDS --policy "
            "policy.json`"
        )
    if not any(r.device == device and is_about(r, problem) for r in records):
        raise ValueError(f"{where} is for {problem}; the records are of {_list({r.problem for r in records})}")
    return found, where


def _problem_of(records: Sequence[BenchRecord]) -> MoEProblem:
    problems = {problem_of_record(r) for r in records if not r.is_peer}
    if len(problems) != 1:
        raise ValueError(
            f"the records are about several problems or none: {_list(map(str, problems))}; "
            "name a policy of one of them with --policy"
        )
    return problems.pop()


def _learned_from(policy: Policy, path: Path | None) -> Read:
    """The files that a policy was learned from, known by their digests."""
    folders = [Path.cwd(), shipped_records_dir()]
    if path is not None:
        folders.append(path if path.is_dir() else path.parent)
    read: Read = []
    for digest in policy.inputs:
        called = [p for folder in folders for p in _called(digest.name, folder)]
        same = [p for p in called if sha256_of(p) == digest.sha256]
        if not same:
            raise ValueError(
                f"the policy for {policy.device} was learned from {digest.name} (sha256 {digest.sha256[:12]}...), "
                f"which isn't in {_list(map(str, folders))}: name the files of records, as `hybrid-moe report RECORDS`"
            )
        read.append(read_with_digest(same[0]))
    return read


def _called(name: str, folder: Path) -> list[Path]:
    # As benchmarks/results/<device>/ has them: no deeper, as the working directory may be anybody's home.
    return sorted(p for pattern in (name, f"*/{name}", f"*/*/{name}") for p in folder.glob(pattern) if p.is_file())


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))) or "none"


def _figures(result: data.Report) -> dict[str, Any]:
    views = [*result.overall, *result.loads]
    return {
        "device": result.policy.device,
        "definition": result.policy.definition,
        "policy_sha256": result.policy_sha256,
        "regret": [
            {
                "timing": view.timing,
                "routing": view.routing,
                "candidate": None if s.choice is None else str(s.choice),
                "regret": None if s.regret is None else s.regret.model_dump(mode="json"),
                "policy_gain": s.policy_gain,
            }
            for view in views
            for s in view.standings
        ],
        "refused": [asdict(r) | {"choice": str(r.choice)} for r in result.refused],
    }
