"""What saliency maps are asked for, checked as far as no file is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cortexloop.cli.console import BadInputError
from cortexloop.cli.sources import SourceOptions

METHODS = {
    "gradient": "gradient of the response",
    "input-x-gradient": "input times gradient",
    "smoothgrad": "SmoothGrad",
    "integrated-gradients": "integrated gradients",
    "occlusion": "occlusion",
}
"""Name -> words."""

PAIR_METHODS = ("gradient", "input-x-gradient", "integrated-gradients")
"""Those that parallel backpropagation takes."""

COTANGENTS = ("weighted-product", "similarity-gradient", "minimum")
SIMILARITIES = ("weighted", "cosine", "abs-cosine")


@dataclass(frozen=True)
class SaliencyOptions:
    """See the options of the command."""

    source: SourceOptions = field(default_factory=SourceOptions)
    images: Path | None = None
    neurons: tuple[str, ...] = ()
    method: str = "gradient"
    top: int = 6
    every_image: bool = False
    samples: int = 16
    noise: float = 0.15
    steps: int = 32
    baseline: str = "zero"
    radius: float = 8.0
    stride: int = 4
    fill: str = "smooth"
    blur: float = 1.5
    model: Path | None = None
    gallery: Path | None = None
    references: int = 2
    cotangent: str = "weighted-product"
    similarity: str = "weighted"
    seed: int = 0
    show: int = 24
    resize: bool = False
    skip_bad: bool = False
    out: Path = Path("cortexloop-saliency")
    overwrite: bool = False
    threads: int | None = None
    json: bool = False

    def stored(self) -> dict[str, Any]:
        """The options as JSON, without those that belong to one call."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("source", "out", "overwrite", "threads", "json")}
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def check(options: SaliencyOptions) -> None:
    """Refuse what cannot be meant. Raises BadInputError."""
    if options.method not in METHODS:
        raise BadInputError(f"--method should be one of {', '.join(METHODS)}, got {options.method!r}")
    for name in ("top", "samples", "steps", "stride", "show", "references"):
        if getattr(options, name) < 1:
            raise BadInputError(f"--{name} should be at least 1, got {getattr(options, name)}")
    if options.seed < 0:
        raise BadInputError(f"--seed should be at least 0, got {options.seed}")
    if not 0 < options.noise < 10:
        raise BadInputError(f"--noise should be above 0 and below 10, got {options.noise:g}")
    if not 0 <= options.blur <= 50:
        raise BadInputError(f"--blur should be 0 to 50 pixels, got {options.blur:g}")
    if not 0.71 <= options.radius <= 1000:
        raise BadInputError(f"--radius should be 0.71 to 1000 pixels, got {options.radius:g}")
    level_of("baseline", options.baseline, ("zero", "blur"))
    level_of("fill", options.fill, ("zero", "smooth"))
    for name, known in (("cotangent", COTANGENTS), ("similarity", SIMILARITIES)):
        if getattr(options, name) not in known:
            raise BadInputError(f"--{name} should be one of {', '.join(known)}, got {getattr(options, name)!r}")
    source = options.source
    if options.model is None:
        pairs_only = {
            "gallery": options.gallery,
            "network": source.network,
            "layer": source.layer,
            "weights": source.weights,
            "source-model": source.model,
        }
        for name, value in pairs_only.items():
            if value is not None:
                raise BadInputError(f"--{name} needs --model, a factor model fitted by cortexloop fit")
    elif options.method not in PAIR_METHODS:
        raise BadInputError(f"--method with --model should be one of {', '.join(PAIR_METHODS)}, got {options.method!r}")


def level_of(option: str, text: str, words: tuple[str, ...]) -> str | float:
    """One of the words, or a grey level. Raises BadInputError."""
    if text in words:
        return text
    try:
        level = float(text)
    except ValueError:
        level = -1.0
    if not 0 <= level <= 255:
        raise BadInputError(f"--{option} should be {', '.join(words)} or a level 0 to 255, got {text!r}")
    return level
