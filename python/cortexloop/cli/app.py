"""The command `cortexloop`: options, help texts and exit codes. The modules beside this one do the work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from cortexloop._native import SettingError
from cortexloop.cli.console import (
    BadInputError,
    InterruptedCommandError,
    complain,
    stdout,
    telling_interruptions,
    warnings_in_one_line,
)
from cortexloop.cli.factor_models import fit, saliency
from cortexloop.cli.parameters import Backend, Images, Json, Models, Neurons, Precision, Resize, SkipBad, Threads
from cortexloop.cli.rig import rig
from cortexloop.cli.rig.serve import serve

app = typer.Typer(
    name="cortexloop",
    help="Banks of compact models of visual neurons, evaluated together.",
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows its plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import cortexloop

        stdout().print(f"cortexloop {cortexloop.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Banks of compact models of visual neurons, evaluated together."""
    if context.invoked_subcommand is None:
        stdout().print(context.get_help())


@app.command()
@telling_interruptions()
def demo(
    models: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--models", help="Models to show; nine built-in textbook neurons if not given."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Images to score; procedural images if not given."),
    ] = None,
    responses: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--responses", help="Recorded responses (.npz, .npy, .csv) to correlate predictions with."),
    ] = None,
    recording: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--recording", help="Which recording of the responses file belongs to the images."),
    ] = None,
    held_out_from: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--held-out-from", help="Correlate on images from this number on only (601: published models)."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the report; made if missing.")] = Path(
        "cortexloop-demo"
    ),
    neurons: Neurons = None,
    show: Annotated[int, typer.Option("--show", help="How many neurons get a card and a synthesized image.")] = 12,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--steps", help="Steps of gradient ascent; 100 (40 without the C++ kernels) if not given."),
    ] = None,
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--count", help="Number of procedural images; 480 (96 without the C++ kernels) if not given."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of procedural images and of the noise to climb from.")] = 0,
    skip_bad: SkipBad = False,
    resize: Resize = False,
    threads: Threads = None,
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """Score images, find preferred ones, synthesize maximizing ones, and write a report in one HTML file."""
    from cortexloop.cli.demo import demo as run_demo
    from cortexloop.cli.findings import DemoOptions

    run_demo(
        DemoOptions(
            models=models,
            images=images,
            responses=responses,
            recording=recording,
            held_out_from=held_out_from,
            out=out,
            neurons=tuple(neurons or ()),
            show=show,
            steps=steps,
            count=count,
            seed=seed,
            skip_bad=skip_bad,
            resize=resize,
            threads=threads,
            backend=backend,
            json=json,
        )
    )


@app.command()
@telling_interruptions()
def respond(
    models: Models,
    images: Images,
    out: Annotated[Path, typer.Option("--out", help="Table to write: .npz, .csv or .parquet.")],
    neurons: Neurons = None,
    batch: Annotated[int, typer.Option("--batch", help="Images per batch.")] = 64,
    precision: Precision = "exact",
    threads: Threads = None,
    backend: Backend = "auto",
    device: Annotated[
        str, typer.Option("--device", help="auto (a GPU where its kernels take the models), cpu, cuda, cuda:1, ...")
    ] = "auto",
    layout: Annotated[str, typer.Option("--layout", help="Axes of an array file: NHWC or NCHW.")] = "NHWC",
    key: Annotated[Optional[str], typer.Option("--key", help="Name of the array in an .npz of images.")] = None,  # noqa: UP045
    recentred: Annotated[
        bool, typer.Option("--recentred", help="The array file holds float values recentred already.")
    ] = False,
    skip_bad: SkipBad = False,
    resize: Resize = False,
    json: Json = False,
) -> None:
    """Write the responses of models to images into a table; streams, so that any number of images fits in memory."""
    from cortexloop.cli.respond import RespondOptions
    from cortexloop.cli.respond import respond as run_respond

    run_respond(
        RespondOptions(
            models=models,
            images=images,
            out=out,
            neurons=tuple(neurons or ()),
            batch=batch,
            precision=precision,
            threads=threads,
            backend=backend,
            device=device,
            layout=layout,
            key=key,
            recentred=recentred,
            skip_bad=skip_bad,
            resize=resize,
            json=json,
        )
    )


@app.command()
@telling_interruptions()
def evolve(
    context: typer.Context,
    models: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--models", help="Models to evolve images for; nine built-in textbook neurons if not given."),
    ] = None,
    neurons: Neurons = None,
    optimiser: Annotated[
        str,
        typer.Option(
            "--optimiser",
            help="cholesky-cma, diagonal-cma, sphere-cma-exp, sphere-cma-lin, sphere-cma-inv, ga-ponce2019, ga-xdream, "
            "nes, fdgd; several with commas between, to compare them; or all.",
        ),
    ] = "cholesky-cma",
    generator: Annotated[
        str,
        typer.Option("--generator", help="What makes images of codes: fourier, gabor, cppn, deepsim-fc6 and siblings."),
    ] = "fourier",
    weights: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--weights", help="Weight file of a deepsim generator."),
    ] = None,
    dim: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--dim", help="Length of a code; the generator's own if not given."),
    ] = None,
    population: Annotated[int, typer.Option("--population", help="Images per generation.")] = 40,
    generations: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--generations", help="Generations per evolution; 75 if not given."),
    ] = None,
    evaluations: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--evaluations", help="Images per evolution, instead of --generations."),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Evolutions per neuron, each with random numbers of its own.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="The first seed.")] = 0,
    noise: Annotated[
        str, typer.Option("--noise", help="Standard deviation of multiplicative noise; several, to compare: 0,0.2,0.5.")
    ] = "0",
    noise_model: Annotated[str, typer.Option("--noise-model", help="multiplicative or poisson.")] = "multiplicative",
    spikes_per_unit: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--spikes-per-unit", help="Poisson noise: spikes per unit of response; several: 5,20,inf."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Noisy presentations of each image, averaged.")] = 1,
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline", help="What noisy scores are counted from: grey (response to a grey screen) or none."
        ),
    ] = "grey",
    minimise: Annotated[bool, typer.Option("--minimise", help="Evolve images that suppress.")] = False,
    size: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--size", help="Size of evolved images in degrees; they fill the screen if not given."),
    ] = None,
    position: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--position", help="Their centre in degrees right and up of the screen's centre: 'x,y'."),
    ] = None,
    pixels_per_degree: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--pixels-per-degree", help="Pixels per degree of the models' input."),
    ] = None,
    references: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--references", help="Images to show in every generation beside the evolved ones."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Natural images to compare evolved ones with."),
    ] = None,
    resize: Resize = False,
    skip_bad: SkipBad = False,
    show: Annotated[int, typer.Option("--show", help="How many neurons get a card in the report.")] = 40,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write the generations as .parquet as well.")] = False,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", help="Generations between checkpoints.")] = 10,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out; other options need not be given again.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for report and files; made if missing.")] = Path(
        "cortexloop-evolve"
    ),
    precision: Precision = "exact",
    threads: Threads = None,
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """Evolve images that drive neurons, compare optimisers and natural images, and write a report and tables."""
    from cortexloop.cli.evolution.command import evolve_command
    from cortexloop.cli.evolution.options import EvolveOptions

    code = evolve_command(
        EvolveOptions(
            models=models,
            neurons=tuple(neurons or ()),
            optimiser=optimiser,
            generator=generator,
            weights=weights,
            dim=dim,
            population=population,
            generations=generations,
            evaluations=evaluations,
            seeds=seeds,
            seed=seed,
            noise=noise,
            noise_model=noise_model,
            spikes_per_unit=spikes_per_unit,
            repeats=repeats,
            baseline=baseline,
            minimise=minimise,
            size=size,
            position=position,
            pixels_per_degree=pixels_per_degree,
            references=references,
            images=images,
            resize=resize,
            skip_bad=skip_bad,
            show=show,
            parquet=parquet,
            checkpoint_every=checkpoint_every,
            precision=precision,
            backend=backend,
            threads=threads,
            out=out,
            resume=resume,
            json=json,
            given=frozenset(_given(context)),
        )
    )
    raise typer.Exit(code)


def _given(context: typer.Context) -> Iterator[str]:
    """Names of the parameters that are not at their defaults because they were given."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            yield name


app.command()(fit)
app.command()(saliency)
app.command()(serve)
app.add_typer(rig)


@app.command()
def doctor(json: Json = False) -> None:
    """Describe the installation: versions, processor, instruction set, threads, backends and why (not)."""
    from cortexloop.cli.doctor import doctor as run_doctor

    run_doctor(json=json)


@app.command()
@telling_interruptions()
def bench(
    models: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--models", help="Models to time; random ones of the published shapes if not given."),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="About how long to measure.")] = 20.0,
    json: Json = False,
) -> None:
    """Time this machine: milliseconds per image and model, against plain torch modules, interleaved."""
    from cortexloop.cli.bench import bench as run_bench

    run_bench(models, seconds=seconds, json=json)


# click's UsageError, which some versions of typer import and others carry within.
_UsageError: Any = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str]) -> int:
    """Run one command. Exit code: 0 success, 2 bad input (one sentence on stderr), 130 interrupted."""
    from PIL import Image

    with warnings.catch_warnings(), warnings_in_one_line():
        # Large pictures are refused by name where they are read; Pillow's own warning would come on top.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            code = app(args=list(arguments), prog_name="cortexloop", standalone_mode=False)
        except (BadInputError, SettingError) as error:
            complain(str(error))
            return 2
        except _UsageError as error:
            complain(f"{error.format_message()} (see cortexloop --help)")
            return 2
        except (InterruptedCommandError, KeyboardInterrupt, typer.Abort):
            complain("interrupted; nothing was written")
            return 130
    return code if isinstance(code, int) else 0
