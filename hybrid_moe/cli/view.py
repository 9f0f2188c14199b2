"""Tables for people."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..candidate import Candidate
from ..learn.report.letters import index
from ..measure.single import SimpleTime
from ..measure.timing import Work
from ..numerics import Correctness
from ..policy.schema import Evidence, Policy, RegretSummary, label
from ..policy.select import Decision, Span

_VERDICTS = {"best": "green", "tie": "cyan", "unsure": "yellow"}
# By the place of the candidate, as in the report's figures; the letters tell them apart without colour.
_GROUNDS = ("blue", "dark_orange", "green", "magenta", "yellow", "cyan")
_VERIFIED = {"seed_only": "published", "measured": "measured"}


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; a column named ``>name`` is justified to the right."""
    result = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        result.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return result


def percent(value: float | None) -> str:
    """``0.0342`` -> ``3.4%``; a dash where it isn't known."""
    return "-" if value is None else f"{100 * value:.1f}%"


def regimes(policy: Policy, runs_here: dict[str, Candidate] | None = None) -> Table:
    """The regimes of a policy, and its default; with ``runs_here`` by regime label, what runs on this machine."""
    extra = [] if runs_here is None else ["runs here"]
    result = table(">T", "choice", "verdict", ">expected regret", ">T with results", "verified", *extra)
    for r in policy.regimes:
        result.add_row(
            r.label,
            escape(str(r.choice)),
            f"[{_VERDICTS[r.verdict]}]{r.verdict}[/]",
            percent(r.expected_regret),
            str(len(r.evidence)),
            _VERIFIED[r.verified],
            *([] if runs_here is None else [escape(str(runs_here[r.label]))]),
        )
    result.add_row(
        "otherwise",
        escape(str(policy.default)),
        "default",
        "",
        str(len(policy.default_evidence)),
        "",
        *([] if runs_here is None else [escape(str(runs_here["otherwise"]))]),
    )
    return result


def strip(spans: Sequence[Span], letters: Mapping[Candidate, str], width: int) -> Text:
    """What runs over T as a strip of letters on a logarithmic axis, with its ticks and a legend.

    Small letters are where no regime of the policy holds T. Every span that starts on the axis has at least one column.

    Parameters
    ----------
    spans
        All T from 1 on.
    letters
        One letter for each choice of the spans.
    width
        Columns of the terminal.
    """
    columns = max(20, min(width - 2, 110))
    # Room for what has no upper bound: a quarter of a decade more, and up to a round number of tokens at least.
    top = max(100.0, max(span.first for span in spans) * 10**0.75)
    scale = (columns - 1) / math.log10(top)

    def column(num_tokens: float) -> int:
        return min(columns - 1, int(math.log10(num_tokens) * scale))

    cells: list[Span] = []
    for span in spans:
        # A span that shares its column with the one before still gets one, and what follows starts after it.
        start = max(column(span.first), len(cells))
        cells += [cells[-1]] * (start - len(cells)) if cells else []
        cells.append(span)
    cells = cells[:columns] + [spans[-1]] * (columns - len(cells))

    text = Text()
    for span, run in itertools.groupby(cells):
        choice, outside = span.decision.choice, span.decision.regime is None
        letter = letters[choice].lower() if outside else letters[choice]
        style = f"{_GROUNDS[index(letters[choice]) % len(_GROUNDS)]} reverse"
        text.append(letter * len(list(run)), style=f"{style} dim" if outside else style)
    text.append("\n")

    ticks, labels = [" "] * columns, [" "] * columns
    for power in range(int(math.log10(top)) + 1):
        at, label = column(10**power), str(10**power)
        ticks[at] = "|"
        if at + len(label) <= columns:
            labels[at : at + len(label)] = label
    text.append("".join(ticks).rstrip() + "\n", style="dim")
    text.append("".join(labels).rstrip() + "  T\n")

    shown = dict.fromkeys(span.decision.choice for span in spans)
    for choice in [c for c in letters if c in shown]:
        text.append(f" {letters[choice]} ", style=f"{_GROUNDS[index(letters[choice]) % len(_GROUNDS)]} reverse")
        text.append(f" {choice}\n")
    if any(span.decision.regime is None for span in spans):
        text.append("small letters: in no regime, as no results are near\n", style="dim")
    return text


def regret(name: str, summary: RegretSummary | None) -> str:
    """A regret in one line."""
    if summary is None:
        return f"{name}: not known (fewer than three T)"
    worst = (
        ""
        if summary.worst_num_tokens is None
        else f", worst {percent(summary.worst)} at T = {summary.worst_num_tokens}"
    )
    return f"{name}: mean {percent(summary.mean)}{worst} (over {summary.num_tokens} T)"


def evidence(items: Sequence[Evidence], chosen: Candidate | None = None) -> Table:
    """The slowdown of each candidate at each T; the fastest in green, ``chosen`` in bold."""
    names = sorted({name for item in items for name in item.slowdown})
    result = table(">T", ">workloads", *(f">{escape(name)}" for name in names))
    for item in items:
        cells = []
        for name in names:
            slowdown = item.slowdown.get(name)
            cell = "-" if slowdown is None else f"{slowdown:.3f}"
            if slowdown is not None and slowdown == min(item.slowdown.values()):
                cell = f"[green]{cell}[/]"
            cells.append(f"[bold]{cell}[/]" if chosen is not None and name == str(chosen) else cell)
        result.add_row(str(item.num_tokens), str(item.workloads), *cells)
    return result


def regime_text(decision: Decision) -> str:
    """The bounds of the decision's regime for people."""
    return "none" if decision.regime is None else label(decision.regime)


def checks() -> Table:
    """The head of a table of checked runs, for `add_check`."""
    heads = (">T", ">offset", ">active experts", ">local rows", "backend", ">rel L2", ">cosine", ">matched", "check")
    return table(*heads, ">time")


def add_check(
    to: Table, num_tokens: int, offset: int, load: Work, choice: Candidate, correctness: Correctness, time: SimpleTime
) -> None:
    """Add a row to `checks`."""
    to.add_row(
        str(num_tokens),
        str(offset),
        str(load.active_experts),
        str(load.local_rows),
        escape(str(choice)),
        f"{correctness.relative_l2:.4f}",
        f"{correctness.cosine:.5f}",
        f"{correctness.matched_ratio:.4f}",
        "[green]pass[/]" if correctness.passed else f"[bold red]{escape('; '.join(correctness.failures))}[/]",
        str(time),
    )
