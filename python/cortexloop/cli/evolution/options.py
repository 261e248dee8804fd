"""What evolutions are asked for: the options as given, what they mean, and which of them a resumed run must share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cortexloop.cli.console import BadInputError

GENERATIONS = 75
NOISE_MODELS = ("multiplicative", "poisson")
BASELINES = ("grey", "none")


@dataclass(frozen=True)
class EvolveOptions:
    """See the options of the command."""

    models: Path | None = None
    neurons: tuple[str, ...] = ()
    optimiser: str = "cholesky-cma"
    generator: str = "fourier"
    weights: Path | None = None
    dim: int | None = None
    population: int = 40
    generations: int | None = None
    evaluations: int | None = None
    seeds: int = 1
    seed: int = 0
    noise: str = "0"
    noise_model: str = "multiplicative"
    spikes_per_unit: str | None = None
    repeats: int = 1
    baseline: str = "grey"
    minimise: bool = False
    size: float | None = None
    position: str | None = None
    pixels_per_degree: float | None = None
    references: Path | None = None
    images: Path | None = None
    resize: bool = False
    skip_bad: bool = False
    show: int = 40
    parquet: bool = False
    checkpoint_every: int = 10
    precision: str = "exact"
    backend: str = "auto"
    threads: int | None = None
    out: Path = Path("cortexloop-evolve")
    resume: bool = False
    json: bool = False
    given: frozenset[str] = frozenset()
    """Names of the options that were given on the command line."""

    def stored(self) -> dict[str, Any]:
        """What a run remembers of its options, as JSON; the rest belongs to one call."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("out", "resume", "json", "given", "threads")}
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in kept.items()}

    def continuing(self, stored: Mapping[str, Any]) -> EvolveOptions:
        """These options, with those that were not given taken from the run to be resumed."""
        paths = {"models", "weights", "references", "images"}
        kept = {field.name for field in fields(self)} - self.given
        if self.given & {"generations", "evaluations"}:
            kept -= {"generations", "evaluations"}
        if self.given & {"noise", "noise_model", "spikes_per_unit"}:
            kept -= {"noise", "noise_model", "spikes_per_unit"}
        values = {name: value for name, value in stored.items() if name in kept}
        for name, value in values.items():
            if name in paths and value is not None:
                values[name] = Path(value)
            if name == "neurons":
                values[name] = tuple(value)
        return replace(self, **values)


@dataclass(frozen=True)
class Settings:
    """Everything that the course of the evolutions depends on, beside the models and files themselves."""

    optimisers: tuple[str, ...]
    generator: str
    dim: int | None
    population: int
    generations: int
    seeds: int
    seed: int
    noise: tuple[float, ...]
    """Levels: sigma of multiplicative noise, or spikes per unit of response (infinity: no noise)."""
    noise_model: str
    repeats: int
    baseline: str
    """What scores are counted from: the response to a "grey" screen, or "none", the model's own zero."""
    minimise: bool
    size: float | None
    position: tuple[float, float]
    pixels_per_degree: float | None
    precision: str

    def quiet(self, noise: float) -> bool:
        """Whether a level of noise is none at all."""
        return noise == (math.inf if self.noise_model == "poisson" else 0.0)

    def noise_label(self, noise: float) -> str:
        """A level of noise in words."""
        if self.quiet(noise):
            return "no noise"
        return f"{noise:g} spikes per unit" if self.noise_model == "poisson" else f"noise {noise:g}"

    def as_json(self) -> dict[str, Any]:
        """Plain data: lists for tuples, the text "inf" for infinity."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return plain | {"noise": [level if math.isfinite(level) else "inf" for level in self.noise]}

    def conditions(self) -> tuple[tuple[str, float], ...]:
        """Every optimiser with every level of noise, in the order in which they run."""
        return tuple((optimiser, noise) for noise in self.noise for optimiser in self.optimisers)


_OPTION_OF = {"optimisers": "optimiser"}
"""Settings with another name than their option."""


def settle(options: EvolveOptions, *, optimisers: Sequence[str], generators: Sequence[str]) -> Settings:
    """Check the options that need no file and work out what they mean.

    Args:
        options: as given.
        optimisers, generators: the names that there are.

    Raises:
        BadInputError: an option that cannot be used.
    """
    _check_numbers(options)
    if options.generator not in generators:
        raise BadInputError(f"--generator should be one of {', '.join(generators)}, got {options.generator!r}")
    needs_weights = options.generator.startswith("deepsim")
    if needs_weights and options.weights is None:
        raise BadInputError(f"--generator {options.generator} needs --weights, the file of its published weights")
    if not needs_weights and options.weights is not None:
        raise BadInputError(f"--generator {options.generator} takes no --weights; only the deepsim generators do")
    if needs_weights and options.dim is not None:
        raise BadInputError(f"--generator {options.generator} has codes of fixed length; leave --dim out")
    if options.baseline not in BASELINES:
        raise BadInputError(f"--baseline should be {' or '.join(BASELINES)}, got {options.baseline!r}")
    if options.precision not in ("exact", "fast"):
        raise BadInputError(f"--precision should be exact or fast, got {options.precision!r}")
    if options.out.exists() and not options.out.is_dir():
        raise BadInputError(f"--out {str(options.out)!r} is a file; give a folder")
    return Settings(
        optimisers=_optimisers(options.optimiser, optimisers),
        generator=options.generator,
        dim=options.dim,
        population=options.population,
        generations=_generations(options),
        seeds=options.seeds,
        seed=options.seed,
        noise=_noise(options),
        noise_model=options.noise_model,
        repeats=options.repeats,
        baseline=options.baseline,
        minimise=options.minimise,
        size=options.size,
        position=_position(options),
        pixels_per_degree=options.pixels_per_degree,
        precision=options.precision,
    )


def _check_numbers(options: EvolveOptions) -> None:
    least = (
        ("dim", options.dim, 1),
        ("population", options.population, 2),
        ("generations", options.generations, 1),
        ("evaluations", options.evaluations, options.population),
        ("seeds", options.seeds, 1),
        ("seed", options.seed, 0),
        ("repeats", options.repeats, 1),
        ("show", options.show, 1),
        ("checkpoint-every", options.checkpoint_every, 1),
    )
    for name, value, smallest in least:
        if value is not None and value < smallest:
            why = ", the population" if name == "evaluations" else ""
            raise BadInputError(f"--{name} should be at least {smallest}{why}, got {value}")
    for name, measure in (("size", options.size), ("pixels-per-degree", options.pixels_per_degree)):
        if measure is not None and not (math.isfinite(measure) and measure > 0):
            raise BadInputError(f"--{name} should be a positive number, got {measure:g}")


def _generations(options: EvolveOptions) -> int:
    if options.generations is not None and options.evaluations is not None:
        raise BadInputError("--generations and --evaluations say the same thing twice; give one of them")
    if options.evaluations is not None:
        return options.evaluations // options.population
    return options.generations or GENERATIONS


def _optimisers(text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return tuple(known)
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None or not names:
        raise BadInputError(f"--optimiser should be all or one or several of {', '.join(known)}, got {text!r}")
    _different("optimiser", names, text)
    return tuple(names)


def _noise(options: EvolveOptions) -> tuple[float, ...]:
    if options.noise_model not in NOISE_MODELS:
        raise BadInputError(f"--noise-model should be {' or '.join(NOISE_MODELS)}, got {options.noise_model!r}")
    if options.noise_model == "multiplicative":
        if options.spikes_per_unit is not None:
            raise BadInputError("--spikes-per-unit belongs to --noise-model poisson")
        return _numbers("noise", options.noise, "numbers from 0 on", lambda v: v >= 0 and math.isfinite(v))
    if "noise" in options.given:
        raise BadInputError("--noise belongs to --noise-model multiplicative; poisson takes --spikes-per-unit")
    if options.spikes_per_unit is None:
        raise BadInputError("--noise-model poisson needs --spikes-per-unit, such as 5,20,inf (inf: no noise)")
    return _numbers("spikes-per-unit", options.spikes_per_unit, "positive numbers or inf", lambda v: v > 0)


def _numbers(option: str, text: str, expected: str, fits: Any) -> tuple[float, ...]:
    parts = [part.strip() for part in text.split(",")]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if not values or not all(fits(value) for value in values):
        raise BadInputError(f"--{option} should be {expected}, separated by commas, got {text!r}")
    _different(option, values, text)
    return tuple(values)


def _different(option: str, values: Sequence[object], text: str) -> None:
    if len(set(values)) != len(values):
        raise BadInputError(f"--{option} names the same thing twice: {text!r}")


def _position(options: EvolveOptions) -> tuple[float, float]:
    if (options.size is None) != (options.pixels_per_degree is None):
        raise BadInputError("--size and --pixels-per-degree belong together: give both or neither")
    if options.position is None:
        return 0.0, 0.0
    if options.size is None:
        raise BadInputError("--position needs --size and --pixels-per-degree")
    parts = options.position.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) != 2 or not all(map(math.isfinite, values)):
        raise BadInputError(f"--position should be degrees to the right and up, 'x,y', got {options.position!r}")
    return values[0], values[1]


def check_same(now: Settings, then: Mapping[str, Any], where: Path) -> None:
    """Refuse to resume a run with other settings.

    Raises:
        BadInputError: a setting that differs, with both values.
    """
    for name, value in now.as_json().items():
        if value != then.get(name):
            option = _OPTION_OF.get(name, name).replace("_", "-")
            raise BadInputError(
                f"--{option} is {_told(then.get(name))} in the run in {str(where)!r} and {_told(value)} here: "
                "leave it out to resume, or give another --out"
            )


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
