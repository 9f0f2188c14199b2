"""The report's figures: latency, ratio to the floor and regret over T, as SVG for a page and as PNG.

In SVG the colours are CSS variables (`STYLE` defines them, light and dark) and the text stays text. The same values
give the same bytes, whatever the user's own matplotlib settings are.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.markers import CARETUP
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from ...candidate import Candidate
from .data import Report, Row, View
from .letters import index

# Okabe and Ito's colours, which stay apart for the colour-blind, and lighter ones for a dark ground: (light, dark).
_CANDIDATES = (
    ("#0072b2", "#4aa8e8"),
    ("#d55e00", "#ff8f45"),
    ("#009e73", "#35cfa0"),
    ("#aa4488", "#e79cc8"),
    ("#b08200", "#f2c14e"),
    ("#3a86a8", "#8ed3f4"),
)
_MARKERS = "osD^vPX"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_NAMED = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "muted": ("#5c636b", "#a3abb4"),
    "peer": ("#7a828c", "#8b949f"),
    "grid": ("#e3e6e9", "#32383f"),
    "paper": ("#ffffff", "#15181c"),
}
_COLOURS = _NAMED | {f"candidate-{i}": pair for i, pair in enumerate(_CANDIDATES)}


def _variables(theme: int) -> str:
    return "".join(f"--{name}:{pair[theme]};" for name, pair in _COLOURS.items())


# What a page needs for the figures: their colours, and which of the two widths is shown.
STYLE = f""":root{{color-scheme:light dark;{_variables(0)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}"""

_RATIO_TOP = 2.5  # of the axis of ratios to the floor

_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is one
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _NAMED["muted"][0],
    "axes.labelcolor": _NAMED["muted"][0],
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlecolor": _NAMED["ink"][0],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.color": _NAMED["grid"][0],
    "grid.linewidth": 0.6,
    "text.color": _NAMED["ink"][0],
    "xtick.color": _NAMED["muted"][0],
    "ytick.color": _NAMED["muted"][0],
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Shape:
    """Size of a figure in inches, its height without the legend, and of its text in points."""

    name: str
    width: float
    height: float
    text: float


WIDE = Shape("wide", 9.6, 4.0, 8.5)
NARROW = Shape("narrow", 4.0, 3.7, 8.5)
_PICTURE = Shape("picture", 9.6, 4.1, 9)

Plot = Callable[[Report, View, Axes], None]


def available(report: Report, view: View) -> dict[str, Plot]:
    """The figures that the records have the figures for, by name, in the order of the page."""
    figures: dict[str, Plot] = {}
    if report.by_speedup:
        figures["slowdown"] = _slowdown
    else:
        figures["latency"] = _latency
        if any(row.floor_us for row in view.rows):
            figures["floor"] = _floor_ratio
    figures["regret"] = _regret
    return figures


def svg(report: Report, view: View, name: str, shape: Shape = WIDE) -> str:
    """One figure of `available` as an ``<svg>`` element with CSS variables for colours.

    Raises
    ------
    KeyError
        The view has no such figure.
    """
    plot = available(report, view)[name]
    # The salt makes the ids of clip paths, which are unique in a page only if they differ from figure to figure.
    salt = "-".join((name, view.timing, view.routing or "all", shape.name))
    buffer = io.StringIO()
    with matplotlib.style.context(["default", _SETTINGS | {"svg.hashsalt": salt, "font.size": shape.text}]):
        figure = _figure(report, view, plot, shape)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(buffer.getvalue())


def png(report: Report, view: View) -> bytes:
    """The ratio to the floor, or the first figure of `available`, on white with a title, at 200 dots per inch."""
    figures = available(report, view)
    plot = figures.get("floor") or next(iter(figures.values()))
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", _SETTINGS | {"font.size": _PICTURE.text}]):
        figure = _figure(report, view, plot, _PICTURE, title=f"{report.device}: {describe(view)}")
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def describe(view: View) -> str:
    """Timing and routing load of a view in words."""
    timings = {"cuda_graph": "CUDA graph", "eager": "eager calls", "cupti": "CUPTI"}
    load = "all routing loads" if view.routing is None else f"routing load {view.routing}"
    return f"{timings[view.timing]}, {load}"


def colour(letter: str) -> str:
    """CSS variable of the candidate with this letter."""
    return f"var(--candidate-{index(letter) % len(_CANDIDATES)})"


# ---- The parts of a figure ----


def _figure(report: Report, view: View, plot: Plot, shape: Shape, title: str | None = None) -> Figure:
    figure = Figure(figsize=(shape.width, shape.height), layout="constrained")
    strip, main = figure.subplots(2, 1, sharex=True, height_ratios=[1, 18])
    _x_axis(main, [row.num_tokens for row in view.rows], wide=shape.width > 6)
    _y_labels(main)
    plot(report, view, main)
    _bands(report, strip, main, shape)
    handles, labels = main.get_legend_handles_labels()
    if any(span.decision.regime is None and span.first <= main.get_xlim()[1] for span in report.spans):
        handles.append(Patch(facecolor="none", edgecolor=_NAMED["muted"][0], hatch="////", linewidth=0.5))
        labels.append("the default, without results near")
    columns = _legend_columns(labels, shape)
    rows = math.ceil(len(labels) / columns) + (title is not None)
    figure.set_figheight(shape.height + rows * 1.6 * shape.text / 72)
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, fontsize=shape.text, handlelength=3, columnspacing=1.5
    )
    if title is not None:
        legend.set_title(title, prop=FontProperties(size=shape.text + 2, weight="bold"))
        legend.set_alignment("left")
    return figure


def _legend_columns(labels: Sequence[str], shape: Shape) -> int:
    # 0.62 of the font size is the mean width of a character; the handle and the gaps are six characters.
    characters = shape.width * 72 / (0.62 * shape.text)
    return max(1, min(len(labels), int(characters // (max(map(len, labels), default=1) + 6))))


def _x_axis(axes: Axes, tokens: Sequence[int], *, wide: bool) -> None:
    axes.set_xscale("log")
    low, high = min(tokens), max(tokens)
    edge = max(1.12, (high / low) ** 0.02)
    axes.set_xlim(low / edge, high * edge)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e5 else f"{x:.0e}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("T, number of tokens")


def _y_labels(axes: Axes) -> None:
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_log(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, dense enough to have a few of them."""
    if axes.dataLim.height == 0:  # one value alone has no scale
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _bands(report: Report, strip: Axes, main: Axes, shape: Shape) -> None:
    """The regimes: a strip with letters, and tinted behind the plot; hatched where the default runs."""
    low, high = main.get_xlim()
    decades = math.log10(high / low)
    inches = 0.86 * shape.width
    strip.set_ylim(0, 1)
    strip.set_yticks([])
    strip.grid(False)
    strip.tick_params(bottom=False, labelbottom=False, which="both")
    for spine in strip.spines.values():
        spine.set_visible(False)
    least = 10 ** (0.008 * decades)
    for span in report.spans:
        left, right = span.first - 0.5, math.inf if span.last is None else span.last + 0.5
        if span.last == span.first:  # a hair on this axis: no band is narrower than a mark
            left, right = span.first / least, span.first * least
        left, right = max(left, low), min(right, high)
        if left >= right:
            continue
        tint = _CANDIDATES[index(report.letters[span.decision.choice]) % len(_CANDIDATES)][0]
        default = span.decision.regime is None
        if span.last == span.first:  # wider than it is: cover what its neighbours drew
            strip.axvspan(left, right, color=_NAMED["paper"][0], linewidth=0)
        strip.axvspan(left, right, color=tint, alpha=0.15 if default else 0.45, linewidth=0)
        if default:
            strip.axvspan(left, right, facecolor="none", edgecolor=tint, alpha=0.5, hatch="////", linewidth=0)
        else:
            main.axvspan(left, right, color=tint, alpha=0.09, linewidth=0, zorder=0)
        room = inches * 72 * math.log10(right / left) / decades / (0.62 * shape.text)
        choice, letter = span.decision.choice, report.letters[span.decision.choice]
        config = ",".join(f"{key}={value}" for key, value in choice.config.items())
        names = [f"{letter}  {name}" for name in (str(choice), config) if name]
        text = next((t for t in (*names, letter) if len(t) <= room), None)
        if text is not None:
            middle = math.sqrt(left * right)
            ground = (
                {"facecolor": _NAMED["paper"][0], "alpha": 0.75, "edgecolor": "none", "pad": 1} if default else None
            )
            strip.text(middle, 0.45, text, ha="center", va="center", fontweight="bold", bbox=ground)


def _each(report: Report, view: View, value: Callable[[Row, Candidate], float | None]) -> Any:
    """For each candidate: its style, and T and value where there is one."""
    for choice, letter in report.letters.items():
        found = [(row.num_tokens, v) for row in view.rows if (v := value(row, choice)) is not None]
        place = index(letter)
        style = {
            "color": _CANDIDATES[place % len(_CANDIDATES)][0],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _DASHES[place % len(_DASHES)],
            "label": f"{letter}  {choice}",
            "markersize": 3.6,
            "linewidth": 1.4,
        }
        if found:
            yield choice, style, [t for t, _ in found], [v for _, v in found]


def _peers(report: Report, view: View, axes: Axes, value: Callable[[Row, Candidate], float | None]) -> None:
    for number, peer in enumerate(report.peers):
        found = [(row.num_tokens, v) for row in view.rows if (v := value(row, peer)) is not None]
        if found:
            axes.plot(
                [t for t, _ in found],
                [v for _, v in found],
                color=_NAMED["peer"][0],
                linestyle=(0, (4, 2 + number)),
                marker="x+12"[number % 4],
                markersize=5,
                linewidth=0.9,
                label=str(peer),
            )


def _cut_off(axes: Axes, top: float) -> None:
    """End the y axis at ``top``, with an arrow there for each point above it and the largest value of each line."""
    bottom = axes.get_ylim()[0]
    axes.set_ylim(bottom, top)
    for line in list(axes.get_lines()):
        tokens, values = (np.asarray(data, dtype=float) for data in line.get_data())
        above, label = values > top, str(line.get_label())
        if label.startswith("_") or not above.any():  # matplotlib's names of what isn't in the legend
            continue
        axes.plot(
            tokens[above],
            np.full(above.sum(), top),
            color=line.get_color(),
            linestyle="none",
            marker=CARETUP,
            markersize=5,
            clip_on=False,
            zorder=5,
        )
        highest = values.max()
        line.set_label(f"{label} (to {highest:.0f})" if highest >= 100 else f"{label} (to {highest:.3g})")


# ---- The figures ----


def _latency(report: Report, view: View, axes: Axes) -> None:
    def median(row: Row, choice: Candidate) -> float | None:
        return row.latency[choice].median if choice in row.latency else None

    for choice, style, tokens, values in _each(report, view, median):
        bands = [(t, b) for row in view.rows if (t := row.num_tokens) in tokens and (b := _band(row, choice))]
        axes.fill_between(
            [t for t, _ in bands],
            [low for _, (low, _) in bands],
            [high for _, (_, high) in bands],
            color=style["color"],
            alpha=0.25,
            linewidth=0,
        )
        axes.plot(tokens, values, **style)
    _peers(report, view, axes, median)
    floor = [(row.num_tokens, row.floor_us) for row in view.rows if row.floor_us]
    if floor:
        axes.plot(
            [t for t, _ in floor],
            [f for _, f in floor],
            color=_NAMED["ink"][0],
            linewidth=1,
            label="floor of the device",
        )
    _plain_log(axes)
    slowest = max((row.latency[c].median for row in view.rows for c in row.slowdown if c in row.latency), default=0.0)
    if report.peers:
        _cut_off(axes, min(axes.get_ylim()[1], 1.5 * slowest))
    axes.set_ylabel("microseconds")


def _band(row: Row, choice: Candidate) -> tuple[float, float] | None:
    latency = row.latency[choice]
    return None if latency.p10 is None or latency.p90 is None else (latency.p10, latency.p90)


def _floor_ratio(report: Report, view: View, axes: Axes) -> None:
    def ratio(row: Row, choice: Candidate) -> float | None:
        return row.latency[choice].median / row.floor_us if row.floor_us and choice in row.latency else None

    for _, style, tokens, values in _each(report, view, ratio):
        axes.plot(tokens, values, **style)
    _peers(report, view, axes, ratio)
    axes.axhline(1, color=_NAMED["ink"][0], linewidth=1, label="floor of the device")
    # What can be chosen stays legible however slow another is: the fastest at every T is in the picture.
    fastest = [min(found) for row in view.rows if (found := [r for c in row.slowdown if (r := ratio(row, c))])]
    axes.set_ylim(bottom=0.95)
    _cut_off(axes, max(_RATIO_TOP, 1.1 * max(fastest, default=1.0)))
    axes.set_ylabel("latency / floor")


def _slowdown(report: Report, view: View, axes: Axes) -> None:
    for _, style, tokens, values in _each(report, view, lambda row, choice: row.slowdown.get(choice)):
        axes.plot(tokens, values, **style)
    _plain_log(axes)
    axes.set_ylabel("latency / that of the fastest")


def _regret(report: Report, view: View, axes: Axes) -> None:
    highest = 0.0
    for _, style, tokens, values in _each(report, view, lambda row, choice: row.regret.get(choice)):
        axes.plot(tokens, [100 * v for v in values], **style)
        highest = max(highest, *values)
    own = [(row.num_tokens, 100 * row.policy_regret) for row in view.rows if row.policy_regret is not None]
    if own:
        axes.plot(
            [t for t, _ in own], [v for _, v in own], color=_NAMED["ink"][0], linewidth=2.2, label="policy", zorder=4
        )
    if highest > 0.8:  # linear, the small ones would be a flat line
        axes.set_yscale("symlog", linthresh=10, linscale=0.6)
        ticks = [0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
        axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if t <= 150 * highest]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
    axes.set_ylim(bottom=-2 if highest <= 0.8 else -0.5)
    axes.set_ylabel("slower than the fastest")


# ---- From matplotlib's file to a part of a page ----


def _for_page(text: str) -> str:
    """The ``<svg>`` alone: colours as CSS variables, no size, ids or namespaces that a page doesn't need."""
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 stroke-linejoin="round">', text, count=1)
    text = text.replace("xlink:href", "href")
    text = text.replace("font-family: 'DejaVu Sans'; ", "")
    # matplotlib's style sheet would hold for the whole page.
    text = re.sub(r"\s*<defs>\s*<style .*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    for name, (light, _) in _COLOURS.items():
        text = re.sub(light, f"var(--{name})", text, flags=re.IGNORECASE)
    return text
