"""The modules against the float64 reference predictions of the V4 data pack (made with PyTorch, checked with Keras).

Tolerances: the references are float64 themselves, so the modules in float64 agree to rounding; in float32 the
responses are within 5e-6 absolute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cortexloop import io
from cortexloop.models import CompactModel, SharedCompactModel
from cortexloop.weights import IMAGE_MEAN, CompactWeights

EXACT = 1e-12  # float64 against float64, absolute, for responses of about 1
SINGLE = 5e-6  # float32 against float64, absolute
GRADIENT_SINGLE = 1e-5  # relative L2, where no ReLU gate lies within rounding of zero
GRADIENT_FLIPPED = 5e-3  # relative L2 where single gates flip between the precisions


@pytest.fixture(scope="module")
def folder() -> Path:
    root = Path(__file__).parents[2]
    path = Path(os.environ.get("CORTEXLOOP_V4_DATA", root.parent / "shared" / "data" / "v4_compact"))
    if not (path / "reference_predictions.npz").is_file():
        pytest.skip(f"no V4 data pack at {path}: set CORTEXLOOP_V4_DATA")
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[np.lib.npyio.NpzFile]:
    with np.load(folder / "reference_predictions.npz") as arrays:
        yield arrays


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, CompactWeights]:
    return {w.name: w for w in io.load_models(folder / "compact_models.npz")}


@pytest.fixture(scope="module")
def images(reference: np.lib.npyio.NpzFile) -> torch.Tensor:
    """All 48 reference images, recentred, float64."""
    return torch.from_numpy(reference["images_uint8"] - np.array(IMAGE_MEAN))


def gradient_cases(reference: np.lib.npyio.NpzFile) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(model name, image rows, expected gradients [3, 112, 112, 3])."""
    names = [f"{session}/neuron{k}" for session, k in reference["gradient_models"]]
    return [(name, reference["gradient_image_rows"], reference["input_gradients"][i]) for i, name in enumerate(names)]


def test_responses_of_every_model_in_double(models, reference, images):
    # One image for each of the 122 models, so that all 48 images occur: double precision is slow.
    for i, (name, weights) in enumerate(models.items()):
        rows = [i % 48]
        session, neuron = name.split("/neuron")
        with torch.no_grad():
            got = CompactModel.from_weights(weights).double()(images[rows]).numpy()
        assert np.abs(got - reference[f"predictions/{session}"][int(neuron), rows]).max() < EXACT, name


def test_responses_in_single_precision(models, reference, images):
    for name in list(models)[::12]:
        session, neuron = name.split("/neuron")
        with torch.no_grad():
            got = CompactModel.from_weights(models[name])(images.float()).double().numpy()
        assert np.abs(got - reference[f"predictions/{session}"][int(neuron)]).max() < SINGLE, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_input_gradients(models, reference, images, dtype):
    tight = 0
    for name, rows, expected in gradient_cases(reference):
        inputs = images[rows].to(dtype).requires_grad_()
        CompactModel.from_weights(models[name]).to(dtype)(inputs).sum().backward()
        for got, truth in zip(inputs.grad.double().numpy(), expected, strict=True):
            relative = np.linalg.norm(got - truth) / np.linalg.norm(truth)
            cosine = (got * truth).sum() / np.linalg.norm(got) / np.linalg.norm(truth)
            if dtype == torch.float64:
                assert relative < EXACT
            assert relative < GRADIENT_FLIPPED
            assert cosine > 0.9999
            tight += relative < GRADIENT_SINGLE
    assert tight >= 4  # of six; in the others single gates flip


def test_activations(models, reference, images):
    for name, _, _ in gradient_cases(reference):
        model = CompactModel.from_weights(models[name]).double()
        stem = name.replace("/", "_")
        with torch.no_grad():
            maps = [model.activity(images[:1], i)[0].numpy() for i in range(5)]
        for i, got in enumerate(maps):
            mean = reference[f"activation_channel_mean/{stem}/layer{i}"]
            np.testing.assert_allclose(got.mean((0, 1)), mean, rtol=1e-10, atol=1e-12)
            if i >= 2:
                np.testing.assert_allclose(got, reference[f"activations/{stem}/layer{i}"], rtol=1e-10, atol=1e-12)


def test_shared_models(folder, reference, images):
    for weights in io.load_shared(folder / "shared_compact_models.npz"):
        expected = reference[f"shared_predictions/{weights.name}"].T
        model = SharedCompactModel.from_weights(weights)
        with torch.no_grad():
            single = model(images.float()).double().numpy()
            double = model.double()(images[::6]).numpy()
        assert np.abs(single - expected).max() < SINGLE, weights.name
        assert np.abs(double - expected[::6]).max() < EXACT, weights.name


def test_published_torch_files_reach_the_reference_responses(folder, reference, images):
    # The one format whose variances have lost digits.
    for weights in io.load_models(folder / "published_formats" / "models_torch"):
        session, neuron = weights.name.removeprefix("compact_model_").split("_neuron")
        with torch.no_grad():
            got = CompactModel.from_weights(weights)(images.float()).double().numpy()
        assert np.abs(got - reference[f"predictions/{session}"][int(neuron)]).max() < SINGLE
