"""The method section of a report of a fit, in words."""

from __future__ import annotations

from cortexloop.cli.fitting.cards import LEVEL, NOISE_IMAGES
from cortexloop.cli.fitting.example import IMAGES, NOISE, REPEATS, SATURATION
from cortexloop.cli.fitting.findings import FitFindings

_METHODS = {
    "posneg-nmf": "non-negative matrix factorization of its positive and negative parts, stacked along channels "
    "(Wang and "
    "Ponce); masks are non-negative, vectors signed",
    "semi-nmf": "semi-NMF (Ding, Li and Jordan 2010); masks are non-negative, vectors free",
    "svd": "truncated singular value decomposition, the best approximation of this rank; masks may have either sign",
}


def method_texts(findings: FitFindings) -> list[tuple[str, str]]:
    """(heading, sentences)."""
    options = findings.options
    channels, height, width = findings.feature_shape
    count = channels * height * width
    dead = (
        f"{findings.dead:,} of {count:,} features never vary and take no part"
        if findings.dead
        else (f"all {count:,} features vary")
    )
    found = [
        (
            "Features",
            f"{findings.source}: {channels:,} channels on {height} x {width} places; {dead}.",
        ),
        (
            "Factorization",
            "Over the images to fit on, the covariance of every feature with the z-scored response is taken in one "
            "pass; "
            f"{findings.record['threshold']}. A border of {options.border} place{'' if options.border == 1 else 's'} "
            f"is "
            f"left out at each side. What is left becomes {options.rank} outer "
            f"product{'' if options.rank == 1 else 's'} of a mask and a vector by {_METHODS[options.method]}. "
            f"Explained is "
            "1 \N{MINUS SIGN} |M \N{MINUS SIGN} M\N{PRIME}|\N{SUPERSCRIPT TWO} / |M|\N{SUPERSCRIPT TWO} of that "
            "tensor, "
            "kept the fraction of features whose covariance passed the threshold.",
        ),
        ("Prediction", str(findings.record["regression"])),
        (
            "Scores",
            "Nothing of the held-out images enters a fit. r is Pearson's correlation, R\N{SUPERSCRIPT TWO} the "
            "coefficient "
            "of determination, FEV 1 \N{MINUS SIGN} var(y \N{MINUS SIGN} y\N{PRIME}) / var(y).",
        ),
    ]
    if findings.ceiling is not None:
        text = "the correlation that a perfect model could reach with responses averaged over this many repeats: the "
        text += (
            "square root of their reliability, by random halves of the repeats and the formula of Spearman and Brown."
        )
        found.append(("Ceiling", text))
    fields = "the first follows from the factors alone, the sum of |vector| times mask over factors, without any image"
    if any(card.gradient is not None for card in findings.cards):
        fields += (
            f"; the second is the mean size of the gradient of the linear score in pixels over {NOISE_IMAGES} images "
            f"of "
            "uniform noise, back-projected through the network"
        )
    fields += (
        f". Outlines are where a Gaussian fitted to the map falls to {LEVEL:g} of its height, if it is not wider than "
    )
    fields += "the image."
    found.append(("Receptive fields", fields))
    others = findings.methods[1:]
    if others:
        told = findings.record["baselines"]
        found.append(("Compared with", "; ".join(f"{method.label}: {told[method.name]}" for method in others) + "."))
    if options.example:
        text = (
            f"responses of the textbook neurons to {IMAGES} collages of pieces of procedural images (seed "
            f"{options.seed}), "
            f"z-scored and levelling off at {SATURATION:g} standard deviations, {REPEATS} repeats each with Gaussian "
            f"noise "
            f"of {NOISE:g}. The network that explains them is a bank of fixed Gabor and centre-surround filters; the "
            "neurons are built of others. Arrows say which side of an edge is lighter."
        )
        found.append(("The example", text))
    else:
        text = f"recording {findings.recorded.what} of {str(options.responses)!r}, averaged over repeats."
        found.append(("Responses", text))
    return found
