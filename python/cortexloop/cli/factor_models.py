"""The commands `fit` and `saliency`: options and help texts. `fitting` and `saliency` beside this do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cortexloop.cli.console import telling_interruptions
from cortexloop.cli.parameters import Json, Resize, SkipBad, Threads

SourceModels = Annotated[
    Optional[Path],  # noqa: UP045 - typer evaluates this on Python 3.10 as well
    typer.Option("--models", help="Compact models, or shared compact models (.npz), of which --model gives features."),
]
SourceModel = Annotated[Optional[str], typer.Option("--model", help="Which of the --models.")]  # noqa: UP045
Layer = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--layer", help="Layer: 'layer2' of a compact model, 'layer3.5' of a network."),
]
Network = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--network", help="torchvision:resnet50, timm:NAME, or FILE.py:FUNCTION that returns a torch module."),
]
Weights = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--weights", help="Checkpoint of the network, or 'pretrained': those that its package downloads."),
]
Size = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--size", help="Pixels that the network takes: 224, or 224x192 (height x width)."),
]
Mean = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--mean", help="What the network subtracts, R,G,B in units of 0..1; ImageNet's if not given."),
]
Std = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--std", help="What the network then divides by; ImageNet's if not given."),
]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Batch = Annotated[int, typer.Option("--batch", help="Images at a time.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run in --out.")]


@telling_interruptions()
def fit(
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Folder or zip of pictures, .npy or .npz array; an example if not given."),
    ] = None,
    responses: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--responses", help="Recorded responses (.npz, .npy, .csv), with or without single repeats."),
    ] = None,
    recording: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--recording", help="Which recording of the responses file belongs to the images."),
    ] = None,
    models: SourceModels = None,
    model: SourceModel = None,
    network: Network = None,
    layer: Layer = None,
    weights: Weights = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    features: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--features", help="Feature maps computed before, .npy or .npz: images x channels x height x width."
        ),
    ] = None,
    neurons: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--neurons", help="Names, patterns or positions ('0,3-7') of neurons; all if not given."),
    ] = None,
    missing: Annotated[
        str, typer.Option("--missing", help="What to leave out where responses are missing: neurons or images.")
    ] = "neurons",
    rank: Annotated[int, typer.Option("--rank", help="Factors (pairs of mask and vector) per neuron.")] = 3,
    method: Annotated[
        str, typer.Option("--method", help="Factorization: posneg-nmf (published), semi-nmf or svd.")
    ] = "posneg-nmf",
    threshold: Annotated[
        str,
        typer.Option(
            "--threshold",
            help="Which covariances to keep: two-sided (|t| >= 3), published (t >= 3), negative, fdr, permutation, "
            "familywise or none; with a level: two-sided:2.5, fdr:0.01.",
        ),
    ] = "two-sided",
    border: Annotated[
        int, typer.Option("--border", help="Rows and columns of the map left out at each side (zero padding).")
    ] = 1,
    reduction: Annotated[
        str,
        typer.Option(
            "--reduction",
            help="What a regression sees of the map: mask (published spmask), vector (featvec) or factor; none: the "
            "factors themselves predict.",
        ),
    ] = "mask",
    regressor: Annotated[str, typer.Option("--regressor", help="ridge or lasso.")] = "ridge",
    nonlinearity: Annotated[
        str, typer.Option("--nonlinearity", help="softplus, line, or auto: softplus without a reduction.")
    ] = "auto",
    held_out: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--held-out", help="Fraction of images to test on, chosen at random; 0.2 if not given."),
    ] = None,
    held_out_from: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--held-out-from", help="Test on images from this number on instead (601: published V4 data)."),
    ] = None,
    baselines: Annotated[
        str,
        typer.Option("--baselines", help="Compare with pca, srp, dense-ridge, lasso; several with commas; none."),
    ] = "pca",
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    show: Annotated[int, typer.Option("--show", help="How many neurons get a card in the report.")] = 12,
    resize: Resize = False,
    skip_bad: SkipBad = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for report and files; made if missing.")] = Path(
        "cortexloop-fit"
    ),
    overwrite: Overwrite = False,
    batch: Batch = 64,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Fit factorized encoding models (masks and feature vectors) to recorded neurons, and write a report."""
    from cortexloop.cli.fitting.command import fit_command
    from cortexloop.cli.fitting.options import FitOptions
    from cortexloop.cli.sources import SourceOptions

    source = SourceOptions(models, model, layer, network, weights, size, mean, std, batch, device, seed)
    fit_command(
        FitOptions(
            source=source,
            images=images,
            responses=responses,
            recording=recording,
            features=features,
            neurons=tuple(neurons or ()),
            missing=missing,
            rank=rank,
            method=method,
            threshold=threshold,
            border=border,
            reduction=reduction,
            regressor=regressor,
            nonlinearity=nonlinearity,
            held_out=held_out,
            held_out_from=held_out_from,
            baselines=baselines,
            seed=seed,
            show=show,
            resize=resize,
            skip_bad=skip_bad,
            out=out,
            overwrite=overwrite,
            threads=threads,
            json=json,
        )
    )


@telling_interruptions()
def saliency(
    models: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--models",
            help="Models to explain; nine built-in textbook neurons if not given. With --model: "
            "the compact models that the features come from, if not as recorded.",
        ),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--images", help="Folder or zip of pictures, .npy or .npz array; procedural images if not given."),
    ] = None,
    neurons: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--neurons", help="Names, patterns or positions ('0,3-7') of neurons; all if not given."),
    ] = None,
    method: Annotated[
        str,
        typer.Option("--method", help="gradient, input-x-gradient, smoothgrad, integrated-gradients or occlusion."),
    ] = "gradient",
    top: Annotated[int, typer.Option("--top", help="Preferred images per neuron.")] = 6,
    every_image: Annotated[
        bool, typer.Option("--every-image", help="Maps of all images for every neuron, instead of preferred ones.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", help="Noisy copies of an image, for smoothgrad.")] = 16,
    noise: Annotated[
        float, typer.Option("--noise", help="Their standard deviation, as a fraction of the range of levels.")
    ] = 0.15,
    steps: Annotated[int, typer.Option("--steps", help="Points on the path of integrated gradients.")] = 32,
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline", help="Where paths and inputs start: zero (what the network sees as 0), blur or a level."
        ),
    ] = "zero",
    radius: Annotated[float, typer.Option("--radius", help="Of the patches that occlude, in pixels.")] = 8.0,
    stride: Annotated[int, typer.Option("--stride", help="Pixels between their places.")] = 4,
    fill: Annotated[str, typer.Option("--fill", help="What takes their place: smooth, zero or a level.")] = "smooth",
    blur: Annotated[float, typer.Option("--blur", help="Standard deviation in pixels of a blur of the maps.")] = 1.5,
    model: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--model", help="Fitted factor model (model.safetensors of `cortexloop fit`): parallel backpropagation."
        ),
    ] = None,
    gallery: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--gallery", help="Reference images, among which the most similar ones are found for every image."
        ),
    ] = None,
    references: Annotated[int, typer.Option("--references", help="Of the gallery, for every image and neuron.")] = 2,
    cotangent: Annotated[
        str,
        typer.Option("--cotangent", help="What a pair shares: weighted-product, similarity-gradient or minimum."),
    ] = "weighted-product",
    similarity: Annotated[
        str, typer.Option("--similarity", help="How references are found: weighted, cosine or abs-cosine.")
    ] = "weighted",
    source_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--source-model", help="Which of the --models gave the features of --model."),
    ] = None,
    network: Network = None,
    layer: Layer = None,
    weights: Weights = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    show: Annotated[int, typer.Option("--show", help="How many neurons get a card in the report.")] = 24,
    resize: Resize = False,
    skip_bad: SkipBad = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for report and files; made if missing.")] = Path(
        "cortexloop-saliency"
    ),
    overwrite: Overwrite = False,
    batch: Batch = 64,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Show which pixels drive model neurons, as heat maps, and write a report."""
    from cortexloop.cli.saliency.command import saliency_command
    from cortexloop.cli.saliency.options import SaliencyOptions
    from cortexloop.cli.sources import SourceOptions

    saliency_command(
        SaliencyOptions(
            source=SourceOptions(models, source_model, layer, network, weights, size, mean, std, batch, device, seed),
            images=images,
            neurons=tuple(neurons or ()),
            method=method,
            top=top,
            every_image=every_image,
            samples=samples,
            noise=noise,
            steps=steps,
            baseline=baseline,
            radius=radius,
            stride=stride,
            fill=fill,
            blur=blur,
            model=model,
            gallery=gallery,
            references=references,
            cotangent=cotangent,
            similarity=similarity,
            seed=seed,
            show=show,
            resize=resize,
            skip_bad=skip_bad,
            out=out,
            overwrite=overwrite,
            threads=threads,
            json=json,
        )
    )
