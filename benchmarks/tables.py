"""Recorded rows as tables for people, and targets to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Recorded = dict[str, str]


def select(rows: Iterable[Recorded], **wanted: str) -> list[Recorded]:
    """Rows whose columns have these values."""
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def number(text: str) -> str:
    """Three significant digits, without an exponent where that reads better."""
    value = float(text)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}".replace("e-0", "e-")
    digits = f"{value:.3g}"
    return f"{float(digits):g}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Markdown table, first column left, others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


@dataclass(frozen=True)
class Target:
    """An aim: the ratio of two recorded times should be at least (or at most) this."""

    what: str
    measured: Callable[[Sequence[Recorded]], float | None]
    at_least: float | None = None
    at_most: float | None = None

    def line(self, rows: Sequence[Recorded]) -> str:
        value = self.measured(rows)
        aim = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        if value is None:
            return f"{'not measured':13s} {'':8s} {aim:8s} {self.what}"
        low, high = self.at_least or float("-inf"), self.at_most or float("inf")
        return f"{'met' if low <= value <= high else 'MISSED':13s} {value:<8.3g} {aim:8s} {self.what}"
