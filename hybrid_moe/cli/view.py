"""Tables for people."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..candidate import Candidate
from ..measure.single import SimpleTime
from ..measure.timing import Work
from ..numerics import Correctness
from ..policy.schema import Evidence, Policy, RegretSummary, label
from ..policy.select import Decision, Span
from .table import Column, Fitted, ground
from .table import legend as legend_of

_VERDICTS = {"best": "green", "tie": "cyan", "unsure": "yellow"}
NOT_MEASURED = "not measured for this problem: the policy is the nearest problem's"


def percent(value: float | None) -> str:
    """``0.0342`` -> ``3.4%``; a dash where it isn't known."""
    return "-" if value is None else f"{100 * value:.1f}%"


def item(head: str, *details: str) -> RenderableType:
    """A line in markup, and below it, indented, what there is to say of it; wraps anywhere, cuts nothing."""
    parts: list[RenderableType] = [Text.from_markup(head)]
    parts += [Padding(Text.from_markup(detail), (0, 0, 0, 4), expand=False) for detail in details if detail]
    return Group(*parts)


def regimes(
    policy: Policy,
    runs_here: Mapping[str, Candidate] | None = None,
    *,
    borrowed: bool = False,
    legend: bool = True,
) -> Fitted:
    """The regimes of a policy, and its default.

    Parameters
    ----------
    policy
        The policy.
    runs_here
        By regime label, what runs on this machine; a column of its own.
    borrowed
        The policy is another problem's: nothing in it was measured for this one.
    legend
        As `Fitted` takes it.
    """
    columns = [
        Column("T", right=True),
        Column("choice"),
        *([] if runs_here is None else [Column("runs here")]),
        Column("verdict"),
        Column("expected regret", right=True),
        Column("T with results", right=True, optional=True),
        Column("verified", optional=True),
    ]
    table = Fitted(columns, legend=legend)
    for r in policy.regimes:
        table.add(
            r.label,
            r.choice,
            *([] if runs_here is None else [runs_here[r.label]]),
            f"[{_VERDICTS[r.verdict]}]{r.verdict}[/]",
            percent(r.expected_regret),
            str(len(r.evidence)),
            "not measured" if borrowed else r.verified,
        )
    here = [] if runs_here is None else [runs_here["otherwise"]]
    table.add("otherwise", policy.default, *here, "default", "", str(len(policy.default_evidence)), "")
    return table


def regrets(policy: Policy, *, borrowed: bool = False) -> str:
    """What the policy costs where it was learned, in lines."""
    if borrowed:
        return f"regret: {NOT_MEASURED}"
    training = regret("training regret", policy.training_regret)
    return f"{training}\n{regret('leave-one-T-out regret', policy.leave_one_out_regret)}"


def strip(spans: Sequence[Span], letters: Mapping[Candidate, str], width: int, reach: int = 1) -> Text:
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
    reach
        Largest T that the axis has to show, as the largest with results.
    """
    columns = max(20, min(width - 2, 110))
    # Room for what has no upper bound: a quarter of a decade more, and up to a round number of tokens at least.
    top = max(100.0, reach, max(span.first for span in spans) * 10**0.75)
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
        style = f"{ground(letters[choice])} reverse"
        text.append(letter * len(list(run)), style=f"{style} dim" if outside else style)
    text.append("\n")

    ticks, labels = [" "] * columns, [" "] * columns
    for power in range(int(math.log10(top)) + 1):
        at, label = column(10**power), str(10**power)
        ticks[at] = "|"
        at = min(at, columns - 1 - len(label))
        if not "".join(labels[at - 1 :]).strip():  # no other label is there
            labels[at : at + len(label)] = label
    text.append("".join(ticks).rstrip() + "\n", style="dim")
    text.append("".join(labels).rstrip() + "  T\n")

    shown = dict.fromkeys(span.decision.choice for span in spans)
    text.append(legend_of({c: letter for c, letter in letters.items() if c in shown}))
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


def evidence(items: Sequence[Evidence], chosen: Candidate | None = None) -> Fitted:
    """The slowdown of each candidate at each T; the fastest in green, ``chosen`` in bold."""
    names = sorted({name for item in items for name in item.slowdown})
    candidates = [Candidate.parse(name) for name in names]
    columns = [Column("T", right=True), Column("workloads", right=True, optional=True)]
    table = Fitted([*columns, *(Column(candidate, right=True) for candidate in candidates)])
    for item in items:
        cells = []
        for name in names:
            slowdown = item.slowdown.get(name)
            cell = "-" if slowdown is None else f"{slowdown:.3f}"
            if slowdown is not None and slowdown == min(item.slowdown.values()):
                cell = f"[green]{cell}[/]"
            cells.append(f"[bold]{cell}[/]" if chosen is not None and name == str(chosen) else cell)
        table.add(str(item.num_tokens), str(item.workloads), *cells)
    return table


def regime_text(decision: Decision) -> str:
    """The bounds of the decision's regime for people."""
    return "none" if decision.regime is None else label(decision.regime)


def checks() -> Fitted:
    """The head of a table of checked runs, for `add_check`."""
    return Fitted(
        [
            Column("T", right=True),
            Column("offset", right=True, optional=True),
            Column("active experts", right=True, optional=True),
            Column("local rows", right=True, optional=True),
            Column("backend"),
            Column("rel L2", right=True),
            Column("cosine", right=True, optional=True),
            Column("matched", right=True, optional=True),
            Column("check"),
            Column("time", right=True),
        ]
    )


def add_check(
    to: Fitted, num_tokens: int, offset: int, load: Work, choice: Candidate, correctness: Correctness, time: SimpleTime
) -> None:
    """Add a row to `checks`."""
    to.add(
        str(num_tokens),
        str(offset),
        str(load.active_experts),
        str(load.local_rows),
        choice,
        f"{correctness.relative_l2:.4f}",
        f"{correctness.cosine:.5f}",
        f"{correctness.matched_ratio:.4f}",
        "[green]pass[/]" if correctness.passed else "[bold red]FAIL[/]",
        str(time),
    )
