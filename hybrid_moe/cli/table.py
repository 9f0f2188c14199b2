"""Tables that fit the terminal: a candidate's name is never cut, it gives way to its letter and a legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..candidate import Candidate
from ..learn.report.letters import assign_letters, index

# By the place of a candidate's letter, as in the report's figures.
GROUNDS = ("blue", "dark_orange", "green", "magenta", "yellow", "cyan")

Cell = str | Candidate
Name = Callable[[Candidate], str]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its head, its side, and whether it may be left out where there is no room."""

    head: Cell
    right: bool = False
    optional: bool = False


_T = TypeVar("_T")


def shortened(items: Sequence[_T], most: int = 200) -> tuple[list[_T], int, list[_T]]:
    """The items to show to people: the first, how many are left out in the middle, and the last."""
    if len(items) <= most:
        return list(items), 0, []
    return list(items[: most // 2]), len(items) - 2 * (most // 2), list(items[-(most // 2) :])


class Fitted:
    """A table of cells in markup and of candidates.

    As wide as there is room: with the candidates' names; else with their letters and a legend below, and heads of one
    word a line; else without the optional columns, the last first. What is still too wide wraps. ``legend`` is whether
    there is none yet.
    """

    def __init__(self, columns: Sequence[Column], *, legend: bool = True) -> None:
        self._columns = list(columns)
        self._all_rows: list[list[Cell]] = []
        self._legend = legend

    def add(self, *cells: Cell) -> None:
        """Add a row. Of hundreds of rows, those in the middle are counted and not shown."""
        self._all_rows.append(list(cells))

    @property
    def _rows(self) -> list[list[Cell]]:
        first, omitted, last = shortened(self._all_rows)
        if not omitted:
            return first
        return [*first, [f"... {omitted} more", *[""] * (len(self._columns) - 1)], *last]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        named = [c for c in (*(column.head for column in self._columns), *(c for row in self._rows for c in row))]
        letters = assign_letters(c for c in named if isinstance(c, Candidate))

        def fits(table: Table) -> bool:
            return Measurement.get(console, options.update(width=10_000), table).maximum <= options.max_width

        kept = list(range(len(self._columns)))
        table = self._table(kept, str)
        if fits(table):
            yield table
            return
        table = self._table(kept, letters.__getitem__, narrow=True)
        for place in reversed(range(len(self._columns))):
            if fits(table):
                break
            if self._columns[place].optional:
                kept.remove(place)
                table = self._table(kept, letters.__getitem__, narrow=True)
        yield table
        if not self._legend:
            return
        shown = {cell for place in kept for cell in (self._columns[place].head, *(row[place] for row in self._rows))}
        yield legend({c: letter for c, letter in letters.items() if c in shown})

    def _table(self, kept: Sequence[int], name: Name, *, narrow: bool = False) -> Table:
        def text(cell: Cell) -> str:
            return escape(name(cell)) if isinstance(cell, Candidate) else cell

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for place in kept:
            column = self._columns[place]
            head = text(column.head)
            table.add_column(head.replace(" ", "\n") if narrow else head, justify="right" if column.right else "left")
        for row in self._rows:
            table.add_row(*(text(row[place]) for place in kept))
        return table


def legend(letters: dict[Candidate, str]) -> Text:
    """A line for each letter."""
    text = Text()
    for candidate, letter in letters.items():
        text.append(f" {letter} ", style=f"{ground(letter)} reverse")
        text.append(f" {candidate}\n")
    return text


def ground(letter: str) -> str:
    """The colour of a letter."""
    return GROUNDS[index(letter) % len(GROUNDS)]
