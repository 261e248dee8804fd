"""Published V4 models: reference predictions made from the original files, and recorded responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import io, metrics
from cortexloop.testing import Inputs, without_kinks

SESSIONS = ("190923", "201025")
HELD_OUT = slice(600, 1200)  # images 601..1200; the first 600 fitted the teacher's readout


@pytest.fixture(scope="module")
def bank(v4_data: Path) -> cl.ModelBank:
    return cl.ModelBank.load(v4_data / "compact_models.npz")


@pytest.fixture(scope="module")
def golden(v4_data: Path) -> dict[str, Any]:
    with np.load(v4_data / "reference_predictions.npz") as file:
        return {name: file[name] for name in file.files}


def of_session(bank: cl.ModelBank, session: str) -> cl.ModelBank:
    return bank.select([name for name in bank.names if name.startswith(f"{session}/")])


def predictions(bank: cl.ModelBank, golden: dict[str, Any]) -> np.ndarray:
    """float64 [48, 122], in the bank's order."""
    columns = []
    for name in bank.names:
        session, neuron = name.split("/neuron")
        columns.append(golden[f"predictions/{session}"][int(neuron)])
    return np.stack(columns, axis=1)


def test_responses(kernels: None, bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    got = cl.responses(golden["images_uint8"], bank, backend="cpu")
    assert np.abs(got - predictions(bank, golden)).max() < 5e-6


def test_responses_of_the_reference(bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    """Each image with one model in float32, and in float64 to the precision of the float32-folded weights."""
    images, expected = golden["images_uint8"], predictions(bank, golden)
    rows = np.arange(48)
    pairs = rows * 2
    got = cl.responses(images, bank, pairs=pairs, backend="reference")
    assert np.abs(got - expected[rows, pairs]).max() < 5e-6
    recentred = cl.recenter(images[:12].astype(np.float64))
    got64 = cl.responses(recentred, bank, pairs=pairs[:12], backend="reference")
    assert np.abs(got64 - expected[rows, pairs][:12]).max() < 2e-6


def test_pairs_cover_the_bank(isa: str, bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    rows = np.arange(len(bank)) % 48
    got = cl.responses(golden["images_uint8"][rows], bank, pairs=np.arange(len(bank)), backend="cpu")
    assert np.abs(got - predictions(bank, golden)[rows, np.arange(len(bank))]).max() < 5e-6


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_gradients(engine: str, bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    """No ReLU gate of these six pairs lies within rounding of zero."""
    images = golden["images_uint8"][golden["gradient_image_rows"]]
    for (session, neuron), expected in zip(golden["gradient_models"], golden["input_gradients"], strict=True):
        model = bank.select(f"{session}/neuron{neuron}")
        got = cl.input_gradient(images, model, np.ones((3, 1), np.float32), backend=engine)
        for i in range(3):
            assert relative_error(got[i], expected[i]) < 1e-5


@dataclass(frozen=True)
class Gradients:
    """float32 images with one model each, the float64 gradients, and which pairs keep clear of every gate."""

    images: np.ndarray
    pairs: np.ndarray
    expected: np.ndarray
    clear: np.ndarray


@pytest.fixture(scope="module")
def gradients(bank: cl.ModelBank, golden: dict[str, Any]) -> Gradients:
    rows = np.arange(0, 48, 4)
    pairs = (rows * 7) % len(bank)
    images = cl.recenter(golden["images_uint8"][rows])
    expected = cl.input_gradient(images.astype(np.float64), bank, np.ones(len(rows)), pairs=pairs, backend="reference")
    nothing = torch.empty(0)
    clear = [
        bool(
            without_kinks(
                Inputs(nothing, torch.from_numpy(images[i : i + 1]), bank.select(int(n)), nothing, nothing), band=1e-7
            )
        )
        for i, n in enumerate(pairs)
    ]
    return Gradients(images, pairs, expected, np.array(clear))


def test_gradients_of_many_pairs(isa: str, bank: cl.ModelBank, gradients: Gradients) -> None:
    """Where single gates lie within rounding of zero they may flip, as in float32 torch; elsewhere they may not."""
    ones = np.ones(len(gradients.pairs), np.float32)
    got = cl.input_gradient(gradients.images, bank, ones, pairs=gradients.pairs, backend="cpu")
    for g, expected, clear in zip(got, gradients.expected, gradients.clear, strict=True):
        error = relative_error(g, expected)
        assert error < (1e-5 if clear else 5e-3)
        assert np.vdot(g, expected) / np.linalg.norm(g) / np.linalg.norm(expected) > 0.9999
    assert gradients.clear.any()


def test_activations(bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    image = golden["images_uint8"][golden["gradient_image_rows"][:1]]
    for session, neuron in golden["gradient_models"]:
        model = bank.select(f"{session}/neuron{neuron}")
        for layer in range(5):
            got = cl.activations(image, model, layer)[0][0]
            mean = golden[f"activation_channel_mean/{session}_neuron{neuron}/layer{layer}"]
            np.testing.assert_allclose(got.mean(axis=(0, 1), dtype=np.float64), mean, rtol=1e-5, atol=1e-5)
            if layer >= 2:
                expected = golden[f"activations/{session}_neuron{neuron}/layer{layer}"]
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def held_out(v4_data: Path) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Held-out images uint8 [600, 112, 112, 3] of a session, and the responses to them [neurons, 600]."""

    def load(session: str) -> tuple[np.ndarray, np.ndarray]:
        source = io.open_images(v4_data / f"images_{session}.zip")
        names, images = next(source.batches(1200))
        assert [io.image_number(name) for name in names] == list(range(1, 1201))
        with np.load(v4_data / "responses.npz") as file:
            recorded = file[f"repeat_averaged/{session}"]
        return images[HELD_OUT], recorded[:, HELD_OUT]

    return load


@pytest.mark.parametrize(("session", "expected"), [("190923", 0.636), ("201025", 0.688)])
def test_correlation_with_recorded_responses(
    kernels: None,
    bank: cl.ModelBank,
    held_out: Callable[[str], tuple[np.ndarray, np.ndarray]],
    session: str,
    expected: float,
) -> None:
    images, recorded = held_out(session)
    predicted = cl.responses(images, of_session(bank, session), backend="cpu")
    r = metrics.pearson_r(predicted.T, recorded)
    assert round(float(np.median(r)), 3) == expected


def test_correlation_is_lost_when_images_are_shifted(
    kernels: None, bank: cl.ModelBank, held_out: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> None:
    """The control: image i's response against image i + 1's prediction."""
    images, recorded = held_out("190923")
    predicted = cl.responses(images[:300], of_session(bank, "190923").select(slice(0, 8)), backend="cpu")
    r = metrics.pearson_r(np.roll(predicted, 1, axis=0).T, recorded[:8, :300])
    assert abs(float(np.median(r))) < 0.1
