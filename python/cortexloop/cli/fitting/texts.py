"""The method section of a report of a fit, in words."""

from __future__ import annotations

from cortexloop.cli.fitting.findings import FitFindings

_METHODS = {
    "posneg-nmf": "non-negative matrix factorization of its positive and negative parts, stacked along channels (Wang and "
    "Ponce); masks are non-negative, vectors signed",
    "semi-nmf": "semi-NMF (Ding, Li and Jordan 2010): masks are non-negative, vectors free",
    "svd": "truncated singular value decomposition, the best approximation of this rank; masks may have either sign",
}
_REDUCTIONS = {
    "spmask": "the feature map summed under each mask, all channels of it",
    "featvec": "the feature map summed with each vector, all places of it",
    "factor": "one number per factor: the map under its mask with its vector",
    "scalar": "one number: the sum of all factors",
}


def method_texts(findings: FitFindings) -> list[tuple[str, str]]:
    """(heading, sentences)."""
    options = findings.options
    channels, height, width = findings.feature_shape
    found = [
        (
            "Features",
            f"{findings.source}: {channels:,} channels on {height} x {width} places. {findings.dead:,} of "
            f"{channels * height * width:,} features never vary and take no part.",
        ),
        (
            "Factorization",
            f"Over the images to fit on, the covariance of every feature with the neuron's response is taken in one pass; "
            f"{findings.record['threshold']}. A border of {options.border} is left out at each side. What is left "
            f"becomes {options.rank} outer products of a mask and a vector by {_METHODS[options.method]}. "
            "Explained is 1 - |M - M'|\N{SUPERSCRIPT TWO} / |M|\N{SUPERSCRIPT TWO} of that tensor.",
        ),
        ("Regression", f"{options.regressor} on {_REDUCTIONS[options.reduction]}. {findings.record['regression']}"),
        (
            "Scores",
            "Nothing of the held-out images enters a fit. r is Pearson's correlation, R\N{SUPERSCRIPT TWO} the coefficient of "
            "determination, FEV 1 - var(y - y') / var(y).",
        ),
    ]
    if findings.ceiling is not None:
        found.append(("Ceiling", str(findings.record["ceiling"])))
    found.append(("Receptive fields", str(findings.record["fields"])))
    others = findings.methods[1:]
    if others:
        found.append(("Compared with", "; ".join(f"{method.label}: {findings.record['baselines'][method.name]}" for method in others) + "."))
    if options.example:
        found.append(("The example", str(findings.record["example"])))
    else:
        found.append(("Responses", f"recording {findings.recorded.what} of {options.responses}, averaged over repeats."))
    return found
