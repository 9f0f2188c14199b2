"""The report's page: one HTML file that loads nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...candidate import Candidate
from ...policy.schema import LearnerOptions
from ...problem import MoEProblem
from . import draw
from .data import Report, Row, Standing, View

_CAPTIONS = {
    "latency": (
        "Latency.",
        "Median of one call; the shade is the noise, 10th to 90th percentile. Tinted are the regimes; the floor is the "
        "least time that the device's bandwidth and arithmetic allow.",
    ),
    "slowdown": ("Latency against the fastest.", "1 is the fastest candidate at that T. Tinted are the regimes."),
    "floor": ("Ratio to the floor.", "How far from what the device allows; 1 is the floor. Arrows are what is above."),
    "regret": ("Regret.", "How much slower than the fastest candidate: of the policy, and of each candidate alone."),
}


def html(report: Report) -> str:
    """The page. The same values give the same bytes; every string of the records is escaped."""
    environment = Environment(
        loader=PackageLoader("hybrid_moe.learn.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "tokens": _tokens,
        "cell": _cell,
        "fastest": lambda row: min(row.slowdown, key=lambda c: row.slowdown[c], default=None),
        "upper_first": lambda text: text[:1].upper() + text[1:],
        "measured": functools.partial(_measured, report),
        "knows_rows": lambda view: any(row.local_rows or row.active_experts for row in view.rows),
        "several_workloads": lambda view: any(row.workloads > 1 for row in view.rows),
        # A long name breaks at its configuration, and nowhere else.
        "breakable": lambda choice: Markup("<wbr>[").join(str(choice).split("[")),
        "tint": functools.partial(_tint, report),
        "describe": draw.describe,
        "captions": lambda view: [(name, _caption(report, name)) for name in draw.available(report, view)],
        "wide": lambda figure: Markup(draw.svg(report, figure[0], figure[1], draw.WIDE)),
        "narrow": lambda figure: Markup(draw.svg(report, figure[0], figure[1], draw.NARROW)),
    }
    main, *others = report.loads
    return environment.get_template("page.html").render(
        report=report,
        policy=report.policy,
        style=Markup(draw.STYLE),
        problem=_in_words(report.policy.problem),
        verdict=verdict(report),
        published=report.by_speedup,
        main=main,
        others=others,
        # With one load, that load is all of them.
        several_loads=len({view.routing for view in report.loads}) > 1,
        cell_meaning=(
            "Latency over that of the fastest candidate at the T."
            if report.by_speedup
            else "Microseconds, and in brackets the ratio to the floor."
        ),
        options=_options(report.policy.learner),
        shown={input.digest.sha256 for input in report.inputs},
    )


def verdict(report: Report) -> str:
    """What the report comes to, in a sentence or two."""
    view = report.overall[0]
    own, best = view.policy, view.best_single
    loads = [load for load in report.loads if load.timing == view.timing]
    where = f"({draw.describe(view if len(loads) > 1 else loads[0])})"
    if own.regret is None:
        return f"The policy knows none of the candidates of these records {where}."
    over = f"Over the {own.regret.num_tokens} token counts measured {where}"
    if own.regret.num_tokens < len(view.rows):
        over = f"Over the {own.regret.num_tokens} of {len(view.rows)} token counts where it is known {where}"
    if own.regret.worst == 0:
        said = f"{over}, the policy runs the fastest candidate at every T."
    else:
        said = f"{over}, the policy is {_costs(own)}."
    if best is None or best.regret is None:
        return f"{said} No single candidate was right at every T."
    return f"{said} The best single candidate, {best.choice}, is {_costs(best)}{_against(best)}."


def _costs(standing: Standing) -> str:
    regret = standing.regret
    assert regret is not None
    worst = (
        ""
        if regret.worst_num_tokens is None
        else f", {_percent(regret.worst)} at worst (T = {regret.worst_num_tokens})"
    )
    return f"{_percent(regret.mean)} slower than the fastest at each T on average{worst}"


def _against(best: Standing) -> str:
    gain = best.policy_gain
    if gain is None or _percent(abs(gain)) == _percent(0):
        return ""
    if gain > 0:
        return f"; the policy is {_percent(gain)} faster (geometric mean)"
    return f"; the policy is {_percent(1 / (1 + gain) - 1)} slower (geometric mean)"


def _in_words(problem: MoEProblem) -> str:
    shared = f" and {problem.num_shared_experts} shared" if problem.num_shared_experts else ""
    return (
        f"{problem.num_local_experts} of {problem.num_experts} experts{shared} on this rank, top {problem.top_k} from "
        f"{problem.topk_group} of {problem.n_group} groups, {problem.routing_method} routing, hidden size "
        f"{problem.hidden_size}, intermediate size {problem.intermediate_size}, FP8 with scales of {problem.block} x "
        f"{problem.block} blocks, "
        f"{'gate' if problem.gate_first else 'up'} half first"
    )


def _options(options: LearnerOptions) -> str:
    given = options.model_dump(exclude_none=True)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())


def _caption(report: Report, name: str) -> tuple[str, str]:
    title, text = _CAPTIONS[name]
    return title, text + (" Arrows are peers above the axis." if name == "latency" and report.peers else "")


# ---- Cells ----


def _measured(report: Report, view: View) -> list[Candidate]:
    """Candidates and peers that have a figure somewhere in the view."""
    found: set[Candidate] = set()
    for row in view.rows:
        found |= {*row.slowdown, *row.latency}
    return [c for c in (*report.letters, *report.peers) if c in found]


def _cell(of: tuple[Row, Candidate]) -> str:
    row, choice = of
    if choice in row.latency:
        median = row.latency[choice].median
        ratio = f" ({median / row.floor_us:.2f})" if row.floor_us else ""
        return f"{median:.1f}{ratio}"
    return f"{row.slowdown[choice]:.3f}" if choice in row.slowdown and not row.latency else "–"


def _tint(report: Report, choice: Candidate) -> str:
    return draw.colour(report.letters[choice])


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _tokens(tokens: Sequence[int]) -> str:
    listed = [str(t) for t in tokens]
    return ", ".join(listed) if len(listed) <= 8 else f"{listed[0]} ... {listed[-1]} ({len(listed)} T)"
