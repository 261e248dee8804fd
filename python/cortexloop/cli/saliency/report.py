"""Saliency maps as one HTML file."""

from __future__ import annotations

from typing import Any

import jinja2
import numpy as np

from cortexloop.cli import charts, overlays
from cortexloop.cli.report import DESCRIPTIONS, breakable, shown_number
from cortexloop.cli.saliency.findings import Comparison, Explained, NeuronMaps, SaliencyFindings

MOST_COMPARISONS = 8
"""Query images of a neuron in the report; all are in the files."""


def render(findings: SaliencyFindings) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cortexloop.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = shown_number
    environment.filters["breakable"] = breakable
    options = findings.options
    context: dict[str, Any] = {
        "title": findings.title,
        "lead": _lead(findings),
        "label": findings.label,
        "record": findings.record,
        "n_neurons": len(findings.neurons),
        "n_images": findings.images,
        "n_maps": sum(len(n.explained) + 2 * sum(len(c.pairs) for c in n.comparisons) for n in findings.neurons),
        "gallery": findings.gallery,
        "notes": findings.notes,
        "cards": [_card(findings, neuron) for neuron in findings.neurons[: options.show]],
        "skipped": findings.skipped,
        "texts": findings.texts,
    }
    return environment.get_template("saliency.html").render(context)


def _lead(findings: SaliencyFindings) -> str:
    if findings.gallery is not None:
        return (
            "For each neuron, every image is compared with the reference images that resemble it most to that neuron; "
            "the maps show, in both images of a pair, the pixels of what they share."
        )
    which = "All images" if findings.options.every_image else "The preferred images of each neuron"
    return f"{which}, and under each the pixels that the response depends on: {findings.label}."


def _card(findings: SaliencyFindings, neuron: NeuronMaps) -> dict[str, Any]:
    return {
        "name": neuron.name,
        "description": DESCRIPTIONS.get(neuron.name, "") if findings.textbook else "",
        "explained": [_explained(one) for one in neuron.explained],
        "comparisons": [_comparison(one) for one in neuron.comparisons[:MOST_COMPARISONS]],
    }


def _explained(one: Explained) -> dict[str, Any]:
    return {
        "name": one.name,
        "response": one.response,
        "picture": charts.picture(one.pixels, lossless=False),
        "overlay": _overlay(one.pixels, one.map),
    }


def _overlay(pixels: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> str:
    return charts.picture(overlays.overlay(pixels, values), lossless=False)


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        "name": one.name,
        "response": one.response,
        "picture": charts.picture(one.pixels, lossless=False),
        "pairs": [
            _explained(pair.reference)
            | {"similarity": f"{pair.similarity:.3g}", "query": _overlay(one.pixels, pair.query)}
            for pair in one.pairs
        ],
    }
