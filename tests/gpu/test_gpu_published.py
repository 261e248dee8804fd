"""The published V4 models on a GPU against their reference predictions and against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl


@pytest.fixture(scope="module")
def golden(v4_data: Path) -> dict[str, Any]:
    with np.load(v4_data / "reference_predictions.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def bank(v4_data: Path, device: torch.device, rehearsal: bool) -> cl.ModelBank:
    whole = cl.ModelBank.load(v4_data / "compact_models.npz")
    return whole.select(slice(0, len(whole), 15)) if rehearsal else whole.to(device)


def predictions(bank: cl.ModelBank, golden: dict[str, Any]) -> np.ndarray:
    """float64 [48, N], in the bank's order."""
    names = (name.split("/neuron") for name in bank.names)
    return np.stack([golden[f"predictions/{session}"][int(neuron)] for session, neuron in names], axis=1)


def test_exact_responses(gpu_engine: str, bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    expected = predictions(bank, golden)
    got = cl.responses(golden["images_uint8"], bank, backend=gpu_engine)
    assert np.abs(got - expected).max() < 1e-5
    pairs = np.arange(48) % len(bank)
    got = cl.responses(golden["images_uint8"], bank, pairs=pairs, backend=gpu_engine)
    assert np.abs(got - expected[np.arange(48), pairs]).max() < 1e-5


def test_fast_responses(gpu_engine: str, bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    """Pearson r over natural images: median model at least 0.99999, worst at least 0.9999."""
    expected = predictions(bank, golden)
    got = cl.responses(golden["images_uint8"], bank, backend=gpu_engine, precision="fast").astype(np.float64)
    centred, wanted = got - got.mean(axis=0), expected - expected.mean(axis=0)
    r = (centred * wanted).sum(axis=0) / np.sqrt((centred**2).sum(axis=0) * (wanted**2).sum(axis=0))
    assert np.median(r) >= 0.99999
    assert r.min() >= 0.9999


def test_gradients(gpu_engine: str, bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    """No ReLU gate of these pairs lies within rounding of zero."""
    images = golden["images_uint8"][golden["gradient_image_rows"]]
    for (session, neuron), expected in zip(golden["gradient_models"], golden["input_gradients"], strict=True):
        name = f"{session}/neuron{neuron}"
        if name not in bank.names:
            continue
        ones = np.ones((3, 1), np.float32)
        got = cl.input_gradient(images, bank.select(name), ones, backend=gpu_engine)
        for i in range(3):
            assert np.linalg.norm(got[i] - expected[i]) / np.linalg.norm(expected[i]) < 1e-5
