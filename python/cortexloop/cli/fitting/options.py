"""What a fit is asked for: the options as given, checked as far as no file is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cortexloop.cli.console import BadInputError
from cortexloop.cli.sources import SourceOptions

METHODS = ("posneg-nmf", "semi-nmf", "svd")
REDUCTIONS = ("mask", "vector", "factor", "none")
REGRESSORS = ("ridge", "lasso")
NONLINEARITIES = ("auto", "softplus", "line")
THRESHOLDS = ("two-sided", "published", "negative", "fdr", "permutation", "familywise", "none")
BASELINES = {
    "pca": "PCA and ridge",
    "srp": "sparse random projection and ridge",
    "dense-ridge": "ridge on all features",
    "lasso": "PCA and lasso",
}
"""What factor models are compared with, and what each is."""

MISSING = ("neurons", "images")


@dataclass(frozen=True)
class FitOptions:
    """See the options of the command."""

    source: SourceOptions = field(default_factory=SourceOptions)
    images: Path | None = None
    responses: Path | None = None
    recording: str | None = None
    features: Path | None = None
    neurons: tuple[str, ...] = ()
    missing: str = "neurons"
    rank: int = 3
    method: str = "posneg-nmf"
    threshold: str = "two-sided"
    border: int = 1
    reduction: str = "mask"
    regressor: str = "ridge"
    nonlinearity: str = "auto"
    held_out: float | None = None
    held_out_from: int | None = None
    baselines: str = "pca"
    seed: int = 0
    show: int = 12
    resize: bool = False
    skip_bad: bool = False
    out: Path = Path("cortexloop-fit")
    overwrite: bool = False
    threads: int | None = None
    json: bool = False

    @property
    def example(self) -> bool:
        """Whether nothing was given, so that the built-in example is fitted."""
        return self.responses is None

    def stored(self) -> dict[str, Any]:
        """The options as JSON, without those that belong to one call."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("source", "out", "overwrite", "threads", "json")}
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def settle_baselines(text: str) -> tuple[str, ...]:
    """Names of the methods to compare with. Raises BadInputError."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names in ([], ["none"]):
        return ()
    for name in names:
        if name not in BASELINES:
            raise BadInputError(f"--baselines should be among {', '.join(BASELINES)}, or none, got {name!r}")
    return tuple(dict.fromkeys(names))


def settle_threshold(text: str) -> tuple[str, float | None]:
    """Kind and level (None: that of the kind) of a threshold such as "fdr" or "two-sided:2.5". Raises BadInputError."""
    kind, colon, level = text.strip().partition(":")
    if kind not in THRESHOLDS:
        raise BadInputError(f"--threshold should be one of {', '.join(THRESHOLDS)}, got {kind!r}")
    if not colon:
        return kind.replace("-", "_"), None
    try:
        return kind.replace("-", "_"), float(level)
    except ValueError as error:
        raise BadInputError(f"--threshold {text!r}: the level behind the colon should be a number") from error


def check(options: FitOptions) -> None:
    """Refuse what cannot be meant. Raises BadInputError."""
    choices = (
        ("method", METHODS),
        ("reduction", REDUCTIONS),
        ("regressor", REGRESSORS),
        ("nonlinearity", NONLINEARITIES),
        ("missing", MISSING),
    )
    for name, known in choices:
        if getattr(options, name) not in known:
            raise BadInputError(f"--{name} should be one of {', '.join(known)}, got {getattr(options, name)!r}")
    for name, least in (("rank", 1), ("show", 1), ("border", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise BadInputError(f"--{name} should be at least {least}, got {getattr(options, name)}")
    if options.held_out is not None and options.held_out_from is not None:
        raise BadInputError("--held-out and --held-out-from are two rules for the same: give one of them")
    if options.held_out is not None and not 0 < options.held_out < 1:
        raise BadInputError(f"--held-out is a fraction, above 0 and below 1, got {options.held_out:g}")
    if options.responses is None:
        for name, value in (("images", options.images), ("features", options.features)):
            if value is not None:
                raise BadInputError(f"--{name} needs the --responses that were recorded to the images")
        if options.recording is not None:
            raise BadInputError("--recording needs --responses")
        return
    if options.features is not None and options.source.given:
        raise BadInputError("--features are computed already: leave --models and --network out")
    if options.images is None and options.features is None:
        raise BadInputError("--responses needs the --images that they belong to, or --features computed of them")
    if options.features is None and not options.source.given:
        raise BadInputError(
            "say what gives the features: --models with --model and --layer, --network with --layer, or --features "
            "(--network filters takes the small built-in ones, of 112 x 112 pixels)"
        )
