"""The findings of a fit as tables for other tools."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cortexloop.cli.fitting.findings import FitFindings

PREDICTIONS, NEURONS = "predictions.csv", "neurons.csv"


def write_tables(findings: FitFindings, folder: Path) -> None:
    """Write predictions.csv (a row per image) and neurons.csv (a row per neuron, excluded ones included)."""
    _write_csv(folder / PREDICTIONS, *predictions(findings))
    _write_csv(folder / NEURONS, *neurons(findings))


def predictions(findings: FitFindings) -> tuple[list[str], Iterable[Sequence[Any]]]:
    """Columns and rows: image, its number in the recording, held out or not, and of each neuron both responses."""
    recorded = findings.recorded
    held = np.zeros(len(recorded.names), bool)
    held[findings.held] = True
    columns = ["image", "number", "held_out"]
    for name in recorded.neurons:
        columns += [f"{name} predicted", f"{name} recorded"]
    both = np.stack([findings.predictions, recorded.responses], axis=2).reshape(len(recorded.names), -1)
    rows = (
        [name, number, int(out), *values]
        for name, number, out, values in zip(
            recorded.names, recorded.numbers.tolist(), held, both.tolist(), strict=True
        )
    )
    return columns, rows


def neurons(findings: FitFindings) -> tuple[list[str], Iterable[Sequence[Any]]]:
    """Columns and rows: how well each neuron is predicted, by each method, or why it was excluded."""
    model, ceiling = findings.model, findings.ceiling
    others = findings.methods[1:]
    columns = ["neuron", "r", "r2", "fev", "ceiling", "r_over_ceiling", "explained", "kept"]
    for method in others:
        columns += [f"r {method.name}", f"r2 {method.name}"]
    columns.append("excluded")
    rows: list[list[Any]] = []
    for n, name in enumerate(findings.recorded.neurons):
        top = math.nan if ceiling is None else float(ceiling[n])
        r = float(model.r[n])
        row = [name, r, float(model.r2[n]), float(model.fev[n]), top, r / top if top > 0 else math.nan]
        row += [float(findings.explained[n]), float(findings.kept[n])]
        for method in others:
            row += [float(method.r[n]), float(method.r2[n])]
        rows.append([*row, ""])
    rows += [[one.name, *[math.nan] * (len(columns) - 2), one.reason] for one in findings.recorded.excluded]
    return columns, rows


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers with nine digits; NaN is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return value
