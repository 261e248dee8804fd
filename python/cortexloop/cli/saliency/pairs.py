"""Parallel backpropagation: what images share, for neurons of a factor model, with the most similar of a gallery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop import attribution
from cortexloop.cli.console import BadInputError, bad_input, guarded, progress
from cortexloop.cli.fitting.data import Excluded, Pictures, open_images
from cortexloop.cli.fitting.example import IMAGES, collages
from cortexloop.cli.inputs import choose
from cortexloop.cli.saliency.findings import Comparison, Explained, NeuronMaps, Pair, SaliencyFindings
from cortexloop.cli.saliency.options import METHODS, SaliencyOptions, level_of
from cortexloop.cli.saliency.preferred import Chosen, choose_images
from cortexloop.cli.sources import OpenSource, open_source, restored
from cortexloop.factor import FactorModel

RECONSTRUCTION = (
    "No code of the method is public: this is a reconstruction from the abstract and the captions of Lappe and others "
    "(NeurIPS 2024), and what they leave open is an option"
)


@dataclass(frozen=True, eq=False)
class Readout:
    """A fitted model with its features.

    Attributes:
        chosen: positions of the neurons to explain; `names` of them.
        example: whether it was fitted to the built-in example; `seed` of that.
    """

    model: FactorModel
    opened: OpenSource
    chosen: list[int]
    names: list[str]
    example: bool
    seed: int


def explain_pairs(options: SaliencyOptions, record: dict[str, Any]) -> SaliencyFindings:
    """Maps of every neuron's preferred images, or of all, and of their references.

    Raises:
        BadInputError: a model, its source, images or options that cannot be used.
    """
    readout = open_readout(options)
    gallery = _gallery(options, readout)
    chosen, pictures = choose_images(options, readout.names, readout.opened.size, lambda x: _predicted(readout, x))
    method = attribution.ParallelBackprop(
        readout.opened.source,
        readout.model.readout,
        cotangent=options.cotangent.replace("-", "_"),
        similarity=options.similarity.replace("-", "_"),
        method={"input-x-gradient": "grad_x_input"}.get(options.method, options.method.replace("-", "_")),
        steps=options.steps,
        baseline=level_of("baseline", options.baseline, ("zero", "blur")),
        post=attribution.Post(channels="sum", blur=options.blur),
    )
    names, index, similarity = _references(options, readout, method, chosen, gallery)
    found = _maps(options, readout, method, chosen, gallery, names, index, similarity)
    record |= {"features": readout.opened.source.settings(), "model": readout.model.settings}
    skipped = [Excluded(one.name, one.reason) for one in (*pictures.skipped, *gallery.skipped)]
    count = len(found)
    return SaliencyFindings(
        options, f"What images share for {count:,} neuron{'' if count == 1 else 's'}",
        f"parallel backpropagation, {METHODS[options.method]}", chosen.seen, len(names), found,
        _texts(options, readout), readout.example, (RECONSTRUCTION, *readout.opened.notes), tuple(skipped), options.out,
        record,
    )  # fmt: skip


def open_readout(options: SaliencyOptions) -> Readout:
    """The factor model of the options with the features that it reads.

    Raises:
        BadInputError: an unreadable file, a source that is not said or does not fit, neurons that are not in it.
    """
    path = options.model
    assert path is not None
    with bad_input():
        model = FactorModel.load(path)
    told = model.settings.get("fit", {})
    source = options.source
    if not source.given:
        try:
            source = restored(told["source"], batch=source.batch, device=source.device)
        except (KeyError, TypeError) as error:
            raise BadInputError(
                f"{str(path)!r} does not say which features it reads (it was fitted to --features of a file, or not by "
                "cortexloop fit): name them by --network and --layer, or --models, --source-model and --layer"
            ) from error
    opened = open_source(source)
    with bad_input():
        model = model.to(opened.source.device).with_source(opened.source)
    names = list(told.get("neurons", [f"neuron{i}" for i in range(len(model))]))
    wanted = choose(names, options.neurons, "neurons")
    out = {i for places in model.excluded.values() for i in places}
    kept = [names.index(name) for name in wanted if names.index(name) not in out]
    if not kept:
        raise BadInputError(f"none of the {len(wanted)} chosen neurons could be fitted: there is nothing to explain")
    return Readout(model, opened, kept, [names[i] for i in kept], bool(told.get("example")), int(told.get("seed", 0)))


def _predicted(readout: Readout, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = readout.model.predict(pixels)[:, readout.chosen].double().cpu().numpy()
    return found


def _gallery(options: SaliencyOptions, readout: Readout) -> Pictures:
    if options.gallery is not None:
        return open_images(options.gallery, readout.opened.size, resize=options.resize, skip_bad=options.skip_bad)
    if readout.example:
        return Pictures(collages(IMAGES, readout.seed), "collage")
    raise BadInputError("--model needs a --gallery of reference images, such as those that it was fitted on")


def _references(
    options: SaliencyOptions,
    readout: Readout,
    method: attribution.ParallelBackprop,
    chosen: Chosen,
    gallery: Pictures,
) -> tuple[list[str], NDArray[np.int64], NDArray[np.float64]]:
    """Names of the gallery, and positions in it and similarities [queries, neurons, references].

    An image is not its own reference where images and gallery are one source.
    """
    names: list[str] = []
    exclude = None
    if (
        options.gallery is not None
        and options.images is not None
        and options.gallery.resolve() == options.images.resolve()
    ):
        place = {name: i for i, name in enumerate(_usable(options, gallery))}
        exclude = torch.tensor([place.get(name, -1) for name in chosen.names])
    with progress("finding references", len(gallery.names), quiet=options.json) as bar:

        def stream() -> Any:
            for batch, pixels in guarded(gallery.batches(readout.opened.source.batch)):
                names.extend(batch)
                bar.advance(len(batch))
                yield pixels

        with bad_input():
            found = method.find_references(
                chosen.pixels, stream(), neurons=readout.chosen, top=options.references, exclude=exclude
            )
    return names, found.index.cpu().numpy(), found.similarity.double().cpu().numpy()


def _usable(options: SaliencyOptions, gallery: Pictures) -> list[str]:
    if not options.skip_bad:
        return gallery.names
    return [name for batch, _ in gallery.batches(options.source.batch) for name in batch]


def _maps(
    options: SaliencyOptions,
    readout: Readout,
    method: attribution.ParallelBackprop,
    chosen: Chosen,
    gallery: Pictures,
    names: list[str],
    index: NDArray[np.int64],
    similarity: NDArray[np.float64],
) -> tuple[NeuronMaps, ...]:
    places = chosen.positions  # [k, N]
    used = sorted({int(g) for n in range(places.shape[1]) for q in places[:, n] if q >= 0 for g in index[q, n]})
    row = {g: i for i, g in enumerate(used)}
    pixels_of = gallery.pick([names[g] for g in used])
    others = np.stack([pixels_of[names[g]] for g in used])
    answers = _predicted(readout, others)
    found = []
    with progress("making maps", int((places >= 0).sum()), quiet=options.json) as bar:
        for n, name in enumerate(readout.names):
            queries = [int(q) for q in places[:, n] if q >= 0]
            sides = []
            for r in range(options.references):
                near = torch.tensor([[row[int(index[q, n, r])]] for q in queries])
                pair = method.attribute(chosen.pixels[queries], others, index=near, neurons=[readout.chosen[n]])
                sides.append((pair.image[:, 0].float().cpu().numpy(), pair.reference[:, 0].float().cpu().numpy()))
            comparisons = []
            for i, q in enumerate(queries):
                pairs = []
                for r, (mine, theirs) in enumerate(sides):
                    g = int(index[q, n, r])
                    reference = Explained(names[g], float(answers[row[g], n]), others[row[g]], theirs[i])
                    pairs.append(Pair(float(similarity[q, n, r]), mine[i], reference))
                comparisons.append(
                    Comparison(chosen.names[q], float(chosen.responses[i, n]), chosen.pixels[q], tuple(pairs))
                )
            found.append(NeuronMaps(name, (), tuple(comparisons)))
            bar.advance(len(queries))
    return tuple(found)


_SIMILARITIES = {
    "weighted": "the sum over features of weight times the product of both activations",
    "cosine": "the cosine of both activations, each times the weights",
    "abs-cosine": "the cosine of both activations under the metric of the absolute weights",
}
_COTANGENTS = {
    "weighted-product": "the product of the weight and both activations",
    "similarity-gradient": "the product of the weight and the other image's activation, the gradient of the weighted "
    "similarity",
    "minimum": "the weight times the smaller of both activations",
}


def _texts(options: SaliencyOptions, readout: Readout) -> tuple[tuple[str, str], ...]:
    """(heading, sentences) of the method section."""
    c, h, w = readout.model.factors.feature_shape
    way = {
        "gradient": "back to the pixels of either image, as one vector-Jacobian product each",
        "input-x-gradient": "back to the pixels of either image, times the image's difference from the baseline "
        f"({options.baseline})",
        "integrated-gradients": "back to the pixels of either image along the straight line from the baseline "
        f"({options.baseline}), {options.steps} points, with what is shared held fixed",
    }[options.method]
    gallery = (
        "the collages that the example was fitted on" if options.gallery is None else f"from {str(options.gallery)!r}"
    )
    images = "procedural" if options.images is None else f"from {str(options.images)!r}"
    return (
        ("A reconstruction", RECONSTRUCTION + "."),
        (
            "References",
            f"For each neuron and image, the reference images with the largest similarity: "
            f"{_SIMILARITIES[options.similarity]} "
            f"(--similarity {options.similarity}); weights are those of the readout of the fitted model in feature "
            f"space.",
        ),
        (
            "Maps",
            f"What a pair shares is, feature by feature, {_COTANGENTS[options.cotangent]} (--cotangent "
            f"{options.cotangent}). It "
            f"is sent {way} (--method {options.method}), summed over colours"
            + (f" and blurred with a Gaussian of {options.blur:g} pixels." if options.blur else "."),
        ),
        (
            "Model",
            f"{str(options.model)!r}: {len(readout.model)} neurons on {readout.opened.source.name}, {c} x {h} x {w}. "
            f"Responses "
            "are predictions of that model.",
        ),
        ("Images", f"{images}; reference images: {gallery}."),
    )
