"""Evolutions as one HTML file: images, charts and tables inside, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from cortexloop import evolve
from cortexloop.cli import charts
from cortexloop.cli.evolution.compare import Comparison, Entry, Estimate
from cortexloop.cli.evolution.findings import Double, EvolveFindings, Shown, Versus
from cortexloop.cli.evolution.summary import speed
from cortexloop.cli.report import DESCRIPTIONS, breakable, shown_number

LEVEL_STYLES = ("b", "a", "bar", *charts.CURVES[3:])
"""Colours of noise levels in the charts of the comparison."""

MANY_SEEDS = 10
"""With more seeds than this, bands leave out the outer tenths."""

BANDS = 4
"""With more curves than this in one chart, bands would hide each other."""


def render(findings: EvolveFindings) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cortexloop.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"number": shown_number, "breakable": breakable}
    settings, options = findings.settings, findings.options
    several = len(findings.conditions) > 1
    picked = [_strongest(findings, n) for n in range(len(findings.bank))]
    colors = dict(zip(settings.optimisers, charts.CURVES * 2, strict=False))
    context: dict[str, Any] = {
        "title": _title(findings),
        "textbook": options.models is None,
        "settings": settings,
        "options": options,
        "record": findings.record,
        "n_models": len(findings.bank),
        "evolutions": len(findings.conditions) * findings.layout.problems,
        "levels": [settings.noise_label(level) for level in settings.noise],
        "noisy": any(not settings.quiet(level) for level in settings.noise),
        "several": several,
        "legend": [(name, f"var(--{colors[name]})") for name in settings.optimisers],
        "speed": speed(findings),
        "sheet": [_sheet(findings, n, picked[n][2]) for n in range(len(findings.bank))],
        "cards": [_card(findings, n, picked[n], colors) for n in range(min(len(findings.bank), options.show))],
        "comparison": None if findings.comparison is None else _comparison(findings, findings.comparison),
        "natural": findings.natural,
        "versus": [_versus(findings, versus) for versus in findings.versus],
        "versus_table": _versus_table(findings),
        "ratio_chart": _ratio_chart(findings),
        "generator": _told(findings.record["generator"]),
        "optimisers": [_optimiser(name, made) for name, made in findings.record["optimisers"].items()],
        "spread": _spread_text(findings),
        "height": findings.bank.height,
        "width": findings.bank.width,
    }
    return environment.get_template("evolve.html").render(context)


def _title(findings: EvolveFindings) -> str:
    n = len(findings.bank)
    if findings.options.models is None:
        return f"Images evolved for {'nine' if n == 9 else n} textbook neuron{'' if n == 1 else 's'}"
    return f"Images evolved for {n:,} model neuron{'' if n == 1 else 's'}"


_TOLD_ELSEWHERE = ("generator", "optimiser", "population", "seed", "minimise", "dtype", "height", "width")


def _told(settings: dict[str, Any]) -> str:
    """Settings of a generator or optimiser in one line; long ones are in run.json."""
    parts = []
    for key, value in settings.items():
        if key in _TOLD_ELSEWHERE or (isinstance(value, (dict, list, tuple)) and len(str(value)) > 60):
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{key.replace('_', ' ')} {text if len(text) <= 24 else text[:12] + '...'}")
    return ", ".join(parts)


def _optimiser(name: str, made: dict[str, Any]) -> tuple[str, str, str]:
    recipe = evolve.OPTIMISERS[name]
    return name, f"{recipe.description} ({recipe.source})", _told(made).capitalize()


def _strongest(findings: EvolveFindings, neuron: int) -> tuple[int, int, Shown]:
    """(condition, seed, images) of the run whose best image drives the neuron most."""
    runs = [
        (c, s, findings.shown(c, neuron, s))
        for c in range(len(findings.conditions))
        for s in range(findings.layout.seeds)
    ]
    return max(runs, key=lambda run: findings.sign * run[2].best_response)


def _sheet(findings: EvolveFindings, neuron: int, shown: Shown) -> dict[str, Any]:
    carded = neuron < findings.options.show
    return {
        "name": findings.bank.names[neuron],
        "anchor": f"#neuron-{neuron}" if carded else None,
        "image": charts.picture(shown.best, lossless=False),
        "response": shown.best_response,
    }


# ------------------------------------------------------------------------------------------------------- cards


def _card(
    findings: EvolveFindings, neuron: int, picked: tuple[int, int, Shown], colors: dict[str, str]
) -> dict[str, Any]:
    condition, seed, shown = picked
    grey, natural = float(findings.grey[neuron]), findings.natural
    name = findings.bank.names[neuron]
    card: dict[str, Any] = {
        "name": name,
        "anchor": f"neuron-{neuron}",
        "description": DESCRIPTIONS.get(name, "") if findings.options.models is None else "",
        "grey": grey,
        "run": _run_label(findings, condition, seed),
        "best": charts.picture(shown.best),
        "best_response": shown.best_response,
        "best_generation": shown.best_generation,
        "steps": [
            *((charts.picture(image, lossless=False), value, f"generation {g}") for g, image, value in shown.frames),
            (charts.picture(shown.centre, lossless=False), shown.centre_response, "final estimate"),
        ],
        "natural": None,
        "ratio": None,
        "others": _others(findings, neuron),
        "charts": _card_charts(findings, neuron, colors),
    }
    if natural is not None:
        response = float(natural.best[neuron])
        card["natural"] = (charts.picture(natural.pixels[neuron], lossless=False), response, natural.names[neuron])
        if findings.sign * (response - grey) > 0:
            card["ratio"] = (shown.best_response - grey) / (response - grey)
    return card


def _run_label(findings: EvolveFindings, condition: int, seed: int) -> str:
    """Which run the images of a card come from, where there are several."""
    optimiser, noise = findings.conditions[condition]
    parts = []
    if len(findings.settings.optimisers) > 1:
        parts.append(optimiser)
    if len(findings.settings.noise) > 1:
        parts.append(findings.settings.noise_label(noise))
    if findings.layout.seeds > 1:
        parts.append(f"seed {findings.settings.seed + seed}")
    return ", ".join(parts)


def _others(findings: EvolveFindings, neuron: int) -> list[dict[str, Any]]:
    """Rows of best images: of every seed, or of every optimiser (its best seed) at each noise level."""
    seeds = range(findings.layout.seeds)
    if len(findings.conditions) == 1:
        if len(seeds) == 1:
            return []
        found = [(f"seed {findings.settings.seed + s}", findings.shown(0, neuron, s)) for s in seeds]
        return [{"caption": "Best image of every seed", "images": [_thumb(label, shown) for label, shown in found]}]
    rows = []
    for level in findings.settings.noise:
        images = []
        for c, (optimiser, noise) in enumerate(findings.conditions):
            if noise == level:
                runs = [findings.shown(c, neuron, s) for s in seeds]
                images.append(_thumb(optimiser, max(runs, key=lambda shown: findings.sign * shown.best_response)))
        of_seeds = ", of its seeds" if len(seeds) > 1 else ""
        caption = f"Best image of every optimiser{of_seeds}: {findings.settings.noise_label(level)}"
        rows.append({"caption": caption, "images": images})
    return rows


def _thumb(label: str, shown: Shown) -> tuple[str, float, str]:
    return charts.picture(shown.best, lossless=False), shown.best_response, label


def _card_charts(findings: EvolveFindings, neuron: int, colors: dict[str, str]) -> list[tuple[Markup, Markup]]:
    """(chart, caption) pairs: scores, and the norm of the codes."""
    settings, natural = findings.settings, findings.natural
    level = None if natural is None else (float(natural.best[neuron]), "best natural image")
    if len(findings.conditions) == 1:
        return _single_charts(findings, neuron, level)
    width = 322.0 if len(settings.noise) < 3 else 235.5
    found = []
    for noise in settings.noise:
        series = _by_optimiser(findings, "clean_mean", neuron, noise, colors)
        chart = charts.line_chart(series, "generation", "mean response", level=level, width=width)
        found.append((chart, Markup("Population mean, ") + settings.noise_label(noise)))
    first = settings.noise[0]
    series = _by_optimiser(findings, "code_norm", neuron, first, colors)
    chart = charts.line_chart(series, "generation", "norm", width=width)
    found.append((chart, Markup("Norm of the codes, ") + settings.noise_label(first)))
    return found


def _single_charts(
    findings: EvolveFindings, neuron: int, level: tuple[float, str] | None
) -> list[tuple[Markup, Markup]]:
    noisy = not findings.settings.quiet(findings.conditions[0][1])
    traces = {name: values[0, :, neuron] for name, values in findings.traces.items()}  # [G, S]
    series = [_series(traces["clean_mean"], "a")]
    caption = "Mean of the population"
    if noisy:
        series.insert(0, _series(traces["mean"], "b", thin=True, band=False))
        caption += ': <b class="b">as observed</b> and <b class="a">without noise</b>'
    references = traces["reference_mean"]
    if np.isfinite(references).all():
        series.insert(0, _series(references, "bar", thin=True))
        caption += ', <b class="bar">reference images</b>'
    best = findings.traces["clean_min" if findings.settings.minimise else "clean_max"][0, :, neuron]
    so_far = (np.minimum if findings.settings.minimise else np.maximum).accumulate(best, axis=0)
    return [
        (charts.line_chart(series, "generation", "response"), Markup(caption)),
        (charts.line_chart([_series(so_far, "a")], "generation", "response", level=level), Markup("Best image so far")),
        (charts.line_chart([_series(traces["code_norm"], "a")], "generation", "norm"), Markup("Norm of the codes")),
    ]


def _by_optimiser(
    findings: EvolveFindings, trace: str, neuron: int, noise: float, colors: dict[str, str]
) -> list[charts.Series]:
    band = len(findings.settings.optimisers) <= BANDS
    return [
        _series(findings.traces[trace][c, :, neuron], colors[optimiser], band=band)
        for c, (optimiser, level) in enumerate(findings.conditions)
        if level == noise
    ]


def _series(values: Double, style: str, *, thin: bool = False, band: bool = True) -> charts.Series:
    """Median over seeds of [generations, seeds], with the band of their spread."""
    seeds = values.shape[1]
    generation = np.arange(len(values), dtype=float)
    middle = np.median(values, axis=1)
    if seeds == 1 or not band:
        return charts.Series(generation, middle, style, thin=thin)
    outer = (0, 100) if seeds <= MANY_SEEDS else (10, 90)
    low, high = np.percentile(values, outer, axis=1)
    return charts.Series(generation, middle, style, low, high, thin)


def _spread_text(findings: EvolveFindings) -> str:
    seeds = findings.layout.seeds
    if seeds == 1:
        return ""
    band = "their range" if seeds <= MANY_SEEDS else "the range of the middle 80 %"
    if len(findings.settings.optimisers) > BANDS:
        return f"Curves are medians over {seeds} seeds."
    return f"Curves are medians over {seeds} seeds, bands {band}."


# --------------------------------------------------------------------------------------------------- comparisons


def _comparison(findings: EvolveFindings, comparison: Comparison) -> dict[str, Any]:
    levels = list(dict.fromkeys(entry.noise for entry in comparison.final))
    measures = (
        ("Mean of the last generation", comparison.final),
        ("Best image so far", comparison.best),
    )
    return {
        "neurons": comparison.neurons,
        "apart": [findings.bank.names[n] for n in comparison.apart],
        "genetic": comparison.genetic,
        "levels": ["all" if noise is None else findings.settings.noise_label(noise) for noise in levels],
        "tables": [
            {"title": title, "rows": _table(findings, entries, levels), "chart": _chart(findings, entries)}
            for title, entries in measures
        ],
        "level_styles": [
            (findings.settings.noise_label(noise), f"var(--{style})")
            for noise, style in zip(findings.settings.noise, LEVEL_STYLES * 2, strict=False)
        ],
    }


def _ranked(findings: EvolveFindings, entries: tuple[Entry, ...]) -> list[str]:
    """Optimisers by their score over all noise levels, best first."""
    last = entries[-1].noise
    scores = {entry.optimiser: entry.score.value for entry in entries if entry.noise == last}
    return sorted(findings.settings.optimisers, key=lambda name: -np.nan_to_num(scores[name], nan=-np.inf))


def _table(findings: EvolveFindings, entries: tuple[Entry, ...], levels: list[float | None]) -> list[dict[str, Any]]:
    table = {(entry.optimiser, entry.noise): entry for entry in entries}
    highest = {level: max(e.score.value for e in entries if e.noise == level) for level in levels}
    rows = []
    for name in _ranked(findings, entries):
        own = [table[name, level] for level in levels]
        rows.append(
            {
                "name": name,
                "cells": [(*_cell(e.score, 3), e.score.value == highest[e.noise]) for e in own],
                "ratio": None if own[-1].ratio is None else _cell(own[-1].ratio, 2),
            }
        )
    return rows


def _cell(estimate: Estimate, digits: int) -> tuple[str, str]:
    """(value, interval) as texts."""
    if math.isnan(estimate.value):
        return "\N{EN DASH}", ""
    if math.isnan(estimate.low):
        return shown_number(estimate.value, digits), ""
    return shown_number(
        estimate.value, digits
    ), f"{shown_number(estimate.low, digits)} to {shown_number(estimate.high, digits)}"


def _chart(findings: EvolveFindings, entries: tuple[Entry, ...]) -> Markup:
    names = _ranked(findings, entries)
    styles = dict(zip(findings.settings.noise, LEVEL_STYLES * 2, strict=False))
    intervals = [
        charts.Interval(names.index(e.optimiser), e.score.value, e.score.low, e.score.high, styles[e.noise])
        for e in entries
        if e.noise is not None and math.isfinite(e.score.value)
    ]
    return charts.interval_chart(names, intervals, "normalised score")


def _versus(findings: EvolveFindings, versus: Versus) -> dict[str, Any]:
    found = versus.found
    if versus.condition is None:
        label = "best of all runs"
    elif len(findings.conditions) > 1:
        label = f"{versus.condition[0]}, {findings.settings.noise_label(versus.condition[1])}"
    else:
        label = "one evolution" if findings.layout.seeds > 1 else "best evolved image"
    return {
        "label": label,
        "median": found.median,
        "exceeding": found.exceeding,
        "neurons": found.neurons,
        "fraction": 100 * found.fraction.value,
        "interval": (100 * found.fraction.low, 100 * found.fraction.high),
        "apart": [findings.bank.names[n] for n in np.flatnonzero(np.isnan(found.ratios))],
    }


def _versus_table(findings: EvolveFindings) -> list[tuple[str, list[dict[str, Any]]]]:
    """Optimisers by noise levels, where there are several conditions."""
    if findings.natural is None or len(findings.conditions) == 1:
        return []
    cells = {versus.condition: _versus(findings, versus) for versus in findings.versus}
    settings = findings.settings
    return [(name, [cells[name, noise] for noise in settings.noise]) for name in settings.optimisers]


def _ratio_chart(findings: EvolveFindings) -> Markup | None:
    """Ratios of the best of all runs; a single one makes no histogram."""
    if not findings.versus or findings.versus[-1].found.neurons < 2:
        return None
    found = findings.versus[-1].found
    marks = [(1.0, "as strong as natural"), (found.median, f"median {found.median:.2f}")]
    return charts.histogram(found.ratios, "evolved to natural, responses above grey", "neurons", bins=16, marks=marks)
