"""The findings of a fit as one HTML file."""

from __future__ import annotations

import math
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from cortexloop.cli import charts, overlays
from cortexloop.cli.fitting.findings import Card, Ellipse, FactorShown, FieldShown, FitFindings, Seen
from cortexloop.cli.fitting.texts import method_texts
from cortexloop.cli.report import DESCRIPTIONS, breakable, shown_number

STYLES = ("a", "b", "curve-c", "curve-d", "curve-e", "curve-f")
"""Colours of the factor models, of factors alone, and of all that they can be compared with."""


def render(findings: FitFindings) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cortexloop.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["breakable"] = breakable
    environment.filters["capitalize_first"] = capitalize_first
    model, ceiling = findings.model, findings.ceiling
    carded = {card.index for card in findings.cards}
    count = len(findings.recorded.neurons)
    context: dict[str, Any] = {
        "title": _title(findings, count),
        "record": findings.record,
        "source": findings.source,
        "rank": findings.options.rank,
        "shape": [f"{n:,}" for n in findings.feature_shape],
        "n_fit": len(findings.recorded.names) - len(findings.held),
        "n_held": len(findings.held),
        "rule": f"held out are {findings.rule}",
        "median_r": _median(model.r),
        "median_ceiling": None if ceiling is None else _median(ceiling),
        "median_normalised": None if ceiling is None else _median(_ratio(model.r, ceiling)),
        "median_explained": _median(findings.explained),
        "ceilings": ceiling is not None,
        "notes": findings.notes,
        "methods": [
            {
                "name": method.name, "label": method.label, "style": style, "r": _median(method.r),
                "r2": _median(method.r2), "fev": _median(method.fev), "seconds": method.seconds,
            }
            for method, style in zip(findings.methods, STYLES, strict=False)
        ],
        "methods_chart": _methods_chart(findings),
        "rows": [_row(findings, n, n in carded) for n in np.argsort(-np.nan_to_num(model.r, nan=-2), kind="stable")],
        "cards": [_card(findings, card) for card in findings.cards],
        "excluded": findings.recorded.excluded,
        "dropped": findings.recorded.dropped,
        "skipped": findings.skipped,
        "method_texts": method_texts(findings),
    }  # fmt: skip
    return environment.get_template("fit.html").render(context)


def number(value: float, digits: int = 2) -> str:
    """`shown_number`, and a dash for what is not defined."""
    return "\N{EN DASH}" if math.isnan(value) else shown_number(round(value, digits) + 0.0, digits)


def capitalize_first(text: str) -> str:
    """The text with a capital at its start and its other letters as they are."""
    return text[:1].upper() + text[1:]


def _title(findings: FitFindings, count: int) -> str:
    if findings.options.example:
        return f"{'Nine' if count == 9 else count} textbook neuron{'' if count == 1 else 's'}, factorized"
    return f"{count:,} recorded neuron{'' if count == 1 else 's'}, factorized"


def _median(values: np.ndarray[Any, Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def _ratio(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _methods_chart(findings: FitFindings) -> Markup:
    labels = [method.label for method in findings.methods]
    return charts.strip_chart(
        labels, [method.r for method in findings.methods], "Pearson r, held-out images", styles=STYLES
    )


def _row(findings: FitFindings, n: int, carded: bool) -> dict[str, Any]:
    model, ceiling = findings.model, findings.ceiling
    cells: list[tuple[float, int, float | None]] = [_bar(float(model.r[n]))]
    if ceiling is not None:
        cells += [(float(ceiling[n]), 3, None), _bar(float(_ratio(model.r, ceiling)[n]))]
    cells += [(float(model.r2[n]), 3, None), (float(model.fev[n]), 3, None)]
    cells += [(float(method.r[n]), 3, None) for method in findings.methods[1:]]
    cells += [(float(findings.explained[n]), 3, None), (float(findings.kept[n]), 3, None)]
    return {
        "name": findings.recorded.neurons[n],
        "anchor": f"#neuron-{n}" if carded else None,
        "cells": cells,
    }


def _bar(value: float) -> tuple[float, int, float | None]:
    """A cell with a bar behind its number."""
    return value, 3, 0.0 if math.isnan(value) else 100 * min(max(value, 0.0), 1.0)


# ------------------------------------------------------------------------------------------------------- cards


def _card(findings: FitFindings, card: Card) -> dict[str, Any]:
    n, model = card.index, findings.model
    size = findings.image_size or (findings.feature_shape[1], findings.feature_shape[2])
    background = None if card.background is None else overlays.thumbnail(card.background, 224)
    return {
        "name": card.name,
        "anchor": f"neuron-{n}",
        "description": DESCRIPTIONS.get(card.name, "") if findings.options.example else "",
        "r": float(model.r[n]),
        "r2": float(model.r2[n]),
        "ceiling": None if findings.ceiling is None else float(findings.ceiling[n]),
        "explained": float(findings.explained[n]),
        "kept": float(findings.kept[n]),
        "background": card.background_name if card.background is not None else "",
        "analytic": _field(card.analytic, background, size),
        "gradient": None if card.gradient is None else _field(card.gradient, background, size),
        "overlap": "",
        "factors": [_factor(factor, size) for factor in card.factors],
        "rows": [
            (Markup(caption), [_seen(one, size, card.analytic.ellipse) for one in seen])
            for caption, seen in (
                ('Held-out images, most driving: <b class="a">predicted</b> and <b class="b">recorded</b>', card.best),
                ('Held-out images, least driving', card.worst),
                ('Held-out images, furthest from the prediction', card.off),
            )
            if seen and seen[0].pixels is not None
        ],
        "scatter": charts.scatter(
            card.x, card.y, "linear score", "response", curve=charts.Series(*card.curve, "a"), width=514
        ),
        "ranks": charts.line_chart(
            [charts.Series(np.array(findings.ranks, float), card.by_rank, "b")],
            "factors", "explained variance", width=514,
        ),
    }  # fmt: skip


def _field(field: FieldShown, background: str | None, size: tuple[int, int]) -> Markup:
    return overlays.frame(background, overlays.heat(field.map), size, ellipse=field.ellipse)


def _factor(factor: FactorShown, size: tuple[int, int]) -> dict[str, Any]:
    most = max((abs(channel.weight) for channel in factor.channels), default=0.0) or 1.0
    return {
        "frame": overlays.frame(None, overlays.heat(factor.mask), size),
        "share": factor.share,
        "pictured": any(channel.pixels is not None for channel in factor.channels),
        "channels": [
            {
                "name": channel.name,
                "weight": channel.weight,
                "width": 100 * abs(channel.weight) / most,
                "uri": None if channel.pixels is None else overlays.thumbnail(channel.pixels, 64),
                "image": channel.image,
            }
            for channel in factor.channels
        ],
    }


def _seen(seen: Seen, size: tuple[int, int], ellipse: Ellipse | None) -> dict[str, Any]:
    assert seen.pixels is not None
    return {
        "frame": overlays.frame(overlays.thumbnail(seen.pixels, 112), None, size, ellipse=ellipse, faded=False),
        "name": seen.name,
        "predicted": seen.predicted,
        "recorded": seen.recorded,
    }
