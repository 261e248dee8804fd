"""`cortexloop saliency` as a user runs it: maps are those of the library, references the most similar ones."""

from __future__ import annotations

import contextlib
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import cortexloop as cl
from cortexloop import attribution, features
from cortexloop.cli import overlays
from cortexloop.cli.app import run
from cortexloop.cli.fitting import example
from cortexloop.cli.saliency import pairs, preferred
from cortexloop.factor import FactorModel
from cortexloop.textbook import procedural_images, textbook_neurons

CHOSEN = (0, 7)


def cortexloop(*arguments):
    """Run in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def explained(out, *arguments):
    """Run `cortexloop saliency --json` into a folder: (printed document, arrays of maps.npz)."""
    code, printed, err = cortexloop("saliency", "--out", out, "--json", *arguments)
    assert code == 0, err
    with np.load(out / "maps.npz", allow_pickle=False) as archive:
        return json.loads(printed), dict(archive)


def refused(*arguments):
    """The sentence with which maps are refused."""
    code, printed, err = cortexloop("saliency", *arguments)
    assert (code, printed) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bank():
    return cl.ModelBank.from_weights(textbook_neurons()[i] for i in CHOSEN)


@pytest.fixture(scope="module")
def files(tmp_path_factory, bank):
    """bank.safetensors, images.npy and gallery.npy in one folder."""
    folder = tmp_path_factory.mktemp("files")
    bank.save(folder / "bank.safetensors")
    np.save(folder / "images.npy", procedural_images(12, 3))
    np.save(folder / "gallery.npy", procedural_images(16, 4))
    return folder


# ---------------------------------------------------------------------------------------------------------- a bank


METHODS = {
    "gradient": lambda bank, post: attribution.Saliency(bank, post=post),
    "input-x-gradient": lambda bank, post: attribution.InputXGradient(bank, baseline=90.0, post=post),
    "smoothgrad": lambda bank, post: attribution.SmoothGrad(bank, samples=2, deviation=51.0, seed=3, post=post),
    "integrated-gradients": lambda bank, post: attribution.IntegratedGradients(bank, steps=3, baseline=90.0, post=post),
    "occlusion": lambda bank, post: attribution.Occlusion(bank, radius=9.0, stride=28, fill="zero"),
}
OPTIONS = {
    "input-x-gradient": ("--baseline", 90),
    "smoothgrad": ("--samples", 2, "--noise", 0.2, "--seed", 3),
    "integrated-gradients": ("--steps", 3, "--baseline", 90),
    "occlusion": ("--radius", 9, "--stride", 28, "--fill", "zero"),
}


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_a_bank_are_those_of_the_library(tmp_path, bank, files, method):
    document, maps = explained(
        tmp_path / "out", "--models", files / "bank.safetensors", "--images", files / "images.npy", "--method", method,
        "--top", 2, "--blur", 0.5, *OPTIONS.get(method, ()),
    )  # fmt: skip
    images = np.load(files / "images.npy")
    responses = cl.responses(images, bank)
    best = np.argsort(-responses, axis=0, kind="stable")[:2]
    assert maps["neurons"].tolist() == [name for name in bank.names for _ in range(2)]
    assert maps["images"].tolist() == [str(i) for n in range(2) for i in best[:, n]]
    np.testing.assert_allclose(maps["responses"], best_of(responses, best), rtol=1e-6)
    expected = METHODS[method](bank, attribution.Post(channels="sum", blur=0.5)).attribute(
        images[best.T.ravel()], pairs=[0, 0, 1, 1]
    )
    sign = -1 if method == "occlusion" else 1
    scale = float(expected.abs().max())
    np.testing.assert_allclose(maps["maps"], sign * expected.numpy(), rtol=1e-5, atol=1e-5 * scale)
    assert [n["name"] for n in document["neurons"]] == list(bank.names)
    assert sorted(os.listdir(tmp_path / "out")) == ["maps.npz", "overlays", "report.html", "run.json"]
    pictures = sorted(os.listdir(tmp_path / "out" / "overlays"))
    assert len(pictures) == 4
    with Image.open(tmp_path / "out" / "overlays" / pictures[0]) as picture:
        assert picture.size == (224, 112)


def best_of(responses, best):
    return np.take_along_axis(responses, best, axis=0).T.ravel()


def test_every_image(tmp_path, bank, files):
    _, maps = explained(
        tmp_path / "out", "--models", files / "bank.safetensors", "--images", files / "images.npy", "--every-image",
        "--neurons", bank.names[1],
    )  # fmt: skip
    assert maps["maps"].shape == (12, 112, 112)
    assert sorted(map(int, maps["images"])) == list(range(12))


def test_textbook_neurons_without_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(preferred, "PROCEDURAL", 20)
    monkeypatch.chdir(tmp_path)
    code, printed, err = cortexloop("saliency", "--top", 1, "--neurons", "dot_*")
    assert code == 0, err
    assert "dot_large" in printed
    text = (tmp_path / "cortexloop-saliency" / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "a large dot, light or dark" in text
    assert "--overwrite" in refused("--top", 1)


def test_the_gradient_of_a_dot_neuron_lies_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(preferred, "PROCEDURAL", 60)
    _, maps = explained(tmp_path / "out", "--top", 1, "--neurons", "dot_small", "--blur", 0)
    size = np.abs(maps["maps"][0])
    assert size[28:84, 28:84].sum() > 0.95 * size.sum()


# ------------------------------------------------------------------------------------------------- a factor model


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, files, bank):
    """model.safetensors of a fit to responses that are known functions of a layer's map."""
    folder = tmp_path_factory.mktemp("fit")
    images = procedural_images(48, 6)
    np.save(folder / "images.npy", images)
    maps = cl.activations(images, bank.select("edge_0deg"), 3)[0]
    np.save(
        folder / "responses.npy", np.stack([maps[:, 9:12, 9:12].sum((1, 2, 3)), maps[:, 15:18, 15:18, 0].sum((1, 2))])
    )
    code, _, err = cortexloop(
        "fit", "--images", folder / "images.npy", "--responses", folder / "responses.npy", "--models",
        files / "bank.safetensors", "--model", "edge_0deg", "--layer", "3", "--rank", 1, "--threshold", "none",
        "--baselines", "none", "--out", folder / "out", "--show", 1, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    return folder / "out" / "model.safetensors"


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        ((), {}),
        (
            ("--cotangent", "minimum", "--similarity", "abs-cosine", "--method", "integrated-gradients", "--steps", 2),
            {"cotangent": "minimum", "similarity": "abs_cosine", "method": "integrated_gradients", "steps": 2},
        ),
    ],
)
def test_pairs_are_those_of_the_library(tmp_path, files, bank, fitted, options, choices):
    document, maps = explained(
        tmp_path / "out", "--model", fitted, "--images", files / "images.npy", "--gallery", files / "gallery.npy",
        "--top", 2, "--references", 2, "--blur", 0, *options,
    )  # fmt: skip
    source = features.BankFeatures(bank, "edge_0deg", 3)
    model = FactorModel.load(fitted, source)
    images, gallery = np.load(files / "images.npy"), np.load(files / "gallery.npy")
    predicted = model.predict(images).numpy()
    best = np.argsort(-predicted, axis=0, kind="stable")[:2]
    method = attribution.ParallelBackprop(source, model.readout, post=attribution.Post(channels="sum"), **choices)
    found = method.find_references(images, gallery, top=2)
    row = 0
    for n in range(2):
        for image in best[:, n]:
            for r in range(2):
                reference = int(found.index[image, n, r])
                assert maps["images"][row] == str(image)
                assert maps["references"][row] == str(reference)
                assert maps["similarity"][row] == pytest.approx(float(found.similarity[image, n, r]), rel=1e-5)
                assert maps["responses"][row] == pytest.approx(float(predicted[image, n]), rel=1e-5)
                pair = method.attribute(images[image : image + 1], gallery[reference : reference + 1], neurons=[n])
                for ours, theirs in ((maps["maps"], pair.image), (maps["reference_maps"], pair.reference)):
                    expected = theirs[0, 0].numpy()
                    np.testing.assert_allclose(ours[row], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
                row += 1
    assert row == len(maps["maps"])
    assert "reconstruction" in document["notes"][0]
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "this is a reconstruction" in text
    assert f"--cotangent {choices.get('cotangent', 'weighted_product').replace('_', '-')}" in text
    with Image.open(next((tmp_path / "out" / "overlays").iterdir())) as picture:
        assert picture.size == (448, 112)


def test_an_image_is_not_its_own_reference(tmp_path, files, fitted):
    _, maps = explained(
        tmp_path / "out", "--model", fitted, "--images", files / "images.npy", "--gallery", files / "images.npy",
        "--every-image", "--references", 1, "--neurons", "neuron1",
    )  # fmt: skip
    assert len(maps["images"]) == 12
    assert not (maps["images"] == maps["references"]).any()


def test_the_example_explains_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "IMAGES", 60)
    monkeypatch.setattr(pairs, "IMAGES", 20)
    monkeypatch.setattr(preferred, "PROCEDURAL", 8)
    code, _, err = cortexloop(
        "fit", "--out", tmp_path / "fit", "--baselines", "none", "--neurons", "edge_0deg", "--threshold", "two-sided:2",
        "--show", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    document, maps = explained(
        tmp_path / "out", "--model", tmp_path / "fit" / "model.safetensors", "--top", 1, "--references", 1
    )
    assert document["gallery"] == 20
    assert maps["references"][0].startswith("collage ")
    assert maps["images"][0].startswith("procedural ")


def test_features_of_a_file_have_to_be_named_again(tmp_path, files, fitted, bank):
    model = FactorModel.load(fitted)
    settings = dict(model.settings)
    del settings["fit"]
    from dataclasses import replace

    path = tmp_path / "model.safetensors"
    replace(model, settings=settings).save(path)
    arguments = ("--model", path, "--images", files / "images.npy", "--gallery", files / "gallery.npy", "--top", 1)
    assert "name them by" in refused(*arguments, "--out", tmp_path / "none")
    source = ("--models", files / "bank.safetensors", "--source-model", "edge_0deg", "--layer")
    document, _ = explained(tmp_path / "out", *arguments, *source, 3)
    assert [neuron["name"] for neuron in document["neurons"]] == ["neuron0", "neuron1"]
    assert "the model reads maps" in refused(*arguments, *source, 0, "--out", tmp_path / "none")


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_told_in_one_sentence(tmp_path, files, fitted, monkeypatch):
    out = ("--out", tmp_path / "none")
    bank, images = ("--models", files / "bank.safetensors"), ("--images", files / "images.npy")
    assert "--method should be one of" in refused("--method", "lime", *out)
    assert "--method with --model" in refused("--model", fitted, "--method", "occlusion", *out)
    assert "needs --model" in refused("--gallery", files / "gallery.npy", *out)
    assert "needs a --gallery" in refused("--model", fitted, *images, *out)
    assert "cannot be used" in refused("--model", files / "bank.safetensors", *images, *out)
    assert "No such file" in refused("--model", tmp_path / "nothing", *images, *out)
    assert "matches none" in refused(*bank, "--neurons", "edge_7deg", *out)
    assert "--baseline should be" in refused("--baseline", "black", *out)
    assert "--fill should be" in refused("--fill", "300", *out)
    assert "--similarity should be" in refused("--similarity", "dot", *out)
    assert "--top should be at least 1" in refused("--top", 0, *out)
    assert "--noise" in refused("--noise", 0, *out)
    small = tmp_path / "small.npy"
    np.save(small, np.zeros((3, 20, 20, 3), np.uint8))
    assert "112" in refused(*bank, "--images", small, *out)
    assert "fewer than 30" in refused(
        "--model", fitted, *images, "--gallery", files / "gallery.npy", "--references", 30, *out
    )
    monkeypatch.setattr(preferred, "MOST_MAPS", 20)
    assert "24 maps, at most 20" in refused(*bank, *images, "--every-image", *out)
    assert not (tmp_path / "none").exists()


def test_overlays_color_by_sign():
    pixels = np.full((8, 8, 3), 128, np.uint8)
    values = np.zeros((8, 8))
    values[1, 1], values[6, 6] = 2.0, -1.0
    shown = overlays.overlay(pixels, values).astype(int)
    assert tuple(shown[1, 1]) == overlays.WARM
    assert shown[6, 6, 2] > shown[6, 6, 0]
    np.testing.assert_array_equal(shown[4, 4], shown[0, 7])
    assert len(set(shown[4, 4])) == 1
    np.testing.assert_array_equal(overlays.overlay(pixels, np.zeros((2, 2))), np.full((8, 8, 3), shown[4, 4, 0]))
