"""What `cortexloop fit` prints at the end: a table for people, or one JSON document."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from cortexloop.cli.console import print_json, stderr, stdout
from cortexloop.cli.fitting.findings import FitFindings
from cortexloop.cli.fitting.report import number

ROWS = 24
"""Neurons in the printed table; the report and the files have all of them."""

NAME = 24
"""Characters of a neuron's name that are never cut, however narrow the window."""


def summary(findings: FitFindings, report: str) -> dict[str, Any]:
    """The key numbers as plain data."""
    recorded = findings.recorded
    return {
        "out": str(findings.out),
        "report": report,
        "seconds": findings.record["seconds"],
        "source": findings.source,
        "features": list(findings.feature_shape),
        "images": {"fitted": len(recorded.names) - len(findings.held), "held_out": len(findings.held)},
        "rank": findings.options.rank,
        "dead_features": findings.dead,
        "median_r": {method.name: _median(method.r) for method in findings.methods},
        "neurons": [_neuron(findings, n) for n in range(len(recorded.neurons))],
        "excluded": [{"name": one.name, "reason": one.reason} for one in recorded.excluded],
        "dropped_images": [{"name": one.name, "reason": one.reason} for one in (*recorded.dropped, *findings.skipped)],
        "notes": list(findings.notes),
    }


def _neuron(findings: FitFindings, n: int) -> dict[str, Any]:
    found: dict[str, Any] = {"name": findings.recorded.neurons[n]}
    found["r"], found["r2"], found["fev"] = (
        float(v[n]) for v in (findings.model.r, findings.model.r2, findings.model.fev)
    )
    if findings.ceiling is not None:
        found["ceiling"] = float(findings.ceiling[n])
    found["explained"], found["kept"] = float(findings.explained[n]), float(findings.kept[n])
    for method in findings.methods[1:]:
        found[f"r_{method.name}"] = float(method.r[n])
    return found


def _median(values: np.ndarray[Any, Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("nan")


def summarise(findings: FitFindings) -> None:
    """Print it."""
    report = str(findings.out / "report.html")
    if findings.options.json:
        print_json(summary(findings, report))
        return
    recorded, model = findings.recorded, findings.model
    for note in findings.notes:
        stderr().print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    for kind, entries in (("neuron", recorded.excluded), ("image", (*recorded.dropped, *findings.skipped))):
        for one in entries[:ROWS]:
            stderr().print(f"[yellow]{kind} left out:[/] {escape(one.name)}: {escape(one.reason)}", soft_wrap=True)
        if len(entries) > ROWS:
            stderr().print(f"... and {len(entries) - ROWS} more {kind}s, listed in run.json", soft_wrap=True)
    n_held = len(findings.held)
    title = f"{len(recorded.neurons)} neurons, {len(recorded.names) - n_held:,} images to fit on, {n_held:,} held out"
    if findings.methods[1:]:
        title += f"; r of {', '.join(method.name for method in findings.methods[1:])}, too"
    table = Table(title=title, title_justify="left")
    longest = max(len(name) for name in recorded.neurons)
    table.add_column("neuron", min_width=min(longest, NAME))
    ceiling = findings.ceiling
    headings = ["r", *(["ceiling"] if ceiling is not None else []), "R2", *(m.name for m in findings.methods[1:])]
    for heading in (*headings, "explained", "kept"):
        table.add_column(heading, justify="right", min_width=5)
    order = np.argsort(-np.nan_to_num(model.r, nan=-2), kind="stable")
    for n in order[:ROWS]:
        values = [model.r[n], *([ceiling[n]] if ceiling is not None else []), model.r2[n]]
        values += [method.r[n] for method in findings.methods[1:]]
        table.add_row(
            escape(recorded.neurons[n]), *(number(float(v)) for v in (*values, findings.explained[n], findings.kept[n]))
        )
    console = stdout()
    console.print(table)
    if len(order) > ROWS:
        console.print(f"... and {len(order) - ROWS} more neurons, in neurons.csv")
    medians = ", ".join(f"{method.label} [bold]{_median(method.r):.3f}[/]" for method in findings.methods)
    console.print(f"median r on held-out images: {medians}", soft_wrap=True)
    console.print(f"report: [bold]{escape(report)}[/] ({findings.record['seconds']:.0f} s)", soft_wrap=True)
