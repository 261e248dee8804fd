"""The published V4 models on a GPU against their reference predictions and against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop.testing import Inputs, without_kinks


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
    """To 1e-5 where no ReLU gate lies within rounding of zero; elsewhere single gates may flip."""
    rows = np.arange(0, 48, 4)
    pairs = (rows * 7) % len(bank)
    images = cl.recenter(golden["images_uint8"][rows])
    host = bank.to("cpu")
    expected = cl.input_gradient(images.astype(np.float64), host, np.ones(len(rows)), pairs=pairs, backend="reference")
    got = cl.input_gradient(images, bank, np.ones(len(rows), np.float32), pairs=pairs, backend=gpu_engine)
    nothing = torch.empty(0)
    kept = 0
    for i, n in enumerate(pairs):
        one = Inputs(nothing, torch.from_numpy(images[i : i + 1]), host.select(int(n)), nothing, nothing)
        clear = bool(without_kinks(one, band=1e-7))
        kept += clear
        norms = np.linalg.norm(got[i]) * np.linalg.norm(expected[i])
        assert np.linalg.norm(got[i] - expected[i]) / np.linalg.norm(expected[i]) < (1e-5 if clear else 5e-3)
        assert np.vdot(got[i], expected[i]) / norms > 0.9999
    assert kept
