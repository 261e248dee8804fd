"""Saliency maps of the models of a bank."""

from __future__ import annotations

from typing import Any

import cortexloop as cl
from cortexloop import attribution, textbook
from cortexloop.cli.console import bad_input, progress
from cortexloop.cli.fitting.data import Excluded
from cortexloop.cli.inputs import choose, load_bank, settle_backend, settle_device
from cortexloop.cli.saliency.findings import Explained, NeuronMaps, SaliencyFindings
from cortexloop.cli.saliency.options import METHODS, SaliencyOptions, level_of
from cortexloop.cli.saliency.preferred import choose_images

CHUNK = 64
"""Maps between two moves of the progress bar."""


def explain_bank(options: SaliencyOptions, record: dict[str, Any]) -> SaliencyFindings:
    """Maps of every model's preferred images, or of all.

    Raises:
        BadInputError: models, images or options that cannot be used.
    """
    path = options.source.models
    if path is None:
        models = {weights.name: weights for weights in textbook.textbook_neurons()}
        bank = cl.ModelBank.from_weights(models[name] for name in choose(tuple(models), options.neurons))
    else:
        bank = load_bank(path, options.neurons)
    bank = settle_device(bank, options.source.device, backend="auto", precision="exact", dtype="float32")
    record["backend"] = settle_backend(
        bank, backend="auto", precision="exact", op="bank_input_gradient", dtype="float32", batch=CHUNK
    ).chosen
    chosen, pictures = choose_images(options, bank.names, (bank.height, bank.width), lambda x: cl.responses(x, bank))
    with bad_input():
        method = _method(options, bank)
    places = [(k, n) for n in range(len(bank)) for k in range(len(chosen.positions)) if chosen.positions[k, n] >= 0]
    found: dict[tuple[int, int], Any] = {}
    with progress("making maps", len(places), quiet=options.json) as bar:
        for start in range(0, len(places), CHUNK):
            part = places[start : start + CHUNK]
            pixels = chosen.pixels[[chosen.positions[place] for place in part]]
            maps = method.attribute(pixels, pairs=[n for _, n in part]).float().cpu().numpy()
            if options.method == "occlusion":
                maps = -maps  # what is lost with a patch is what it drove
            found |= dict(zip(part, maps, strict=True))
            bar.advance(len(part))
    neurons = tuple(
        NeuronMaps(
            name,
            tuple(
                Explained(
                    chosen.names[chosen.positions[k, n]], float(chosen.responses[k, n]),
                    chosen.pixels[chosen.positions[k, n]], found[k, n],
                )
                for k in range(len(chosen.positions)) if (k, n) in found
            ),
        )
        for n, name in enumerate(bank.names)
    )  # fmt: skip
    count, kind = len(bank), "textbook neuron" if path is None else "model neuron"
    return SaliencyFindings(
        options, f"What drives {count:,} {kind}{'' if count == 1 else 's'}", METHODS[options.method], chosen.seen, None,
        neurons, _texts(options, bank), path is None, (),
        tuple(Excluded(one.name, one.reason) for one in pictures.skipped), options.out, record,
    )  # fmt: skip


def _method(options: SaliencyOptions, bank: cl.ModelBank) -> attribution.Method:
    post = attribution.Post(channels="sum", blur=options.blur)
    baseline = level_of("baseline", options.baseline, ("zero", "blur"))
    if options.method == "gradient":
        return attribution.Saliency(bank, post=post)
    if options.method == "input-x-gradient":
        return attribution.InputXGradient(bank, baseline=baseline, post=post)
    if options.method == "smoothgrad":
        return attribution.SmoothGrad(
            bank, samples=options.samples, deviation=options.noise * 255, seed=options.seed, post=post
        )
    if options.method == "integrated-gradients":
        return attribution.IntegratedGradients(bank, baseline=baseline, steps=options.steps, post=post)
    fill = level_of("fill", options.fill, ("zero", "smooth"))
    return attribution.Occlusion(bank, fill=fill, radius=options.radius, stride=options.stride)


def _texts(options: SaliencyOptions, bank: cl.ModelBank) -> tuple[tuple[str, str], ...]:
    """(heading, sentences) of the method section."""
    start = {"zero": "the mean colour, which the models see as 0", "blur": "the image itself, strongly blurred"}.get(
        options.baseline, f"uniform grey of level {options.baseline}"
    )
    place = {"smooth": "the blurred image (Gaussian, 5 pixels)", "zero": "the mean colour"}.get(
        options.fill, f"grey of level {options.fill}"
    )
    sums = "summed over the three colours"
    what = {
        "gradient": f"The derivative of the response with respect to every pixel, {sums} (Simonyan and others 2013): "
        f"warm "
        "where the response rises when the pixel gets lighter, cool where it falls.",
        "input-x-gradient": f"The difference of the image from {start}, times the gradient, {sums} (Shrikumar and "
        f"others "
        "2016): warm where it adds to the response to first order.",
        "smoothgrad": f"The gradient averaged over {options.samples} copies of the image with Gaussian noise of "
        f"{100 * options.noise:g} % of the range of levels (seed {options.seed}), {sums} (Smilkov and others 2017).",
        "integrated-gradients": f"The difference of the image from {start}, times the gradient averaged over "
        f"{options.steps} points of the straight line between them, {sums}; a map sums to the change of the response "
        "(Sundararajan and others 2017).",
        "occlusion": f"What the response loses when a disc of radius {options.radius:g} pixels, every {options.stride} "
        f"pixels, is replaced by {place}: warm where the image drives the neuron.",
    }[options.method]
    found = [("Maps", what)]
    if options.blur and options.method != "occlusion":
        found.append(("Blur", f"Maps were blurred with a Gaussian of {options.blur:g} pixels."))
    images = f"procedural (seed {options.seed})" if options.images is None else f"from {str(options.images)!r}"
    found.append(
        ("Images", f"RGB, {bank.height} x {bank.width} pixels, {images}; responses are in the models' own units.")
    )
    if options.source.models is not None:
        found.append(("Models", f"from {str(options.source.models)!r}."))
    return tuple(found)
