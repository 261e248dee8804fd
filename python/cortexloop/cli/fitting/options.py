"""What a fit is asked for: the options as given, checked as far as no file is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cortexloop.cli.console import BadInputError
from cortexloop.cli.sources import SourceOptions

METHODS = ("semi-nmf", "posneg-nmf", "svd")
REDUCTIONS = ("spmask", "featvec", "factor", "scalar")
REGRESSORS = ("ridge", "lasso")
BASELINES = {
    "pca": "PCA and ridge",
    "srp": "sparse random projection and ridge",
    "dense-ridge": "ridge on all features",
    "lasso": "PCA and lasso",
}
"""What factor models are compared with, and what each is."""

MISSING = ("exclude-neurons", "drop-images")


@dataclass(frozen=True)
class FitOptions:
    """See the options of the command."""

    source: SourceOptions = field(default_factory=SourceOptions)
    images: Path | None = None
    responses: Path | None = None
    recording: str | None = None
    features: Path | None = None
    neurons: tuple[str, ...] = ()
    missing: str = "exclude-neurons"
    rank: int = 3
    method: str = "semi-nmf"
    threshold: str = "two-sided"
    border: int = 0
    reduction: str = "spmask"
    regressor: str = "ridge"
    held_out: float | None = None
    held_out_from: int | None = None
    baselines: tuple[str, ...] = ()
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
