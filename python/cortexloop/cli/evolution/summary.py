"""What `cortexloop evolve` prints at the end: tables for people, or one JSON document."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from cortexloop.cli.console import print_json, stderr, stdout
from cortexloop.cli.evolution import store
from cortexloop.cli.evolution.compare import Comparison, Entry, Estimate
from cortexloop.cli.evolution.findings import EvolveFindings, Versus

ROWS = 24
"""Neurons in the printed table; the report and the files have all of them."""


def summary(findings: EvolveFindings) -> dict[str, Any]:
    """The key numbers as plain data."""
    settings, layout = findings.settings, findings.layout
    document: dict[str, Any] = {
        "out": str(findings.folder.out),
        "report": str(findings.folder.out / store.REPORT),
        "seconds": findings.record["seconds"],
        "models": len(findings.bank),
        "evolutions": len(findings.conditions) * layout.problems,
        "generations": settings.generations,
        "population": settings.population,
        "machine": findings.record["machine"],
        "speed": speed(findings),
        "neurons": neurons(findings),
    }
    if findings.natural is not None:
        document["natural"] = {
            "images": findings.natural.count,
            "skipped": [{"name": s.name, "reason": s.reason} for s in findings.natural.skipped],
            "evolved_to_natural": [_versus(findings, versus) for versus in findings.versus],
        }
    if findings.comparison is not None:
        document["comparison"] = _comparison(findings, findings.comparison)
    return document


def speed(findings: EvolveFindings) -> dict[str, Any]:
    """Generations per second, all evolutions counted, and where the time went."""
    total = sum(findings.seconds.values())
    computed = len(findings.conditions) * findings.layout.problems * findings.settings.generations
    return {
        "generations_per_second": computed / total if total else math.nan,
        "images_per_second": computed * findings.settings.population / total if total else math.nan,
        "seconds": total,
        "share": {stage: seconds / total if total else math.nan for stage, seconds in findings.seconds.items()},
    }


def neurons(findings: EvolveFindings) -> list[dict[str, Any]]:
    """Of each neuron: response to grey, means of the first and last generation, best response, over all its runs."""
    mean = findings.traces["clean_mean"]
    best = findings.best_clean()
    found = []
    for n, name in enumerate(findings.bank.names):
        neuron: dict[str, Any] = {
            "name": name,
            "grey": float(findings.grey[n]),
            "first_generation": float(np.median(mean[:, 0, n])),
            "last_generation": float(np.median(mean[:, -1, n])),
            "best": float(findings.extreme(best[:, n], (0, 1))),
        }
        if findings.natural is not None:
            neuron["best_natural"] = {
                "name": findings.natural.names[n],
                "response": float(findings.natural.best[n]),
            }
            neuron["ratio"] = float(findings.versus[-1].found.ratios[n])
        found.append(neuron)
    return found


def _versus(findings: EvolveFindings, versus: Versus) -> dict[str, Any]:
    found = versus.found
    return {
        "optimiser": None if versus.condition is None else versus.condition[0],
        "noise": None if versus.condition is None else versus.condition[1],
        "neurons": found.neurons,
        "exceeding": found.exceeding,
        "fraction": found.fraction.value,
        "fraction_interval": [found.fraction.low, found.fraction.high],
        "median_ratio": found.median,
        "without_ratio": [findings.bank.names[n] for n in np.flatnonzero(np.isnan(found.ratios))],
    }


def _comparison(findings: EvolveFindings, comparison: Comparison) -> dict[str, Any]:
    def entry(one: Entry) -> dict[str, Any]:
        found: dict[str, Any] = {
            "optimiser": one.optimiser,
            "noise": "all" if one.noise is None else one.noise,
            "score": one.score.value,
            "interval": [one.score.low, one.score.high],
        }
        if one.ratio is not None:
            found |= {"ratio": one.ratio.value, "ratio_interval": [one.ratio.low, one.ratio.high]}
        return found

    return {
        "neurons": comparison.neurons,
        "left_out": [findings.bank.names[n] for n in comparison.apart],
        "ratio_to": comparison.genetic,
        "final": [entry(one) for one in comparison.final],
        "best": [entry(one) for one in comparison.best],
    }


def summarise(findings: EvolveFindings) -> None:
    """Print the summary."""
    if findings.options.json:
        print_json(store.plain(summary(findings)))
        return
    if findings.natural is not None:
        for skipped in findings.natural.skipped:
            stderr().print(f"[yellow]skipped:[/] {escape(skipped.name)}: {escape(skipped.reason)}", soft_wrap=True)
    console = stdout()
    console.print(_neuron_table(findings))
    if findings.comparison is not None:
        console.print(_comparison_table(findings, findings.comparison))
        console.print(
            "score: mean noise-free response to the last generation above grey, as a share of the largest seen for the "
            f"neuron in any run; mean over {findings.comparison.neurons} neurons, 95 % bootstrap interval",
            soft_wrap=True,
        )
    for versus in findings.versus[-1:]:
        console.print(_natural_line(versus), soft_wrap=True)
    found = speed(findings)
    share = ", ".join(f"{stage} {100 * value:.0f} %" for stage, value in found["share"].items())
    machine = findings.record["machine"]
    console.print(
        f"{found['generations_per_second']:,.0f} generations/s, {found['images_per_second']:,.0f} images/s "
        f"({share}); {machine['backend']} backend, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}",
        soft_wrap=True,
    )
    report = findings.folder.out / store.REPORT
    console.print(f"report: [bold]{escape(str(report))}[/] ({findings.record['seconds']:.0f} s)", soft_wrap=True)


def _neuron_table(findings: EvolveFindings) -> Table:
    runs = len(findings.conditions) * findings.layout.problems
    title = f"{len(findings.bank)} models, {runs} evolutions of {findings.settings.generations} generations"
    table = Table(title=title, title_justify="left")
    table.add_column("neuron", no_wrap=True)
    for column in ("grey", "first gen.", "last gen.", "best image"):
        table.add_column(column, justify="right")
    if findings.natural is not None:
        table.add_column("natural", justify="right")
        table.add_column("ratio", justify="right")
    found = neurons(findings)
    for neuron in found[:ROWS]:
        cells = [f"{neuron[key]:.2f}" for key in ("grey", "first_generation", "last_generation", "best")]
        if findings.natural is not None:
            ratio = neuron["ratio"]
            cells += [f"{neuron['best_natural']['response']:.2f}", "" if math.isnan(ratio) else f"{ratio:.2f}"]
        table.add_row(escape(neuron["name"]), *cells)
    if len(found) > ROWS:
        table.caption = f"and {len(found) - ROWS} more"
    return table


def _comparison_table(findings: EvolveFindings, comparison: Comparison) -> Table:
    table = Table(title="normalised score", title_justify="left")
    table.add_column("optimiser", no_wrap=True)
    levels = list(dict.fromkeys(entry.noise for entry in comparison.final))
    for noise in levels:
        table.add_column("all" if noise is None else findings.settings.noise_label(noise), justify="right")
    if comparison.genetic is not None:
        table.add_column(f"to {comparison.genetic}", justify="right")
    last = levels[-1]
    for name in findings.settings.optimisers:
        entries = {entry.noise: entry for entry in comparison.final if entry.optimiser == name}
        cells = [interval(entries[noise].score) for noise in levels]
        ratio = entries[last].ratio
        if ratio is not None:
            cells.append(interval(ratio, 2))
        table.add_row(name, *cells)
    return table


def interval(estimate: Estimate, digits: int = 3) -> str:
    """The value, and below it the interval if there is one."""
    value = "" if math.isnan(estimate.value) else f"{estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return value
    return f"{value}\n[dim]{estimate.low:.{digits}f} to {estimate.high:.{digits}f}[/]"


def _natural_line(versus: Versus) -> str:
    found = versus.found
    if not found.neurons:
        return "no neuron responds to any natural image above grey: nothing to compare evolved images with"
    apart = int(np.isnan(found.ratios).sum())
    left = f"; {apart} without a natural response above grey left out" if apart else ""
    return (
        f"best evolved to best natural image: median ratio [bold]{found.median:.2f}[/], above 1 in "
        f"[bold]{found.exceeding} of {found.neurons}[/] neurons "
        f"({100 * found.fraction.low:.0f} to {100 * found.fraction.high:.0f} %){left}"
    )
