"""The demonstration's findings as one HTML file: style, pictures and charts inside, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from cortexloop.cli import charts
from cortexloop.cli.findings import EFFORT, RADII, Card, Findings

DESCRIPTIONS = {
    "edge_0deg": "a straight contour, horizontal",
    "edge_45deg": "a straight contour, rising to the right",
    "edge_90deg": "a straight contour, vertical",
    "edge_135deg": "a straight contour, falling to the right",
    "curve_up": "an arc like the top of a disc",
    "curve_right": "an arc like the right side of a disc",
    "corner": "the top left corner of a square",
    "dot_small": "a small dot, light or dark",
    "dot_large": "a large dot, light or dark",
}
"""What the textbook neurons were built to prefer."""


def render(findings: Findings) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cortexloop.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = shown_number
    environment.filters["breakable"] = breakable
    options, scores, agreement = findings.options, findings.scores, findings.agreement
    textbook = options.models is None
    context: dict[str, Any] = {
        "title": "Nine textbook neurons" if textbook and len(findings.bank) == 9 else _title(findings),
        "textbook": textbook,
        "procedural": options.images is None,
        "options": options,
        "machine": findings.machine,
        "n_models": len(findings.bank),
        "models_text": f"{len(findings.bank)} model{'' if len(findings.bank) == 1 else 's'}",
        "n_images": len(scores.names),
        "left_out": findings.left_out,
        "skipped": scores.skipped,
        "height": findings.bank.height,
        "width": findings.bank.width,
        "ms_per_pair": 1e3 * scores.seconds / scores.responses.size,
        "pairs_per_second": scores.responses.size / scores.seconds,
        "p50": 1e3 * findings.latency.percentile(50),
        "p99": 1e3 * findings.latency.percentile(99),
        "runs": len(findings.latency.seconds),
        "seconds": findings.seconds,
        "models_source": "" if textbook else str(options.models),
        "images_source": "" if options.images is None else str(options.images),
        "cards": [_card(findings, card) for card in findings.cards],
        "latency_chart": _latency_chart(findings),
        "agreement": agreement,
        "effort": findings.effort,
        "reduced": _reduced(findings),
    }
    if agreement is not None:
        context |= _agreement(findings)
    return environment.get_template("report.html").render(context)


def _reduced(findings: Findings) -> list[str]:
    """What the backend in force computes less of than the kernels would; not what the user asked for."""
    options, effort, usual = findings.options, findings.effort, EFFORT["cpu"]
    parts = (
        (effort.count, usual.count, "images", options.images is None and options.count is None),
        (effort.steps, usual.steps, "steps of gradient ascent", options.steps is None),
    )
    found = [f"{here} {what} instead of {there}" for here, there, what, ours in parts if ours and here != there]
    if effort.stride != usual.stride:
        found.append(f"dots {effort.stride} pixels apart instead of {usual.stride}")
    return found


def _title(findings: Findings) -> str:
    n = len(findings.bank)
    kind = "textbook neuron" if findings.options.models is None else "model neuron"
    return f"{n} {kind}{'' if n == 1 else 's'}"


def _card(findings: Findings, card: Card) -> dict[str, Any]:
    lossless = findings.options.images is None
    best = card.preferred[0].response
    steps = np.arange(len(card.trajectory), dtype=float)
    dots = card.dots
    strongest = dots.light if dots.polarity == "light" else dots.dark
    # A third or a fourth of a card, as the style sheet lays them out: the text keeps its size.
    width = 322.0 if findings.agreement is None else 235.5
    size = 100 / findings.bank.height, 100 / findings.bank.width
    found: dict[str, Any] = {
        "name": card.name,
        "anchor": f"neuron-{card.index}",
        "description": DESCRIPTIONS.get(card.name, "") if findings.options.models is None else "",
        "filters": " \N{MIDDLE DOT} ".join(map(str, card.filters)),
        "synthesized": charts.picture(card.synthesized),
        "response": card.response,
        "best": best,
        "preferred": [
            {"uri": charts.picture(seen.pixels, lossless=lossless), "name": seen.name, "response": seen.response}
            for seen in card.preferred
        ],
        "trajectory": charts.line_chart(
            [charts.Series(steps, card.trajectory, "a")],
            "step of gradient ascent",
            "response",
            level=(best, "best image"),
            width=width,
        ),
        "sizes": charts.line_chart(
            [charts.Series(RADII, dots.light, "b"), charts.Series(RADII, dots.dark, "a")],
            "dot radius (pixels)",
            "response",
            width=width,
        ),
        "radius": float(RADII[strongest.argmax()]),
        "polarity": dots.polarity,
        "map": charts.heat_map(dots.map, float(np.median(dots.map))),
        "map_cross": ((dots.place[1] + 0.5) * size[1], (dots.place[0] + 0.5) * size[0]),
    }
    agreement = findings.agreement
    if agreement is not None:
        n = card.index
        found["r"] = float(agreement.r[n])
        found["corrected"] = None if agreement.corrected is None else float(agreement.corrected[n])
        found["scatter"] = charts.scatter(
            agreement.predicted[n], agreement.recorded[n], "predicted", "recorded", width=width
        )
    return found


def _agreement(findings: Findings) -> dict[str, Any]:
    agreement = findings.agreement
    assert agreement is not None
    median = float(np.nanmedian(agreement.r))
    found: dict[str, Any] = {
        "r_chart": charts.histogram(
            agreement.r,
            "Pearson r, predicted and recorded",
            "neurons",
            bins=16,
            marks=[(median, f"median {median:.3f}")],
        ),
        "median_r": median,
        "quartiles_r": [float(q) for q in np.nanpercentile(agreement.r, [0, 25, 50, 75, 100])],
        "matched": int(np.isfinite(agreement.r).sum()),
        "corrected_chart": None,
        "median_corrected": None,
    }
    if agreement.corrected is not None and np.isfinite(agreement.corrected).any():
        corrected = float(np.nanmedian(agreement.corrected))
        found["median_corrected"] = corrected
        found["corrected_chart"] = charts.histogram(
            agreement.corrected,
            "noise-corrected R2",
            "neurons",
            bins=16,
            marks=[(corrected, f"median {corrected:.3f}")],
        )
    return found


def _latency_chart(findings: Findings) -> Markup:
    milliseconds = 1e3 * findings.latency.seconds
    p50, p99 = (float(np.percentile(milliseconds, q)) for q in (50, 99))
    shown = milliseconds[milliseconds <= max(2 * p50, 1.2 * p99)]
    return charts.histogram(
        shown, "milliseconds, one image in, all responses out", "runs", bins=30, marks=[(p50, "median"), (p99, "99 %")]
    )


def breakable(name: str) -> Markup:
    """A name that may be broken behind slashes and underscores."""
    return Markup("<wbr>").join(re.findall(r"[^/_]*[/_]?", name))


def shown_number(value: float, digits: int = 2) -> str:
    """Fixed digits with a real minus sign; thousands separated."""
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
